"""What all routes have in common: body, schema, call, observation, and the only way out with an error."""

import asyncio
import json
import math
import secrets
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from aiohttp import HttpVersion11, web
from pydantic import BaseModel, ConfigDict, ValidationError

from ml_inference_server.door.rights import INFER, Needs
from ml_inference_server.server.call import Call
from ml_inference_server.server.calls import Calls
from ml_inference_server.server.http.answer import HttpAnswer
from ml_inference_server.server.http.body import BODY_TIMEOUT_S, parse_json, read_body
from ml_inference_server.server.http.dialect import Dialect, Refusal
from ml_inference_server.server.observation import Reply, expected
from ml_inference_server.utils.errors import BodyRefused, InvalidRequest, ServiceError

_NOT_STORED = {"Cache-Control": "no-store"}
_JSON_ONLY = ("application/json",)
# ServerState.relay_key, a space, and the address of the caller that the request came from.
RELAYED_FROM = "x-relayed-from"
_TIMEOUT_HEADER = "x-request-timeout-ms"
_MOST_TIMEOUT_MS = 86_400_000
# Parsed in a millisecond where it holds texts, in some ten where it holds as many small values as it can.
_INLINE_BYTES = 65_536


class Schema(BaseModel):
    """Of a request's body. Fields that it does not know are ignored: clients send more than we need."""

    model_config = ConfigDict(extra="ignore", frozen=True, protected_namespaces=(), strict=True)


def example(**body: Any) -> ConfigDict:
    """For a schema's `model_config`: a body that works, which the page of the API fills in."""
    return ConfigDict(json_schema_extra={"example": body})


S = TypeVar("S", bound=Schema)
T = TypeVar("T")
Run = Callable[[S, Call], Awaitable[Reply[HttpAnswer]]]
Question = Callable[[web.Request], web.Response | Awaitable[web.Response]]


@dataclass(frozen=True, slots=True)
class HttpWork(Generic[S]):
    """What a request may ask for. metric: under which it is counted."""

    dialect: Dialect
    metric: str
    schema: type[S]
    run: Run[S]


@dataclass(frozen=True, slots=True)
class Route:
    """What is documented of a route. path: with {names}. schema: of its body; None where it has none.

    others: further schemas of which its body may be instead. other_dialects: in whose form it may be refused as well.
    needs: what a caller's key must allow.
    """

    method: str
    path: str
    dialect: Dialect
    summary: str
    schema: type[Schema] | None = None
    others: tuple[type[Schema], ...] = ()
    other_dialects: tuple[Dialect, ...] = ()
    needs: Needs = INFER


