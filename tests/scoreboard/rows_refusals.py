"""Row G9: what callers cost the others who are refused and come back at once, whatever they are told."""

import contextlib
import math
import statistics
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Literal

from tests.scoreboard.callers import Job
from tests.scoreboard.load_figures import LoadRun, Machine, arrivals, latency_ms, percentile
from tests.scoreboard.load_kit import ENGINE, LoadServer, keys, load_server, run_calm, run_jobs, tries_of
from tests.scoreboard.row import Figure, Row, Scope

_RELENTLESS, _PROCESSES = 200, 2
_BEHAVED = 20
Keys = Literal["one for the relentless", "one each", "one for all"]
# Of the capacity, of all well-behaved together. Where everybody has a key, that is a third of their fair share.
_BEHAVED_SHARE: dict[Keys, float] = {"one for the relentless": 0.2, "one each": 0.03, "one for all": 0.2}
_TIMEOUT_S = 2.0
_LEAST_OF_PEAK, _LEAST_ANSWERED = 0.9, 0.99
# Of the calls of the relentless: otherwise there was no overload.
_LEAST_REFUSED = 0.5


@dataclass(frozen=True)
class Flooded:
    """One round of a variant. attempts_per_s: of the relentless. refusal_ms: what one took, p50 and p99.

    behaved_ok: which share of their calls was answered. server_cpu: processors that it used.
    """

    goodput: float
    attempts_per_s: float
    refused: int
    refusal_ms: tuple[float, float]
    behaved_p99_ms: float
    behaved_ok: float
    server_cpu: float
    broken: int


class RelentlessBench:
    """A server with keys, callers who have a key each or one for all, and the loads of a round."""

    def __init__(self, server: LoadServer, tokens: list[str], kind: Keys, tries: int) -> None:
        self._server, self._tries = server, tries
        self._rate_per_s = _BEHAVED_SHARE[kind] * ENGINE.texts_per_s
        self._relentless = tokens[:_RELENTLESS] if kind == "one each" else tokens[:1] * _RELENTLESS
        self._behaved = tokens[:1] * _BEHAVED if kind == "one for all" else tokens[_RELENTLESS:-1]

    async def peak(self, seconds: float, seed: int) -> LoadRun:
        """As much as it can do for callers who wait for their answers."""
        job = Job(
            target=self._server.address,
            name=f"peak{seed}",
            style="once",
            callers=24,
            channels=_BEHAVED,
            keys=self._behaved,
            seconds=seconds,
            timeout_s=_TIMEOUT_S,
        )
        return await run_calm(self._server, job, tries=self._tries)

    async def flooded(self, seconds: float, seed: int, machine: Machine) -> Flooded:
        """The well-behaved beside the relentless."""
        behaved = self._behaved_job(seconds, seed)
        each = _RELENTLESS // _PROCESSES
        relentless = [
            Job(
                target=self._server.address,
                name=f"relentless{seed}-{part}",
                style="once",
                callers=each,
                channels=each,
                keys=self._relentless[part * each : (part + 1) * each],
                seconds=seconds,
                timeout_s=_TIMEOUT_S,
            )
            for part in range(_PROCESSES)
        ]
        run = await run_calm(self._server, behaved, *relentless, tries=self._tries)
        machine.saw(run)
        refusals = [value for ran in run.ran[1:] for value in latency_ms(ran.refused, since="sent_s")]
        own = run.ran[0]
        return Flooded(
            goodput=run.goodput,
            attempts_per_s=sum(len(ran.records) for ran in run.ran[1:]) / seconds,
            refused=len(refusals),
            refusal_ms=(percentile(refusals, 0.5), percentile(refusals, 0.99)),
            behaved_p99_ms=percentile(latency_ms(own.ok), 0.99),
            behaved_ok=len(own.ok) / len(own.records),
            server_cpu=run.server_cpu_s / run.seconds,
            broken=run.broken,
        )

    async def behaved_alone(self, seconds: float, seed: int) -> float:
        """Their p99 in ms."""
        run = await run_calm(self._server, self._behaved_job(seconds, seed), tries=self._tries)
        return percentile(latency_ms(run.ran[0].ok), 0.99)

    def _behaved_job(self, seconds: float, seed: int) -> Job:
        return Job(
            target=self._server.address,
            name=f"behaved{seed}",
            style="our client",
            due_s=arrivals("poisson", self._rate_per_s, seconds, seed),
            channels=_BEHAVED,
            keys=self._behaved,
            timeout_s=_TIMEOUT_S,
        )


