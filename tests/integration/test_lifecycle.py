"""A server in this process: what a start that fails or is given up leaves behind, and what a stop answers."""

import asyncio
import contextlib
import socket
from collections.abc import Callable
from typing import Any

import grpc
import numpy as np
import pytest
from numpy.typing import NDArray

from ml_inference_server.backends.base import TokenBatch
from ml_inference_server.backends.fake import FakeBackend
from ml_inference_server.backends.startup.start import Described
from ml_inference_server.proto import inference_pb2 as pb
from ml_inference_server.proto import inference_pb2_grpc as rpc
from ml_inference_server.server import health
from ml_inference_server.server.lifecycle import serving
from ml_inference_server.server.ready_model import load_model
from ml_inference_server.server.workers import ThreadWorker, Worker
from ml_inference_server.utils.config import Settings
from ml_inference_server.utils.errors import ConfigError, ModelError
from tests.conftest import free_ports, refusal, until


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def settings(**sections: dict[str, object]) -> Settings:
    return Settings.model_validate(free_ports({"model": {"backend": "fake"}, **sections}))


def embed(channel: grpc.aio.Channel) -> Any:
    return rpc.InferenceServiceStub(channel).Embed


def assert_free(*ports: int) -> None:
    for port in ports:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))


async def test_a_start_that_fails_leaves_no_port_open_and_no_task() -> None:
    before = len(asyncio.all_tasks())
    grpc_port, http_port = free_port(), free_port()
    wrong = settings(
        model={"backend": "fake", "name": "fake:nonsense"}, server={"port": grpc_port}, metrics={"port": http_port}
    )
    with pytest.raises(ModelError, match="expected fake:base_ms=NUMBER"):
        async with serving(wrong, quiet_s=0):
            pytest.fail("it serves a model that it could not load")
    assert_free(grpc_port, http_port)
    await until(lambda: len(asyncio.all_tasks()) == before)


async def test_a_model_that_the_settings_do_not_fit_is_closed_again() -> None:
    closed = []

    class Watched(ThreadWorker):
        def close(self) -> None:
            super().close()
            closed.append(self)

    async def load(settings: Settings, phase: Callable[[str], None]) -> tuple[Described, Worker]:
        described, worker = await load_model(settings, phase)
        assert isinstance(worker, ThreadWorker)
        return described, Watched(worker.backend)

    with pytest.raises(ConfigError, match="max_batch_tokens is 9"):
        async with serving(settings(batching={"max_batch_tokens": 9}), load=load, quiet_s=0):
            pytest.fail("it serves")
    assert len(closed) == 1


async def test_a_start_that_is_given_up_answers_calls_until_then_and_closes_its_ports() -> None:
    grpc_port, http_port = free_port(), free_port()
    loading = asyncio.Event()

    async def load(settings: Settings, phase: Callable[[str], None]) -> tuple[Described, Worker]:
        phase("reading a large file")
        loading.set()
        await asyncio.Event().wait()
        raise AssertionError

    async def start() -> None:
        whole = settings(server={"port": grpc_port}, metrics={"port": http_port})
        async with serving(whole, load=load, quiet_s=0):
            pytest.fail("it serves without a model")

    starting = asyncio.create_task(start())
    await loading.wait()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{grpc_port}") as channel:
        error = await refusal(embed(channel)(pb.EmbedRequest(texts=["a"])))
    assert "reading a large file" in (error.details() or "")
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert_free(grpc_port, http_port)


async def test_a_stop_answers_what_it_cannot_finish_and_counts_it() -> None:
    async with contextlib.AsyncExitStack() as channels:
        async with serving(settings(server={"drain_timeout_ms": 0}), quiet_s=0) as server:
            worker = server.model.worker
            assert isinstance(worker, ThreadWorker)
            assert isinstance(worker.backend, FakeBackend)
            worker.backend.hold()
            channel = await channels.enter_async_context(grpc.aio.insecure_channel(f"127.0.0.1:{server.grpc_port}"))
            held = asyncio.ensure_future(embed(channel)(pb.EmbedRequest(texts=["a"])))
            await until(lambda: server.model.admission.requests == 1)
        error = await refusal(held)
        worker.backend.release()
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert server.cut_off == 1


async def test_a_model_in_threads_that_fails_on_everything_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a GPU whose driver has failed. Health says so first; only a new process helps."""
    monkeypatch.setattr(health, "INTERVAL_S", 0.002)
    async with serving(settings(), quiet_s=0) as server:
        worker = server.model.worker
        assert isinstance(worker, ThreadWorker)

        def fail(batch: TokenBatch) -> NDArray[np.float32]:
            raise RuntimeError("an illegal memory access was encountered")

        monkeypatch.setattr(worker.backend, "infer", fail)
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
            for _ in range(3):
                assert (await refusal(embed(channel)(pb.EmbedRequest(texts=["a"])))).code() is grpc.StatusCode.INTERNAL
        with pytest.raises(health.EngineLost, match="the model fails on everything"):
            await server.health
        assert not server.state.readiness()[0]
