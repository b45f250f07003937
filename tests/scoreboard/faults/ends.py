"""F10: ways in which a server ends, and what it leaves behind."""

import asyncio
import contextlib
import os
import signal
import sys
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from pathlib import Path

from tests.faults.processes import MARK, engine_pids, marked
from tests.integration.server_process import ROOT, ServerProcess, arguments, server_process
from tests.scoreboard.faults.live import ENGINE, FAULT_WORDS, Live, live_server, new_text, until
from tests.scoreboard.faults.outcome import NotProven, Outcomes, figure
from tests.scoreboard.row import Figure, Row, Scope

REPEATS = 5
# An engine's process watches its server all the time; a server that should end with its parent looks twice a second.
LIMIT_S = 10.0
_INTERRUPTED, _TERMINATED = 130, 143
_PARENT = "import subprocess, sys, time; subprocess.Popen(sys.argv[1:]); time.sleep(600)"


def _ended_with(code: int, wanted: int) -> list[str]:
    return [] if code == wanted else [f"exit code {code}, not {wanted}"]


async def _end(live: Live) -> int:
    code, _ = await asyncio.to_thread(live.process.end)
    return code


@contextlib.asynccontextmanager
async def _working(mark: str, *extra: str) -> AsyncIterator[Live]:
    """A server whose engine works on a batch that takes a minute."""
    async with live_server(*ENGINE, *extra, environment={MARK: mark}) as live:
        call = live.asking(f"!slow:60000 {new_text()}")
        await live.until_batches_run()
        yield live
        await call


async def _kill_idle(mark: str) -> list[str]:
    async with live_server(*ENGINE, environment={MARK: mark}) as live:
        _check_there(mark, 2)
        live.process.signal(signal.SIGKILL)
        return _ended_with(await _end(live), -signal.SIGKILL)


async def _kill_mid_batch(mark: str) -> list[str]:
    async with _working(mark) as live:
        _check_there(mark, 2)
        live.process.signal(signal.SIGKILL)
        return _ended_with(await _end(live), -signal.SIGKILL)


async def _kill_while_loading(mark: str) -> list[str]:
    async with _loading(mark) as server:
        server.signal(signal.SIGKILL)
        code, _ = await asyncio.to_thread(server.end)
        return _ended_with(code, -signal.SIGKILL)


async def _kill_supervisor(mark: str) -> list[str]:
    async with live_server(*ENGINE, "--supervise", environment={MARK: mark}) as live:
        _check_there(mark, 3)
        live.process.signal(signal.SIGKILL)
        return _ended_with(await _end(live), -signal.SIGKILL)


async def _kill_parent(mark: str) -> list[str]:
    """A process that started the server with --exit-with-parent."""
    with tempfile.TemporaryDirectory() as folder:
        ready = Path(folder) / "ready.json"
        command = arguments("--set", "model.backend=fake", *ENGINE, "--exit-with-parent", "--ready-file", str(ready))
        parent = await asyncio.create_subprocess_exec(
            sys.executable,
            "-c",
            _PARENT,
            *command,
            cwd=ROOT,
            env=os.environ | {MARK: mark},
            stderr=asyncio.subprocess.DEVNULL,
        )
        try:
            await until(ready.exists, "the server serves")
            _check_there(mark, 3)
        finally:
            parent.kill()
            await parent.wait()
        await until(lambda: not ready.exists(), "the server has stopped", limit_s=LIMIT_S)
    return []


async def _interrupt_twice(mark: str) -> list[str]:
    async with _working(mark) as live:
        live.process.signal(signal.SIGINT)
        await until(lambda: live.logged("press Ctrl-C again") > 0, "the first Ctrl-C is heard")
        live.process.signal(signal.SIGINT)
        return _ended_with(await _end(live), _INTERRUPTED)


async def _interrupt_group_twice(mark: str) -> list[str]:
    """As a terminal does it: to the processes of the engine, too."""
    async with _working(mark) as live:
        os.killpg(live.pid, signal.SIGINT)
        await until(lambda: live.logged("press Ctrl-C again") > 0, "the first Ctrl-C is heard")
        os.killpg(live.pid, signal.SIGINT)
        return _ended_with(await _end(live), _INTERRUPTED)


async def _terminate_while_loading(mark: str) -> list[str]:
    async with _loading(mark) as server:
        server.signal(signal.SIGTERM)
        code, _ = await asyncio.to_thread(server.end)
        return _ended_with(code, _TERMINATED)


async def _terminate_with_a_hang(mark: str) -> list[str]:
    async with _working(mark, "--set", "server.drain_timeout_ms=200") as live:
        live.process.signal(signal.SIGTERM)
        return _ended_with(await _end(live), 5)


@contextlib.asynccontextmanager
async def _loading(mark: str) -> AsyncIterator[ServerProcess]:
    """A server whose first process of the engine starts."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with server_process(folder, *ENGINE, *FAULT_WORDS, log=folder / "log", environment={MARK: mark}) as server:
            await until(lambda: bool(engine_pids(server.process.pid)), "the engine starts")
            if server.ready_file.exists():
                raise NotProven("the server serves already")
            yield server


def _check_there(mark: str, least: int) -> None:
    """What is counted at the end is seen now."""
    if len(found := marked(mark)) < least:
        raise NotProven(f"only {len(found)} processes of the server are seen")


CASES: dict[str, Callable[[str], Awaitable[list[str]]]] = {
    "SIGKILL of the server, idle": _kill_idle,
    "SIGKILL of the server, mid-batch": _kill_mid_batch,
    "SIGKILL of the server, loading": _kill_while_loading,
    "SIGKILL of the supervisor": _kill_supervisor,
    "SIGKILL of the parent": _kill_parent,
    "SIGINT twice": _interrupt_twice,
    "SIGINT twice, to the group": _interrupt_group_twice,
    "SIGTERM while loading": _terminate_while_loading,
    "SIGTERM while a batch hangs": _terminate_with_a_hang,
}


async def _run(scope: Scope) -> Figure:
    repeats = 1 if scope.is_quick else REPEATS
    outcomes, orphans = Outcomes(), 0
    for name, case in CASES.items():
        for _ in range(repeats):
            mark = uuid.uuid4().hex
            wrong = await case(mark)
            ended_at = time.monotonic()
            with contextlib.suppress(TimeoutError):
                await until(lambda m=mark: not marked(m), "nothing is left", limit_s=LIMIT_S)  # type: ignore[misc]
            time_s = time.monotonic() - ended_at
            if left := marked(mark):
                orphans += len(left)
                wrong.append(f"{len(left)} orphans after {LIMIT_S:.0f} s")
                for pid in left:
                    os.kill(pid, signal.SIGKILL)
            outcomes.add(name, wrong, time_s)
            scope.tell(outcomes.tried.total(), repeats * len(CASES))
    found = figure(outcomes, orphans=orphans)
    return replace(
        found,
        text=f"{orphans} orphans of {outcomes.tried.total()} ends; all gone after {max(outcomes.all_times_s):.2f} s",
    )


ROW = Row(
    key="F10",
    title="SIGKILL of server, supervisor and parent; SIGINT twice; SIGTERM while loading and while a batch hangs",
    pass_line="0 orphans, and the right exit code",
    run=_run,
)
