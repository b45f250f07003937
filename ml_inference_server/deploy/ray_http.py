"""HTTP calls on their way from Ray Serve's proxy to the replica's own HTTP port, which has the routes of all dialects.

Ray wants an application of ASGI and ours is one of aiohttp, so a replica asks its own port, over loopback. What that
answers goes back byte for byte. Any replica may get a call: what is told by one of them alone is refused here.
"""

import logging
import socket
from collections.abc import AsyncIterable, AsyncIterator, Mapping
from typing import Any, NamedTuple
from urllib.parse import quote

import aiohttp
from aiohttp import web
from yarl import URL

from ml_inference_server.deploy.ray_proxy import REPLICA, RETRY_AFTER_MS
from ml_inference_server.metrics.http_connections import MAX_CONNECTIONS
from ml_inference_server.metrics.http_rules import (
    SECURITY_HEADERS,
    UNKNOWN_HOST,
    allowed_hosts,
    is_host_allowed,
    json_error,
)
from ml_inference_server.metrics.http_server import KEEPALIVE_TIMEOUT_S
from ml_inference_server.metrics.live_routes import BENCHMARK_PATH, FIGURES_PATHS
from ml_inference_server.server.http.api import dialect_of
from ml_inference_server.server.http.dialect import Refusal
from ml_inference_server.server.http.endpoint import RELAYED_FROM, answer_refusal, refused
from ml_inference_server.server.lifecycle import Server
from ml_inference_server.utils.errors import Overloaded, ServiceError, Unavailable

log = logging.getLogger(__name__)

# Where a server is asked that listens on every address.
_LOOPBACK = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - compared with, not listened on
# At once, of those that the port takes; the rest is for who asks the port itself. More calls wait for their turn.
_CONNECTIONS = MAX_CONNECTIONS * 3 // 4
_WAIT_S = 5.0
# The port closes an idle connection later than this side does: a call must not meet one that is about to be closed.
_KEEPALIVE_S = KEEPALIVE_TIMEOUT_S / 3
_FIGURES = {"/metrics", "/metrics/prometheus", *FIGURES_PATHS, BENCHMARK_PATH}
_NOT_HERE = (
    "this tells of one replica alone, and behind Ray Serve any of them may answer: ask the HTTP port of a replica, "
    "which its log names"
)
_HOP_BY_HOP = {
    "connection",
    "keep-alive",
    "proxy-authenticate",
    "proxy-authorization",
    "proxy-connection",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
}
_NOT_PASSED_ON = {*_HOP_BY_HOP, "host", RELAYED_FROM}
# Ray's proxy writes its own.
_NOT_PASSED_BACK = {*_HOP_BY_HOP, "date", "server"}
_REQUEST_ID = "x-request-id"

Headers = list[tuple[str, str]]


class HttpEnd(NamedTuple):
    """How an HTTP call ended. headers: as ASGI wants them."""

    status: int
    headers: list[tuple[bytes, bytes]]
    body: bytes


