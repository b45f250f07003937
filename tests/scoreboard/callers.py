"""Callers in a process of their own: `python -m tests.scoreboard.callers` (load_kit.py starts it).

It reads a job as one JSON line, connects, answers `ready`, reads the common start instant (perf_counter), and at the
end writes one JSON line and its records. Every answer is compared with what the fake backend owes for its texts.
"""

import asyncio
import functools
import io
import itertools
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import aiohttp
import grpc
import numpy as np
from grpc_health.v1 import health_pb2, health_pb2_grpc

from ml_inference_server.api import AsyncClient, ServerError
from ml_inference_server.backends.fake import fake_embedding
from ml_inference_server.benchmark.load.channel import CHANNEL_OPTIONS, OK, TimedReply
from ml_inference_server.benchmark.load.loops import ClosedLoop, FinishedRequest, OpenLoop, Send, event_loop
from ml_inference_server.proto import inference_pb2 as pb
from ml_inference_server.proto import inference_pb2_grpc as rpc

Style = Literal["once", "any answer", "naive", "our client", "health", "readyz", "idle"]

_NAIVE_ATTEMPTS = 4
_WATCHERS = 64
_WRONG = TimedReply("INVALID_RESPONSE", "not what the fake backend owes for these texts")
_NOT_SERVING = TimedReply("INVALID_RESPONSE", "not serving")


@dataclass(frozen=True, kw_only=True)
class Job:
    """What the callers of one process do.

    target: host:port, of gRPC or for `readyz` of HTTP. name: of all jobs of a run, none alike, as texts begin with it.
    due_s: when calls are sent; without it each of `callers` calls again as soon as it is answered, for `seconds`.
    style: `once` asks once, as does `any answer`, which does not look at what comes back; `naive` asks three times more
    at once where it was refused; `our client` is AsyncClient; `health` and `readyz` ask whether the server is ready;
    `idle` sends nothing: how late it is, is the machine's doing. channels: connections, of which each caller uses one;
    keys: of these connections in turn.
    """

    target: str
    name: str
    style: Style
    due_s: list[float] = field(default_factory=list)
    callers: int = 0
    seconds: float = 0.0
    channels: int = 1
    keys: list[str] = field(default_factory=list)
    timeout_s: float = 60.0
    texts: int = 1
    words: int = 6
    priority: str = ""

    def as_json(self) -> str:
        return json.dumps(asdict(self))

    def texts_of(self, index: int) -> list[str]:
        """Of call number `index`: all different, each of `words` words."""
        rest = " ".join(["word"] * (self.words - 1))
        return [f"{self.name}-{index}-{i} {rest}" for i in range(self.texts)]


def _judged(texts: Sequence[str], rows: Any) -> TimedReply:
    return OK if np.array_equal(rows, np.stack([fake_embedding(text) for text in texts])) else _WRONG


def _failed(error: BaseException) -> TimedReply:
    if isinstance(error, grpc.aio.AioRpcError):
        return TimedReply(error.code().name, str(error.details() or "")[:300])
    if isinstance(error, ServerError):
        return TimedReply(error.code, str(error)[:300])
    return TimedReply("CLIENT_ERROR", f"{type(error).__name__}: {error}"[:300])


