"""A server of our own, as a child process: started on free ports, watched until it is ready, always ended."""

import asyncio
import contextlib
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ml_inference_server.benchmark.load.channel import Target
from ml_inference_server.benchmark.target.interrupt import Stop
from ml_inference_server.utils.connection import IN_THE_CLEAR, Connection
from ml_inference_server.utils.errors import EXIT_INTERNAL, EXIT_MODEL, StartError
from ml_inference_server.utils.installation import child_environment
from ml_inference_server.utils.layers import without_settings

COMMAND = (sys.executable, "-m", "ml_inference_server.main")
# The port is known from a file as soon as there is one; health over gRPC then says whether it may be used.
_READY_FILE_POLL_S = 0.05
# Beyond the server's own drain limit, which its settings know.
_STOP_MARGIN_S = 10.0
LOOPBACK = "127.0.0.1"


class ServerNotStarted(StartError):
    """The server ended, or did not become ready; carries the exit code that it ended with."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@dataclass(frozen=True)
class ServerOptions:
    """How a server is started. `arguments` are the server's own.

    takes_environment: settings that environment variables bring are in force, as in the server that is measured.
    connection: how it is reached with its settings.
    """

    arguments: Sequence[str]
    log: Path
    start_timeout_s: float
    drain_timeout_s: float
    command: Sequence[str] = COMMAND
    takes_environment: bool = True
    connection: Connection = IN_THE_CLEAR


class ServerProcess:
    """Use as `async with`: whatever happens inside, the process and its group are gone afterwards."""

    def __init__(self, options: ServerOptions, stop: Stop) -> None:
        self._options = options
        self._stop = stop
        self._process: asyncio.subprocess.Process | None = None
        self._log_start_bytes = 0
        self.ready_s = 0.0  # from the start of the process until it served

    async def __aenter__(self) -> "ServerProcess":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.end()

    @property
    def pid(self) -> int:
        """Of the process that was started; 0 before that. A supervisor's servers are its children."""
        return self._process.pid if self._process else 0

    async def death(self, patience_s: float = 1.0) -> str:
        """How the process ended although nobody asked it to; "" if it still runs after `patience_s`."""
        if self._process is None:
            return ""
        try:
            # One that was killed a moment ago has closed its connections, but may not be reaped yet.
            return str(self._death_notice(await asyncio.wait_for(self._process.wait(), patience_s)))
        except TimeoutError:
            return ""

    async def start(self) -> dict[str, int]:
        """The ready file's grpc_port, http_port and pid, of a server that is SERVING.

        ServerNotStarted as soon as it ends, or when it takes too long.
        """
        environment = child_environment()
        if not self._options.takes_environment:
            environment = without_settings(environment)
        with tempfile.TemporaryDirectory(prefix="ml_inference_server-") as folder:
            ready = Path(folder) / "ready.json"
            with self._options.log.open("ab") as log:
                self._log_start_bytes = log.tell()
                started_s = time.monotonic()
                self._process = await asyncio.create_subprocess_exec(
                    *self._options.command,
                    *self._options.arguments,
                    *("--ready-file", str(ready), "--exit-with-parent"),
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env=environment,
                    start_new_session=True,  # Ctrl-C in the terminal reaches the runner only
                )
            died = asyncio.create_task(self._process.wait())
            serving = asyncio.create_task(self._wait_until_serving(ready))
            try:
                async with asyncio.timeout(self._options.start_timeout_s):
                    await asyncio.wait({died, serving}, return_when=asyncio.FIRST_COMPLETED)
                if died.done():
                    raise self._death_notice(died.result())
                ports = await serving
                self.ready_s = time.monotonic() - started_s
                return ports
            except TimeoutError:
                raise ServerNotStarted(
                    f"the server was not ready within {self._options.start_timeout_s:g} s: {self.last_line()};"
                    f" its log is {self._options.log}",
                    EXIT_MODEL,
                ) from None
            finally:
                died.cancel()
                serving.cancel()
                await asyncio.gather(died, serving, return_exceptions=True)

    async def _wait_until_serving(self, ready: Path) -> dict[str, int]:
        while not (ports := _read_ready(ready)):  # noqa: ASYNC110 - a file has no event
            await asyncio.sleep(_READY_FILE_POLL_S)
        async with Target(LOOPBACK, ports["grpc_port"], self._options.connection) as target:
            await target.wait_until_serving(self._options.start_timeout_s)
        return ports

    def _death_notice(self, status: int) -> ServerNotStarted:
        if status < 0:
            name = signal.Signals(-status).name
            return ServerNotStarted(f"the server was killed by {name}; last words: {self.last_line()}", EXIT_INTERNAL)
        return ServerNotStarted(self.last_line(), status or EXIT_INTERNAL)

    def last_line(self) -> str:
        """The last line that the server wrote."""
        with self._options.log.open("rb") as log:
            log.seek(0, os.SEEK_END)
            log.seek(max(self._log_start_bytes, log.tell() - 8192))
            lines = log.read().decode(errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "it wrote nothing")
        return last.removeprefix("error: ")

    async def end(self) -> int | None:
        """SIGTERM, then SIGKILL after the drain limit or a second Ctrl-C. The exit status, None if never started."""
        process = self._process
        if process is None:
            return None
        if process.returncode is None:
            process.terminate()
            exited = asyncio.create_task(process.wait())
            hurry = asyncio.create_task(self._stop.at_once.wait())
            limit_s = self._options.drain_timeout_s + _STOP_MARGIN_S
            await asyncio.wait({exited, hurry}, timeout=limit_s, return_when=asyncio.FIRST_COMPLETED)
            hurry.cancel()
            if not exited.done():
                process.kill()
            await exited
        self._kill_group(process.pid)
        return process.returncode

    def _kill_group(self, group: int) -> None:
        """Its own children, if it left any behind."""
        with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS says the latter of a group of zombies
            os.killpg(group, signal.SIGKILL)


def _read_ready(path: Path) -> dict[str, int]:
    try:
        content: dict[str, int] = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):  # not there yet, or half of it
        return {}
    return content
