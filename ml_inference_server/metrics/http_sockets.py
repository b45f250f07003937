"""The socket that the sidecar listens on, and what a new connection meets before HTTP begins."""

import asyncio
import errno
import socket
from collections.abc import Callable

from ml_inference_server.utils.errors import ConfigError, PortInUse


class AfterHandshake(asyncio.Protocol):
    """Counts a TLS connection from where its handshake is done: of one that fails nobody hears again."""

    def __init__(self, accept: Callable[[], asyncio.BaseProtocol]) -> None:
        self._accept = accept

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        connection = self._accept()
        transport.set_protocol(connection)
        connection.connection_made(transport)


class ConnectionRefusal(asyncio.Protocol):
    """Closes the connection at once."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport.close()


async def bound_socket(host: str, port: int, *, shares_port: bool = False) -> socket.socket:
    """A socket that listens. PortInUse; ConfigError where the host or the port cannot be listened on.

    shares_port: it is reserved for several processes.
    """
    loop = asyncio.get_running_loop()
    try:
        found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"metrics.host {host!r} is no known address: use 127.0.0.1, or 0.0.0.0 for all") from error
    # One socket only: the several addresses of a name would get several ports when a free one is asked for.
    family, _, _, _, address = found[0]
    both_families = host == "::" and socket.has_dualstack_ipv6()
    try:
        return socket.create_server(address[:2], family=family, dualstack_ipv6=both_families, reuse_port=shares_port)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise PortInUse(
                f"port {port} on {host} is in use: stop what holds it, or pass --http-port 0 for a free one"
            ) from error
        if error.errno == errno.EACCES:
            raise ConfigError(
                f"port {port} on {host} needs more rights: pass --http-port with one above 1023"
            ) from error
        if error.errno != errno.EADDRNOTAVAIL:
            raise ConfigError(f"metrics.host {host!r}, port {port}: {error.strerror}") from error
        raise ConfigError(
            f"metrics.host {host!r} is not an address of this machine: use 127.0.0.1, or 0.0.0.0 for all"
        ) from error
