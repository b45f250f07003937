"""For the rows about load: a real server process round a fake backend that sleeps, and callers in processes."""

import asyncio
import contextlib
import hashlib
import io
import json
import os
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import psutil
from prometheus_client.parser import text_string_to_metric_families

from ml_inference_server.benchmark.target.interrupt import Stop
from ml_inference_server.benchmark.target.server_process import LOOPBACK, ServerOptions, ServerProcess
from ml_inference_server.door.keys import CallerKey, new_token, written
from ml_inference_server.door.rights import Right
from ml_inference_server.utils.installation import child_environment
from tests.integration.server_process import ROOT
from tests.scoreboard.callers import Job
from tests.scoreboard.load_figures import LoadRun, Ran, arrivals, lag_ms
from tests.scoreboard.row import Scope

# Between the word that all are ready and the first call.
_START_MARGIN_S = 0.3
_READY_S = 60.0
_LOOK_EVERY_S = 0.5
# Before a run is repeated.
_PAUSE_S = 5.0


@dataclass(frozen=True)
class Engine:
    """A fake backend that sleeps: how long for a batch, and the batch's size in texts of `tokens` tokens."""

    base_ms: float
    per_token_us: float
    batch: int
    tokens: int = 8

    @property
    def full_batch_ms(self) -> float:
        return self.base_ms + self.per_token_us * self.batch * self.tokens / 1e3

    @property
    def texts_per_s(self) -> float:
        """What it can do, apart from the time between two batches."""
        return 1e3 * self.batch / self.full_batch_ms

    def settings(self) -> list[str]:
        name = f"fake:base_ms={self.base_ms:g},per_token_us={self.per_token_us:g}"
        return [
            f"model.name={name}",
            "model.streams=1",
            f"batching.max_batch_size={self.batch}",
            f"model.max_tokens={self.batch * self.tokens}",
            f"batching.max_batch_tokens={self.batch * self.tokens}",
        ]


# 100 texts/s, 80 ms for a full batch, 24 ms for a text alone.
ENGINE = Engine(base_ms=16, per_token_us=1000, batch=8)


class LoadServer:
    """A server that is up. key: one that may read its figures, where there are keys.

    worst_lag_ms: of its event loop, in all looks of `watch_lag` since that began.
    """

    def __init__(self, ports: dict[str, int], key: str, session: aiohttp.ClientSession) -> None:
        self.port, self.http_port, self.pid = ports["grpc_port"], ports["http_port"], ports["pid"]
        self._headers = {"authorization": f"Bearer {key}"} if key else {}
        self._session = session
        self._process = psutil.Process(self.pid)
        self.worst_lag_ms = 0.0

    @property
    def address(self) -> str:
        return f"{LOOPBACK}:{self.port}"

    def cpu_s(self) -> float:
        """User and system time of its process (/proc/PID/stat)."""
        times = self._process.cpu_times()
        return float(times.user + times.system)

    def waited_s(self) -> float:
        """How long its event loop's thread was ready to run and got no processor; Linux only."""
        path = Path(f"/proc/{self.pid}/task/{self.pid}/schedstat")
        return int(path.read_text().split()[1]) / 1e9 if path.exists() else 0.0

    async def counters(self) -> dict[str, float]:
        """Every sample of /metrics/prometheus, by names such as mlis_requests_total{method=Embed,code=OK}.

        None where it has no figures.
        """
        if not self.http_port:
            return {}
        async with self._session.get(self._url("/metrics/prometheus"), headers=self._headers) as answer:
            answer.raise_for_status()
            return samples(await answer.text())

    async def watch_lag(self) -> None:
        """Looks at the lag of its event loop until cancelled. Its window is a second: the p99 is the highest.

        Not where it has no figures.
        """
        self.worst_lag_ms = 0.0
        while self.http_port:
            await asyncio.sleep(_LOOK_EVERY_S)
            async with self._session.get(self._url("/metrics"), headers=self._headers) as answer:
                answer.raise_for_status()
                lag = (await answer.json())["loop_lag_ms"]
            if lag is not None:
                self.worst_lag_ms = max(self.worst_lag_ms, lag["p99"])

    def _url(self, path: str) -> str:
        return f"http://{LOOPBACK}:{self.http_port}{path}"


