"""A TCP proxy that harms the connections through it: what a client, or the network between, may do to a server."""

import asyncio
import contextlib
import socket
import struct
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

_AT_ONCE = struct.pack("ii", 1, 0)  # SO_LINGER: close sends RST


@dataclass(eq=False)
class Leg:
    """One connection through the proxy. is_ended: the server has ended it."""

    client: asyncio.StreamWriter
    server: asyncio.StreamWriter
    is_ended: asyncio.Event = field(default_factory=asyncio.Event)


class FaultyProxy:
    """Forwards until a fault is switched on; each concerns all connections that there are."""

    def __init__(self, port: int) -> None:
        self._server_port = port
        self._reads_on = asyncio.Event()
        self._reads_on.set()
        self._is_cut = False
        self._tasks: set[asyncio.Task[None]] = set()
        self.legs: set[Leg] = set()
        self.bytes_to_client = 0
        self.port = 0

    def reset(self) -> None:
        """As a client that is gone: RST to the server."""
        for leg in self.legs:
            leg.server.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _AT_ONCE)
            leg.server.transport.abort()

    def half_close(self) -> None:
        """As a client that sends no more and would still read."""
        for leg in self.legs:
            leg.server.write_eof()

    def stop_reading(self) -> None:
        """As a client that reads nothing more."""
        self._reads_on.clear()

    def cut(self) -> None:
        """As a cable that is out: nothing comes through, and nobody is told."""
        self._is_cut = True

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        from_server, to_server = await asyncio.open_connection("127.0.0.1", self._server_port, limit=4096)
        leg = Leg(writer, to_server)
        self.legs.add(leg)
        pumps = (self._pump_to_server(reader, to_server), self._pump_to_client(from_server, leg))
        self._tasks |= {asyncio.create_task(pump) for pump in pumps}

    async def _pump_to_server(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, RuntimeError):
            while part := await reader.read(65536):
                if not self._is_cut:
                    writer.write(part)
                    await writer.drain()
            if not self._is_cut:
                writer.close()

    async def _pump_to_client(self, reader: asyncio.StreamReader, leg: Leg) -> None:
        with contextlib.suppress(OSError, RuntimeError):
            while await self._reads_on.wait() and (part := await reader.read(65536)):
                self.bytes_to_client += len(part)
                if not self._is_cut:
                    leg.client.write(part)
                    await leg.client.drain()
        leg.is_ended.set()
        if not self._is_cut:
            leg.client.close()

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator["FaultyProxy"]:
        """On a free port, until the block ends; then all connections are reset."""
        listening = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = int(listening.sockets[0].getsockname()[1])
        try:
            yield self
        finally:
            listening.close()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            for leg in self.legs:
                leg.client.transport.abort()
                leg.server.transport.abort()
