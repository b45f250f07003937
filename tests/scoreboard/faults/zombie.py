"""F9: how long health says SERVING while nobody is answered, over faults that take the engine or the server away."""

import asyncio
import contextlib
import itertools
import os
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from ml_inference_server.server.health import INTERVAL_S
from tests.faults.processes import is_stopped, socket_of
from tests.scoreboard.faults.engine import HANG_TIMEOUT_S, SETTINGS
from tests.scoreboard.faults.live import (
    SERVING,
    Live,
    asked,
    ending,
    live_server,
    loop_lag,
    new_text,
    until,
    until_async,
)
from tests.scoreboard.faults.outcome import NotProven
from tests.scoreboard.row import Figure, Row, Scope

REPEATS = 10
# The loss of an engine is seen after the hang timeout at the latest, and health says so at its next look.
DETECTION_LIMIT_S = HANG_TIMEOUT_S + 2 * INTERVAL_S
# A text that takes the engine with it is tried once more, on its own.
_LOSSES = {"hang": 2, "crash": 2}
_BUSY_MS = 50.0
_LOOK_S = 0.02
_PROBE_S = 30.0
_ANSWERS_IN_S = 0.2


@dataclass
class Watch:
    """Probes one after the other, and health as anybody sees it who asks.

    good_at: ends of probes that were answered. looks: (when asked, when answered, whether SERVING).
    """

    good_at: list[float] = field(default_factory=list)
    looks: list[tuple[float, float, bool]] = field(default_factory=list)

    def zombie_s(self, began_at: float) -> tuple[float, float]:
        """(seconds SERVING, all seconds) in the longest outage since then."""
        good_at = [at for at in self.good_at if at >= began_at]
        outages = list(zip([began_at, *good_at], good_at, strict=False))
        begin, end = max(outages, key=lambda each: each[1] - each[0])
        serving_s = 0.0
        for (_, told_at, is_serving), (asked_at, next_at, _) in itertools.pairwise(self.looks):
            # What was told holds until the next answer, unless none comes.
            until_at = min(next_at, asked_at + _ANSWERS_IN_S)
            serving_s += is_serving * max(0.0, min(until_at, end) - max(told_at, begin))
        return serving_s, end - begin

    async def probe(self, live: Live) -> None:
        while True:
            if await ending(asked(live.stub, [new_text()], _PROBE_S)) == "OK":
                self.good_at.append(time.monotonic())
            await asyncio.sleep(_LOOK_S)

    async def look(self, live: Live) -> None:
        async with grpc.aio.insecure_channel(live.address, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
            health = health_pb2_grpc.HealthStub(channel)
            while True:
                asked_at = time.monotonic()
                try:
                    reply = await health.Check(health_pb2.HealthCheckRequest(), timeout=1)
                    is_serving = reply.status == SERVING
                except grpc.aio.AioRpcError:
                    is_serving = False
                self.looks.append((asked_at, time.monotonic(), is_serving))
                await asyncio.sleep(_LOOK_S)


@contextlib.asynccontextmanager
async def watching(live: Live) -> AsyncIterator[Watch]:
    watch = Watch()
    tasks = [asyncio.create_task(each(live)) for each in (watch.probe, watch.look)]
    try:
        await until(lambda: len(watch.good_at) > 3 and len(watch.looks) > 3, "probes are answered")
        yield watch
    finally:
        for task in tasks:
            task.cancel()
        for found in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(found, AssertionError):
                raise found


async def _kill(live: Live) -> None:
    (pid,) = live.engines()
    os.kill(pid, signal.SIGKILL)


async def _stop(live: Live) -> None:
    (pid,) = live.engines()
    os.kill(pid, signal.SIGSTOP)
    await until(lambda: is_stopped(pid), "the engine is stopped")


async def _kill_again_while_it_starts(live: Live) -> None:
    (pid,) = live.engines()
    os.kill(pid, signal.SIGKILL)
    await until(lambda: set(live.engines()) - {pid} != set(), "the next process starts")
    (second,) = set(live.engines()) - {pid}
    os.kill(second, signal.SIGKILL)


async def _hang(live: Live) -> None:
    if (end := await live.asking(f"!hang {new_text()}")) != "INTERNAL":
        raise NotProven(f"the text that hangs ended with {end}")


async def _crash(live: Live) -> None:
    end = await live.asking(f"!crash {new_text()}")
    if end == "OK":
        raise NotProven("the text that crashes was answered")


async def _garbage(live: Live) -> None:
    (pid,) = live.engines()
    with socket_of(pid) as connection:
        connection.sendall(os.urandom(64))


async def _server_stops(live: Live) -> None:
    """The whole server: nobody can ask for its health either."""
    os.kill(live.pid, signal.SIGSTOP)
    try:
        await until(lambda: is_stopped(live.pid), "the server is stopped")
        await asyncio.sleep(1)
    finally:
        os.kill(live.pid, signal.SIGCONT)


FAULTS: dict[str, Callable[[Live], Awaitable[None]]] = {
    "kill": _kill,
    "SIGSTOP": _stop,
    "kill, and again while it starts": _kill_again_while_it_starts,
    "hang": _hang,
    "crash": _crash,
    "garbage frame": _garbage,
    "SIGSTOP of the server": _server_stops,
}


async def _one(live: Live, watch: Watch, name: str) -> tuple[float, float]:
    restarts = await live.restarts()
    began_at = time.monotonic()
    await FAULTS[name](live)
    fault_ended_at = time.monotonic()
    if name != "SIGSTOP of the server":

        async def seen() -> bool:
            return await live.restarts() > restarts

        await until_async(seen, "the engine was started again")
    await until(lambda: len([at for at in watch.good_at if at > fault_ended_at]) > 3, "probes are answered again")
    await live.until_serving()
    return watch.zombie_s(began_at)


async def _run(scope: Scope) -> Figure:
    repeats = 1 if scope.is_quick else REPEATS
    worst_s, outage_s, done = dict.fromkeys(FAULTS, 0.0), dict.fromkeys(FAULTS, 0.0), 0
    async with loop_lag() as lag, live_server(*SETTINGS) as live, watching(live) as watch:
        for name in FAULTS:
            for _ in range(repeats):
                serving_s, all_s = await _one(live, watch, name)
                worst_s[name], outage_s[name] = max(worst_s[name], serving_s), max(outage_s[name], all_s)
                scope.tell(done := done + 1, repeats * len(FAULTS))
    if max(outage_s.values()) < 0.1:
        raise NotProven("no fault took the answers away")
    limits_s = {name: DETECTION_LIMIT_S * _LOSSES.get(name, 1) for name in FAULTS}
    late = [
        f"{name}: {each:.2f} s, at most {limits_s[name]:.1f}" for name, each in worst_s.items() if each > limits_s[name]
    ]
    busy = f"the machine was busy (the loop of the test was {lag.worst_ms:.0f} ms late): " if late else ""
    is_unknown = bool(late) and lag.worst_ms > _BUSY_MS
    return Figure(
        text=f"{max(worst_s.values()):.2f} s SERVING in the worst of {done} outages",
        passed=None if is_unknown else not late,
        note=(busy if is_unknown else "") + "; ".join(late),
        details={f"{name}: worst_serving_s": round(each, 3) for name, each in worst_s.items()}
        | {f"{name}: longest_outage_s": round(each, 3) for name, each in outage_s.items()}
        | {"detection_limit_s": DETECTION_LIMIT_S, "loop_lag_worst_ms": round(lag.worst_ms, 1)},
    )


ROW = Row(
    key="F9",
    title="Health while nobody is answered, over 7 kinds of faults, 10 times each",
    pass_line="seconds SERVING in an outage below the detection limit: hang timeout and two looks, for each loss",
    run=_run,
)
