"""Fixtures that several folders of tests use: a loop with a jumping clock, and a real server round the fake backend."""

import asyncio
import contextlib
import functools
import logging
import selectors
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any, ParamSpec

import grpc
import pytest

from ml_inference_server.backends.base import Backend
from ml_inference_server.backends.fake import FakeBackend
from ml_inference_server.backends.startup.resolve import resolve
from ml_inference_server.backends.startup.start import Described
from ml_inference_server.metrics.registry import Metrics
from ml_inference_server.proto import inference_pb2_grpc as rpc
from ml_inference_server.server.lifecycle import attach
from ml_inference_server.server.rpc.grpc_server import GrpcServer, start_grpc
from ml_inference_server.server.rpc.method_handlers import Shell
from ml_inference_server.server.rpc.native import NativeServicer
from ml_inference_server.server.state import ServerState
from ml_inference_server.server.workers import ThreadWorker
from ml_inference_server.utils.config import Settings

P = ParamSpec("P")


class _JumpingSelector(selectors.DefaultSelector):
    """Instead of sleeping it moves the clock; with nothing left to wake the loop it reports the deadlock."""

    now = 1000.0

    def select(self, timeout: float | None = None) -> Any:
        ready = super().select(0)
        if not ready:
            if timeout is None:
                raise RuntimeError("deadlock: nothing is scheduled and nothing can wake the loop")
            self.now += timeout
        return ready


class JumpingLoop(asyncio.SelectorEventLoop):
    """An event loop on which an hour of waiting takes no time."""

    def __init__(self) -> None:
        self.jumping = _JumpingSelector()
        super().__init__(self.jumping)

    def time(self) -> float:
        return self.jumping.now


def virtual_time(test: Callable[P, Coroutine[Any, Any, None]]) -> Callable[P, None]:
    """Run an async test on a JumpingLoop."""

    @functools.wraps(test)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        with asyncio.Runner(loop_factory=JumpingLoop) as runner:
            runner.run(test(*args, **kwargs))

    return run


@pytest.fixture(autouse=True)
def logging_as_at_the_start() -> None:
    """Libraries change the logging of the whole process; a test must not depend on which ones ran before it."""
    root = logging.getLogger()
    root.setLevel(logging.WARNING)
    logging.disable(logging.NOTSET)
    for handler in root.handlers:
        handler.setLevel(logging.NOTSET)
    for name, logger in list(root.manager.loggerDict.items()):
        if name.startswith("ml_inference_server") and isinstance(logger, logging.Logger):
            logger.disabled, logger.propagate = False, True
            logger.setLevel(logging.NOTSET)


@dataclass(kw_only=True)
class RunningServer:
    """A real gRPC server on loopback and a real channel to it."""

    state: ServerState
    metrics: Metrics
    grpc_server: GrpcServer
    channel: grpc.aio.Channel
    stub: Any

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.grpc_server.port}"


@dataclass(kw_only=True)
class FakeServer(RunningServer):
    """One whose model is the fake backend."""

    backend: FakeBackend


@contextlib.asynccontextmanager
async def serving(settings: Settings, described: Described, backend: Backend) -> AsyncIterator[RunningServer]:
    """A server round a loaded backend."""
    state, metrics = ServerState(settings), Metrics(window_s=30)
    shell = Shell(metrics, default_timeout_s=settings.server.default_timeout_ms / 1000, prefix="test")
    grpc_server = await start_grpc(settings.server, NativeServicer(state, metrics, shell))
    attach(state, described, ThreadWorker(backend), metrics)
    await grpc_server.set_serving(True)
    channel = grpc.aio.insecure_channel(
        f"127.0.0.1:{grpc_server.port}", options=[("grpc.max_receive_message_length", 64 << 20)]
    )
    try:
        yield RunningServer(
            state=state,
            metrics=metrics,
            grpc_server=grpc_server,
            channel=channel,
            stub=rpc.InferenceServiceStub(channel),
        )
    finally:
        state.draining.set()
        await channel.close()
        if state.batcher is not None and state.service is not None:
            state.batcher.close()
            state.service.close()
        await grpc_server.server.stop(None)


@contextlib.asynccontextmanager
async def fake_server(**sections: dict[str, Any]) -> AsyncIterator[FakeServer]:
    """Settings by section, for instance fake_server(batching={"max_batch_size": 4})."""
    sections.setdefault("model", {})
    sections["model"].setdefault("backend", "fake")
    sections.setdefault("server", {}).setdefault("port", 0)
    settings = Settings.model_validate(sections)
    resolution = resolve(settings.model)
    backend = FakeBackend(resolution.model)
    backend.load_model()
    backend.keep_log()
    described = Described(resolution=resolution, info=backend.info, tokenizer=backend.tokenizer)
    if settings.server.enable_test_faults:
        backend.enable_faults()
    async with serving(settings, described, backend) as running:
        try:
            yield FakeServer(**vars(running), backend=backend)
        finally:
            backend.release()


@pytest.fixture
async def server() -> AsyncIterator[FakeServer]:
    async with fake_server(server={"enable_test_faults": True}) as running:
        yield running


async def until(condition: Callable[[], bool]) -> None:
    """Let the loop and the threads go on until `condition` holds; pytest's timeout is the limit."""
    while not condition():  # noqa: ASYNC110 - polls state of another thread
        await asyncio.sleep(0.001)


def raw(channel: grpc.aio.Channel) -> Any:
    """The channel for calls without serialisers: they take and give bytes, which grpc's stubs do not know."""
    return channel


async def refusal(call: Awaitable[Any]) -> grpc.aio.AioRpcError:
    """The error that `call` ends with."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value


def thread_names() -> list[str]:
    return sorted(thread.name for thread in threading.enumerate())
