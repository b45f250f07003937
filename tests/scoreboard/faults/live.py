"""A real server under faults: asked, watched, and looked at again when they are over."""

import asyncio
import contextlib
import itertools
import json
import logging
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from grpc_health.v1 import health_pb2, health_pb2_grpc

from ml_inference_server.backends.fake import fake_embedding
from ml_inference_server.proto import inference_pb2 as pb
from ml_inference_server.proto import inference_pb2_grpc as rpc
from tests.faults.processes import engine_pids
from tests.integration.server_process import ServerProcess, server_process

SERVING = health_pb2.HealthCheckResponse.SERVING
FAULT_WORDS = ("--set", "server.enable_test_faults=true")
ENGINE = (*FAULT_WORDS, "--set", "model.process_per_stream=true", "--set", "model.streams=1")
# Nothing of a sound server takes longer; a condition that does not hold by then fails the row.
LIMIT_S = 60.0
_LOOK_S = 0.005
_PIPED = ("bash", "-c", 'log=$1; shift; exec "$@" 2> >(exec cat >> "$log")', "sh")
_numbers = itertools.count()


class WrongAnswer(AssertionError):
    """An answer that is not that of its own text."""


async def until(condition: Callable[[], bool], what: str, limit_s: float = LIMIT_S) -> None:
    """TimeoutError that names `what` if it does not hold in time."""
    give_up_at = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > give_up_at:
            raise TimeoutError(f"it did not come in {limit_s:.0f} s: {what}")
        await asyncio.sleep(_LOOK_S)


async def until_async(condition: Callable[[], Awaitable[bool]], what: str, limit_s: float = LIMIT_S) -> None:
    give_up_at = time.monotonic() + limit_s
    while not await condition():
        if time.monotonic() > give_up_at:
            raise TimeoutError(f"it did not come in {limit_s:.0f} s: {what}")
        await asyncio.sleep(_LOOK_S)


def new_text(words: int = 3) -> str:
    """One that nobody has sent before."""
    return " ".join(f"w{next(_numbers)}" for _ in range(words))


async def asked(stub: Any, texts: Sequence[str], timeout_s: float = LIMIT_S) -> None:
    """One call; WrongAnswer unless each row is that of its own text, AioRpcError where it is refused."""
    reply = await stub.Embed(pb.EmbedRequest(texts=texts), timeout=timeout_s)
    rows = np.frombuffer(reply.embeddings, "<f4").reshape(reply.count, reply.dimension)
    expected = np.stack([fake_embedding(text) for text in texts])
    if rows.shape != expected.shape or not np.array_equal(rows, expected):
        raise WrongAnswer(f"{len(texts)} texts got rows that are not theirs")


async def ending(call: Awaitable[None]) -> str:
    """How it ended: OK, or the name of its code. A wrong answer is no end: it is raised."""
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return str(error.code().name)
    return "OK"


@dataclass
class LoopLag:
    """How late this process's own loop was: what a limit in milliseconds has to be measured against."""

    worst_ms: float = 0.0

    async def run(self, step_s: float = 0.01) -> None:
        loop = asyncio.get_running_loop()
        while True:
            before = loop.time()
            await asyncio.sleep(step_s)
            self.worst_ms = max(self.worst_ms, 1000 * (loop.time() - before - step_s))


@contextlib.asynccontextmanager
async def loop_lag() -> AsyncIterator[LoopLag]:
    lag = LoopLag()
    task = asyncio.create_task(lag.run())
    try:
        yield lag
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@contextlib.asynccontextmanager
async def without_log() -> AsyncIterator[None]:
    """Of a server in this process, whose lines would stand between those of the row."""
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


@dataclass
class Neighbours:
    """Callers that have no fault of their own and call again as soon as they are answered.

    ends: by code. Every answer was that of its own text, or the row fails.
    """

    stub: Any
    ends: Counter[str] = field(default_factory=Counter)
    is_over: bool = False
    pause_s: float = 0.002

    async def call_until_over(self) -> None:
        while not self.is_over:
            self.ends[await ending(asked(self.stub, [new_text()]))] += 1
            await asyncio.sleep(self.pause_s)

    @property
    def harmed(self) -> int:
        return self.ends.total() - self.ends["OK"]


