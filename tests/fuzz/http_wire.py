"""HTTP as bytes: connections that send whatever they are given, and the API as its own description tells it."""

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NoReturn

import jsonschema
import pytest

from tests.conftest import FakeServer, fake_server
from tests.integration.http_kit import HttpReply

GUARD_S = 30
CONNECTIONS = 16
JSON_TYPE = "Content-Type: application/json"
# Of the server itself: it is loading or draining, or the deadline passed. No other 5xx is a right answer to bad input.
SERVER_STATUSES = frozenset({503, 504})
_BETWEEN = b"\r\n\r\n"


def http_request(path: str, body: bytes, *headers: str, method: str = "POST") -> bytes:
    """With its Content-Length; `headers` are whole lines."""
    lines = [f"{method} {path} HTTP/1.1", "Host: localhost", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join(lines).encode("latin-1") + _BETWEEN + body


class Connection:
    """One at a time: the answer to what was sent, whatever that was. It connects again where the server hung up."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, request: bytes) -> HttpReply:
        """TimeoutError where no answer comes, EOFError where the server hangs up without one."""
        async with asyncio.timeout(GUARD_S):
            reader, writer = self._streams or await asyncio.open_connection("127.0.0.1", self._port)
            self._streams = reader, writer
            with contextlib.suppress(ConnectionError):  # refused before it was all sent: the answer says why
                writer.write(request)
                await writer.drain()
            reply = await read_reply(reader)
            if reply.headers.get("connection") == "close":
                await self.close()
            return reply

    async def close(self) -> None:
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None


async def read_reply(reader: asyncio.StreamReader) -> HttpReply:
    """One answer; the names of its headers in lower case."""
    head = (await reader.readuntil(_BETWEEN)).decode("latin-1")
    status_line, *lines = head.strip().split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    body = await reader.readexactly(int(headers.get("content-length", "0")))
    return HttpReply(int(status_line.split()[1]), headers, body)


@dataclass(frozen=True)
class PostRoute:
    """path: with every name in it filled in. schemas: of its bodies. examples: bodies that work.

    described: the whole document. operation: this route's part of it.
    """

    path: str
    schemas: Sequence[Mapping[str, Any]]
    examples: Sequence[Mapping[str, Any]]
    described: Mapping[str, Any] = field(repr=False)
    operation: Mapping[str, Any] = field(repr=False)

    @cached_property
    def _error_form(self) -> jsonschema.Draft202012Validator:
        forms = [response["content"]["application/json"]["schema"] for response in self._errors.values()]
        assert all(form == forms[0] for form in forms), "one dialect writes all errors in one form"
        return jsonschema.Draft202012Validator({"components": self.described["components"], **forms[0]})

    @property
    def _errors(self) -> Mapping[str, Any]:
        return {status: response for status, response in self.operation["responses"].items() if status >= "400"}

    def check(self, reply: HttpReply) -> None:
        """AssertionError unless it is an answer, or a refusal of the described status and form that tells nothing of
        the server's inside."""
        assert reply.status < 500 or reply.status in SERVER_STATUSES, (self.path, reply)
        assert b"Traceback" not in reply.body, (self.path, reply)
        if reply.status == 200:
            content = reply.body[: int(reply.headers.get("inference-header-content-length", len(reply.body)))]
            json.loads(content, parse_constant=_no_constant)
            return
        assert str(reply.status) in self._errors, (self.path, reply)
        self.check_form(reply)

    def check_form(self, reply: HttpReply) -> None:
        """Of an error, whatever its status."""
        assert reply.headers["content-type"].startswith("application/json"), (self.path, reply)
        self._error_form.validate(json.loads(reply.body))


@dataclass
class Wire:
    """Connections to one server, and what it says of its own routes. sent: requests so far."""

    server: FakeServer
    described: Mapping[str, Any]
    model: str
    sent: int = 0

    def __post_init__(self) -> None:
        self._free: asyncio.LifoQueue[Connection] = asyncio.LifoQueue()
        for _ in range(CONNECTIONS):
            self._free.put_nowait(Connection(self.port))

    @property
    def port(self) -> int:
        return self.server.server.http_port

    async def ask(self, request: bytes) -> HttpReply:
        """Over a connection that others have used; as many at once as there are connections."""
        connection = await self._free.get()
        try:
            self.sent += 1
            return await connection.ask(request)
        except BaseException:
            await connection.close()
            raise
        finally:
            self._free.put_nowait(connection)

    async def ask_all(self, requests: Sequence[bytes]) -> list[HttpReply]:
        return list(await asyncio.gather(*map(self.ask, requests)))

    async def post(self, route: PostRoute, body: bytes, *headers: str) -> HttpReply:
        return await self.ask(http_request(route.path, body, *(headers or (JSON_TYPE,))))

    @cached_property
    def routes(self) -> list[PostRoute]:
        """Everything that takes a body."""
        found = []
        for path, operations in self.described["paths"].items():
            if "post" not in operations:
                continue
            operation = operations["post"]
            filled = path
            for parameter in operation.get("parameters", ()):
                filled = filled.replace(
                    "{" + parameter["name"] + "}", {"model": self.model}.get(parameter["name"], "1")
                )
            schemas = [self._resolved(each) for each in _schemas(operation)]
            examples = [schema["example"] for schema in schemas]
            found.append(PostRoute(filled, schemas, examples, self.described, operation))
        return found

    def _resolved(self, reference: Mapping[str, str]) -> Mapping[str, Any]:
        found: Mapping[str, Any] = self.described["components"]["schemas"][reference["$ref"].rpartition("/")[2]]
        return found

    async def check_well(self) -> None:
        """The server answers right requests, and holds nothing of those before."""
        reply = await self.ask(http_request("/rerank", b'{"query": "are you well", "texts": ["yes"]}', JSON_TYPE))
        assert reply.status == 200, reply
        assert self.server.model.admission.requests == 0

    async def close(self) -> None:
        while not self._free.empty():
            await self._free.get_nowait().close()


def _no_constant(name: str) -> NoReturn:
    raise AssertionError(f"{name} is no number of JSON")


def _schemas(operation: Mapping[str, Any]) -> Sequence[Mapping[str, str]]:
    schema = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema")
    if schema is None:
        return []
    found: Sequence[Mapping[str, str]] = schema.get("anyOf", [schema])
    return found


@contextlib.asynccontextmanager
async def quiet_wire(caplog: pytest.LogCaptureFixture, **sections: dict[str, Any]) -> AsyncIterator[Wire]:
    """To a server that is well at the end, and that has written nothing into its log that an operator must look at."""
    async with fake_server(**sections) as server, wire_to(server) as wire:
        yield wire
        await wire.check_well()
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == []


@contextlib.asynccontextmanager
async def wire_to(server: FakeServer) -> AsyncIterator[Wire]:
    async def get(path: str) -> Any:
        connection = Connection(server.server.http_port)
        try:
            return (await connection.ask(http_request(path, b"", method="GET"))).json
        finally:
            await connection.close()

    wire = Wire(server, await get("/openapi.json"), (await get("/v1/models"))["data"][0]["id"])
    try:
        yield wire
    finally:
        await wire.close()
