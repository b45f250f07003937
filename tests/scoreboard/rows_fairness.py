"""Rows G4, G5 and G6: what is computed for nobody, who stands before whom, and what a flood costs another caller."""

import asyncio
import contextlib

import numpy as np

from ml_inference_server.backends.fake import FakeTokenizer
from ml_inference_server.benchmark.load.records import Records
from ml_inference_server.proto import inference_pb2 as pb
from tests.conftest import FakeServer, fake_server, until
from tests.scoreboard.callers import Job
from tests.scoreboard.load_figures import Machine, arrivals, in_processes, latency_ms, percentile
from tests.scoreboard.load_kit import ENGINE, Engine, LoadServer, keys, load_server, run_calm, samples, tries_of
from tests.scoreboard.row import Figure, Row, Scope

_DOOMED, _WAITING = 100, 50
_EXPIRES_S, _LATE_S = 1.5, 0.5
# Of the calls that expire, so many have to reach the queue before.
_LEAST_IN_QUEUE = 0.9
_MOST_BATCHES = 3.0
_SINGLES_PER_S = 10.0
# 40 ms for every batch, however full.
_STEADY = Engine(base_ms=40, per_token_us=0, batch=32)
# 50 texts/s, so that ten times as many are no load for two cores.
_SLOW = Engine(base_ms=16, per_token_us=2250, batch=8)
_FLOOD, _LIGHT, _MOST_RATIO = 10.0, 0.1, 2.0
_ONSET_S = 1.0


async def deadline_aware(scope: Scope) -> Figure:
    """The queue is held until all doomed calls have ended on both sides; then the engine's own log tells."""
    rounds = 2 if scope.is_quick else 10
    executed = lost = 0
    async with fake_server(server={"enable_test_faults": True}, model={"streams": 1}) as server:
        for number in range(rounds):
            scope.tell(number, rounds + 1)
            more_executed, more_lost = await _held_round(server, number)
            executed, lost = executed + more_executed, lost + more_lost
        ended = samples(server.metrics.prometheus("")[0].decode())
    cancelled = ended["mlis_request_errors_total{reason=CANCELLED}"]
    expired = ended["mlis_request_errors_total{reason=DEADLINE_EXCEEDED}"]
    doomed = rounds * _DOOMED
    wasted, machine = await _for_nobody(scope)
    scope.tell(rounds + 1, rounds + 1)
    return Figure(
        text=f"{100 * executed / doomed:.0f} % of {doomed} executed",
        passed=executed == 0 and lost == 0 and cancelled + expired >= _LEAST_IN_QUEUE * doomed,
        details={
            "cancelled_in_queue": cancelled,
            "expired_in_queue": expired,
            "executed": executed,
            "others_not_answered": lost,
            "computed_for_nobody_at_3x_share": wasted,
            **machine.details(),
        },
    )


