"""A real server process for tests: started on free ports, always ended."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class ServerProcess:
    process: subprocess.Popen[str]
    ready_file: Path

    def ready(self) -> dict[str, int]:
        """The ports, once the server serves; AssertionError with its stderr if it ends first."""
        while not self.ready_file.exists():
            assert self.process.poll() is None, self.process.communicate()[1] or f"exit code {self.process.returncode}"
            time.sleep(0.01)
        return json.loads(self.ready_file.read_text())  # type: ignore[no-any-return]

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.process.pid, number)

    def end(self) -> tuple[int, str]:
        """(exit code, stderr) once it has ended by itself."""
        _, stderr = self.process.communicate(timeout=60)
        return self.process.returncode, stderr or ""


def arguments(*extra: str) -> list[str]:
    free_ports = ["--port", "0", "--http-port", "0"]
    return [sys.executable, "-m", "ml_inference_server.main", *free_ports, *extra]


@contextlib.contextmanager
def server_process(
    tmp_path: Path,
    *extra: str,
    closed: Sequence[int] = (),
    log: Path | None = None,
    before: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
) -> Iterator[ServerProcess]:
    """A server with the fake backend unless `extra` says otherwise, with these standard streams closed.

    log: a file for its stderr, where it may write more than a pipe holds; `end` gives "" then. before: a command that
    runs the server's (as `prlimit`). environment: besides this process's own.
    """
    ready_file = tmp_path / "ready.json"
    command = arguments("--set", "model.backend=fake", "--ready-file", str(ready_file), *extra)
    if closed:
        closing = " ".join(f"{number}>&-" for number in closed)
        command = ["sh", "-c", f'exec "$0" "$@" {closing}', *command]
    with contextlib.ExitStack() as files:
        stderr = subprocess.PIPE if log is None else files.enter_context(log.open("w"))
        process = subprocess.Popen(
            [*before, *command],
            cwd=ROOT,
            stderr=stderr,
            text=True,
            start_new_session=True,
            env=os.environ | (environment or {}),
        )
    try:
        yield ServerProcess(process, ready_file)
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def run_to_end(*extra: str, preexec: Callable[[], None] | None = None) -> tuple[int, str]:
    """(exit code, last line of stderr) of a server that cannot start. preexec: run in its process before it begins."""
    done = subprocess.run(
        arguments("--set", "model.backend=fake", *extra),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        preexec_fn=preexec,
    )
    lines = done.stderr.strip().splitlines()
    return done.returncode, lines[-1] if lines else ""
