"""The rows of bad inputs that no other test holds, in their quick form; and that what they report is what was tried."""

import json
from typing import Any

import grpc
import pytest

from tests.fuzz import guided_targets
from tests.fuzz.grpc_wire import Outcome
from tests.integration.http_kit import HttpReply
from tests.scoreboard.inputs import attacks, guided_runs, send_grpc, send_http
from tests.scoreboard.inputs.canaries import Canaries
from tests.scoreboard.inputs.case import GrpcCase, HttpCase
from tests.scoreboard.inputs.tried import all_cases
from tests.scoreboard.row import Figure, Scope
from tests.scoreboard.rows_inputs import ROWS


async def quick(key: str) -> Figure:
    [row] = [row for row in ROWS if row.key == key]
    return await row.run(Scope(is_quick=True, seed=1, tell=lambda *_: None))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("key", "counts"),
    [
        ("X1", {"inputs": 600, "grpc_calls": 300, "http_requests": 350}),
        ("X6", {"traversal_payloads": 200, "script_payloads": 100, "host_payloads": 100, "smuggling_payloads": 50}),
        ("X7", {"canaries": 150, "outputs": 200, "searched_bytes": 500_000}),
    ],
)
async def test_the_row_passes_and_has_tried_what_it_is_for(key: str, counts: dict[str, int]) -> None:
    figure = await quick(key)
    assert figure.passed, (figure.text, figure.note)
    for name, least in counts.items():
        assert int(figure.details[name]) >= least, (name, figure.details)


def test_no_two_inputs_are_the_same() -> None:
    cases = all_cases()
    for kind in (GrpcCase, HttpCase):
        names = [(case.group, case.name) for case in cases if isinstance(case, kind)]
        assert len(names) == len(set(names)), {name for name in names if names.count(name) > 1}
    sent = [(case.request, case.ends, case.server) for case in cases if isinstance(case, HttpCase)]
    assert len(sent) == len(set(sent))
    asked = [
        (case.path, case.messages, case.metadata, case.timeout_s, case.compression, case.server)
        for case in cases
        if isinstance(case, GrpcCase)
    ]
    assert len(asked) == len(set(asked))


def http_case(**fields: Any) -> HttpCase:
    return HttpCase(group="g", name="n", **{"request": b"POST / HTTP/1.1", "status": 400, **fields})


@pytest.mark.parametrize(
    "reply",
    [
        HttpReply(500, {"content-type": "application/json"}, b'{"message": "a sentence"}'),
        HttpReply(400, {"content-type": "application/json"}, b'{"message": ""}'),
        HttpReply(400, {"content-type": "application/json"}, b'{"error": {"code": 1}}'),
        HttpReply(400, {"content-type": "application/json"}, json.dumps({"error": "KeyError('a')"}).encode()),
        HttpReply(400, {"content-type": "application/json"}, json.dumps({"error": "Traceback (most"}).encode()),
        HttpReply(400, {"content-type": "text/plain"}, b""),
        HttpReply(200, {"content-type": "application/json"}, b"[[1, 2]]"),
    ],
)
def test_an_answer_that_is_not_as_written_down_is_seen(reply: HttpReply) -> None:
    with pytest.raises(AssertionError):
        send_http.check(http_case(), reply)


def test_a_wrong_vector_is_seen() -> None:
    case = next(case for case in all_cases() if isinstance(case, GrpcCase) and case.right and "Embed" in case.path)
    assert case.code is grpc.StatusCode.OK
    with pytest.raises(AssertionError):
        send_grpc.check(case, Outcome(None, [b""]))


def test_a_canary_that_came_out_is_seen() -> None:
    canaries = Canaries(secrets={"key123": "a key"})
    word = canaries.word("a text")
    canaries.outputs += [("the log", f"... {word} ...".encode()), ("/metrics", b"key123"), ("/info", b"nothing")]
    assert canaries.found() == ["a text came out of the log", "a key came out of /metrics"]


def test_a_payload_that_got_through_is_seen() -> None:
    found = attacks.Attacks()
    page = b"HTTP/1.1 200 OK\r\ncontent-type: text/html\r\nx-content-type-options: nosniff\r\n\r\n<b>"
    found.judge("script", "a page", attacks.is_page_with(page, "<b>"))
    found.judge("script", "JSON", attacks.is_page_with(page.replace(b"text/html", b"application/json"), "<b>"))
    assert (found.payloads.total(), len(found.through)) == (2, 1)


def test_every_target_takes_its_seeds_and_noise() -> None:
    """What atheris begins with; the rest needs atheris."""
    with guided_targets.targets() as targets:
        assert set(targets) == set(guided_runs.TARGETS)
        for name, target in targets.items():
            seeds = [path.read_bytes() for path in sorted((guided_runs.CORPUS / name).iterdir())]
            assert len(seeds) >= 4
            for seed in [b"", *seeds]:
                for cut in {0, len(seed) // 2, len(seed)}:
                    target(seed[:cut])
                    target(seed[:cut] + b"\xff" + seed[cut:])
