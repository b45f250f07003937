"""The sidecar: dashboard, metrics, health and server information over HTTP, beside gRPC on the same event loop."""

import asyncio
import logging
import secrets
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.typedefs import Handler

from ml_inference_server.door.certificates import TlsFiles
from ml_inference_server.door.door import Door
from ml_inference_server.door.rights import ADMIN, ANY_KEY, METRICS, MODEL_FACTS, OPEN, Needs
from ml_inference_server.metrics.http_connections import FIRST_REQUEST_TIMEOUT_S, Connections
from ml_inference_server.metrics.http_rules import (
    SECURITY_HEADERS,
    UNKNOWN_HOST,
    allowed_hosts,
    is_host_allowed,
    json_answer,
    json_error,
    wants_prometheus,
)
from ml_inference_server.metrics.http_sockets import AfterHandshake, ConnectionRefusal, bound_socket
from ml_inference_server.metrics.live_routes import BENCHMARK_PATH, FIGURES_PATHS, LiveRoutes
from ml_inference_server.metrics.view import View
from ml_inference_server.utils.config import MetricsSettings
from ml_inference_server.utils.errors import Forbidden, Unauthenticated, Unavailable

DASHBOARD_DIR = Path(__file__).resolve().parent / "dashboard"
# Path -> (file, content type). Only these are served, from memory: no path of a request ever reaches the disk.
STATIC_FILES = {
    "/": ("index.html", "text/html"),
    "/app.js": ("app.js", "text/javascript"),
    **{
        f"/{name}.js": (f"{name}.js", "text/javascript")
        for name in ("bars", "charts", "feed", "format", "key", "model_card", "theme")
    },
    "/style.css": ("style.css", "text/css"),
    "/favicon.svg": ("favicon.svg", "image/svg+xml"),
}

# What each path asks of a key; the api knows it of its own. Where there is no such path, it takes a key to learn so.
NEEDS: dict[str, Needs] = {
    **dict.fromkeys(STATIC_FILES, OPEN),
    **dict.fromkeys(("/healthz", "/readyz"), OPEN),
    **dict.fromkeys(("/metrics", "/metrics/prometheus", *FIGURES_PATHS), METRICS),
    "/info": MODEL_FACTS,
    BENCHMARK_PATH: ADMIN,
}
WWW_AUTHENTICATE = 'Bearer realm="ml-inference-server"'

# These get an answer also where there is no room for other connections.
PROBE_PATHS = frozenset({"/healthz", "/readyz", "/metrics", "/metrics/prometheus"})
KEEPALIVE_TIMEOUT_S = 15.0
MAX_HEADER_BYTES = 8190
LINGERING_S = 1.0
SHUTDOWN_TIMEOUT_S = 1.0
QUIET_LIMIT_S = 1.0

log = logging.getLogger(__name__)
protocol_log = logging.getLogger(f"{__name__}.protocol")
# What a client can cause by itself: a malformed request, a body that is broken or ends too soon, a connection cut off.
CLIENT_FAULTS = (HttpProcessingError, web.RequestPayloadError, ConnectionError)
# aiohttp logs a traceback for each of them: whoever can connect could fill the disk.
protocol_log.addFilter(lambda record: not (record.exc_info and isinstance(record.exc_info[1], CLIENT_FAULTS)))


class Api(Protocol):
    """Further routes beside the sidecar's own, which may take bodies and have their own form of errors."""

    def add_to(self, router: web.UrlDispatcher) -> None: ...

    def takes_body(self, request: web.Request) -> bool: ...

    def needs(self, request: web.Request) -> Needs | None:
        """What this request's route asks of a key; None where it is none of the api's."""
        ...

    def info(self) -> dict[str, Any]:
        """Further keys of /info."""
        ...

    def error(self, request: web.Request, status: int, message: str) -> web.Response | None:
        """The form that an error takes on this request's path; None where the path is none of the api's."""
        ...


