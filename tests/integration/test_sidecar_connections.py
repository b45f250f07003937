"""Too many HTTP connections: who has to go, and that a probe gets in whatever strangers do."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest

from ml_inference_server.metrics import http_connections
from tests.integration.sidecar_kit import GUARD_S, Server

PROBE = b"GET /readyz HTTP/1.1\r\nHost: localhost\r\n\r\n"
LAST_PROBE = PROBE.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
STREAM = b"GET /api/v1/stream HTTP/1.1\r\nHost: localhost\r\n\r\n"
SLOW_BODY = (
    b"POST /api/v1/benchmark HTTP/1.1\r\nHost: localhost\r\n"
    b"Content-Type: application/json\r\nContent-Length: 500\r\n\r\n{"
)


class Client:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def ask(self, request: bytes, until: bytes = b"}") -> bytes:
        self.writer.write(request)
        async with asyncio.timeout(GUARD_S):
            return await self.reader.readuntil(until)

    async def is_closed(self) -> bool:
        async with asyncio.timeout(GUARD_S):
            return await self.reader.read() == b""


class Clients(contextlib.AsyncExitStack):
    def __init__(self, port: int) -> None:
        super().__init__()
        self.port = port

    async def open(self, count: int, first: bytes = b"") -> list[Client]:
        return [await self.one(first) for _ in range(count)]

    async def one(self, first: bytes = b"") -> Client:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        self.callback(writer.close)
        writer.write(first)
        return Client(reader, writer)


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    started = await Server().start()
    yield started
    await started.sidecar.stop()


@pytest.mark.parametrize(("count", "sent"), [(500, b"GET /readyz HTT"), (500, b""), (500, SLOW_BODY)])
async def test_slow_connections_leave_the_probe_its_place(server: Server, count: int, sent: bytes) -> None:
    async with Clients(server.port) as clients:
        await clients.open(count, sent)
        for _ in range(3):
            assert (await server.raw(LAST_PROBE)).startswith(b"HTTP/1.1 200 ")


async def test_idle_connections_that_asked_before_leave_the_probe_its_place(server: Server) -> None:
    async with Clients(server.port) as clients:
        for _ in range(300):
            await (await clients.one()).ask(PROBE)
        for _ in range(3):
            assert (await server.raw(LAST_PROBE)).startswith(b"HTTP/1.1 200 ")


async def test_the_one_that_is_idle_for_longest_goes(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_connections, "MAX_CONNECTIONS", 3)
    async with Clients(server.port) as clients:
        first, second, third = await clients.open(3)
        for each in (first, second, third, first):
            await each.ask(PROBE)
        fourth = await clients.one()
        assert b" 200 " in await fourth.ask(PROBE, b"\r\n")
        assert await second.is_closed()
        for each in (first, third):
            assert b" 200 " in await each.ask(PROBE, b"\r\n")


async def test_a_connection_at_work_stays_and_beyond_them_there_is_room_for_probes_only(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_connections, "MAX_CONNECTIONS", 3)
    async with Clients(server.port) as clients:
        at_work = await clients.open(3)
        for each in at_work:
            assert b" 200 " in await each.ask(STREAM, b"\r\n")
        for _ in range(2):
            answer = await server.raw(PROBE)  # its connection is closed with the answer
            assert answer.startswith(b"HTTP/1.1 200 ")
        answer = await server.raw(PROBE.replace(b"/readyz", b"/info"))
        assert answer.startswith(b"HTTP/1.1 503 ")
        assert b"too many connections" in answer
        silent = await clients.one()
        assert (await server.raw(PROBE)).startswith(b"HTTP/1.1 200 ")
        assert await silent.is_closed()
        at_work.pop().writer.close()
        async with asyncio.timeout(GUARD_S):
            while not (await server.raw(LAST_PROBE.replace(b"/readyz", b"/info"))).startswith(b"HTTP/1.1 200 "):
                pass  # the server sees the close when it sees it
        for each in at_work:
            assert not each.reader.at_eof()


async def test_more_than_that_are_closed_at_once(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_connections, "MAX_CONNECTIONS", 2)
    monkeypatch.setattr(http_connections, "PROBE_CONNECTIONS", 0)
    async with Clients(server.port) as clients:
        for each in await clients.open(2):
            assert b" 200 " in await each.ask(STREAM, b"\r\n")
        assert await server.raw(b"") == b""