def loopback_session() -> aiohttp.ClientSession:
    """For `Relay`; it has to outlive the server, which finishes the calls that it has."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=_CONNECTIONS, keepalive_timeout=_KEEPALIVE_S),
        timeout=aiohttp.ClientTimeout(total=None, connect=_WAIT_S),  # the server knows the deadline of a call
        auto_decompress=False,
        skip_auto_headers=["Accept", "Accept-Encoding", "Content-Type", "User-Agent"],
        cookie_jar=aiohttp.DummyCookieJar(),
    )


class Relay:
    """Asks the HTTP port of `server`, which is of this process."""

    def __init__(self, server: Server, session: aiohttp.ClientSession) -> None:
        settings = server.state.settings.metrics
        self._session = session
        host = _LOOPBACK.get(settings.host, settings.host)
        self._authority = f"[{host}]:{server.http_port}" if ":" in host else f"{host}:{server.http_port}"
        self._names = allowed_hosts(settings.host, socket.gethostname(), *settings.hosts)
        self._relay_key = server.state.relay_key
        self._instance_id = server.state.instance_id

    async def answer(self, scope: Mapping[str, Any], body: AsyncIterable[bytes]) -> HttpEnd:
        """scope: ASGI's, of a request. Whatever befalls the call but a cancellation."""
        method, path = scope["method"], scope["path"].removeprefix(scope.get("root_path", "")) or "/"
        headers = [(_text(name), _text(value)) for name, value in scope["headers"]]
        hosts = [value for name, value in headers if name == "host"]
        # By name, or by any address: those of the machines where Ray's proxies run are not known here.
        if len(hosts) != 1 or not is_host_allowed(hosts[0], self._names, "0.0.0.0"):  # noqa: S104
            return self._own(json_error(421, UNKNOWN_HOST))
        if _is_of_one_replica(method, path):
            return self._own(answer_refusal(dialect_of(method, path), Refusal(501, "UNIMPLEMENTED", _NOT_HERE)))
        try:
            return await self._asked(method, self._url(path, scope["query_string"]), headers, body, scope.get("client"))
        except TimeoutError:
            error: ServiceError = Overloaded(
                f"too many HTTP calls are under way in this replica; retry in {RETRY_AFTER_MS} ms",
                retry_after_ms=RETRY_AFTER_MS,
            )
        except (aiohttp.ClientError, OSError) as cause:
            log.warning("%s %.200r: this replica's own HTTP port did not answer: %s", method, path, cause)
            error = Unavailable(
                f"the replica that worked on the request is lost; retry in {RETRY_AFTER_MS} ms", reason="REPLICA_LOST"
            )
        return self._own(refused(dialect_of(method, path), error))

    def _url(self, path: str, query: bytes) -> URL:
        """path: decoded, as it was looked at here; so the port cannot read another one from it."""
        return URL.build(
            scheme="http", authority=self._authority, path=quote(path), query_string=_text(query), encoded=True
        )

    async def _asked(self, method: str, url: URL, headers: Headers, body: AsyncIterable[bytes], client: Any) -> HttpEnd:
        named = dict(headers)
        is_chunked = "transfer-encoding" in named
        passed = [
            *_without(headers, _NOT_PASSED_ON | {"content-length"} if is_chunked else _NOT_PASSED_ON),
            ("host", "localhost"),
            (RELAYED_FROM, f"{self._relay_key} {client[0] if client else ''}"),
        ]
        data = _filled(body) if is_chunked or named.get("content-length", "0") != "0" else None
        async with self._session.request(method, url, headers=passed, data=data, allow_redirects=False) as answer:
            content = await answer.read()
        back = [(name.lower(), value) for name, value in answer.headers.items()]
        twice = (_REQUEST_ID, named.get(_REQUEST_ID, ""))  # Ray's proxy says it as well
        return self._end(answer.status, [each for each in back if each != twice], content)

    def _own(self, response: web.Response) -> HttpEnd:
        """An answer that is written here."""
        response.headers.update(SECURITY_HEADERS)
        content = response.body
        assert isinstance(content, bytes)  # noqa: S101 - as web.Response makes of a text
        response.headers["Content-Length"] = str(len(content))
        return self._end(response.status, [(name.lower(), value) for name, value in response.headers.items()], content)

    def _end(self, status: int, headers: Headers, body: bytes) -> HttpEnd:
        passed = [*_without(headers, _NOT_PASSED_BACK), (REPLICA, self._instance_id)]
        return HttpEnd(status, [(name.encode(), value.encode(errors="replace")) for name, value in passed], body)


def _is_of_one_replica(method: str, path: str) -> bool:
    """The page, its figures, and those of a model in the Open Inference Protocol. POST / is TEI's."""
    if path == "/":
        return method != "POST"
    return path in _FIGURES or (path.startswith("/v2/models/") and path.endswith("/stats"))


async def _filled(body: AsyncIterable[bytes]) -> AsyncIterator[bytes]:
    """An empty chunk would end a body."""
    async for chunk in body:
        if chunk:
            yield chunk


def _text(raw: bytes) -> str:
    return raw.decode(errors="replace")


def _without(headers: Headers, names: set[str]) -> Headers:
    """Nor those that `connection` says are of one connection alone."""
    lists = [value for name, value in headers if name == "connection"]
    dropped = names.union(*({name.strip().lower() for name in each.split(",")} for each in lists))
    return [each for each in headers if each[0] not in dropped]