@dataclass
class Live:
    """log: what the server has written to its stderr."""

    process: ServerProcess
    ports: dict[str, int]
    channel: grpc.aio.Channel
    log: Path
    folder: Path

    def __post_init__(self) -> None:
        self.stub: Any = rpc.InferenceServiceStub(self.channel)

    @property
    def pid(self) -> int:
        return self.ports["pid"]

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.ports['grpc_port']}"

    def engines(self) -> list[int]:
        return engine_pids(self.pid)

    async def ask(self, *texts: str, timeout_s: float = LIMIT_S) -> None:
        await asked(self.stub, texts or [new_text()], timeout_s)

    async def ask_until_answered(self) -> int:
        """As a client that may repeat what is UNAVAILABLE: how often it was refused before."""
        for refusals in itertools.count():
            end = await ending(asked(self.stub, [new_text()]))
            if end == "OK":
                return refusals
            if end != "UNAVAILABLE":
                raise AssertionError(f"a call without a fault of its own ended with {end}")
            await asyncio.sleep(_LOOK_S)
        raise AssertionError

    def asking(self, *texts: str, timeout_s: float = LIMIT_S) -> asyncio.Task[str]:
        """A call that goes on by itself; its result is how it ended."""
        return asyncio.create_task(ending(asked(self.stub, texts, timeout_s)))

    async def get(self, path: str) -> bytes:
        def read() -> bytes:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.ports['http_port']}{path}", timeout=10) as reply:
                return bytes(reply.read())

        return await asyncio.to_thread(read)

    async def figures(self) -> dict[str, Any]:
        return json.loads(await self.get("/metrics"))  # type: ignore[no-any-return]

    async def restarts(self) -> int:
        """Of the engine, as the server counts them."""
        page = (await self.get("/metrics/prometheus")).decode()
        return round(float(page.split("\nmlis_engine_restarts_total ")[1].split()[0]))

    async def holding(self, milliseconds: int) -> asyncio.Task[str]:
        """A call whose batch runs now, and for so long; longer where it had ended before anybody could see that."""
        while True:
            call = self.asking(f"!slow:{milliseconds} {new_text()}")
            while not call.done():
                if (await self.figures())["queue"]["batches_in_flight"] and not call.done():
                    return call
            if await call != "OK":
                raise AssertionError(f"a batch that takes {milliseconds} ms ended with {await call}")
            milliseconds *= 2

    async def until_batches_run(self, count: int = 1) -> None:
        async def do_run() -> bool:
            return bool((await self.figures())["queue"]["batches_in_flight"] >= count)

        await until_async(do_run, "a batch runs")

    async def until_serving(self) -> None:
        async for reply in health_pb2_grpc.HealthStub(self.channel).Watch(
            health_pb2.HealthCheckRequest(), timeout=LIMIT_S
        ):
            if reply.status == SERVING:
                return

    async def permits_left_over(self) -> int:
        """What is still held once nobody calls: requests in flight, and texts and tokens in the queue."""

        async def at_rest() -> bool:
            found = await self.figures()
            left.update(
                requests=sum(found["in_flight"].values()),
                texts=found["queue"]["texts"],
                tokens=found["queue"]["tokens"],
            )
            return not left.total()

        left: Counter[str] = Counter()
        with contextlib.suppress(TimeoutError):
            await until_async(at_rest, "rest", limit_s=10)
        return left.total()

    def logged(self, words: str) -> int:
        return self.log.read_text(errors="replace").count(words)

    @contextlib.asynccontextmanager
    async def neighbours(self, count: int = 4) -> AsyncIterator[Neighbours]:
        """They call on connections of their own until the block ends; then the last ones are answered."""
        async with grpc.aio.insecure_channel(self.address, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
            calling = Neighbours(rpc.InferenceServiceStub(channel))
            tasks = [asyncio.create_task(calling.call_until_over()) for _ in range(count)]
            try:
                yield calling
            finally:
                calling.is_over = True
                await asyncio.gather(*tasks)


@contextlib.asynccontextmanager
async def live_server(*extra: str, piped: bool = False, **how: Any) -> AsyncIterator[Live]:
    """A server process that serves. piped: its stderr is a pipe, as under a service manager, that somebody reads.

    how: as `server_process` takes it.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        log: Path = how.pop("log", folder / "log")
        if piped:
            how["before"] = (*_PIPED, str(log), *how.get("before", ()))
        with server_process(folder, *extra, log=None if piped else log, **how) as process:
            ports = await asyncio.to_thread(process.ready)
            async with grpc.aio.insecure_channel(f"127.0.0.1:{ports['grpc_port']}") as channel:
                yield Live(process, ports, channel, log, folder)
