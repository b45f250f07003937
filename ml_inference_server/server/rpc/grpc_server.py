"""The grpc.aio server: options, health, reflection, port."""

import contextlib
import logging
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2
from grpc_reflection.v1alpha import reflection

from ml_inference_server.door.certificates import Certificates, TlsFiles
from ml_inference_server.door.door import Door
from ml_inference_server.server.rpc.doorkeeper import Doorkeeper
from ml_inference_server.server.rpc.health_servicer import HealthServicer
from ml_inference_server.server.rpc.library import health_handlers, reflection_handlers
from ml_inference_server.server.rpc.services import Servicer
from ml_inference_server.utils.config import ServerSettings
from ml_inference_server.utils.errors import ConfigError
from ml_inference_server.utils.ports import check_bindable, in_use

log = logging.getLogger(__name__)


def _is_worth_a_line(record: logging.LogRecord) -> bool:
    """False where an answer could not be sent: its caller left a moment before. gRPC logs a traceback for each."""
    if record.exc_info and isinstance(record.exc_info[1], grpc.aio.InternalError):
        log.debug("a caller left before its answer was sent")
        return False
    return True


logging.getLogger("grpc._cython.cygrpc").addFilter(_is_worth_a_line)


def server_options(settings: ServerSettings, *, shares_port: bool = False) -> list[tuple[str, int]]:
    """Channel arguments. gRPC ignores a misspelt one without a word, so a test compares the names with gRPC's list.

    shares_port: with other workers of the same server.
    """
    age_ms, grace_ms = round(1000 * settings.max_connection_age_s), round(1000 * settings.max_connection_age_grace_s)
    return [
        ("grpc.max_receive_message_length", settings.max_message_bytes),
        ("grpc.max_send_message_length", settings.max_message_bytes),
        # With 1 a second server binds the same port and takes half of the calls.
        ("grpc.so_reuseport", int(shares_port)),
        ("grpc.max_concurrent_streams", settings.max_concurrent_streams),
        # Headers of one call: above the first some are refused, above the second all (both are gRPC's defaults).
        ("grpc.max_metadata_size", 8192),
        ("grpc.absolute_max_metadata_size", 16_384),
        ("grpc.keepalive_time_ms", 20_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        # Without it gRPC gives up only after its own minute, whatever the line above says.
        ("grpc.http2.ping_timeout_ms", 10_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
        ("grpc.http2.max_ping_strikes", 2),
        ("grpc.max_connection_idle_ms", 900_000),
        *([("grpc.max_connection_age_ms", age_ms), ("grpc.max_connection_age_grace_ms", grace_ms)] if age_ms else []),
        ("grpc.server_handshake_timeout_ms", 20_000),
        ("grpc.max_allowed_incoming_connections", 4096),
    ]


@dataclass(slots=True)
class RpcHealth:
    """What the gRPC health service says: NOT_SERVING until it is set."""

    servicers: Sequence[Servicer]
    health: HealthServicer = field(default_factory=HealthServicer)
    serving: bool = False

    def set_serving(self, serving: bool) -> None:
        """What health clients and watchers get, for the whole server and for each service.

        A service that the loaded model can do nothing for stays NOT_SERVING, as in Text Embeddings Inference.
        """
        self.serving = serving
        services = {name: able for servicer in self.servicers for name, able in servicer.services().items()}
        up, down = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
        self.health.set({name: up if serving and able else down for name, able in {"": True, **services}.items()})


@dataclass(slots=True, kw_only=True)
class GrpcServer(RpcHealth):
    """A listening server."""

    server: grpc.aio.Server
    port: int = 0


async def start_grpc(
    settings: ServerSettings,
    servicers: Sequence[Servicer],
    door: Door | None = None,
    tls: TlsFiles | None = None,
    *,
    shares_port: bool = False,
) -> GrpcServer:
    """Bind and listen. PortInUse or ConfigError if that cannot be done.

    door: lets callers in; None: everybody. tls: None: in the clear. shares_port: it is reserved for several processes.
    """
    if not shares_port:
        check_bindable(settings.host, settings.port)
    with _socket_threads_wait_their_turn():
        interceptors = [] if door is None else [Doorkeeper(door)]
        server = grpc.aio.server(interceptors=interceptors, options=server_options(settings, shares_port=shares_port))
    built = GrpcServer(servicers, server=server)
    names = [name for servicer in servicers for name in servicer.services()]
    described = reflection.aio.ReflectionServicer((*names, health.SERVICE_NAME, reflection.SERVICE_NAME))
    handlers = [handler for servicer in servicers for handler in servicer.handlers()]
    server.add_generic_rpc_handlers([*handlers, health_handlers(built.health), reflection_handlers(described)])
    built.set_serving(False)
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    address = f"{host}:{settings.port}"
    try:
        built.port = server.add_secure_port(address, _credentials(tls)) if tls else server.add_insecure_port(address)
    except RuntimeError as error:
        if tls is not None and not settings.port:  # a free port cannot be in use
            raise ConfigError(f"server.tls.cert {settings.tls.cert}: gRPC cannot use this pair") from error
        raise in_use(settings.host, settings.port) from error
    await server.start()
    return built


def _credentials(tls: TlsFiles) -> grpc.ServerCredentials:
    """gRPC asks for the certificate with each new connection, in a thread of its own."""

    def configuration(certificates: Certificates) -> Any:
        pair = (certificates.key, certificates.cert)
        return grpc.ssl_server_certificate_configuration([pair], certificates.client_ca)

    given = tls.current

    def changed() -> Any:
        nonlocal given
        if tls.current is given:
            return None
        given = tls.current
        return configuration(given)

    return grpc.dynamic_ssl_server_credentials(configuration(given), changed, tls.asks_clients)


@contextlib.contextmanager
def _socket_threads_wait_their_turn() -> Iterator[None]:
    """The threads in which gRPC reads and writes sockets, started in here, do not push others off a core; Linux only.

    On a busy machine each message would interrupt the event loop, an engine or a client for itself alone. Like this,
    whoever runs goes on, and the thread finds several messages when its turn comes (figures: docs/performance.md).
    """
    if sys.platform != "linux" or _policy() != os.SCHED_OTHER:  # whoever chose another one knows why
        yield
        return
    before = set(threading.enumerate())
    _schedule(0, os.SCHED_BATCH)
    try:
        yield
    finally:
        _schedule(0, os.SCHED_OTHER)
        # Python's threads inherited it too: the one that wakes the event loop after finished steps must not wait.
        for thread in set(threading.enumerate()) - before:
            _schedule(thread.native_id or 0, os.SCHED_OTHER)


def _policy() -> int | None:
    try:
        return os.sched_getscheduler(0)
    except OSError:  # a C library or a sandbox that does not know it
        return None


def _schedule(thread_id: int, policy: int) -> None:
    with contextlib.suppress(OSError):  # forbidden, or the thread has ended
        os.sched_setscheduler(thread_id, policy, os.sched_param(0))
