"""Results that an earlier version wrote: today's reports and comparisons of them say what its own said.

summary.md has two columns that came later, ready and memory, and what its legend says of them.
"""

import json
import shutil
from pathlib import Path

import pytest

from ml_inference_server.benchmark import __main__ as benchmark
from ml_inference_server.benchmark.result import document, stored

# Written by the version before the results had types, each with its report and `compare before.json after.json`.
EARLIER = Path(__file__).resolve().parents[1] / "data" / "results_v2"
NAMES = ("single", "variants", "search", "before", "after", "summary")


@pytest.mark.parametrize("name", NAMES)
def test_the_report_of_an_earlier_result_is_what_it_was(name: str, tmp_path: Path) -> None:
    for file in EARLIER.glob(f"{name}.*"):
        if file.suffix != ".md":
            shutil.copy(file, tmp_path)
    assert benchmark.main(["report", str(tmp_path / f"{name}.json")]) == 0
    assert (tmp_path / f"{name}.md").read_text() == (EARLIER / f"{name}.md").read_text()


def test_the_comparison_of_earlier_results_is_what_it_was(capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark.main(["compare", str(EARLIER / "before.json"), str(EARLIER / "after.json")]) == 1
    assert capsys.readouterr().out == (EARLIER / "before_after.txt").read_text()


@pytest.mark.parametrize("name", NAMES)
def test_an_earlier_result_can_be_written_as_today(name: str, tmp_path: Path) -> None:
    """A summary that is gone on with holds entries of before."""
    earlier = stored.read(EARLIER / f"{name}.json")
    again = tmp_path / "again.json"
    again.write_text(stored.to_json(earlier))
    assert json.loads(again.read_text())["schema"] == document.SCHEMA
    assert stored.read(again) == earlier


def test_fields_of_a_newer_version_are_left_out(tmp_path: Path) -> None:
    content = json.loads((EARLIER / "single.json").read_text())
    content["runs"][0]["colour"] = "blue"
    content["weather"] = {"rain": True}
    newer = tmp_path / "newer.json"
    newer.write_text(json.dumps(content))
    assert stored.read(newer) == stored.read(EARLIER / "single.json")


def test_what_the_server_said_of_itself_is_kept_whole() -> None:
    content = json.loads((EARLIER / "variants.json").read_text())
    read = stored.read(EARLIER / "variants.json")
    assert isinstance(read, document.Document)
    assert [server.info.model_dump() for server in read.servers] == [server["info"] for server in content["servers"]]
