"""Fixtures that several folders of tests use: a loop with a jumping clock, and a real server round the fake backend."""

import asyncio
import contextlib
import functools
import logging
import selectors
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

import grpc
import pytest

from ml_inference_server.backends.base import Backend
from ml_inference_server.backends.fake import FakeBackend
from ml_inference_server.metrics.registry import Metrics
from ml_inference_server.proto import inference_pb2_grpc as rpc
from ml_inference_server.server.lifecycle import Server, serving
from ml_inference_server.server.ready_model import Load, ReadyModel, load_model
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
    """A real server on loopback and a real channel to it."""

    server: Server
    channel: grpc.aio.Channel
    stub: Any

    @property
    def state(self) -> ServerState:
        return self.server.state

    @property
    def model(self) -> ReadyModel:
        return self.server.model

    @property
    def metrics(self) -> Metrics:
        return self.server.metrics

    @property
    def backend(self) -> Backend:
        """The one that runs in threads of this process."""
        worker = self.server.model.worker
        assert isinstance(worker, ThreadWorker)
        return worker.backend

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.server.grpc_port}"

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.http_port}"


@dataclass(kw_only=True)
class FakeServer(RunningServer):
    """One whose model is the fake backend."""

    @property
    def backend(self) -> FakeBackend:
        backend = super().backend
        assert isinstance(backend, FakeBackend)
        return backend


S = TypeVar("S", bound=RunningServer)


@contextlib.asynccontextmanager
async def running(made: type[S], settings: Settings, load: Load = load_model) -> AsyncIterator[S]:
    """The server as main starts it, and a channel; nobody but this process calls, so no quiet period is waited for."""
    async with serving(settings, load=load, quiet_s=0) as server:
        options = [("grpc.max_receive_message_length", 64 << 20)]
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.grpc_port}", options=options) as channel:
            yield made(server=server, channel=channel, stub=rpc.InferenceServiceStub(channel))


def free_ports(sections: dict[str, Any]) -> dict[str, Any]:
    """`sections` of settings, with ports of which nobody else knows."""
    return sections | {name: {"port": 0, **sections.get(name, {})} for name in ("server", "metrics")}


@contextlib.asynccontextmanager
async def fake_server(**sections: dict[str, Any]) -> AsyncIterator[FakeServer]:
    """Settings by section, for instance fake_server(batching={"max_batch_size": 4})."""
    sections["model"] = {"backend": "fake", **sections.get("model", {})}
    async with running(FakeServer, Settings.model_validate(free_ports(sections))) as server:
        server.backend.keep_log()
        try:
            yield server
        finally:
            server.backend.release()


@pytest.fixture
async def server() -> AsyncIterator[FakeServer]:
    async with fake_server(server={"enable_test_faults": True}) as fake:
        yield fake


async def until(condition: Callable[..., bool]) -> None:
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
