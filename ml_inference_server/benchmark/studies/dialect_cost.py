"""What a dialect costs: one server, one client process, the same load through each dialect in turn."""

import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from ml_inference_server.benchmark.load.channel import OK, RequestFailed, TimedReply
from ml_inference_server.benchmark.load.dataset import Workload
from ml_inference_server.benchmark.load.loops import ClosedLoop, FinishedRequest, ServerGone
from ml_inference_server.benchmark.load.records import CODE_NUMBERS
from ml_inference_server.benchmark.result.figures import figures
from ml_inference_server.benchmark.studies.calls import EmbedDialect
from ml_inference_server.benchmark.studies.own_server import OwnServer
from ml_inference_server.benchmark.target.conditions import process_cpu_s
from ml_inference_server.benchmark.target.interrupt import Stop
from ml_inference_server.utils.errors import StartError

_WARMUP_S = 0.5


@dataclass(frozen=True)
class CostLoad:
    """A closed loop: so many requests in flight, each of so many texts."""

    workload: Workload
    per_call: int
    in_flight: int

    def __str__(self) -> str:
        return f"{self.workload.kind}, {self.per_call} per call, {self.in_flight} in flight"


@dataclass
class CostRounds:
    """What a dialect's rounds gave. client_share: of one core, 0..1."""

    texts_per_s: list[float] = field(default_factory=list)
    server_cpu_ms: list[float] = field(default_factory=list)
    client_share: list[float] = field(default_factory=list)
    failed: Counter[str] = field(default_factory=Counter)

    def against(self, other: "CostRounds") -> list[float]:
        """Texts/s as a multiple of `other`'s, round by round."""
        return [a / b for a, b in zip(self.texts_per_s, other.texts_per_s, strict=True) if b]


class CostBench:
    """server: under load by nobody else. on_turn: called after each measurement."""

    def __init__(self, server: OwnServer, seconds: float, stop: Stop, on_turn: Callable[[], object]) -> None:
        self._server, self._seconds, self._stop, self._on_turn = server, seconds, stop, on_turn

    async def measure(self, load: CostLoad, dialects: Sequence[EmbedDialect], rounds: int) -> dict[str, CostRounds]:
        """By name of the dialect. Each round begins with another dialect, so that none is always the first."""
        found = {dialect.name: CostRounds() for dialect in dialects}
        for number in range(rounds):
            first = number * len(dialects) // rounds
            for dialect in [*dialects[first:], *dialects[:first]]:
                await self._stop.race(self._turn(load, dialect, found[dialect.name]))
                self._on_turn()
        return found

    async def _turn(self, load: CostLoad, dialect: EmbedDialect, rounds: CostRounds) -> None:
        await self._drive(load, dialect, _WARMUP_S)
        server_s, client_s, began_s = process_cpu_s(self._server.pid), time.process_time(), time.perf_counter()
        loop = await self._drive(load, dialect, self._seconds)
        took_s, client_s = time.perf_counter() - began_s, time.process_time() - client_s
        server_s = (process_cpu_s(self._server.pid) or 0.0) - (server_s or 0.0)
        done = figures(loop.ledger.records(), batch_size=load.per_call, scores=False, is_open=False)
        rounds.texts_per_s.append(done.texts_per_s)
        rounds.server_cpu_ms.append(1e3 * server_s / max(1, done.texts))
        rounds.client_share.append(client_s / took_s)
        rounds.failed.update(call.reply.message for call in loop.ledger.calls if call.reply != OK)

    async def _drive(self, load: CostLoad, dialect: EmbedDialect, seconds: float) -> ClosedLoop:
        async def send(index: int, _: float | None) -> FinishedRequest:
            texts = load.workload.batch(index, load.per_call)
            sent_s, reply = time.perf_counter(), OK
            try:
                await dialect.call(texts)
            except RequestFailed as error:
                # An HTTP status has no code among those of a record.
                code = error.code if error.code in CODE_NUMBERS else "INVALID_RESPONSE"
                reply = TimedReply(code, f"{error.code}: {error.message}")
            return FinishedRequest(sent_s, sent_s, time.perf_counter(), reply)

        loop = ClosedLoop(send, self._server.target.is_alive, lambda _: None)
        try:
            await loop.run(0, load.in_flight, duration_s=seconds)
        except ServerGone as gone:
            raise StartError(f"{dialect.name}: {gone}") from None
        return loop


def cost_table(load: CostLoad, found: Mapping[str, CostRounds]) -> str:
    """The first dialect is what the others are compared with."""
    base = next(iter(found.values()))
    lines = [
        f"{load}, {len(base.texts_per_s)} rounds, median (lowest-highest)\n",
        "| dialect | texts/s | of Embed, round by round | server's CPU ms/text | client's share of a core | failed |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, rounds in found.items():
        ratios = rounds.against(base) or [float("nan")]
        failed = "; ".join(f"{count}x {message}" for message, count in rounds.failed.most_common(2)) or "0"
        server_ms, client = statistics.median(rounds.server_cpu_ms), statistics.median(rounds.client_share)
        lines.append(
            f"| {name} | {_spread(rounds.texts_per_s, '.0f')} | {_spread(ratios, '.2f')} |"
            f" {server_ms:.2f} | {client:.0%} | {failed} |"
        )
    return "\n".join(lines)


def _spread(values: Sequence[float], form: str) -> str:
    return f"{statistics.median(values):{form}} ({min(values):{form}}-{max(values):{form}})"
