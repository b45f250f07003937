"""What the ledger of the chaos row must see: each invariant is broken once, in a ledger that is sound otherwise."""

import random
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from ml_inference_server.backends.fake import FakeTokenizer, fake_embedding
from ml_inference_server.proto import inference_pb2 as pb
from tests.scoreboard.chaos_ledger import (
    HARM_S,
    SILENCE_S,
    CallEnd,
    Fault,
    breaches_of,
    fallen,
    metrics_breaches,
    silences,
)
from tests.scoreboard.chaos_plan import PlannedCall, name_words, planned, planned_as
from tests.scoreboard.recorded_server import ServerLedger, name_of


def end(name: str = "0c1", kind: str = "plain", code: str = "OK", **more: object) -> CallEnd:
    fields: dict[str, object] = {
        "name": name,
        "kind": kind,
        "method": "Embed",
        "code": code,
        "reason": "",
        "began_at": 100.0,
        "ended_at": 100.5,
        "timeout_s": 10.0,
        "by_server": True,
        "has_hints": True,
        "is_right": True,
    }
    return CallEnd(**(fields | more))  # type: ignore[arg-type]


def ledger(*ends: tuple[str, str]) -> ServerLedger:
    """(name, code) of requests that ended there."""
    found = ServerLedger()
    for name, code in ends:
        found.ended.setdefault(name, []).append(("Embed", code, ""))
    return found


def executed(name: str) -> Counter[tuple[int, int]]:
    return Counter([name_of(FakeTokenizer(256), name_words(name))])


def broken(ends: list[CallEnd], server: ServerLedger, faults: tuple[Fault, ...] = (), lag_s: float = 0.0) -> list[str]:
    return [breach.invariant for breach in breaches_of(ends, server, faults, lag_s)]


KILL = Fault("kill", 99.0, True)
CUT = Fault("cut", 99.0, False)


@pytest.mark.parametrize(
    ("one", "server", "faults"),
    [
        (end(), ledger(("0c1", "OK")), ()),
        (end(code="RESOURCE_EXHAUSTED"), ledger(("0c1", "RESOURCE_EXHAUSTED")), ()),
        (end(code="UNAVAILABLE"), ledger(("0c1", "UNAVAILABLE")), (KILL,)),
        (end(code="DEADLINE_EXCEEDED", by_server=False), ledger(("0c1", "OK")), (KILL,)),
        (end(kind="cancel", code="CANCELLED", by_server=False), ledger(("0c1", "OK")), ()),
        (end(kind="cancel", code="CANCELLED", by_server=False), ledger(), ()),
        (end(kind="proxied", code="UNAVAILABLE", by_server=False, has_hints=False), ledger(), (CUT,)),
        (end(kind="stranger", code="UNAUTHENTICATED"), ledger(), ()),
        (end(), ledger(("0c1", "OK"), ("1f2e-1", "OK")), ()),  # an id of the server's own
    ],
)
def test_what_is_sound(one: CallEnd, server: ServerLedger, faults: tuple[Fault, ...]) -> None:
    assert broken([one], server, faults) == []


@pytest.mark.parametrize(
    ("invariants", "one", "server", "faults"),
    [
        (["V1"], end(ended_at=111.2), ledger(("0c1", "OK")), ()),
        (["V1"], end(), ledger(("0c1", "OK"), ("0c1", "CANCELLED")), ()),
        (["V3"], end(is_right=False), ledger(("0c1", "OK")), ()),
        (["V5", "V5"], end(), ledger(), ()),
        (["V5", "V5"], end(), ledger(("0c1", "INTERNAL")), ()),
        (["V5"], end(), ledger(("0c1", "OK"), ("0c7", "OK")), ()),
        (["V8"], end(code="INTERNAL"), ledger(("0c1", "INTERNAL")), (KILL,)),
        (["V8"], end(code="UNAVAILABLE"), ledger(("0c1", "UNAVAILABLE")), ()),
        (["V8"], end(code="UNAVAILABLE"), ledger(("0c1", "UNAVAILABLE")), (CUT,)),
        (["V8"], end(code="UNAVAILABLE"), ledger(("0c1", "UNAVAILABLE")), (replace(KILL, at=99.0 - HARM_S),)),
        (["V8"], end(kind="raise"), ledger(("0c1", "OK")), ()),
        (["V13", "V8"], end(code="UNKNOWN"), ledger(("0c1", "UNKNOWN")), (KILL,)),
        (["V13"], end(code="RESOURCE_EXHAUSTED", has_hints=False), ledger(("0c1", "RESOURCE_EXHAUSTED")), ()),
    ],
)
def test_each_breach_is_seen(
    invariants: list[str], one: CallEnd, server: ServerLedger, faults: tuple[Fault, ...]
) -> None:
    assert broken([one], server, faults) == invariants


