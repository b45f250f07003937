"""What became of each call of the chaos row, and the invariants that it must keep (reliability.md 4.3)."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ml_inference_server.backends.fake import FakeTokenizer
from tests.scoreboard.chaos_plan import KINDS, NEVER_EXECUTED, REFUSED, SHARED, name_words
from tests.scoreboard.recorded_server import ServerLedger, name_of

# V1: beyond its deadline, besides the lag of its own process.
_LATE_S = 1.0
# V8: how long a shared fault may harm calls.
HARM_S = 15.0
# V13. What the door refuses is no request for the metrics.
CONTRACT = frozenset({"OK", "CANCELLED", "INVALID_ARGUMENT", "INTERNAL", "UNAUTHENTICATED", REFUSED, *SHARED})
_NOT_COUNTED = frozenset({"UNAUTHENTICATED"})
# V11: how long a server may say SERVING while no call is answered.
SILENCE_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class CallEnd:
    """One call as its caller saw it; times are monotonic, of one machine. reason: of the error's details.

    by_server: the end was the server's word, and not the caller's or the network's. has_hints: it says when to come
    again. is_right: an answer that is the right one.
    """

    name: str
    kind: str
    method: str
    code: str
    reason: str
    began_at: float
    ended_at: float
    timeout_s: float
    by_server: bool
    has_hints: bool
    is_right: bool

    def line(self) -> str:
        return json.dumps(list(asdict(self).values())) + "\n"


def read_ends(path: Path) -> Iterator[CallEnd]:
    names = CallEnd.__slots__
    with path.open(encoding="ascii") as lines:
        for line in lines:
            yield CallEnd(**dict(zip(names, json.loads(line), strict=True)))


@dataclass(frozen=True, slots=True)
class Fault:
    """One that hits more than a call of its own. at: when it began. harms_engine: it can fail any call that waits."""

    kind: str
    at: float
    harms_engine: bool


@dataclass(frozen=True, slots=True)
class Breach:
    """invariant: as "V3"."""

    invariant: str
    text: str

    def __str__(self) -> str:
        return f"{self.invariant}: {self.text}"


def _of_caller(end: CallEnd, lag_s: float, harm: Sequence[float]) -> Iterator[Breach]:
    """What one call shows by itself. harm: when shared faults began that can fail any call."""
    said = f"{end.kind} call {end.name} ended with {end.code} {end.reason}".rstrip()
    took_s = end.ended_at - end.began_at
    if took_s > end.timeout_s + _LATE_S + lag_s:
        yield Breach("V1", f"{said} after {took_s:.2f} s, its deadline was {end.timeout_s:.2f} s")
    if not end.is_right:
        yield Breach("V3", f"{said} with an answer that is not its own")
    if end.code not in CONTRACT:
        yield Breach("V13", said)
    if end.code in (REFUSED, "UNAVAILABLE") and end.by_server and not end.has_hints:
        yield Breach("V13", f"{said} without a word on when to come again")
    if end.code in KINDS[end.kind].ends or end.code == REFUSED:
        return
    is_hit = any(end.began_at - HARM_S <= at <= end.ended_at for at in harm)
    if end.code not in SHARED or not is_hit:
        yield Breach("V8", f"{said}; it had no such fault of its own{'' if is_hit else ', nor was there another'}")


def _of_both(end: CallEnd, server: ServerLedger, tokenizer: FakeTokenizer) -> Iterator[Breach]:
    """What the server says of the same call."""
    said = f"{end.kind} call {end.name} ended with {end.code}"
    ends = server.ended.get(end.name, [])
    if len(ends) > 1:
        yield Breach("V1", f"{said}; at the server it ended {len(ends)} times: {ends}")
    if end.by_server and end.code not in _NOT_COUNTED:
        if not ends:
            yield Breach("V5", f"{said}, and the server knows of no such end")
        elif ends[0][1] != end.code:
            yield Breach("V5", f"{said}, and the server counted {ends[0][1]}")
    executed = server.executed[name_of(tokenizer, name_words(end.name))]
    if executed and end.by_server and end.code in NEVER_EXECUTED:
        yield Breach("V6", f"{said}, and {executed} of its texts were given to the engine")
    if executed and end.name in server.not_started:
        yield Breach("V7", f"{said} before it began, and {executed} of its texts were given to the engine")


def breaches_of(
    ends: Iterable[CallEnd], server: ServerLedger, faults: Sequence[Fault], lag_s: float
) -> Iterator[Breach]:
    """Every breach of V1, V3, V5 to V8 and V13. lag_s: the largest of the callers' own loops."""
    tokenizer = FakeTokenizer(256)
    harm = [fault.at for fault in faults if fault.harms_engine]
    ok = Counter[str]()
    own = 0
    names = set()
    for end in ends:
        names.add(end.name)
        ok["callers"] += end.code == "OK"
        own += not end.by_server
        yield from _of_caller(end, lag_s, harm)
        yield from _of_both(end, server, tokenizer)
    ok["server"] = sum(code == "OK" for name in names for _, code, _ in server.ended.get(name, []))
    if not 0 <= ok["server"] - ok["callers"] <= own:
        yield Breach("V5", f"{ok['callers']} answers arrived, the server counted {ok['server']}; {own} calls left")
    for name in sorted(server.ended.keys() - names):
        if "-" not in name:  # ids of the server's own, for those who bring none
            yield Breach("V5", f"the server ended call {name}, which nobody made")


def silences(ok_at: Sequence[float], serving: Sequence[tuple[float, bool]]) -> Iterator[Breach]:
    """V11: stretches in which the server said that it serves, and no call was answered. serving: looks, in order."""
    answered = sorted(ok_at)
    place, since = 0, None
    for at, is_serving in serving:
        while place < len(answered) and answered[place] <= at:
            since = answered[place] if since is None else max(since, answered[place])
            place += 1
        if not is_serving:
            since = at if since is None else max(since, at)
        elif since is None:
            since = at
        elif at - since > SILENCE_S:
            yield Breach("V11", f"SERVING for {at - since:.1f} s without an answer")
            since = at


def metrics_breaches(counted: Mapping[tuple[str, str], int], ledger: Counter[tuple[str, str]]) -> Iterator[Breach]:
    """V12: requests by method and code, as /metrics counted them and as the server's ledger has them."""
    for labels in sorted(counted.keys() | ledger.keys()):
        if counted.get(labels, 0) != ledger[labels]:
            method, code = labels
            yield Breach("V12", f"{method} {code}: /metrics says {counted.get(labels, 0)}, the ledger {ledger[labels]}")


def fallen(before: Mapping[str, float], after: Mapping[str, float]) -> Iterator[Breach]:
    """V12: counters must not fall from one scrape to the next."""
    for name, value in before.items():
        if after.get(name, 0.0) < value:
            yield Breach("V12", f"{name} fell from {value} to {after.get(name)}")
