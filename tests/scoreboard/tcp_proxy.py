"""A proxy between callers and a server that cuts connections, or lets nothing through for a while."""

import asyncio
import contextlib
import socket
import struct
from collections.abc import AsyncIterator

_CHUNK_BYTES = 65_536
# Close sends a reset instead of waiting for what is under way.
_RESET = struct.pack("ii", 1, 0)


class TcpProxy:
    """port: where it listens. It forwards to `target_port` on loopback."""

    def __init__(self, target_port: int) -> None:
        self._target_port = target_port
        self._open = asyncio.Event()
        self._open.set()
        self._writers: set[asyncio.StreamWriter] = set()
        self.port = 0

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            there_reader, there = await asyncio.open_connection("127.0.0.1", self._target_port)
        except OSError:
            writer.transport.abort()
            return
        both = {writer, there}
        self._writers |= both
        try:
            await asyncio.gather(self._forward(reader, there), self._forward(there_reader, writer))
        finally:
            self._writers -= both
            for each in both:
                each.transport.abort()

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(_CHUNK_BYTES):
                await self._open.wait()
                writer.write(data)
                await writer.drain()
        writer.transport.abort()

    def cut(self) -> None:
        """Reset all connections, towards both sides."""
        for writer in self._writers:
            held: socket.socket | None = writer.get_extra_info("socket")
            if held is not None and held.fileno() >= 0:
                held.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            writer.transport.abort()

    def stall(self) -> None:
        """Nothing goes through until `go_on`."""
        self._open.clear()

    def go_on(self) -> None:
        self._open.set()


@contextlib.asynccontextmanager
async def tcp_proxy(target_port: int) -> AsyncIterator[TcpProxy]:
    proxy = TcpProxy(target_port)
    server = await asyncio.start_server(lambda *both: proxy._connected(*both), "127.0.0.1", 0)  # noqa: SLF001
    proxy.port = server.sockets[0].getsockname()[1]
    try:
        yield proxy
    finally:
        server.close()
        proxy.go_on()
        proxy.cut()
