"""F1: the process of the engine is killed at six points."""

import asyncio
import os
import signal
import statistics
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from ml_inference_server.server.process_worker import ProcessWorker
from ml_inference_server.utils.config import ModelSettings
from tests.faults.processes import engine_pids, is_gone, is_stopped, socket_of, unread_bytes, waiting_bytes
from tests.scoreboard.faults.live import ENGINE, Live, live_server, loop_lag, new_text, until, until_async
from tests.scoreboard.faults.outcome import NotProven, Outcomes, TooLate, in_time, within
from tests.scoreboard.row import Figure, Row, Scope

REPEATS = 20
_LIMIT_S = 2.0  # besides the time that the engine needs to load
# A batch of this many texts is larger than what a socket holds.
_LARGE_TEXTS, _LARGE_WORDS = 400, 240
_LARGE = ("--set", "batching.max_batch_tokens=200000", "--set", "batching.max_batch_size=512")
_TRIES = 10


@dataclass
class Killed:
    """calls: that were in flight, each of which has to be answered all the same. loads: starts until one runs."""

    pids: list[int]
    at_s: float
    calls: list[asyncio.Task[str]] = field(default_factory=list)
    loads: int = 1


def _kill(*pids: int) -> float:
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    return time.monotonic()


def _only_engine(live: Live) -> int:
    pids = live.engines()
    if len(pids) != 1:
        raise NotProven(f"there are {len(pids)} processes of the engine, not 1")
    return pids[0]


async def _idle(live: Live) -> Killed:
    if (await live.figures())["queue"]["batches_in_flight"]:
        raise NotProven("a batch runs")
    pid = _only_engine(live)
    return Killed([pid], _kill(pid))


async def _writing_a_batch(live: Live) -> Killed:
    """The engine is stopped, so that half of a large batch waits in its socket, and the other half in the server."""
    pid = _only_engine(live)
    os.kill(pid, signal.SIGSTOP)
    await until(lambda: is_stopped(pid), "the engine is stopped")
    call = live.asking(*(new_text(_LARGE_WORDS) for _ in range(_LARGE_TEXTS)))
    with socket_of(pid) as connection:
        await until(lambda: waiting_bytes(connection) > 100_000, "a part of the batch is written")
        if waiting_bytes(connection) > 4 * _LARGE_TEXTS * _LARGE_WORDS:
            raise NotProven("all of the batch was written")
    return Killed([pid], _kill(pid), [call])


async def _mid_batch(live: Live) -> Killed:
    calls = [await live.holding(300)]
    calls += [live.asking(new_text()) for _ in range(5)]
    pid = _only_engine(live)
    if calls[0].done():
        raise TooLate("the batch had ended")
    return Killed([pid], _kill(pid), calls)


async def _answer_in_the_socket(live: Live) -> Killed:
    """The server is stopped meanwhile: it finds the answer and the end of the process at once."""
    for _ in range(_TRIES):
        pid = _only_engine(live)
        with socket_of(pid) as connection:
            call = await live.holding(100)
            os.kill(live.pid, signal.SIGSTOP)
            try:
                await until(lambda c=connection: unread_bytes(c) > 0, "an answer is written", limit_s=1)  # type: ignore[misc]
            except TimeoutError:
                continue  # it had been read before
            else:
                return Killed([pid], _kill(pid), [call])
            finally:
                os.kill(live.pid, signal.SIGCONT)
    raise NotProven("no answer was caught in the socket")


async def _while_it_starts_again(live: Live) -> Killed:
    pid = _only_engine(live)
    call = await live.holding(300)
    before = live.logged("the engine did not start")
    began_at = _kill(pid)
    await until(lambda: set(engine_pids(live.pid)) - {pid} != set(), "the next process starts")
    (second,) = set(live.engines()) - {pid}
    _kill(second)
    await until(lambda: live.logged("the engine did not start") > before, "the server sees that the start failed")
    return Killed([pid, second], began_at, [call], loads=2)


async def _draining(live: Live) -> Killed:
    calls = [await live.holding(2000)]
    calls += [live.asking(new_text()) for _ in range(3)]

    async def all_in() -> bool:
        return bool(sum((await live.figures())["in_flight"].values()) >= len(calls))

    await until_async(all_in, "all calls are in")
    live.process.signal(signal.SIGTERM)
    await until(lambda: live.logged("draining: ") > 0, "the server drains")
    if calls[0].done():
        raise TooLate("the batch had ended")
    pid = _only_engine(live)
    return Killed([pid], _kill(pid), calls)