async def _held_round(server: FakeServer, number: int) -> tuple[int, int]:
    """(doomed calls that were executed, others that were not answered)."""
    admission = server.model.admission
    server.backend.hold()
    server.backend.log.clear()

    def call(name: str, timeout_s: float) -> "asyncio.Task[pb.EmbedResponse]":
        request = pb.EmbedRequest(texts=[f"{name} {number}"])
        return asyncio.ensure_future(_answer(server, request, timeout_s))

    first = call("first", 60)
    await until(lambda: len(server.backend.log) == 1)
    cancelled = [call(f"cancelled-{i}", 60) for i in range(_DOOMED // 2)]
    waiting = [call(f"waiting-{i}", 60) for i in range(_WAITING)]
    expiring = [call(f"expired-{i}", _EXPIRES_S) for i in range(_DOOMED // 2)]
    everybody = 1 + _DOOMED + _WAITING
    await until(lambda: admission.requests == everybody or any(task.done() for task in expiring))
    for task in cancelled:
        task.cancel()
    await asyncio.gather(*cancelled, *expiring, return_exceptions=True)
    await until(lambda: admission.requests == 1 + _WAITING)
    server.backend.release()
    answered = await asyncio.gather(first, *waiting, return_exceptions=True)
    tokenizer = FakeTokenizer(256)
    doomed = [f"cancelled-{i} {number}" for i in range(_DOOMED // 2)]
    doomed += [f"expired-{i} {number}" for i in range(_DOOMED // 2)]
    rows = {row for batch in server.backend.log for row in batch.rows}
    executed = sum(tuple(encoded.ids.tolist()) in rows for encoded in tokenizer.encode(doomed))
    return executed, sum(isinstance(each, BaseException) for each in answered)


async def _answer(server: FakeServer, request: pb.EmbedRequest, timeout_s: float) -> pb.EmbedResponse:
    answer: pb.EmbedResponse = await server.stub.Embed(request, timeout=timeout_s)
    return answer


async def _for_nobody(scope: Scope) -> tuple[float, Machine]:
    """Share of what a server at 3x computed that was no answer in time: its caller left while it was computed."""
    seconds = 4.0 if scope.is_quick else 10.0
    due_s = arrivals("poisson", 3 * ENGINE.texts_per_s, seconds, scope.seed)
    machine = Machine()
    async with load_server(*ENGINE.settings()) as server:
        job = Job(target=server.address, name="late", style="once", due_s=due_s, timeout_s=_LATE_S)
        run = await run_calm(server, job, tries=tries_of(scope))
    machine.saw(run)
    computed = run.counted["mlis_batch_texts_sum"]
    return 1 - len(run.ran[0].ok) / computed, machine


async def head_of_line(scope: Scope) -> Figure:
    seconds = 8.0 if scope.is_quick else 60.0
    batches: dict[str, float] = {}
    machine = Machine()
    large_calls = singles = broken = 0
    for number, priority in enumerate(("", "interactive")):
        scope.tell(number, 2)
        async with load_server(*_STEADY.settings()) as server:
            large = Job(
                target=server.address,
                name=f"large{priority}",
                style="once",
                callers=1,
                seconds=seconds,
                texts=1024,
                priority=priority,
            )
            due_s = arrivals("poisson", _SINGLES_PER_S, seconds, scope.seed, after_s=0.2)
            single = Job(target=server.address, name=f"single{priority}", style="once", due_s=due_s)
            run = await run_calm(server, large, single, tries=tries_of(scope))
        machine.saw(run)
        found = run.ran[1].ok
        batches[priority or "unnamed"] = percentile(latency_ms(found), 0.99) / _STEADY.full_batch_ms
        large_calls += len(run.ran[0].ok)
        singles += len(found)
        broken += run.broken + len(run.ran[1].records) - len(found)
    scope.tell(2, 2)
    worst = max(batches.values())
    passed, note = machine.judge(exact=large_calls > 0 and not broken, timed=worst <= _MOST_BATCHES)
    return Figure(
        text=f"p99 {worst:.1f} batches",
        passed=passed,
        note=note,
        details={
            **{f"single_p99_batches, large call {name}": value for name, value in batches.items()},
            "batch_ms": _STEADY.full_batch_ms,
            "calls_of_1024": large_calls,
            "singles": singles,
            "not_answered": broken,
            **machine.details(),
        },
    )


async def fairness(scope: Scope) -> Figure:
    """The floods are long: where one begins, what it sends is not yet more than others send, and one full batch of it
    goes in front. `onset_worst_ms` tells what that costs.
    """
    rounds, seconds = (1, 8.0) if scope.is_quick else (3, 40.0)
    alone: list[Records] = []
    beside: list[Records] = []
    machine = Machine()
    flood_refused = 0
    async with contextlib.AsyncExitStack() as stack:
        tokens, setting = stack.enter_context(keys(2))
        server = await stack.enter_async_context(load_server(*_SLOW.settings(), setting, key=tokens[0]))
        for number in range(rounds):
            scope.tell(number, rounds)
            run = await run_calm(server, _light(server, tokens[1], number, seconds, scope.seed), tries=tries_of(scope))
            machine.saw(run)
            alone.append(run.ran[0].records)
            due_s = arrivals("poisson", _FLOOD * _SLOW.texts_per_s, seconds, scope.seed + number)
            flood = [
                Job(
                    target=server.address,
                    name=f"flood{number}-{part}",
                    style="once",
                    due_s=own,
                    keys=tokens[:1],
                    timeout_s=10,
                )
                for part, own in enumerate(in_processes(due_s, 2))
            ]
            light = _light(server, tokens[1], number + rounds, seconds, scope.seed)
            run = await run_calm(server, light, *flood, tries=tries_of(scope))
            machine.saw(run)
            beside.append(run.ran[0].records)
            flood_refused += sum(len(ran.refused) for ran in run.ran[1:])
    scope.tell(rounds, rounds)
    alone_ms, beside_ms = (latency_ms(np.concatenate(each)) for each in (alone, beside))
    onset_ms = latency_ms(np.concatenate([records[records["due_s"] < _ONSET_S] for records in beside]))
    not_ok = sum(int(np.count_nonzero(records["code"])) for records in beside)
    ratio = percentile(beside_ms, 0.99) / percentile(alone_ms, 0.99)
    passed, note = machine.judge(exact=not_ok == 0 and flood_refused > 0, timed=ratio < _MOST_RATIO)
    return Figure(
        text=f"B's p99 {ratio:.2f} of unloaded; {not_ok} of {len(beside_ms)} not answered",
        passed=passed,
        note=note,
        details={
            "alone_p50_ms": percentile(alone_ms, 0.5),
            "alone_p99_ms": percentile(alone_ms, 0.99),
            "beside_p50_ms": percentile(beside_ms, 0.5),
            "beside_p99_ms": percentile(beside_ms, 0.99),
            "onset_worst_ms": float(onset_ms.max(initial=0.0)),
            "flood_refused": flood_refused,
            **machine.details(),
        },
    )


def _light(server: LoadServer, key: str, number: int, seconds: float, seed: int) -> Job:
    due_s = arrivals("poisson", _LIGHT * _SLOW.texts_per_s, seconds, seed + 1000 + number)
    return Job(target=server.address, name=f"light{number}", style="once", due_s=due_s, keys=[key], timeout_s=10)


ROWS: tuple[Row, ...] = (
    Row(
        key="G4",
        title="Calls that expire or are cancelled in the queue",
        pass_line="0 % executed",
        run=deadline_aware,
    ),
    Row(
        key="G5",
        title="Single texts beside calls of 1,024 texts",
        pass_line="p99 <= 3 batches",
        run=head_of_line,
    ),
    Row(
        key="G6",
        title="Fairness: caller A offers 10x the capacity, B 0.1x",
        pass_line="B's p99 < 2 times unloaded; no call of B's refused",
        run=fairness,
    ),
)
