import asyncio
import re
import socket
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest

from ml_inference_server.metrics import http_connections
from ml_inference_server.metrics.http_server import DASHBOARD_DIR, STATIC_FILES
from tests.integration.sidecar_kit import DATA_PATHS, Server


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    started = await Server().start()
    yield started
    await started.sidecar.stop()


@pytest.fixture
async def client(server: Server) -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(f"http://127.0.0.1:{server.port}") as session:
        yield session


def test_the_page_needs_nothing_that_its_policy_forbids() -> None:
    assert {name for name, _ in STATIC_FILES.values()} == {file.name for file in DASHBOARD_DIR.iterdir()}
    page = (DASHBOARD_DIR / "index.html").read_text(encoding="utf-8")
    assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?![^>]*\ssrc=)", page)
    for file in DASHBOARD_DIR.iterdir():
        text = file.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?://|//cdn|innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", text), (
            file
        )


async def test_every_answer_carries_the_security_headers(server: Server, client: aiohttp.ClientSession) -> None:
    server.info = {"not for JSON": float("nan")}
    statuses = set()
    requests: list[tuple[str, str, dict[str, Any]]] = [
        ("GET", path, {}) for path in (*STATIC_FILES, *DATA_PATHS, "/none")
    ]
    requests += [("POST", "/metrics", {}), ("OPTIONS", "/info", {"headers": {"Origin": "http://evil.example"}})]
    requests += [("GET", "/", {"headers": {"Host": "evil.example"}}), ("GET", "/metrics", {"data": b"body"})]
    for method, path, options in requests:
        async with client.request(method, path, **options) as response:
            statuses.add(response.status)
            headers = response.headers
            policy = headers["Content-Security-Policy"]
            assert policy.startswith("default-src 'none'; script-src 'self';")
            assert "unsafe" not in policy
            assert headers["X-Content-Type-Options"] == "nosniff"
            assert headers["Referrer-Policy"] == "no-referrer"
            assert "Python" not in headers["Server"]
            assert not [name for name in headers if name.lower().startswith("access-control")]
            if path not in STATIC_FILES or response.status != 200:
                assert headers["Cache-Control"] == "no-store"
                assert response.content_type in ("application/json", "text/plain")
    assert statuses == {200, 404, 405, 413, 421, 500}


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE"])
@pytest.mark.parametrize("path", ["/", *DATA_PATHS])
async def test_other_methods_are_refused(client: aiohttp.ClientSession, method: str, path: str) -> None:
    async with client.request(method, path) as response:
        assert response.status == 405
        assert (await response.json())["error"]["code"] == 405
        assert "GET" in response.headers["Allow"]


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("LOCALHOST:8080", 200),
        ("localhost.", 200),
        ("127.0.0.1:1", 200),
        ("[::1]:8080", 200),
        ("[::1]", 200),
        (socket.gethostname(), 200),
        ("evil.example", 421),
        ("localhost.evil.example", 421),
        ("evil.example:8080", 421),
        ("user@localhost", 421),
        ("localhost:8080:1", 421),
        ("localhost:port", 421),
        ("[::1]evil", 421),
        ("192.168.1.5", 421),
        ("", 421),
    ],
)
async def test_only_own_names_are_answered(client: aiohttp.ClientSession, host: str, status: int) -> None:
    async with client.get("/metrics", headers={"Host": host}) as response:
        assert response.status == status
        if status == 421:
            assert "--set metrics.hosts=[NAME]" in (await response.json())["error"]["message"], "the remedy"


@pytest.mark.parametrize(
    ("host", "status"), [("192.168.1.5:8080", 200), ("[fe80::1]:8080", 200), ("localhost", 200), ("evil.example", 421)]
)
async def test_a_server_open_to_the_network_is_known_under_any_address(host: str, status: int) -> None:
    server = await Server(host="0.0.0.0").start()
    try:
        answer = await server.raw(f"GET /readyz HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
    finally:
        await server.sidecar.stop()
    assert answer.startswith(f"HTTP/1.1 {status} ".encode())


@pytest.mark.parametrize(
    ("request_line", "hosts", "status"),
    [
        ("GET / HTTP/1.0", "", "421"),
        ("GET / HTTP/1.1", "", "400"),
        ("GET / HTTP/1.1", "Host: localhost\r\nHost: evil.example\r\n", "400"),
        ("NOT HTTP", "", "400"),
    ],
)
async def test_malformed_requests_are_refused_without_noise_in_the_log(
    server: Server, caplog: pytest.LogCaptureFixture, request_line: str, hosts: str, status: str
) -> None:
    answer = await server.raw(f"{request_line}\r\n{hosts}Connection: close\r\n\r\n".encode())
    assert answer.split(b" ", 2)[1] == status.encode()
    assert not [record for record in caplog.records if record.levelname in ("WARNING", "ERROR")]


@pytest.mark.parametrize(
    "body",
    [
        "Content-Length: 99999999\r\n\r\nsome",
        "Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n",
        "Content-Length: 2\r\n\r\n{}",
    ],
)
async def test_a_request_with_a_body_is_refused_before_it_is_read(server: Server, body: str) -> None:
    answer = await server.raw(f"GET /metrics HTTP/1.1\r\nHost: localhost\r\n{body}".encode())
    assert answer.startswith(b"HTTP/1.1 413 ")


async def test_a_fault_in_a_route_is_told_to_the_log_only(
    server: Server, client: aiohttp.ClientSession, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> int:
        raise RuntimeError("secret /home/somebody")

    server.metrics.watch(queue_texts=fail, queue_tokens=int, batches_in_flight=int)
    async with client.get("/metrics") as response:
        assert response.status == 500
        message = (await response.json())["error"]["message"]
    assert "secret" not in message
    request_id = message.rsplit(" ", 1)[1]
    assert request_id in caplog.text
    assert "secret /home/somebody" in caplog.text
    async with client.get("/readyz") as response:
        assert response.status == 200


async def test_huge_headers_are_refused_and_the_server_goes_on(server: Server, client: aiohttp.ClientSession) -> None:
    answer = await server.raw(b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 100_000 + b"\r\n\r\n")
    assert answer.startswith((b"HTTP/1.0 400 ", b"HTTP/1.1 400 "))
    async with client.get("/readyz") as response:
        assert response.status == 200


async def test_a_connection_that_never_asks_is_closed(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_connections, "FIRST_REQUEST_TIMEOUT_S", 0.05)
    assert await server.raw(b"GET /metrics HTTP/1.1\r\nHost: loc") == b""
    assert await server.raw(b"") == b""


async def test_a_connection_that_asked_is_kept(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_connections, "FIRST_REQUEST_TIMEOUT_S", 0.05)
    request = b"GET /readyz HTTP/1.1\r\nHost: localhost\r\n\r\n"
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(request)
    await reader.readuntil(b"}")
    assert await server.raw(b"") == b""  # the limit passed meanwhile, for a later connection
    writer.write(request)
    assert (await reader.readuntil(b"}")).startswith(b"HTTP/1.1 200 ")
    writer.close()