def test_a_lag_of_the_caller_is_no_breach_of_the_server() -> None:
    assert broken([end(ended_at=111.2)], ledger(("0c1", "OK")), lag_s=0.5) == []


@pytest.mark.parametrize(("kind", "code"), [("empty", "INVALID_ARGUMENT"), ("plain", "RESOURCE_EXHAUSTED")])
def test_what_was_refused_is_not_executed(kind: str, code: str) -> None:
    server = ledger(("0c1", code))
    server.executed = executed("0c2")
    assert broken([end(kind=kind, code=code)], server) == []
    server.executed = executed("0c1")
    assert broken([end(kind=kind, code=code)], server) == ["V6"]


def test_what_was_left_before_it_began_is_not_executed() -> None:
    server, one = ledger(("0c1", "CANCELLED")), end(kind="cancel", code="CANCELLED", by_server=False)
    server.executed = executed("0c1")
    assert broken([one], server) == []  # cancelled while it ran
    server.not_started = {"0c1"}
    assert broken([one], server) == ["V7"]


def test_more_answers_at_the_callers_than_the_server_gave_are_seen() -> None:
    server = ledger(("0c1", "OK"))
    assert broken([end(), end(name="0c2", by_server=False)], server) == ["V5"]


def test_silence_while_serving_is_seen() -> None:
    looks = [(float(second), True) for second in range(31)]
    assert [breach.invariant for breach in silences([0.0, 5.0], looks)] == ["V11", "V11"]
    assert list(silences([0.0, 5.0, 12.0, 21.0, 25.0], looks)) == []
    assert list(silences([0.0, 5.0], [(at, at < 6.0) for at, _ in looks])) == []
    assert SILENCE_S < 30


def test_metrics_that_differ_from_the_ledger_or_fall_are_seen() -> None:
    of_server = Counter({("Embed", "OK"): 3, ("Score", "OK"): 1})
    assert list(metrics_breaches({("Embed", "OK"): 3, ("Score", "OK"): 1}, of_server)) == []
    assert [str(each) for each in metrics_breaches({("Embed", "OK"): 4}, of_server)] == [
        "V12: Embed OK: /metrics says 4, the ledger 3",
        "V12: Score OK: /metrics says 0, the ledger 1",
    ]
    assert list(fallen({"a": 1.0}, {"a": 1.0, "b": 2.0})) == []
    assert [each.invariant for each in fallen({"a": 1.0, "b": 1.0}, {"a": 0.0})] == ["V12", "V12"]


def reply(call: PlannedCall, order: list[int] | None = None) -> bytes:
    rows = np.stack([fake_embedding(text) for text in call.texts])
    cosines = rows[1:].astype(np.float64) @ rows[0]
    if call.method == "Embed":
        rows = rows[order] if order else rows
        return pb.EmbedResponse(count=len(rows), dimension=8, embeddings=rows.tobytes()).SerializeToString()
    if call.method == "Score":
        return pb.ScoreResponse(scores=cosines[order] if order else cosines).SerializeToString()
    best = order or np.argsort(-cosines).tolist()
    return pb.RerankResponse(ranks=[pb.Rank(index=i, score=cosines[i]) for i in best]).SerializeToString()


@pytest.mark.parametrize("method", ["Embed", "Score", "Rerank"])
def test_only_the_right_answer_is_right(method: str) -> None:
    """Two rows that were swapped above all."""
    texts = tuple(f"{name_words('0c1')} {number}" for number in range(4))
    call = PlannedCall(name="0c1", kind="plain", method=method, texts=texts, timeout_s=1.0)
    assert call.is_right(reply(call))
    right = list(range(4 if method == "Embed" else 3))
    swapped = [1, 0, *right[2:]]
    if method == "Rerank":
        cosines = np.stack([fake_embedding(text) for text in texts])[1:] @ fake_embedding(texts[0])
        best = np.argsort(-cosines).tolist()
        swapped, right = [best[1], best[0], best[2]], best
    assert not call.is_right(reply(call, swapped))
    assert not call.is_right(reply(call, right[:-1]))


def test_a_call_can_be_planned_again_and_its_texts_are_no_other_calls() -> None:
    one, again = (planned(random.Random("1/0/7"), "0c7", 10.0) for _ in range(2))
    assert one == again
    names = {
        name_of(FakeTokenizer(256), planned_as("plain", random.Random(n), f"0c{n}", 1.0).texts[0]) for n in range(500)
    }
    assert len(names) == 500
