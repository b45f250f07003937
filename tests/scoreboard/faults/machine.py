"""F8: a machine that goes wrong under a server: a full or read-only disk, no descriptor left, a clock that jumps."""

import asyncio
import contextlib
import email.utils
import os
import resource
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

from tests.faults.processes import is_gone
from tests.faults.raw_http2 import PREFACE, SETTINGS, frame
from tests.integration.server_process import ROOT, arguments
from tests.scoreboard.faults.live import ENGINE, Live, live_server, new_text, until
from tests.scoreboard.faults.outcome import NotProven, Outcomes, figure
from tests.scoreboard.row import Figure, Row, Scope

REPEATS = 3
_FILES = 200
_HOUR_S = 3600
# In a file system of the server's own; `$0` is where it is mounted, the rest the command.
_FULL = 'mount -t tmpfs -o size=64k none "$0" && (head -c 1000000 /dev/zero > "$0/fill"; true) 2>/dev/null && exec "$@"'
_READ_ONLY = 'mount -t tmpfs none "$0" && mount -o remount,ro "$0" && exec "$@"'


class NotHere(Exception):
    """This machine cannot do it."""


def _own_mount(script: str, place: Path) -> tuple[str, ...]:
    """A command that runs another one with a file system of its own."""
    place.mkdir(exist_ok=True)
    user = () if os.getuid() == 0 else ("--map-root-user",)
    command = ("unshare", "--mount", *user, "sh", "-c", script, str(place))
    if subprocess.run([*command, "true"], check=False, capture_output=True).returncode:
        raise NotHere("no file system can be mounted here")
    return command


async def _engine_comes_back(live: Live) -> None:
    """It writes to the log, starts a process, and opens files."""
    (pid,) = live.engines()
    os.kill(pid, signal.SIGKILL)
    await until(lambda: is_gone(pid), "the engine is gone")
    await live.ask_until_answered()


async def _stops(live: Live) -> list[str]:
    live.process.signal(signal.SIGTERM)
    code, _ = await asyncio.to_thread(live.process.end)
    return [f"exit code {code}"] if code else []


async def _log_is_full(folder: Path) -> list[str]:
    async with live_server(*ENGINE, log=Path("/dev/full")) as live:
        await live.ask()
        await _engine_comes_back(live)
        return await _stops(live)


async def _serves_on(folder: Path, script: str, is_so: Callable[[os.statvfs_result], bool]) -> list[str]:
    place = folder / "place"
    before = _own_mount(script, place)
    places = {"MLIS_CACHE_DIR": str(place / "cache"), "TMPDIR": str(place)}
    async with live_server(*ENGINE, before=before, environment=places) as live:
        if not is_so(os.statvfs(f"/proc/{live.pid}/root{place}")):
            raise NotProven("the disk is as it was")
        await live.ask()
        await _engine_comes_back(live)
        return await _stops(live)


async def _disk_is_full(folder: Path) -> list[str]:
    return await _serves_on(folder, _FULL, lambda found: not found.f_bavail)


async def _disk_is_read_only(folder: Path) -> list[str]:
    return await _serves_on(folder, _READ_ONLY, lambda found: bool(found.f_flag & os.ST_RDONLY))


async def _ready_file_on_full_disk(folder: Path) -> list[str]:
    """It cannot say that it serves: it does not."""
    place = folder / "place"
    command = [*_own_mount(_FULL, place), *arguments("--set", "model.backend=fake"), "--ready-file", f"{place}/ready"]
    done = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, timeout=60, check=False)
    line = done.stderr.strip().splitlines()[-1]
    is_right = (
        done.returncode == 2 and line.startswith("error: ") and "ready" in line and "Traceback" not in done.stderr
    )
    return [] if is_right else [f"exit code {done.returncode}: {line[:200]}"]


async def _no_more_descriptors(folder: Path) -> list[str]:
    """The engine is killed, and cannot be started, while connections have taken all of them."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < 3 * _FILES:
        raise NotHere(f"this process may open {soft} files only")
    limit = f"--nofile={_FILES}:{_FILES}"
    async with live_server(*ENGINE, before=("prlimit", limit)) as live:
        await live.ask()
        fds = Path(f"/proc/{live.pid}/fd")
        with contextlib.ExitStack() as open_ones:
            for _ in range(2 * _FILES):
                connection = open_ones.enter_context(socket.create_connection(("127.0.0.1", live.ports["grpc_port"])))
                connection.sendall(PREFACE + frame(SETTINGS))
            await until(lambda: len(list(fds.iterdir())) >= _FILES - 2, "no descriptor is left")
            await live.ask()
            (pid,) = live.engines()
            os.kill(pid, signal.SIGKILL)
            await until(lambda: live.logged("the engine did not start") > 0, "the engine cannot be started")
        await live.ask_until_answered()
        await live.until_serving()
        return await _stops(live)


def _library(folder: Path) -> Path:
    """That makes the wall clock of a process jump, compiled here."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise NotHere("there is no C compiler for the clock that jumps")
    library = folder / "jumping_clock.so"
    source = ROOT / "tests" / "faults" / "jumping_clock.c"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
    return library