class Endpoints:
    """Makes aiohttp's handlers round the functions of the dialects, and remembers them for the documentation."""

    def __init__(self, calls: Calls, max_body_bytes: int, relay_key: str) -> None:
        self._calls = calls
        self._max_body_bytes = max_body_bytes
        self._relay_key = relay_key.encode()
        self.routes: list[Route] = []
        self._handlers: list[Callable[[web.Request], Awaitable[web.StreamResponse]]] = []
        self._needs: dict[object, Needs] = {}

    def work(self, path: str, dialect: Dialect, metric: str, schema: type[S], run: Run[S], summary: str) -> None:
        """POST that asks for work: `run` answers it, and it is counted under `metric`."""

        async def handle(request: web.Request) -> web.Response:
            call = self._call(request)
            with self._calls.observe(metric, call) as observed:
                body = await self._body(request, call)
                content = await read(body, lambda: validated(schema, parse_json(body)))
                reply = await run(content, observed.call)
                observed.reply = reply
            return _response(reply.message, call)

        self._add(Route("POST", path, dialect, summary, schema), handle)

    def work_by_body(
        self, path: str, works: Sequence[HttpWork[Any]], choose: Callable[[dict[str, Any]], HttpWork[Any]], summary: str
    ) -> None:
        """POST whose body says which of `works` it asks for; the first one answers for a body that does not say.

        choose: raises InvalidRequest where the body says none.
        """
        first, *others = works

        def chosen(body: bytes) -> tuple[HttpWork[Any], Schema | InvalidRequest]:
            work = first
            try:
                content = parse_json(body)
                work = choose(content)
                return work, validated(work.schema, content)
            except InvalidRequest as error:
                return work, error

        async def handle(request: web.Request) -> web.Response:
            call = self._call(request)
            work: HttpWork[Any] = first
            content: Schema | InvalidRequest
            try:
                body = await self._body(request, call)
                work, content = await read(body, lambda: chosen(body))
            except BodyRefused as error:
                content = error
            try:
                with self._calls.observe(work.metric, call) as observed:
                    if isinstance(content, InvalidRequest):
                        raise content
                    reply = await work.run(content, observed.call)
                    observed.reply = reply
            except ServiceError as error:
                return refused(work.dialect, error)
            return _response(reply.message, call)

        schemas = tuple(other.schema for other in others)
        dialects = tuple(other.dialect for other in others if other.dialect is not first.dialect)
        self._add(Route("POST", path, first.dialect, summary, first.schema, schemas, dialects), handle)

    def raw_work(
        self,
        path: str,
        dialect: Dialect,
        metric: str,
        run: Callable[[bytes, web.Request, Call], Awaitable[Reply[HttpAnswer]]],
        summary: str,
        schema: type[Schema] | None = None,
        *,
        content_types: Sequence[str] = (),
    ) -> None:
        """As `work`, for a body that is not JSON alone, or that has to be looked into before its schema is known.

        content_types: of its bodies; none given: JSON where there is a schema, else any.
        """
        taken = content_types or (_JSON_ONLY if schema is not None else ())

        async def handle(request: web.Request) -> web.Response:
            call = self._call(request)
            with self._calls.observe(metric, call) as observed:
                body = await self._body(request, call, taken)
                reply = await run(body, request, observed.call)
                observed.reply = reply
            return _response(reply.message, call)

        self._add(Route("POST", path, dialect, summary, schema), handle)

    def question(
        self,
        method: str,
        path: str,
        dialect: Dialect,
        run: Question,
        summary: str,
        needs: Needs,
    ) -> None:
        """Asks about the server: it is no work, and is not counted. needs: what a caller's key must allow."""

        async def handle(request: web.Request) -> web.Response:
            call = self._call(request)
            try:
                found = run(request)
                return found if isinstance(found, web.Response) else await found
            except Exception as error:
                raise expected(error, f"{method} {path}", call) from error

        self._add(Route(method, path, dialect, summary, needs=needs), handle)

    def add_to(self, router: web.UrlDispatcher) -> None:
        for route, handler in zip(self.routes, self._handlers, strict=True):
            router.add_route(route.method, route.path, handler, expect_handler=_expect_handler(route.dialect))

    def needs(self, handler: object) -> Needs | None:
        """What the route of `handler` asks of a key; None where it is none of these."""
        return self._needs.get(handler)

    def _add(self, route: Route, handle: Callable[[web.Request], Awaitable[web.Response]]) -> None:
        async def answered(request: web.Request) -> web.StreamResponse:
            try:
                return await handle(request)
            except ServiceError as error:
                return refused(route.dialect, error)

        self.routes.append(route)
        self._handlers.append(answered)
        self._needs[answered] = route.needs

    def _call(self, request: web.Request) -> Call:
        return self._calls.begin(
            request_id=request.headers.get("x-request-id"),
            traceparent=request.headers.get("traceparent"),
            expect_space_id=request.headers.get("x-expect-space-id"),
            priority=request.headers.get("x-priority"),
            peer=self._sender(request),
            timeout_s=_timeout_s(request.headers.get(_TIMEOUT_HEADER)),
        )

    def _sender(self, request: web.Request) -> str:
        """Its address."""
        key, _, address = request.headers.get(RELAYED_FROM, "").partition(" ")
        if secrets.compare_digest(key.encode(errors="replace"), self._relay_key):
            return address
        return request.remote or ""

    async def _body(self, request: web.Request, call: Call, content_types: Sequence[str] = _JSON_ONLY) -> bytes:
        """content_types: none refuses none."""
        if content_types and request.content_type not in content_types:
            message = f"send the body with Content-Type: {' or '.join(content_types)}"
            raise BodyRefused(message, reason="BODY_TYPE")
        timeout_s = min(BODY_TIMEOUT_S, call.deadline - call.received_at)
        return await read_body(request, self._max_body_bytes, timeout_s)