class Callers:
    """The connections of a job, and how one call is sent. not_serving: what the health streams said of that kind."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.not_serving = 0
        self._tasks: list[asyncio.Task[None]] = []
        self._closing: list[Any] = []
        self._metadata: list[tuple[tuple[str, str], ...]] = [
            (("authorization", f"Bearer {key}"),) for key in job.keys
        ] or [()]

    async def connect(self) -> Send:
        job = self.job
        if job.style == "idle":
            return self._clocked(self._nothing)
        if job.style == "readyz":
            session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=job.timeout_s))
            self._closing.append(session)
            return self._clocked(functools.partial(self._readyz, session))
        if job.style == "our client":
            keys: list[str | None] = [*job.keys] or [None]
            clients = [
                AsyncClient(job.target, timeout_s=job.timeout_s, api_key=keys[i % len(keys)])
                for i in range(job.channels)
            ]
            self._closing += clients
            await asyncio.gather(*(client.info() for client in clients))
            return self._clocked(functools.partial(self._by_our_client, clients))
        options = [*CHANNEL_OPTIONS, ("grpc.use_local_subchannel_pool", 1)]
        channels = [grpc.aio.insecure_channel(job.target, options=options) for _ in range(job.channels)]
        self._closing += channels
        await asyncio.gather(*(channel.channel_ready() for channel in channels))
        if job.style == "health":
            stub = health_pb2_grpc.HealthStub(channels[0])
            self._tasks = [asyncio.create_task(self._watch(stub)) for _ in range(_WATCHERS)]
            return self._clocked(functools.partial(self._health, stub))
        stubs: list[Any] = [rpc.InferenceServiceStub(channel) for channel in channels]
        return self._clocked(functools.partial(self._embed, stubs))

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for each in self._closing:
            await each.close()

    def _clocked(self, ask: Any) -> Send:
        async def send(index: int, due_s: float | None) -> FinishedRequest:
            sent_s = time.perf_counter()
            try:
                done_s, reply = await ask(index)
            except Exception as error:
                done_s, reply = time.perf_counter(), _failed(error)
            return FinishedRequest(sent_s if due_s is None else due_s, sent_s, done_s, reply)

        return send

    async def _nothing(self, _: int) -> tuple[float, TimedReply]:
        return time.perf_counter(), OK

    async def _embed(self, stubs: Sequence[Any], index: int) -> tuple[float, TimedReply]:
        job = self.job
        texts = job.texts_of(index)
        request = pb.EmbedRequest(texts=texts)
        place = index % len(stubs)
        metadata = self._metadata[place % len(self._metadata)]
        if job.priority:
            metadata = (*metadata, ("x-priority", job.priority))
        ends_at = time.monotonic() + job.timeout_s
        attempts = _NAIVE_ATTEMPTS if job.style == "naive" else 1
        while True:
            attempts -= 1
            try:
                left_s = max(0.0, ends_at - time.monotonic())
                answer = await stubs[place].Embed(request, timeout=left_s, metadata=metadata)
                break
            except grpc.aio.AioRpcError as error:
                is_refused = error.code() in (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNAVAILABLE)
                if not attempts or not is_refused:
                    raise
        done_s = time.perf_counter()
        if job.style == "any answer":
            return done_s, OK
        return done_s, _judged(texts, np.frombuffer(answer.embeddings, "<f4").reshape(answer.count, answer.dimension))

    async def _by_our_client(self, clients: Sequence[AsyncClient], index: int) -> tuple[float, TimedReply]:
        texts = self.job.texts_of(index)
        rows = await clients[index % len(clients)].embed(texts)
        done_s = time.perf_counter()
        return done_s, _judged(texts, rows)

    async def _health(self, stub: Any, _: int) -> tuple[float, TimedReply]:
        answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=self.job.timeout_s)
        is_up = answer.status == health_pb2.HealthCheckResponse.SERVING
        return time.perf_counter(), OK if is_up else _NOT_SERVING

    async def _watch(self, stub: Any) -> None:
        async for update in stub.Watch(health_pb2.HealthCheckRequest()):
            self.not_serving += update.status != health_pb2.HealthCheckResponse.SERVING

    async def _readyz(self, session: aiohttp.ClientSession, _: int) -> tuple[float, TimedReply]:
        async with session.get(f"http://{self.job.target}/readyz") as answer:
            return time.perf_counter(), OK if answer.status == 200 else _NOT_SERVING


async def _alive() -> bool:
    return True


async def _run(callers: Callers, send: Send, began_s: float) -> Any:
    job = callers.job
    if job.due_s:
        loop = OpenLoop(send, _alive, lambda _: None)
        await asyncio.sleep(began_s - time.perf_counter())
        await loop.run(job.due_s, itertools.count(), began_s)
        return loop.ledger.records()
    # Each caller keeps its connection, so it needs a loop of its own.
    loops = [ClosedLoop(send, _alive, lambda _: None) for _ in range(job.callers)]
    await asyncio.sleep(began_s - time.perf_counter())
    for each in loops:
        each.ledger.began_s = began_s
    numbers = (itertools.count(place, job.callers) for place in range(job.callers))
    await asyncio.gather(
        *(each.run(0, 1, duration_s=job.seconds, indexes=own) for each, own in zip(loops, numbers, strict=True))
    )
    return np.concatenate([each.ledger.records() for each in loops])


async def main() -> None:
    loop = asyncio.get_running_loop()
    callers = Callers(Job(**json.loads(await loop.run_in_executor(None, sys.stdin.readline))))
    try:
        send = await callers.connect()
        print("ready", flush=True)
        began_s = float(await loop.run_in_executor(None, sys.stdin.readline))
        cpu_s = time.process_time()
        records = await _run(callers, send, began_s)
        cpu_s = time.process_time() - cpu_s
    finally:
        await callers.close()
    buffer = io.BytesIO()
    np.save(buffer, records, allow_pickle=False)
    head = {"bytes": len(buffer.getvalue()), "not_serving": callers.not_serving, "cpu_s": cpu_s}
    sys.stdout.buffer.write(json.dumps(head).encode() + b"\n" + buffer.getvalue())
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=event_loop) as runner:
        runner.run(main())