def _set_clock(file: Path, ahead_s: int) -> None:
    """In place: the server has the file in its memory."""
    with file.open("r+b" if file.exists() else "wb") as opened:
        opened.write(ahead_s.to_bytes(8, sys.byteorder, signed=True))


async def _clock_ahead_s(live: Live) -> float:
    """Of the server's clock, by what its HTTP answers say."""

    def read() -> float:
        with urllib.request.urlopen(f"http://127.0.0.1:{live.ports['http_port']}/healthz", timeout=10) as reply:
            return email.utils.parsedate_to_datetime(reply.headers["Date"]).timestamp() - time.time()

    return await asyncio.to_thread(read)


@contextlib.asynccontextmanager
async def _server_with_a_clock(folder: Path) -> AsyncIterator[tuple[Live, Path]]:
    """A server, and the file that says how far its clock is ahead."""
    clock = folder / "clock"
    _set_clock(clock, 0)
    environment = {"LD_PRELOAD": str(_library(folder)), "MLIS_CLOCK_AHEAD": str(clock)}
    async with live_server(*ENGINE, environment=environment) as live:
        yield live, clock


async def _clock_jumps(folder: Path, by_s: int) -> list[str]:
    """While calls run and wait: none ends before its time, or later."""
    async with _server_with_a_clock(folder) as (live, clock):
        began_at = time.monotonic()
        running = await live.holding(1500)
        waiting = live.asking(new_text(), timeout_s=20)
        hurried_at = time.monotonic()
        hurried = live.asking(new_text(), timeout_s=1.0)
        async with live.neighbours() as neighbours:
            _set_clock(clock, by_s)
            ahead_s = await _clock_ahead_s(live)
            if abs(ahead_s - by_s) > 60:
                raise NotProven(f"the server's clock is {ahead_s:.0f} s ahead, not {by_s}")
            end = await hurried
            took_s = time.monotonic() - hurried_at
            ends = await asyncio.gather(running, waiting)
            ran_s = time.monotonic() - began_at
            await live.until_serving()
            await _engine_comes_back(live)
        wrong = [f"a call that was in flight ended with {each}" for each in ends if each != "OK"]
        # The batch in front of it takes longer than it may wait; one that was cut short would be answered.
        if end not in ("DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED") and ran_s >= 1.5:
            wrong.append(f"a call with a deadline of 1 s behind a batch of 1.5 s ended with {end}")
        if end == "DEADLINE_EXCEEDED" and took_s < 0.9:
            wrong.append(f"a deadline of 1 s passed after {took_s:.2f} s")
        if neighbours.harmed:
            wrong.append(f"neighbours ended with {dict(neighbours.ends)}")
        return wrong + await _stops(live)


async def _clock_goes_forward(folder: Path) -> list[str]:
    return await _clock_jumps(folder, _HOUR_S)


async def _clock_goes_back(folder: Path) -> list[str]:
    return await _clock_jumps(folder, -_HOUR_S)


CASES: dict[str, Callable[[Path], Awaitable[list[str]]]] = {
    "log on a full disk": _log_is_full,
    "cache and temporary files on a full disk": _disk_is_full,
    "cache and temporary files on a read-only disk": _disk_is_read_only,
    "ready file on a full disk": _ready_file_on_full_disk,
    "no more descriptors": _no_more_descriptors,
    "clock an hour forward": _clock_goes_forward,
    "clock an hour back": _clock_goes_back,
}


async def _run(scope: Scope) -> Figure:
    repeats = 1 if scope.is_quick else REPEATS
    outcomes, not_here, times_s = Outcomes(), list[str](), list[float]()
    for name, case in CASES.items():
        for _ in range(repeats):
            began_at = time.monotonic()
            with tempfile.TemporaryDirectory() as folder:
                try:
                    outcomes.add(name, await case(Path(folder)))
                except NotHere as error:
                    not_here.append(f"{name}: {error}")
                    break
            times_s.append(time.monotonic() - began_at)
            scope.tell(outcomes.tried.total(), repeats * len(CASES))
    found = figure(
        outcomes,
        median_case_s=round(statistics.median(times_s), 2),
        clock_by="tests/faults/jumping_clock.c, LD_PRELOAD",
    )
    if not_here and found.passed:
        return Figure(text=found.text, passed=None, note=f"not tried: {'; '.join(not_here)}", details=found.details)
    return found


ROW = Row(
    key="F8",
    title=f"The machine under the server goes wrong: {', '.join(CASES)}",
    pass_line="all survived",
    run=_run,
)
