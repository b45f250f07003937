"""Who watches the health hears of every change, whatever other watchers do."""

import asyncio
import socket
import struct
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from ml_inference_server.server.lifecycle import serving
from ml_inference_server.utils.config import Settings
from tests.conftest import FakeServer, fake_server, free_ports, refusal, until
from tests.faults.raw_http2 import HEADERS, PREFACE, SETTINGS, frame, headers_of_a_call

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
_END_HEADERS, _END_STREAM, _DATA, _INITIAL_WINDOW_SIZE = 4, 1, 0, 4


def watch(channel: grpc.aio.Channel, service: str = "") -> Any:
    return health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service=service))


async def next_status(call: Any) -> int:
    return int((await call.read()).status)


async def check(server: FakeServer) -> int:
    return int((await health_pb2_grpc.HealthStub(server.channel).Check(health_pb2.HealthCheckRequest())).status)


class DeafWatcher:
    """Watches, and lets the server write nothing at all: its flow-control window is empty."""

    def __init__(self, port: int) -> None:
        self._connection = socket.create_connection(("127.0.0.1", port))
        window = struct.pack(">HI", _INITIAL_WINDOW_SIZE, 0)
        block = headers_of_a_call("Watch", f"127.0.0.1:{port}", service=health.SERVICE_NAME)
        self._connection.sendall(
            PREFACE
            + frame(SETTINGS, payload=window)
            + frame(SETTINGS, flags=1)
            + frame(HEADERS, 1, block, _END_HEADERS)
            + frame(_DATA, 1, bytes(5), _END_STREAM)
        )

    def leave(self) -> None:
        self._connection.close()


async def test_a_watcher_that_leaves_does_not_make_the_others_deaf() -> None:
    async with fake_server() as server:
        leaving, staying, named = watch(server.channel), watch(server.channel), watch(server.channel, "no.such")
        assert [await next_status(call) for call in (leaving, staying, named)] == [SERVING, SERVING, UNKNOWN]
        leaving.cancel()
        await until(leaving.done)
        # Another call answered: by then the server has seen that the watcher left.
        assert await check(server) == SERVING
        server.state.draining.set()  # what the health is looked at for
        assert await next_status(staying) == NOT_SERVING
        server.state.draining.clear()
        assert await next_status(staying) == SERVING
        for call in (staying, named):
            call.cancel()


async def test_a_watcher_that_reads_nothing_holds_up_neither_the_health_nor_the_stop() -> None:
    settings = Settings.model_validate(free_ports({"model": {"backend": "fake"}}))
    async with serving(settings, quiet_s=0) as server:
        tasks = len(asyncio.all_tasks())
        watcher = DeafWatcher(server.grpc_port)
        await until(lambda: len(asyncio.all_tasks()) > tasks)
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
            hearing = watch(channel)
            assert await next_status(hearing) == SERVING
            server.state.draining.set()
            assert await next_status(hearing) == NOT_SERVING
            hearing.cancel()
    watcher.leave()


async def test_a_service_that_is_not_known_is_not_found() -> None:
    async with fake_server() as server:
        stub = health_pb2_grpc.HealthStub(server.channel)
        error = await refusal(stub.Check(health_pb2.HealthCheckRequest(service="no.such")))
        assert error.code() is grpc.StatusCode.NOT_FOUND
