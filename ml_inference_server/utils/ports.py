"""Whether a port can be listened on, and how several processes come to listen on one."""

import contextlib
import socket
import sys
from collections.abc import Iterator

from ml_inference_server.utils.errors import ConfigError, PortInUse

_FLAGS = {"server": "--port", "metrics": "--http-port"}


def check_bindable(host: str, port: int, section: str = "server") -> None:
    """PortInUse or ConfigError, naming the cause and a remedy. section: of the settings that have host and port."""
    with _socket(host, section) as (probe, address):
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        _bind(probe, (address[0], port, *address[2:]), host, port, section)
        try:
            probe.listen(1)
        except OSError as error:
            raise in_use(host, port, section) from error


def in_use(host: str, port: int, section: str = "server") -> PortInUse:
    flag = _FLAGS[section]
    return PortInUse(f"port {port} on {host} is in use: stop what holds it, or pass {flag} 0 for a free one")


@contextlib.contextmanager
def reserved(host: str, port: int, section: str) -> Iterator[int]:
    """The port, for processes of this user that ask for it with SO_REUSEPORT, and for nobody else; 0: a free one.

    This process does not listen, so it gets no connections. PortInUse or ConfigError where it cannot be had.
    """
    check_bindable(host, port, section)
    with _socket(host, section) as (holder, address):
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        try:
            holder.bind((address[0], port, *address[2:]))
        except OSError:
            # Connections of a server that has just ended stand in the way, unless addresses may be used again.
            holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            _bind(holder, (address[0], port, *address[2:]), host, port, section)
        yield int(holder.getsockname()[1])


def check_shared_ports() -> None:
    """ConfigError where the system does not spread connections over the processes that listen on one port."""
    if sys.platform != "linux":
        raise ConfigError(
            "server.workers needs Linux, which spreads connections over processes: set it to 1, and start several "
            "servers on ports of their own behind a client with round_robin"
        )


@contextlib.contextmanager
def _socket(host: str, section: str) -> Iterator[tuple[socket.socket, tuple[str, ...]]]:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{section}.host {host} is not an address of this machine: {reason}") from error
    with socket.socket(family, kind, protocol) as made:
        yield made, address  # type: ignore[misc]


def _bind(made: socket.socket, address: tuple[object, ...], host: str, port: int, section: str) -> None:
    try:
        made.bind(address)
    except PermissionError as error:
        raise ConfigError(f"{section}.port {port} needs administrator rights: use one above 1023") from error
    except OSError as error:
        if "address" in str(error.strerror).lower() and "assign" in str(error.strerror):
            raise ConfigError(f"{section}.host {host} is not an address of this machine") from error
        raise in_use(host, port, section) from error
