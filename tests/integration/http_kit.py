"""What tests of the HTTP dialects share: a session to a real server, and requests of bytes that mean nothing."""

import asyncio
import contextlib
import io
import json
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any

import aiohttp
import numpy as np
from numpy.typing import NDArray

from tests.conftest import FakeServer, fake_server

GUARD_S = 20
JSON = {"Content-Type": "application/json"}


@dataclass(frozen=True)
class HttpReply:
    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass(frozen=True)
class HttpClient:
    """server: the one that it is connected to."""

    server: FakeServer
    session: aiohttp.ClientSession

    async def send(
        self, path: str, data: bytes, headers: Mapping[str, str] | None = None, *, method: str = "POST"
    ) -> HttpReply:
        """As it is; without headers it is called JSON."""
        sent = JSON if headers is None else headers
        async with (
            asyncio.timeout(GUARD_S),
            self.session.request(
                method, path, data=io.BytesIO(data), headers=sent, skip_auto_headers=["Content-Type"]
            ) as answer,
        ):
            return HttpReply(answer.status, dict(answer.headers), await answer.read())

    async def post(self, path: str, body: Any, headers: Mapping[str, str] | None = None) -> HttpReply:
        return await self.send(path, json.dumps(body).encode(), JSON | dict(headers or {}))

    async def ask(self, path: str, body: Any) -> Any:
        """The JSON of an answer that must be one."""
        reply = await self.post(path, body)
        assert reply.status == 200, reply.body
        return reply.json

    async def get(self, path: str) -> HttpReply:
        async with asyncio.timeout(GUARD_S), self.session.get(path) as answer:
            return HttpReply(answer.status, dict(answer.headers), await answer.read())


@contextlib.asynccontextmanager
async def http_client(**sections: dict[str, Any]) -> AsyncIterator[HttpClient]:
    """A real server round the fake backend, with settings by section, and a client of its HTTP."""
    async with fake_server(**sections) as server, aiohttp.ClientSession(server.url) as session:
        yield HttpClient(server, session)


def float32(numbers: Any) -> NDArray[np.float32]:
    """Numbers of JSON as the float32 that they were written from."""
    return np.array(numbers, np.float64).astype(np.float32)


# Bodies that are no JSON object at all: (name, bytes).
NO_OBJECTS: dict[str, bytes] = {
    "nothing": b"",
    "no JSON": b"{inputs: 1}",
    "cut off": b'{"inputs": "a"',
    "a list": b'["a"]',
    "a string": b'"a"',
    "null": b"null",
    "not UTF-8": b'{"inputs": "\xff\xfe"}',
    "UTF-16": '{"inputs": "a"}'.encode("utf-16"),
    "NaN": b'{"inputs": "a", "x": NaN}',
    "infinity": b'{"inputs": "a", "x": -Infinity}',
    "a key twice": b'{"inputs": "a", "inputs": "b"}',
    "nested too deep": b'{"inputs": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "a huge number": b'{"inputs": ' + b"9" * 5000 + b"}",
}