async def read(body: bytes, parse: Callable[[], T]) -> T:
    """`parse()` of that body, in a thread where the body is large: millions of small values take seconds."""
    return parse() if len(body) <= _INLINE_BYTES else await asyncio.to_thread(parse)


def validated(schema: type[S], body: dict[str, Any]) -> S:
    """InvalidRequest names each field that is wrong and says what it should be."""
    try:
        return schema.model_validate(body)
    except ValidationError as error:
        wrong = [(_path(each["loc"]), _sentence(each["msg"])) for each in error.errors(include_url=False)]
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        message = f"{wrong[0][0]}: {wrong[0][1]}{more}"
        raise InvalidRequest(message, violations=wrong, names_as_sent=True) from None


def _expect_handler(dialect: Dialect) -> Callable[[web.Request], Awaitable[web.StreamResponse | None]]:
    """As aiohttp's own, which refuses in a form of its own what it does not know."""

    async def answer(request: web.Request) -> web.StreamResponse | None:
        if request.headers["Expect"].lower() != "100-continue":
            message = "only 100-continue can be expected: send it without the header Expect"
            response = answer_refusal(dialect, Refusal(417, "MALFORMED_REQUEST", message))
            response.force_close()
            return response
        if request.version >= HttpVersion11:
            await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            request.writer.output_size = 0  # the answer's own lines come later
        return None

    return answer


def refused(dialect: Dialect, error: ServiceError) -> web.Response:
    """The answer to a request that fails."""
    refusal = dialect.refusal(error)
    response = answer_refusal(dialect, refusal)
    if isinstance(error, BodyRefused):
        response.force_close()
    if error.retry_after_ms is not None:
        response.headers["Retry-After"] = str(math.ceil(error.retry_after_ms / 1000))
        response.headers["retry-after-ms"] = str(error.retry_after_ms)
    return response


def answer_refusal(dialect: Dialect, refusal: Refusal) -> web.Response:
    body = json.dumps(dialect.body(refusal), ensure_ascii=True)
    return web.Response(status=refusal.status, text=body, content_type="application/json", headers=_NOT_STORED)


def _response(answer: HttpAnswer, call: Call) -> web.Response:
    headers = {"Content-Type": answer.content_type, "x-request-id": call.request_id, **_NOT_STORED, **answer.headers}
    return web.Response(body=answer.body, headers=headers)


def _timeout_s(header: str | None) -> float | None:
    if header is None:
        return None
    if not header.isascii() or not header.isdigit() or not 0 < int(header[:9]) <= _MOST_TIMEOUT_MS or len(header) > 8:
        raise InvalidRequest(f"{_TIMEOUT_HEADER}: expected milliseconds, 1 to {_MOST_TIMEOUT_MS}")
    return int(header) / 1000


def _path(loc: tuple[int | str, ...]) -> str:
    """`input[3]`; names of types, which pydantic puts between where a field may be one of several, are left out."""
    path = ""
    for part in loc:
        if isinstance(part, int):
            path += f"[{part}]"
        elif part.isidentifier() and part.islower() and part not in ("str", "int", "list"):
            path += f".{part}" if path else part
    return path or "body"


def _sentence(message: str) -> str:
    text = message.removeprefix("Value error, ")
    return text[:1].lower() + text[1:300]
