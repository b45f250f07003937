import json
import logging
from collections.abc import Iterator

import pytest

from ml_inference_server.utils.logging import LogFormat, log_event, set_up_logging

log = logging.getLogger("ml_inference_server.tests")


@pytest.fixture(autouse=True)
def handlers_as_before() -> Iterator[None]:
    before = list(logging.getLogger().handlers)
    yield
    logging.captureWarnings(False)
    logging.getLogger().handlers[:] = before


def written(capsys: pytest.CaptureFixture[str], log_format: LogFormat) -> list[str]:
    set_up_logging("DEBUG", log_format)
    log_event(log, logging.DEBUG, "request", {"request_id": "a-1", "reason": "", "duration_ms": 1.5})
    log.info("two\nlines of %s", "text")
    try:
        raise ValueError("broken")
    except ValueError:
        log.exception("failed")
    return capsys.readouterr().err.splitlines()


def test_text_is_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    lines = written(capsys, "text")
    assert lines[0].endswith("DEBUG   request request_id=a-1 duration_ms=1.5")
    assert lines[-1] == "ValueError: broken"


def test_json_is_one_object_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    request, two_lines, failed = [json.loads(line) for line in written(capsys, "json")]
    assert (request["message"], request["request_id"], request["duration_ms"]) == ("request", "a-1", 1.5)
    assert (request["level"], request["logger"]) == ("DEBUG", "ml_inference_server.tests")
    assert request["time"].endswith("Z")
    assert two_lines["message"] == "two\nlines of text"
    assert failed["exception"].endswith("ValueError: broken")


def test_requests_have_no_line_above_debug(capsys: pytest.CaptureFixture[str]) -> None:
    set_up_logging("INFO", "json")
    log_event(log, logging.DEBUG, "request", {})
    assert capsys.readouterr().err == ""
