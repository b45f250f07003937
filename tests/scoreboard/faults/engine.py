"""F2: ten ways in which an engine fails, each while others are in the same batch, or wait for it."""

import asyncio
import contextlib
import os
import signal
import struct
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from ml_inference_server.server.engine_frames import FrameKind, pack_frame
from tests.faults.processes import is_stopped, socket_of
from tests.scoreboard.faults.live import ENGINE, Live, live_server, loop_lag, new_text, until
from tests.scoreboard.faults.outcome import NotProven, Outcomes, TooLate, figure, in_time
from tests.scoreboard.row import Figure, Row, Scope

REPEATS = 20
NEIGHBOURS = 5
HANG_TIMEOUT_S = 1.0
SETTINGS = (*ENGINE, "--set", f"server.hang_timeout_ms={round(1000 * HANG_TIMEOUT_S)}")
FLOOD_KB = 10_000


@dataclass
class Fault:
    """calls: of the guilty one and its neighbours, and what each may end with. proof: whether it happened, or why not.

    restarts: of the engine, at least.
    """

    guilty: asyncio.Task[str] | None
    guilty_ends: set[str]
    neighbours: list[asyncio.Task[str]]
    proof: Callable[[], bool]
    restarts: int = 0
    began_at: float = field(default_factory=time.monotonic)


async def _company(live: Live, guilty_text: str) -> tuple[asyncio.Task[str], list[asyncio.Task[str]]]:
    """A guilty text in the middle of others; all wait for the same engine and fit one batch."""
    ahead = await live.holding(30)
    neighbours = [live.asking(f"{new_text(2)}") for _ in range(NEIGHBOURS // 2)]
    guilty = live.asking(guilty_text)
    neighbours += [live.asking(new_text(2)) for _ in range(NEIGHBOURS - NEIGHBOURS // 2)]
    return guilty, [ahead, *neighbours]


def _word(text: str, ends: set[str], says: str = "", restarts: int = 0) -> "Kind":
    """says: what the server writes when it happens. Otherwise the end of the call is the proof."""

    async def make(live: Live) -> Fault:
        before = live.logged(says) if says else 0
        guilty, neighbours = await _company(live, f"{text} {new_text(1)}")

        def proof() -> bool:
            return live.logged(says) > before if says else guilty.result() != "OK"

        return Fault(guilty, ends, neighbours, proof, restarts)

    return make


async def _stopped(live: Live) -> Fault:
    (pid,) = live.engines()
    os.kill(pid, signal.SIGSTOP)
    await until(lambda: is_stopped(pid), "the engine is stopped")
    neighbours = [live.asking(new_text()) for _ in range(NEIGHBOURS)]
    return Fault(None, set(), neighbours, lambda: True, restarts=1)


def _sends(frame: Callable[[], bytes], says: str) -> "Kind":
    """Something else in the socket of an engine that works on a batch."""

    async def make(live: Live) -> Fault:
        before = live.logged(says)
        calls = [await live.holding(200)]
        calls += [live.asking(new_text()) for _ in range(NEIGHBOURS)]
        (pid,) = live.engines()
        with socket_of(pid) as connection:
            if calls[0].done():
                raise TooLate("the batch had ended before the frame was sent")
            connection.sendall(frame())
        return Fault(None, set(), calls, lambda: live.logged(says) > before, restarts=1)

    return make


def _late_frame() -> bytes:
    """Rows of one text for the first question that the process was ever asked; they would fit any batch of one."""
    rows = struct.pack("<IIdd8f", 1, 8, 0.0, 0.0, *[0.5] * 8)
    return pack_frame(FrameKind.ROWS, 1, rows)


async def _flood(live: Live) -> Fault:
    guilty, neighbours = await _company(live, f"!stderr:{FLOOD_KB} {new_text(1)}")
    return Fault(guilty, {"OK"}, neighbours, lambda: live.log.stat().st_size >= 1000 * FLOOD_KB)


Kind = Callable[[Live], Awaitable[Fault]]
FAILED = {"INTERNAL"}
KINDS: dict[str, Kind] = {
    "hang": _word("!hang", FAILED, restarts=1),
    "SIGSTOP": _stopped,
    "raise": _word("!raise", FAILED),
    "raise-once": _word("!raise-once", {"OK"}, "(RuntimeError): halving it"),
    "NaN": _word("!nan", FAILED),
    "shape": _word("!short", FAILED),
    "out of memory above 2 texts": _word("!oom:2", {"OK"}, "out of memory"),
    "garbage frame": _sends(lambda: os.urandom(64), "it sent what is no frame"),
    "late frame": _sends(_late_frame, "for which nobody had asked"),
    "stderr flood": _flood,
}


async def survives(live: Live, name: str, outcomes: Outcomes) -> None:
    """One fault of that kind, and what is there after it."""
    await live.ask()
    before = await live.restarts()
    fault = await in_time(lambda: KINDS[name](live))
    await live.ask_until_answered()
    recovered_s = time.monotonic() - fault.began_at
    wrong = []
    ends = await asyncio.gather(*fault.neighbours)
    wrong += [f"a neighbour ended with {end}" for end in ends if end != "OK"]
    if fault.guilty is not None and (end := await fault.guilty) not in fault.guilty_ends:
        wrong.append(f"the call with the fault ended with {end}")
    await live.ask()
    await live.until_serving()
    with contextlib.suppress(TimeoutError):
        await until(fault.proof, "the proof", limit_s=10)
    restarts = await live.restarts() - before
    if not fault.proof() or restarts < fault.restarts:
        raise NotProven(f"{name}: {restarts} restarts, and no sign of it in the log")
    if left := await live.permits_left_over():
        wrong.append(f"{left} permits are left over")
    outcomes.add(name, wrong, recovered_s)
    if name == "stderr flood":
        os.truncate(live.log, 0)


async def _run(scope: Scope) -> Figure:
    repeats = 1 if scope.is_quick else REPEATS
    outcomes = Outcomes()
    async with loop_lag() as lag, live_server(*SETTINGS, piped=True) as live:
        for name in KINDS:
            for _ in range(repeats):
                await survives(live, name, outcomes)
                scope.tell(outcomes.tried.total(), repeats * len(KINDS))
    return figure(outcomes, lag=lag)


ROW = Row(
    key="F2",
    title=f"The engine fails in 10 ways, 20 times each: {', '.join(KINDS)}",
    pass_line="200 of 200 survived",
    run=_run,
)
