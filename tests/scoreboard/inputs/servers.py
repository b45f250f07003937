"""Server processes of rows that send bad input: their log goes to a file, however much it is."""

import asyncio
import contextlib
import json
import re
import signal
import subprocess
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.integration.server_process import ROOT, arguments

START_S = 60.0
END_S = 60.0
# Of the fake engine, by the names that cases use.
SETTINGS: Mapping[str, Sequence[str]] = {
    "plain": ("model.name=fake",),
    "cross": ("model.name=fake", "model.task=cross_encoder"),
    "faults": ("model.name=fake", "server.enable_test_faults=true"),
}
# What nobody wants to find in a log, whatever was sent.
_BUGS = re.compile(
    r"unexpected error|failed \(request|never retrieved|was destroyed but it is pending|"
    r"InvalidStateError|BlockingIOError"
)


@dataclass
class InputServer:
    """log: the file that its standard error goes to."""

    process: subprocess.Popen[bytes]
    grpc_port: int
    http_port: int
    log: Path

    @property
    def lives(self) -> bool:
        return self.process.poll() is None

    def written(self) -> str:
        return self.log.read_text(errors="replace")

    def bugs(self) -> list[str]:
        """Lines of its log that tell of a mistake of ours."""
        return [line for line in self.written().splitlines() if _BUGS.search(line)]

    def warnings(self) -> list[str]:
        """Lines of its log that an operator has to look at."""
        return [line for line in self.written().splitlines() if re.search(r" (WARNING|ERROR|CRITICAL) ", line)]

    async def end(self) -> int:
        """Its exit code after SIGTERM."""
        if self.lives:
            self.process.send_signal(signal.SIGTERM)
        return await asyncio.to_thread(self.process.wait, END_S)


@contextlib.asynccontextmanager
async def input_server(folder: Path, settings: Sequence[str], *flags: str) -> AsyncIterator[InputServer]:
    """Ready to serve; killed at the end where it still runs. settings: as of --set, beside the fake backend."""
    process, ready_file, log = _started(folder, settings, *flags)
    try:
        async with asyncio.timeout(START_S):
            while not await asyncio.to_thread(ready_file.exists):
                if process.poll() is not None:
                    raise RuntimeError(f"the server did not start: {log.read_text(errors='replace')[-500:]}")
                await asyncio.sleep(0.02)
        ports = json.loads(ready_file.read_text())
        yield InputServer(process, ports["grpc_port"], ports["http_port"], log)
    finally:
        if process.poll() is None:
            process.kill()
        await asyncio.to_thread(process.wait)


def _started(folder: Path, settings: Sequence[str], *flags: str) -> tuple[subprocess.Popen[bytes], Path, Path]:
    """(the process, the file that it writes when it serves, its log)."""
    folder.mkdir(parents=True, exist_ok=True)
    ready_file, log = folder / "ready.json", folder / "log"
    sets = [flag for each in ("model.backend=fake", *settings) for flag in ("--set", each)]
    command = arguments(*sets, "--ready-file", str(ready_file), *flags)
    with log.open("wb") as stderr:
        return subprocess.Popen(command, cwd=ROOT, stderr=stderr, start_new_session=True), ready_file, log
