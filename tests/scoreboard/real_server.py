"""A real server process for rows of the scoreboard: its figures, what it holds while nobody calls, and its log."""

import asyncio
import contextlib
import json
import os
import signal
import sys
import urllib.request
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
from prometheus_client.parser import text_string_to_metric_families

ROOT = Path(__file__).resolve().parents[2]
SERVER = "ml_inference_server.main"
_LOOK_EVERY_S = 0.05
_STOP_S, _REST_S = 60.0, 45.0
# Looks at a server at rest, of which the least counts: what is just being closed is no part of it.
_LOOKS = 20

# Lines of a log that only a fault in the server leaves (V14 of reliability.md 4.3).
FAULT_LINES = (
    "never retrieved",
    "was destroyed but it is pending",
    "Abort error unexpectedly suppressed",
    "InvalidStateError",
    "BlockingIOError",
    "unexpected error in",
    "bug of the scheduler",
    "batching policy failed",
)

_TASKS = "mlis_event_loop_tasks"
IN_FLIGHT = ("mlis_in_flight_requests", "mlis_queue_texts", "mlis_queue_tokens", "mlis_in_flight_batches")
# (name, labels) -> value
Scrape = Mapping[tuple[str, tuple[tuple[str, str], ...]], float]


class ServerEnded(Exception):
    """The server is not there any more, or never was."""


# Threads of gRPC's own pool, by the name that it gives them. It grows with the load, shrinks slowly, and is bounded.
_POOL = "event_engine"
_MOST_POOL_THREADS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """What the server holds at one moment. threads: without those of gRPC's pool, which breathes."""

    descriptors: int
    threads: int
    pool_threads: int
    tasks: int
    children: int

    def beyond(self, base: "Held") -> list[str]:
        """What is more than in `base`, in words; of the pool's threads, what is more than it may have."""
        limits = asdict(base) | {"pool_threads": _MOST_POOL_THREADS}
        return [f"{name}: {now}, {limits[name]} before" for name, now in asdict(self).items() if now > limits[name]]


@dataclass(frozen=True, slots=True)
class RealServer:
    process: asyncio.subprocess.Process
    grpc_port: int
    http_port: int
    log: Path
    token: str = ""

    @property
    def ps(self) -> psutil.Process:
        return psutil.Process(self.process.pid)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.grpc_port}"

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http_port}"

    @property
    def headers(self) -> dict[str, str]:
        """Of whoever asks for figures."""
        return {"Authorization": f"Bearer {self.token}"} if self.token else {}

    async def scrape(self, *names: str) -> Scrape:
        """What /metrics says to Prometheus, over a connection of its own. names: of metrics, if not all."""
        return parse(await asyncio.to_thread(self._get, "/metrics/prometheus"), names)

    def _get(self, path: str) -> str:
        request = urllib.request.Request(f"{self.url}{path}", headers=self.headers)  # noqa: S310 - it is ours
        with urllib.request.urlopen(request, timeout=30) as answer:  # noqa: S310
            body: bytes = answer.read()
        return body.decode()

    async def at_rest(self, base: Held | None = None) -> Held:
        """What it holds once nothing is in flight: the least of some looks.

        base: looks go on until it holds no more than that, for most of a minute at most.
        """
        least: Held | None = None
        async with asyncio.timeout(_REST_S):
            while in_flight(await self.scrape(*IN_FLIGHT)):  # noqa: ASYNC110 - the state of another process
                await asyncio.sleep(_LOOK_EVERY_S)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_REST_S):
                for look in range(10**9):
                    least = _least(least, await self._held())
                    if look >= _LOOKS and (base is None or not least.beyond(base)):
                        break
                    await asyncio.sleep(_LOOK_EVERY_S)
        assert least is not None
        return least

    async def _held(self) -> Held:
        figures = await self.scrape(_TASKS)
        threads = self._threads()
        return Held(
            descriptors=self.ps.num_fds(),
            threads=threads.total() - threads[_POOL],
            pool_threads=threads[_POOL],
            tasks=int(figures[_TASKS, ()]),
            children=len(self.ps.children(recursive=True)),
        )

    def _threads(self) -> Counter[str]:
        """By name."""
        found = Counter[str]()
        for path in Path(f"/proc/{self.process.pid}/task").iterdir():
            with contextlib.suppress(OSError):  # it ends while it is looked at
                found[(path / "comm").read_text().strip()] += 1
        return found

    def holds(self) -> str:
        """What its descriptors and threads are, as the kernel names them."""
        files = Counter(f"TCP {each.status}" for each in self.ps.net_connections("tcp"))
        for path in Path(f"/proc/{self.process.pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                files[path.readlink().name.partition(":")[0]] += 1
        return f"descriptors {dict(files)}, threads {dict(self._threads())}"

    async def stop(self) -> int:
        """SIGTERM, and the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return await asyncio.wait_for(self.process.wait(), _STOP_S)

    def fault_lines(self) -> list[str]:
        """Lines of the log that only a fault leaves, the first twenty of them."""
        found = []
        with self.log.open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                if any(fault in line for fault in FAULT_LINES):
                    found.append(line.strip()[:300])
                if len(found) == 20:
                    break
        return found


def _least(one: Held | None, other: Held) -> Held:
    if one is None:
        return other
    ours, others = asdict(one), asdict(other)
    return Held(**{name: min(value, others[name]) for name, value in ours.items()})


def parse(text: str, names: Sequence[str] = ()) -> Scrape:
    """names: of the samples that are asked for; none: all. The library's parser takes its time for each line."""
    if names:
        text = "".join(f"{line}\n" for line in text.splitlines() if line.startswith(tuple(names)))
    families = text_string_to_metric_families(text)
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for family in families for s in family.samples}


def sum_of(figures: Scrape, name: str) -> int:
    """Over all labels."""
    return int(sum(value for (each, _), value in figures.items() if each == name))


def in_flight(figures: Scrape) -> int:
    """Requests, and texts that wait or run."""
    return sum(sum_of(figures, name) for name in IN_FLIGHT)


def environment(**more: str) -> dict[str, str]:
    """For `python -P -m` of a module of ours."""
    return {**os.environ, "PYTHONPATH": str(ROOT), **more}


@contextlib.asynccontextmanager
async def real_server(
    folder: Path, *settings: str, module: str = SERVER, token: str = "", **more: str
) -> AsyncIterator[RealServer]:
    """One on free ports with the fake backend, unless `settings` ("key=value") say otherwise; it is always ended.

    module: what is run in place of the server's own. token: for its figures. more: of the environment.
    """
    ready_file, log = folder / "ready.json", folder / "server.log"
    ready_file.unlink(missing_ok=True)
    command = [sys.executable, "-P", "-m", module, "--port", "0", "--http-port", "0", "--ready-file", str(ready_file)]
    command += ["--log-format", "json"]
    for setting in ("model.backend=fake", *settings):
        command += ["--set", setting]
    with log.open("wb") as file:
        process = await asyncio.create_subprocess_exec(
            *command,
            cwd=ROOT,
            env=environment(**more),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=file,
            start_new_session=True,
        )
    try:
        while not ready_file.exists():
            if process.returncode is not None:
                raise ServerEnded(f"the server ended with {process.returncode}: {log.read_text()[-2000:]}")
            await asyncio.sleep(_LOOK_EVERY_S)
        ports = json.loads(ready_file.read_text())
        yield RealServer(process, ports["grpc_port"], ports["http_port"], log, token)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()
