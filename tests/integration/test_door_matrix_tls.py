"""Every RPC and every route against every kind of client certificate; with a good one, a key is needed all the same."""

import asyncio
import re
import ssl
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
from aiohttp import web

from ml_inference_server.door.rights import OPEN, Right
from ml_inference_server.server.lifecycle import Server
from tests.integration.door_kit import KeysFile, keys_file
from tests.integration.test_door_matrix import (
    ROUTES,
    RPCS,
    Record,
    expected,
    kept_routers,
    methods,
    outcome,
    routes,
)
from tests.integration.test_tls import tls_server
from tests.integration.tls_kit import HOST, Authority, Installed, Pair

GUARD_S = 20
ALL = "everything"


@dataclass
class Walled:
    """strangers: certificates, and none, with which nobody gets in, by what is wrong with them."""

    server: Server
    router: web.UrlDispatcher
    authority: Authority
    keys: KeysFile
    client: Pair
    strangers: Mapping[str, Pair | None]

    async def status(self, method: str, path: str, client: Pair | None, key: str = "") -> int:
        """Of the answer over HTTP; 0 where none comes."""
        try:
            async with asyncio.timeout(GUARD_S):
                reader, writer = await asyncio.open_connection(
                    HOST, self.server.http_port, ssl=self.authority.context(client)
                )
                authorization = f"Authorization: {key}\r\n" if key else ""
                body = "Content-Type: application/json\r\nContent-Length: 2\r\n" if method == "POST" else ""
                head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\n{authorization}{body}\r\n"
                writer.write(head.encode() + (b"{}" if body else b""))
                line = await reader.readline()
                writer.close()
        except (OSError, ssl.SSLError):
            return 0
        return int(line.split()[1]) if line else 0


@pytest.fixture
async def walled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Walled]:
    authority, clients, others = (Authority(tmp_path, name) for name in ("servers", "clients", "others"))
    routers, keys = kept_routers(monkeypatch), keys_file(tmp_path)
    keys.add(ALL, Right)
    (tmp_path / "live").mkdir()
    installed = Installed(tmp_path / "live", client_ca=clients.file)
    installed.put(authority.issue())
    strangers = {
        "none": None,
        "expired": clients.expired(),
        "of another authority": others.issue("a-client"),
        "of the servers' authority": authority.issue("a-client"),
    }
    async with tls_server(installed, auth={"keys_file": str(keys.path)}) as server:
        yield Walled(server, routers[0], authority, keys, clients.issue("a-client"), strangers)


async def test_no_rpc_is_answered_without_a_good_certificate(walled: Walled, record_property: Record) -> None:
    port, bearer = walled.server.grpc_port, [walled.keys.bearer(ALL)]
    async with walled.authority.channel(port, walled.client) as channel:
        found = await methods(channel)
        assert len(found) > 40
        for name, *kind in found:
            for authorization in ([], bearer):
                code, _ = await outcome(channel, name, (kind[0], kind[1]), authorization)
                is_refused = not authorization and expected(RPCS, name) != OPEN
                assert (code is grpc.StatusCode.UNAUTHENTICATED) == is_refused, (name, authorization, code)
    for what, stranger in walled.strangers.items():
        async with walled.authority.channel(port, stranger) as channel:
            for name, *kind in found:
                code, text = await outcome(channel, name, (kind[0], kind[1]), bearer)
                assert code is grpc.StatusCode.UNAVAILABLE, (name, what, code, text)
    record_property("cells", len(found) * (2 + len(walled.strangers)))


async def test_no_route_is_answered_without_a_good_certificate(walled: Walled, record_property: Record) -> None:
    found = sorted((method, re.sub(r"\{\w+\}", "1", path), path) for method, path in routes(walled.router))
    assert len(found) > 50
    bearer = walled.keys.bearer(ALL)
    for method, url, path in found:
        for key in ("", bearer):
            status = await walled.status(method, url, walled.client, key)
            needs = expected(ROUTES, f"{method.replace('HEAD', 'GET')} {path}")
            assert status > 0, (method, path)
            assert (status == 401) == (not key and needs != OPEN), (method, path, status)
        for what, stranger in walled.strangers.items():
            assert await walled.status(method, url, stranger, bearer) == 0, (method, path, what)
    record_property("cells", len(found) * (2 + len(walled.strangers)))