class Sidecar:
    """Serves what `view` and two callables say, and the routes of `api`.

    server_info: what was requested and what runs, a JSON object. liveness: (whether it is so, the reason). door: lets
    callers in; None: everybody. tls: None: in the clear. is_draining: every answer closes its connection then, so that
    a caller who goes on does not send into one that is about to be closed. shares_port: it is reserved for several
    processes.
    """

    def __init__(
        self,
        settings: MetricsSettings,
        view: View,
        *,
        server_info: Callable[[], dict[str, Any]],
        liveness: Callable[[], tuple[bool, str]],
        api: Api | None = None,
        door: Door | None = None,
        tls: TlsFiles | None = None,
        is_draining: Callable[[], bool] = lambda: False,
        shares_port: bool = False,
    ) -> None:
        self._settings = settings
        self._view = view
        self._server_info = server_info
        self._liveness = liveness
        self._api = api
        self._door = door
        self._tls = tls
        self._is_draining = is_draining
        self._shares_port = shares_port
        self._hosts = allowed_hosts(settings.host, socket.gethostname(), *settings.hosts)
        self._files = {
            path: ((DASHBOARD_DIR / name).read_bytes(), content_type)
            for path, (name, content_type) in STATIC_FILES.items()
        }
        self._runner: web.AppRunner | None = None
        self._socket: socket.socket | None = None
        self._listener: asyncio.Server | None = None
        self._connections: Connections | None = None

    async def start(self) -> int:
        """Listen, and return the port. PortInUse; ConfigError where the host or the port cannot be listened on."""
        listening = await bound_socket(self._settings.host, self._settings.port, shares_port=self._shares_port)
        middlewares = [self._close_while_draining, self._answer_errors_as_json, self._check_request]
        app = web.Application(middlewares=middlewares)
        app.router.add_get("/metrics", self._get_metrics)
        app.router.add_get("/metrics/prometheus", self._get_prometheus)
        app.router.add_get("/info", self._get_info)
        app.router.add_get("/healthz", self._get_health)
        app.router.add_get("/readyz", self._get_readiness)
        LiveRoutes(self._view, self._is_allowed).add_to(app.router)
        for path in self._files:
            app.router.add_get(path, self._get_file)
        if self._api is not None:
            self._api.add_to(app.router)
        app.on_response_prepare.append(self._add_headers)
        self._runner = web.AppRunner(
            app,
            access_log=None,
            logger=protocol_log,
            shutdown_timeout=SHUTDOWN_TIMEOUT_S,
            keepalive_timeout=KEEPALIVE_TIMEOUT_S,
            lingering_time=LINGERING_S,
            max_line_size=MAX_HEADER_BYTES,
            max_field_size=MAX_HEADER_BYTES,
            handler_cancellation=True,  # a caller who has left wants no answer
            auto_decompress=False,  # a compressed body is refused, in the form of its route
        )
        await self._runner.setup()
        self._connections = Connections()
        self._socket = listening
        await self._listen()
        if self._tls is not None:
            self._tls.watch.after.append(self._listen)
        self._view.start()
        port: int = listening.getsockname()[1]
        return port

    async def stop(self, quiet_s: float = 0.0) -> None:
        """Close the port and every connection; at most SHUTDOWN_TIMEOUT_S for answers under way. Safe to call twice.

        quiet_s: without a request, before that begins, for a second at most: who comes meanwhile is still answered.
        """
        if self._connections is not None:
            await self._connections.quiet(quiet_s, QUIET_LIMIT_S)
        listener, runner = self._listener, self._runner
        self._listener = self._runner = None
        if listener is not None:
            listener.close()
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        if self._connections is not None:
            self._connections.stop()
        await self._view.stop()
        if runner is not None:
            await runner.cleanup()

    async def _listen(self) -> None:
        """Take connections, from now on with the certificate that is in force; those that are open stay as they are.

        A new context, and not the old one with other files: it would go on trusting the authorities that it has, and
        resume what was begun with them.
        """
        if self._socket is None:
            return
        before = self._listener
        tls = None if self._tls is None else self._tls.current.context
        handshake_s = None if tls is None else FIRST_REQUEST_TIMEOUT_S
        accept = self._accept if tls is None else lambda: AfterHandshake(self._accept)
        # Of the socket, the loop gets copies: connections that wait in it belong to whoever listens next.
        self._listener = await asyncio.get_running_loop().create_server(
            accept, sock=self._socket.dup(), ssl=tls, ssl_handshake_timeout=handshake_s
        )
        if before is not None:
            before.close()

    def _accept(self) -> asyncio.BaseProtocol:
        """A connection begins."""
        server, connections = self._runner.server if self._runner else None, self._connections
        if server is None or connections is None or not connections.has_room():
            return ConnectionRefusal()
        connection = server()
        connections.add(connection)
        return connection

    @web.middleware
    async def _close_while_draining(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        answer = await handler(request)
        if self._is_draining():
            answer.force_close()
        return answer

    @web.middleware
    async def _answer_errors_as_json(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            return await handler(request)
        except web.HTTPException as error:
            response = self._error(request, error.status, error.reason)
            if allow := error.headers.get("Allow"):
                response.headers["Allow"] = allow
            return response
        except Unavailable as error:
            return self._error(request, 503, str(error))
        except CLIENT_FAULTS as error:
            log.debug("%s %s: the client left or its request is broken: %s", request.method, request.path, error)
            response = self._error(request, 400, "the body is broken or ended too soon")
            response.force_close()
            return response
        except Exception:
            request_id = secrets.token_hex(8)
            log.exception("%s %s failed (request %s)", request.method, request.path, request_id)
            return self._error(request, 500, f"internal error, request {request_id}")

    def _error(self, request: web.Request, status: int, message: str) -> web.Response:
        own = self._api.error(request, status, message) if self._api is not None else None
        return own or json_error(status, message)

    @web.middleware
    async def _check_request(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        assert self._connections is not None  # noqa: S101 - requests come over connections
        with self._connections.working(request):
            return await self._checked(request, handler, is_extra=self._connections.is_extra(request.protocol))

    async def _checked(self, request: web.Request, handler: Handler, is_extra: bool) -> web.StreamResponse:
        hosts = request.headers.getall("Host", [])
        if len(hosts) != 1 or not is_host_allowed(hosts[0], self._hosts, self._settings.host):
            return json_error(421, UNKNOWN_HOST)
        try:
            self._let_in(request)
        except (Unauthenticated, Forbidden) as error:
            is_known = isinstance(error, Forbidden)
            response = self._error(request, 403 if is_known else 401, str(error))
            if not is_known:
                response.headers["WWW-Authenticate"] = WWW_AUTHENTICATE
            if request.body_exists or is_extra:
                response.force_close()
            return response
        if request.body_exists and not self._takes_body(request):
            nowhere = request.match_info.http_exception  # no such path, or not this method
            status, message = (nowhere.status, nowhere.reason) if nowhere else (413, "this request takes no body")
            response = self._error(request, status, message)
            if nowhere is not None and (allow := nowhere.headers.get("Allow")):
                response.headers["Allow"] = allow
            response.force_close()
            return response
        if not is_extra:
            return await handler(request)
        if request.path in PROBE_PATHS:
            answer = await handler(request)
        else:
            answer = self._error(request, 503, "too many connections are open: retry, or use fewer at a time")
        answer.force_close()
        return answer

    def _let_in(self, request: web.Request) -> None:
        """Unauthenticated or Forbidden where its caller may not have what it asks for."""
        if self._door is None:
            return
        needs = self._api.needs(request) if self._api is not None else None
        if needs is None:
            resource = request.match_info.route.resource
            needs = ANY_KEY if resource is None else NEEDS[resource.canonical]
        if needs != OPEN:
            self._door.check(request.headers.getall("Authorization", []), needs)

    def _is_allowed(self, request: web.Request) -> bool:
        try:
            self._let_in(request)
        except (Unauthenticated, Forbidden):
            return False
        return True

    def _takes_body(self, request: web.Request) -> bool:
        if (request.method, request.path) == ("POST", BENCHMARK_PATH):
            return True
        return self._api is not None and self._api.takes_body(request)

    async def _add_headers(self, request: web.Request, response: web.StreamResponse) -> None:
        response.headers.update(SECURITY_HEADERS)
        origin = request.headers.get("Origin", "")
        if request.method in ("GET", "HEAD") and origin in self._settings.cors_origins:
            response.headers["Access-Control-Allow-Origin"] = origin
            response.headers["Vary"] = "Accept, Origin"

    async def _get_metrics(self, request: web.Request) -> web.Response:
        accept = ",".join(request.headers.getall("Accept", []))
        if wants_prometheus(accept):
            return await self._prometheus(accept)
        return json_answer(200, await self._view.figures())

    async def _get_prometheus(self, request: web.Request) -> web.Response:
        return await self._prometheus(",".join(request.headers.getall("Accept", [])))

    async def _prometheus(self, accept: str) -> web.Response:
        body, content_type = await self._view.prometheus(accept)
        return web.Response(
            body=body, headers={"Content-Type": content_type, "Cache-Control": "no-store", "Vary": "Accept"}
        )

    async def _get_info(self, _: web.Request) -> web.Response:
        more = self._api.info() if self._api is not None else {}
        return json_answer(200, self._server_info() | {"workers": await self._view.workers()} | more)

    async def _get_health(self, _: web.Request) -> web.Response:
        alive, reason = self._liveness()
        return json_answer(200 if alive else 503, {"alive": alive, "reason": reason})

    async def _get_readiness(self, _: web.Request) -> web.Response:
        ready, reason = await self._view.readiness()
        return json_answer(200 if ready else 503, {"ready": ready, "reason": reason})

    async def _get_file(self, request: web.Request) -> web.Response:
        body, content_type = self._files[request.path]
        return web.Response(
            body=body, content_type=content_type, charset="utf-8", headers={"Cache-Control": "no-cache"}
        )
