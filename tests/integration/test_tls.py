"""TLS on both ports of a real server: who is let in, who is not, and certificates that change under connections."""

import asyncio
import contextlib
import logging
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from ml_inference_server.metrics.http_connections import MAX_CONNECTIONS, PROBE_CONNECTIONS
from ml_inference_server.proto import inference_pb2 as pb
from ml_inference_server.proto import inference_pb2_grpc as rpc
from ml_inference_server.server.lifecycle import Server, serving
from ml_inference_server.utils.config import Settings
from tests.integration.server_process import run_to_end
from tests.integration.tls_kit import HOST, Authority, Installed, Pair

GUARD_S = 20


@contextlib.asynccontextmanager
async def tls_server(installed: Installed, **more: Any) -> AsyncIterator[Server]:
    """more: settings of the server."""
    sections = {
        "model": {"backend": "fake"},
        "server": {"port": 0, "tls": installed.settings, **more},
        "metrics": {"port": 0},
    }
    async with serving(Settings.model_validate(sections), quiet_s=0) as server:
        yield server


async def ask_grpc(channel: grpc.aio.Channel) -> str:
    """OK, or the status."""
    try:
        await rpc.InferenceServiceStub(channel).Embed(pb.EmbedRequest(texts=["a"]), timeout=GUARD_S)
    except grpc.aio.AioRpcError as error:
        return error.code().name
    return "OK"


async def ask_http(port: int, context: ssl.SSLContext, host: str = HOST, version: str = "") -> str:
    """The first line of the answer, or what went wrong; over a connection of its own."""
    try:
        async with asyncio.timeout(GUARD_S):
            reader, writer = await asyncio.open_connection(host, port, ssl=context)
            writer.write(b"GET /readyz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            answer = await reader.read()
            writer.close()
    except (OSError, ssl.SSLError) as error:
        return type(error).__name__
    return answer.partition(b"\r\n")[0].decode()


HTTP_OK = "HTTP/1.1 200 OK"


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


@pytest.fixture
def installed(tmp_path: Path, authority: Authority) -> Installed:
    (tmp_path / "live").mkdir()
    made = Installed(tmp_path / "live")
    made.put(authority.issue())
    return made


async def test_who_trusts_the_authority_is_answered_on_both_ports(installed: Installed, authority: Authority) -> None:
    async with tls_server(installed) as server, authority.channel(server.grpc_port) as channel:
        assert await ask_grpc(channel) == "OK"
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=GUARD_S)
        assert (await anext(aiter(watch))).status == health_pb2.HealthCheckResponse.SERVING
        assert await ask_http(server.http_port, authority.context()) == HTTP_OK


async def test_whoever_does_not_fit_is_not_answered(installed: Installed, authority: Authority, tmp_path: Path) -> None:
    stranger = Authority(tmp_path, "stranger")
    async with tls_server(installed) as server:
        async with stranger.channel(server.grpc_port) as channel:
            assert await ask_grpc(channel) == "UNAVAILABLE"
        assert await ask_http(server.http_port, stranger.context()) == "SSLCertVerificationError"
        async with grpc.aio.insecure_channel(f"{HOST}:{server.grpc_port}") as channel:
            assert await ask_grpc(channel) == "UNAVAILABLE"
        async with asyncio.timeout(GUARD_S):
            reader, writer = await asyncio.open_connection(HOST, server.http_port)
            writer.write(b"GET /readyz HTTP/1.1\r\nHost: localhost\r\n\r\n")
            with contextlib.suppress(ConnectionError):
                assert b"HTTP" not in await reader.read()
            writer.close()
        assert await ask_http(server.http_port, authority.context()) == HTTP_OK


async def test_another_name_than_that_of_the_certificate_is_refused(tmp_path: Path, authority: Authority) -> None:
    installed = Installed(tmp_path)
    pair = authority.issue("elsewhere.example")
    installed.put(pair)
    async with tls_server(installed) as server:
        async with authority.channel(server.grpc_port) as channel:
            assert await ask_grpc(channel) == "UNAVAILABLE"
        assert await ask_http(server.http_port, authority.context()) == "SSLCertVerificationError"


@pytest.mark.filterwarnings("ignore:.*TLSVersion.TLSv1_1 is deprecated:DeprecationWarning")
@pytest.mark.parametrize("port", ["grpc_port", "http_port"])
async def test_versions_before_1_2_are_refused(installed: Installed, authority: Authority, port: str) -> None:
    async with tls_server(installed) as server:
        for version, is_taken in ((ssl.TLSVersion.TLSv1_1, False), (ssl.TLSVersion.TLSv1_2, True)):
            context = authority.context()
            context.set_ciphers("ALL:@SECLEVEL=0")
            context.set_alpn_protocols(["h2"] if port == "grpc_port" else ["http/1.1"])
            context.minimum_version = context.maximum_version = version
            try:
                _, writer = await asyncio.open_connection(HOST, getattr(server, port), ssl=context)
            except (OSError, ssl.SSLError):
                assert not is_taken
            else:
                assert is_taken
                writer.close()


async def test_clients_must_show_a_certificate_of_their_authority(tmp_path: Path, authority: Authority) -> None:
    clients, strangers = Authority(tmp_path, "clients"), Authority(tmp_path, "strangers")
    (tmp_path / "live").mkdir()
    installed = Installed(tmp_path / "live", client_ca=clients.file)
    installed.put(authority.issue())
    cases: list[tuple[Pair | None, bool]] = [
        (clients.issue("a-client"), True),
        (None, False),
        (strangers.issue("a-client"), False),
        (clients.expired(), False),
    ]
    async with tls_server(installed) as server:
        for client, is_taken in cases:
            async with authority.channel(server.grpc_port, client) as channel:
                assert await ask_grpc(channel) == ("OK" if is_taken else "UNAVAILABLE")
            answer = await ask_http(server.http_port, authority.context(client))
            assert (answer == HTTP_OK) == is_taken


