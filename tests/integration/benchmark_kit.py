"""What the tests of the benchmark share: a scripted server, a small dataset, a client process."""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SCRIPTED = (sys.executable, str(Path(__file__).with_name("scripted_server.py")))
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}


@dataclass
class Scripted:
    process: "subprocess.Popen[str]"
    port: int

    def line(self) -> str:
        """The next line that the server prints; waits for it."""
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()


@contextlib.contextmanager
def scripted(**script: Any) -> Iterator[Scripted]:
    process = subprocess.Popen(
        [*SCRIPTED, json.dumps(script)], stdout=subprocess.PIPE, text=True, env=ENVIRONMENT, cwd=ROOT
    )
    with process:
        try:
            assert process.stdout is not None
            yield Scripted(process, json.loads(process.stdout.readline())["grpc_port"])
        finally:
            process.kill()


def python(*arguments: str, cwd: Path) -> "subprocess.Popen[str]":
    """A Python process of ours, its output captured, in a session of its own as a terminal would give it."""
    return subprocess.Popen(
        [sys.executable, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
        cwd=cwd,
        start_new_session=True,
    )


def write_pairs(path: Path, queries: int = 10, passages: int = 6) -> Path:
    """A dataset in the four-column layout; all texts differ."""
    path.write_text(
        "".join(
            f"{q}\t{q * 100 + p}\tquestion number {q}\tanswer {p} to question {q}\n"
            for q in range(queries)
            for p in range(passages)
        )
    )
    return path