@contextlib.asynccontextmanager
async def relentless_bench(kind: Keys, tries: int) -> AsyncIterator[RelentlessBench]:
    with keys(_RELENTLESS + _BEHAVED + 1) as (tokens, setting):
        async with load_server(*ENGINE.settings(), setting, key=tokens[-1]) as server:
            yield RelentlessBench(server, tokens, kind, tries)


async def refusal_cpu_us(seconds: float) -> tuple[float, float]:
    """(microseconds of the server's processor time for one refusal, refusals per second) of a queue that stays full."""
    settings = ["batching.max_queue_requests=1", "server.enable_test_faults=true"]
    async with load_server(*settings) as server:
        name = f"!slow:{1e3 * (seconds + 2):.0f} full"  # a word that the engine obeys
        full = Job(target=server.address, name=name, style="once", callers=1, seconds=0.01)
        asking = Job(target=server.address, name="asking", style="once", callers=8, channels=8, seconds=seconds)
        run = await run_jobs(server, full, asking, watch_lag=False)
        refused = len(run.ran[1].refused)
    return 1e6 * run.server_cpu_s / refused, refused / seconds


async def relentless(scope: Scope) -> Figure:
    rounds, seconds = (1, 3.0) if scope.is_quick else (3, 8.0)
    kinds: list[Keys] = ["one for the relentless"] if scope.is_quick else list(_BEHAVED_SHARE)
    machine = Machine()
    details: dict[str, float] = {}
    ratios: dict[Keys, float] = {}
    steps = len(kinds) * rounds
    offered, refused_share, behaved_ok, broken = math.inf, 1.0, 1.0, 0
    for number, kind in enumerate(kinds):
        found: list[tuple[float, float, Flooded]] = []
        async with relentless_bench(kind, tries_of(scope)) as bench:
            for round_ in range(rounds):
                scope.tell(number * rounds + round_, steps)
                seed = scope.seed + round_
                peak = await bench.peak(seconds, seed)
                alone_ms = await bench.behaved_alone(seconds, seed)
                found.append((peak.goodput, alone_ms, await bench.flooded(seconds, seed + 1000, machine)))
        ratios[kind] = statistics.median(each.goodput / peak for peak, _, each in found)
        flooded = [each for _, _, each in found]
        figures = {
            "peak_per_s": [peak for peak, _, _ in found],
            "goodput_per_s": [each.goodput for each in flooded],
            "relentless_attempts_per_s": [each.attempts_per_s for each in flooded],
            "refusal_p50_ms": [each.refusal_ms[0] for each in flooded],
            "refusal_p99_ms": [each.refusal_ms[1] for each in flooded],
            "behaved_alone_p99_ms": [alone_ms for _, alone_ms, _ in found],
            "behaved_p99_ms": [each.behaved_p99_ms for each in flooded],
            "behaved_answered_share": [each.behaved_ok for each in flooded],
            "server_processors": [each.server_cpu for each in flooded],
        }
        details[f"goodput_of_peak, {kind}"] = ratios[kind]
        details |= {f"{name}, {kind}": statistics.median(values) for name, values in figures.items()}
        offered = min(offered, *(each.attempts_per_s / ENGINE.texts_per_s for each in flooded))
        refused_share = min(refused_share, *(each.refused / (each.attempts_per_s * seconds) for each in flooded))
        broken += sum(each.broken for each in flooded)
        if kind == "one for the relentless":
            behaved_ok = statistics.median(each.behaved_ok for each in flooded)
    cpu_us, _ = await refusal_cpu_us(2.0 if scope.is_quick else 8.0)
    scope.tell(steps, steps)
    worst = min(ratios.values())
    passed, note = machine.judge(
        exact=refused_share >= _LEAST_REFUSED and not broken,
        timed=worst >= _LEAST_OF_PEAK and behaved_ok >= _LEAST_ANSWERED,
    )
    return Figure(
        text=f"goodput {100 * worst:.0f} % of the peak at {offered:.1f}x; "
        f"{100 * behaved_ok:.1f} % of the others answered; a refusal costs {cpu_us:.0f} µs",
        passed=passed,
        note=note,
        details={**details, "refused_share": refused_share, "refusal_cpu_us": cpu_us, **machine.details()},
    )


ROWS: tuple[Row, ...] = (
    Row(
        key="G9",
        title="Callers that ignore retry hints: 200 who come back at once",
        pass_line="goodput >= 90 % of the peak; whoever has a key of his own and asks for little is answered (>= 99 %)",
        run=relentless,
    ),
)