DRAINING, WRITING = "while the server drains", "while a batch is written to it"
# A large batch whose engine is killed makes the next ones smaller: the kernel kills where memory runs out.
_ON_A_SERVER_OF_ITS_OWN = {DRAINING, WRITING}
Point = Callable[[Live], Awaitable[Killed]]
POINTS: dict[str, Point] = {
    "idle": _idle,
    WRITING: _writing_a_batch,
    "mid-batch": _mid_batch,
    "with its answer in the socket": _answer_in_the_socket,
    "while its replacement starts": _while_it_starts_again,
    DRAINING: _draining,
}


async def load_times_s(count: int) -> list[float]:
    """How long a process of the engine takes until it serves, as the server starts it."""
    found = []
    for _ in range(count):
        worker = ProcessWorker(hang_timeout_s=60, faults=False)
        began_at = time.monotonic()
        await worker.start(ModelSettings(backend="fake", streams=1, process_per_stream=True), lambda text: None)
        found.append(time.monotonic() - began_at)
        worker.close()
        await until(lambda w=worker: not w.engines, "the engine has ended")  # type: ignore[misc]
    return found


async def _survives(live: Live, name: str, outcomes: Outcomes) -> int:
    """One kill; how many loads its recovery takes."""
    wrong: list[str] = []
    before = await live.restarts()
    killed = await POINTS[name](live) if name == DRAINING else await in_time(lambda: POINTS[name](live))
    await until(lambda: all(is_gone(pid) for pid in killed.pids), "the killed process is gone")
    if name == DRAINING:
        ends = await asyncio.gather(*killed.calls)
        recovered_s = time.monotonic() - killed.at_s
        code, _ = await asyncio.to_thread(live.process.end)
        wrong += [f"exit code {code}"] if code else []
    else:
        await live.ask_until_answered()
        recovered_s = time.monotonic() - killed.at_s
        ends = await asyncio.gather(*killed.calls)
        await live.until_serving()
        if (after := await live.restarts()) != before + 1:
            raise NotProven(f"the server counts {after} restarts, {before} before")
        if left := await live.permits_left_over():
            wrong.append(f"{left} permits are left over")
    wrong += [f"a call that was in flight ended with {end}" for end in ends if end != "OK"]
    outcomes.add(name, wrong, recovered_s)
    return killed.loads


async def _run(scope: Scope) -> Figure:
    repeats = 1 if scope.is_quick else REPEATS
    outcomes, loads = Outcomes(), dict.fromkeys(POINTS, 1)
    loads_s = await load_times_s(1)

    async def survives(live: Live, name: str) -> None:
        loads[name] = await _survives(live, name, outcomes)
        scope.tell(outcomes.tried.total(), repeats * len(POINTS))

    async with loop_lag() as lag:
        async with live_server(*ENGINE) as live:
            await live.ask()
            for name in set(POINTS) - _ON_A_SERVER_OF_ITS_OWN:
                for _ in range(repeats):
                    await survives(live, name)
                if not scope.is_quick:
                    loads_s += await load_times_s(1)
        for name in _ON_A_SERVER_OF_ITS_OWN:
            for _ in range(repeats):
                async with live_server(*ENGINE, *_LARGE) as live:
                    await survives(live, name)
    load_s = max(loads_s)
    passed, note = within(outcomes, {name: _LIMIT_S + loads[name] * load_s for name in POINTS}, lag)
    times_s = outcomes.all_times_s
    return Figure(
        text=f"{outcomes.text}; first good reply after {statistics.median(times_s):.2f} s, worst {max(times_s):.2f} s",
        passed=passed,
        note=note,
        details=outcomes.details()
        | {
            "load_median_s": round(statistics.median(loads_s), 3),
            "load_worst_s": round(load_s, 3),
            "loop_lag_worst_ms": round(lag.worst_ms, 1),
        },
    )


ROW = Row(
    key="F1",
    title="The process of the engine is killed (SIGKILL) at 6 points, 20 times each",
    pass_line="120 of 120 survived; first good reply in less than 2 s and the time to load",
    run=_run,
)
