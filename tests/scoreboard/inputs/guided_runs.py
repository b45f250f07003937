"""X3: each target of coverage-guided fuzzing in a process of its own, and what libFuzzer says of it at the end."""

import asyncio
import importlib.util
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.integration.server_process import ROOT
from tests.scoreboard.row import NotRun

TARGETS = ("messages", "bodies", "frames", "settings")
CORPUS = ROOT / "tests" / "fuzz" / "corpus"
AT_ONCE = 2
# Of one input: what takes longer hangs, and what takes more runs away.
_UNIT_S, _MOST_MB, _MOST_BYTES = 20, 2048, 4096
# To start: every module of the server is read and changed first.
_GRACE_S = 300.0


@dataclass(frozen=True)
class GuidedRun:
    """crash: empty, or what libFuzzer and Python said of it, with the bytes."""

    target: str
    executions: int
    features: int
    crash: str


def check_installed() -> None:
    """NotRun without atheris, which is nobody's dependency: its wheels are for some versions of Python only."""
    if importlib.util.find_spec("atheris") is None:
        raise NotRun("atheris is not installed: pip install atheris")


async def run_all(seconds: int, seed: int, tell: Callable[[int, int], None]) -> list[GuidedRun]:
    """Each for so many seconds, AT_ONCE at a time."""
    check_installed()
    gate, done = asyncio.Semaphore(AT_ONCE), 0

    async def one(target: str) -> GuidedRun:
        nonlocal done
        async with gate:
            found = await _run(target, seconds, seed)
        done += 1
        tell(done, len(TARGETS))
        return found

    return list(await asyncio.gather(*map(one, TARGETS)))


async def _run(target: str, seconds: int, seed: int) -> GuidedRun:
    folder = Path(tempfile.mkdtemp())
    try:
        return await _run_in(folder, target, seconds, seed)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


async def _run_in(folder: Path, target: str, seconds: int, seed: int) -> GuidedRun:
    new, crashes = folder / "new", folder / "crashes"
    for each in (new, crashes):
        each.mkdir()
    options = {
        "max_total_time": seconds,
        "seed": seed % 2**32 or 1,  # 0 is another one at each run
        "timeout": _UNIT_S,
        "rss_limit_mb": _MOST_MB,
        "max_len": _MOST_BYTES,
        "print_final_stats": 1,
        "artifact_prefix": f"{crashes}/",
    }
    command = [
        sys.executable,
        "-m",
        "tests.fuzz.guided",
        target,
        *(f"-{name}={value}" for name, value in options.items()),
    ]
    search = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    process = await asyncio.create_subprocess_exec(
        *command,
        str(new),
        str(CORPUS / target),
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": search},
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(seconds + _UNIT_S + _GRACE_S):
            _, said = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    return _read(target, said.decode(errors="replace"), process.returncode or 0, crashes)


def _read(target: str, said: str, code: int, crashes: Path) -> GuidedRun:
    executions = re.search(r"stat::number_of_executed_units:\s+(\d+)", said)
    features = re.findall(r" ft: (\d+)", said)
    crash = ""
    if code:
        inputs = " ".join(path.read_bytes()[:200].hex() for path in sorted(crashes.iterdir()))
        raised = re.findall(r"^[A-Z]\w*(?:Error|Exception|Warning)\b.*$", said, re.MULTILINE)
        why = raised[-1][:200] if raised else " ".join(said.split())[-200:]
        crash = f"{target}: exit code {code}, {why}; bytes {inputs or 'unknown'}"
    return GuidedRun(target, int(executions[1]) if executions else 0, int(features[-1]) if features else 0, crash)
