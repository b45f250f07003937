"""Row G8: how many calls a process can take, where the model costs nothing."""

import asyncio
import contextlib
import itertools
import json
import statistics
import sys
from collections.abc import AsyncIterator

import aiohttp

from ml_inference_server.utils.installation import child_environment
from tests.integration.server_process import ROOT
from tests.scoreboard.callers import Job
from tests.scoreboard.load_figures import Machine
from tests.scoreboard.load_kit import LoadServer, run_jobs
from tests.scoreboard.row import Figure, Row, Scope


@contextlib.asynccontextmanager
async def _counterpart(loop: str, kind: str) -> AsyncIterator[dict[str, int]]:
    """Ports and process id of tests.scoreboard.echo."""
    child = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.scoreboard.echo", loop, kind),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        cwd=ROOT,
        env={**child_environment(), "PYTHONPATH": str(ROOT)},
        start_new_session=True,
    )
    assert child.stdout is not None
    try:
        async with asyncio.timeout(60):
            ports: dict[str, int] = json.loads(await child.stdout.readline())
        yield ports
    finally:
        child.kill()
        await child.wait()


async def call_ceiling(scope: Scope) -> Figure:
    rounds, seconds = (1, 2.0) if scope.is_quick else (5, 5.0)
    rates: dict[str, list[float]] = {}
    cpu_us: dict[str, list[float]] = {}
    machine = Machine()
    broken = 0
    timeout = aiohttp.ClientTimeout(total=10)
    async with contextlib.AsyncExitStack() as stack:
        session = await stack.enter_async_context(aiohttp.ClientSession(timeout=timeout))
        servers: dict[str, LoadServer] = {}
        for kind, loop in itertools.product(("echo", "server"), ("asyncio", "uvloop")):
            ports = await stack.enter_async_context(_counterpart(loop, kind))
            servers[f"{kind}, {loop}"] = LoadServer(ports, "", session)
        for round_ in range(rounds):
            scope.tell(round_, rounds)
            for name, server in servers.items():
                jobs = [
                    Job(
                        target=server.address,
                        name=f"ceiling{round_}-{part}",
                        style="any answer" if name.startswith("echo") else "once",
                        callers=16,
                        channels=2,
                        seconds=seconds,
                    )
                    for part in range(2)
                ]
                run = await run_jobs(server, *jobs)
                machine.saw(run)
                answered = sum(len(ran.ok) for ran in run.ran)
                broken += sum(len(ran.records) for ran in run.ran) - answered
                rates.setdefault(name, []).append(answered / seconds)
                cpu_us.setdefault(name, []).append(1e6 * run.server_cpu_s / answered)
    scope.tell(rounds, rounds)
    told = ", ".join(f"{name} {statistics.median(values):.0f}" for name, values in rates.items())
    return Figure(
        text=f"calls/s: {told}",
        passed=None if not broken else False,
        note="Reported only. The callers use the same processors, so it is what is left for the server that counts.",
        details={
            **{f"calls_per_s, {name}": statistics.median(values) for name, values in rates.items()},
            **{f"server_cpu_us_per_call, {name}": statistics.median(values) for name, values in cpu_us.items()},
            "not_answered": broken,
            **machine.details(),
        },
    )


ROWS: tuple[Row, ...] = (
    Row(
        key="G8",
        title="Call ceiling: an echo, and our server with validation, on both event loops",
        pass_line="reported only",
        run=call_ceiling,
    ),
)