async def test_a_new_certificate_is_shown_to_new_connections_and_old_ones_stay(
    installed: Installed, authority: Authority, tmp_path: Path
) -> None:
    later = Authority(tmp_path, "later")
    async with (
        tls_server(installed) as server,
        authority.channel(server.grpc_port) as old_channel,
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=authority.context(), limit=1)) as old_session,
    ):
        url = f"https://{HOST}:{server.http_port}"
        stream = rpc.InferenceServiceStub(old_channel).EmbedStream()
        await stream.write(pb.EmbedStreamRequest(id=1, request=pb.EmbedRequest(texts=["a"])))
        assert (await stream.read()).id == 1
        async with old_session.get(f"{url}/api/v1/stream") as events:
            assert events.status == 200
            await events.content.readline()
            installed.put(later.issue())
            # By the server's own watch, once a second.
            while await ask_http(server.http_port, later.context()) != HTTP_OK:  # noqa: ASYNC110 - polls the server
                await asyncio.sleep(0.05)
            async with later.channel(server.grpc_port) as channel:
                assert await ask_grpc(channel) == "OK"
            async with authority.channel(server.grpc_port) as channel:
                assert await ask_grpc(channel) == "UNAVAILABLE"
            assert await ask_http(server.http_port, authority.context()) == "SSLCertVerificationError"
            assert await events.content.readline()
        assert await ask_grpc(old_channel) == "OK"
        await stream.write(pb.EmbedStreamRequest(id=2, request=pb.EmbedRequest(texts=["b"])))
        assert (await stream.read()).id == 2
        await stream.done_writing()


async def test_an_authority_that_was_taken_away_is_trusted_no_more(tmp_path: Path, authority: Authority) -> None:
    before, after = Authority(tmp_path, "before"), Authority(tmp_path, "after")
    (tmp_path / "live").mkdir()
    client_ca = tmp_path / "clients.pem"
    client_ca.write_bytes(before.pem)
    installed = Installed(tmp_path / "live", client_ca=client_ca)
    installed.put(authority.issue())
    old, new = before.issue("old"), after.issue("new")
    async with tls_server(installed) as server:
        old_context = authority.context(old)
        assert await ask_http(server.http_port, old_context) == HTTP_OK
        client_ca.write_bytes(after.pem)
        while await ask_http(server.http_port, authority.context(new)) != HTTP_OK:  # noqa: ASYNC110 - polls the server
            await asyncio.sleep(0.05)
        assert await ask_http(server.http_port, old_context) != HTTP_OK
        for client, answer in ((old, "UNAVAILABLE"), (new, "OK")):
            async with authority.channel(server.grpc_port, client) as channel:
                assert await ask_grpc(channel) == answer


async def test_a_broken_change_costs_nobody_anything(
    installed: Installed, authority: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    async with tls_server(installed) as server:
        installed.put(Pair(authority.issue().cert, authority.issue().key))
        while not [each for each in caplog.records if each.levelno == logging.ERROR]:  # noqa: ASYNC110 - the server's watch
            await asyncio.sleep(0.05)
        assert await ask_http(server.http_port, authority.context()) == HTTP_OK
        async with authority.channel(server.grpc_port) as channel:
            assert await ask_grpc(channel) == "OK"


@pytest.mark.parametrize("first", [b"", b"GET / HTTP/1.1\r\n\r\n"], ids=["silent", "in the clear"])
async def test_handshakes_that_come_to_nothing_keep_nobody_out(
    installed: Installed, authority: Authority, first: bytes
) -> None:
    """More of them than there may be connections; one that is open stays."""
    ask = b"GET /readyz HTTP/1.1\r\nHost: localhost\r\n\r\n"
    async with tls_server(installed) as server, contextlib.AsyncExitStack() as stack:
        reader, idle = await asyncio.open_connection(HOST, server.http_port, ssl=authority.context())
        stack.callback(idle.close)
        idle.write(ask)
        await reader.readuntil(b"}")
        for _ in range(MAX_CONNECTIONS + PROBE_CONNECTIONS + 10):
            _, writer = await asyncio.open_connection(HOST, server.http_port)
            stack.callback(writer.close)
            writer.write(first)
        assert await ask_http(server.http_port, authority.context()) == HTTP_OK
        idle.write(ask)
        assert (await reader.readuntil(b"}")).startswith(HTTP_OK.encode())


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["expired", "another key", "no file", "keys"])
def test_a_start_with_broken_files_is_refused_in_one_line(authority: Authority, tmp_path: Path, fault: str) -> None:
    pair = authority.expired() if fault == "expired" else authority.issue()
    key = authority.issue().key if fault == "another key" else pair.key
    cert = tmp_path / "none" if fault == "no file" else pair.cert
    flags = ["--set", f"server.tls.cert={cert}", "--set", f"server.tls.key={key}"]
    if fault == "keys":
        (tmp_path / "keys.yaml").write_text("keys: 1")
        flags = ["--set", f"server.auth.keys_file={tmp_path / 'keys.yaml'}"]
    code, line = run_to_end(*flags)
    assert code == 2
    told = {
        "expired": f"error: server.tls.cert {cert}: has expired",
        "another key": f"error: server.tls.key {key} is not the key of {cert}",
        "no file": f"error: server.tls.cert {cert}: cannot be read: No such file or directory",
        "keys": f"error: keys file {tmp_path / 'keys.yaml'}: keys: input should be a valid list",
    }
    assert line == told[fault]