def samples(text: str) -> dict[str, float]:
    """Of Prometheus' text, by names such as mlis_requests_total{method=Embed,code=OK}."""
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = ",".join(f"{name}={value}" for name, value in sample.labels.items())
            found[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return found


@contextlib.contextmanager
def keys(count: int) -> Iterator[tuple[list[str], str]]:
    """(tokens, the setting that names their file) of callers who may all read the figures, too."""
    tokens = [new_token() for _ in range(count)]
    known = [
        CallerKey(
            name=f"caller-{place}",
            hash="sha256:" + hashlib.sha256(token.encode()).hexdigest(),
            rights=frozenset({Right.INFER, Right.METRICS}),
        )
        for place, token in enumerate(tokens)
    ]
    with tempfile.TemporaryDirectory(prefix="ml_inference_server-") as folder:
        path = Path(folder) / "keys.yaml"
        path.write_text(written(known, path))
        yield tokens, f"server.auth.keys_file={path}"


@contextlib.asynccontextmanager
async def load_server(*settings: str, key: str = "") -> AsyncIterator[LoadServer]:
    """A server process with these settings beside those of a fake backend; ended whatever happens."""
    given = [
        *("model.backend=fake", "metrics.window_s=1", "server.drain_timeout_ms=2000"),
        *settings,
    ]
    arguments = [part for setting in given for part in ("--set", setting)]
    stop = Stop()
    with tempfile.TemporaryDirectory(prefix="ml_inference_server-") as folder:
        options = ServerOptions(
            [*arguments, "--port", "0", "--http-port", "0"],
            Path(folder) / "server.log",
            _READY_S,
            2.0,
            takes_environment=False,
        )
        timeout = aiohttp.ClientTimeout(total=10)
        async with ServerProcess(options, stop) as process, aiohttp.ClientSession(timeout=timeout) as session:
            yield LoadServer(await process.start(), key, session)


def tries_of(scope: Scope) -> int:
    """How often a run may be made until the machine is calm."""
    return 1 if scope.is_quick else 4


async def run_calm(server: LoadServer, *jobs: Job, tries: int) -> LoadRun:
    """As run_jobs; again, up to `tries` times, where the machine was busy with other things: the calmest run counts.

    Which one that is depends on the machine alone, never on what the server did.
    """
    runs = []
    for number in range(tries):
        if number:
            await asyncio.sleep(_PAUSE_S)
        runs.append(await run_jobs(server, *jobs))
        if not runs[-1].is_busy:
            break
    return min(runs, key=lambda run: run.waited_share)


async def run_jobs(server: LoadServer, *jobs: Job, watch_lag: bool = True) -> LoadRun:
    """The jobs, each in a process of its own, all from the same instant on. watch_lag: at some cost to the server."""
    seconds = max(job.due_s[-1] if job.due_s else job.seconds for job in jobs)
    idle = Job(target="", name="idle", style="idle", due_s=arrivals("constant", 50, seconds, 0))
    children = [await _start() for _ in (*jobs, idle)]
    before = await server.counters()
    watching = asyncio.create_task(server.watch_lag() if watch_lag else asyncio.sleep(0))
    try:
        async with asyncio.timeout(_READY_S):
            for child, job in zip(children, (*jobs, idle), strict=True):
                child.stdin.write(job.as_json().encode() + b"\n")
            for child in children:
                if await child.stdout.readline() != b"ready\n":
                    raise RuntimeError(f"callers did not start (exit code {await child.wait()})")
        began_s = time.perf_counter() + _START_MARGIN_S
        cpu_s, waited_s, from_s = server.cpu_s(), server.waited_s(), time.perf_counter()
        for child in children:
            child.stdin.write(repr(began_s).encode() + b"\n")
        longest_s = max(job.timeout_s for job in jobs)
        async with asyncio.timeout(seconds + longest_s + _READY_S):
            *ran, idler = await asyncio.gather(
                *(_left(child, job) for child, job in zip(children, (*jobs, idle), strict=True))
            )
        cpu_s = server.cpu_s() - cpu_s
        after = await server.counters()
        waited_share = (server.waited_s() - waited_s) / (time.perf_counter() - from_s)
    finally:
        watching.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watching
        for child in children:
            if child.returncode is None:
                child.kill()
            await child.wait()
    counted = {name: value - before.get(name, 0.0) for name, value in after.items()}
    return LoadRun(ran, lag_ms(idler.records), waited_share, cpu_s, seconds, counted, server.worst_lag_ms)


async def _start() -> Any:
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.scoreboard.callers"),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        cwd=ROOT,
        env={**child_environment(), "PYTHONPATH": os.pathsep.join((str(ROOT),))},
        start_new_session=True,
    )


async def _left(child: Any, job: Job) -> Ran:
    if not (line := await child.stdout.readline()):
        raise RuntimeError(f"callers ended without their records (exit code {await child.wait()})")
    head = json.loads(line)
    data = await child.stdout.readexactly(head["bytes"])
    await child.wait()
    return Ran(job, np.load(io.BytesIO(data), allow_pickle=False), head["not_serving"], head["cpu_s"])
