import asyncio
import json
from collections.abc import AsyncIterator

import aiohttp
import pytest
from prometheus_client.parser import text_string_to_metric_families

from ml_inference_server.metrics.http_server import DASHBOARD_DIR, STATIC_FILES
from ml_inference_server.utils.errors import ConfigError, PortInUse
from tests.integration.sidecar_kit import GUARD_S, HOSTILE, Server

OPENMETRICS = "application/openmetrics-text"
PROMETHEUS_ACCEPT = (
    "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,application/openmetrics-text;version=0.0.1;q=0.5,"
    "text/plain;version=1.0.0;escaping=allow-utf-8;q=0.4,text/plain;version=0.0.4;q=0.3,*/*;q=0.2"
)
BROWSER_ACCEPT = "text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,*/*;q=0.8"


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    started = await Server().start()
    yield started
    await started.sidecar.stop()


@pytest.fixture
async def client(server: Server) -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(f"http://127.0.0.1:{server.port}") as session:
        yield session


async def test_metrics_are_the_snapshot_and_the_readiness(server: Server, client: aiohttp.ClientSession) -> None:
    server.metrics.request_started("Score")
    server.metrics.request_finished("Score", "OK", 0.02, pairs=7)
    server.ready = (False, "the model is loading")
    async with client.get("/metrics") as response:
        told = await response.json()
    expected = json.loads(json.dumps(server.metrics.snapshot()))
    for moving in ("time_unix_s",):
        told.pop(moving)
        expected.pop(moving)
    assert (told.pop("readiness"), told.pop("workers"), told.pop("hints"), told.pop("benchmark")) == (
        {"ready": False, "reason": "the model is loading"},
        [],
        [],
        None,
    )
    assert told == expected
    assert told["totals"]["pairs"] == 7


@pytest.mark.parametrize(
    ("accept", "content_type"),
    [
        (None, "application/json"),
        ("*/*", "application/json"),
        ("application/json", "application/json"),
        (BROWSER_ACCEPT, "application/json"),
        ("application/json, text/plain", "application/json"),
        ("application/json;q=0.9, text/plain;q=0.5", "application/json"),
        ("image/png", "application/json"),
        ("text/plain;q=nonsense", "application/json"),
        ("text/plain", "text/plain"),
        ("text/*", "text/plain"),
        ("text/plain, */*;q=0.1", "text/plain"),
        ("application/json;q=0.5, Text/Plain", "text/plain"),
        (OPENMETRICS, OPENMETRICS),
        (PROMETHEUS_ACCEPT, OPENMETRICS),
    ],
)
async def test_accept_decides_the_form_of_metrics(
    client: aiohttp.ClientSession, accept: str | None, content_type: str
) -> None:
    skip = ["Accept"] if accept is None else []
    headers = {} if accept is None else {"Accept": accept}
    async with client.get("/metrics", headers=headers, skip_auto_headers=skip) as response:
        assert response.status == 200
        assert response.content_type == content_type


async def test_the_prometheus_path_is_always_text(server: Server, client: aiohttp.ClientSession) -> None:
    server.metrics.tokenized(3, 42, 0.1)
    async with client.get("/metrics/prometheus", headers={"Accept": "application/json"}) as response:
        assert response.content_type == "text/plain"
        samples = [s for family in text_string_to_metric_families(await response.text()) for s in family.samples]
    assert {s.name: s.value for s in samples}["mlis_tokenized_tokens_total"] == 42


@pytest.mark.parametrize(("path", "name"), [("/healthz", "alive"), ("/readyz", "ready")])
async def test_health_says_200_or_503_and_why(
    server: Server, client: aiohttp.ClientSession, path: str, name: str
) -> None:
    async with client.get(path) as response:
        assert (response.status, (await response.json())[name]) == (200, True)
    server.ready = server.alive = (False, "draining")
    async with client.get(path) as response:
        assert (response.status, await response.json()) == (503, {name: False, "reason": "draining"})


async def test_info_is_json_however_hostile_its_content(client: aiohttp.ClientSession) -> None:
    async with client.get("/info") as response:
        assert response.content_type == "application/json"
        assert await response.json() == {"title": HOSTILE, "workers": []}


async def test_the_static_files_are_served_as_they_are(client: aiohttp.ClientSession) -> None:
    for path, (name, content_type) in STATIC_FILES.items():
        async with client.get(path) as response:
            assert (response.status, response.content_type) == (200, content_type)
            assert await response.read() == (DASHBOARD_DIR / name).read_bytes()


async def test_a_taken_port_is_named_with_the_remedy(server: Server) -> None:
    with pytest.raises(PortInUse) as caught:
        await Server(port=server.port).sidecar.start()
    assert str(caught.value) == (
        f"port {server.port} on 127.0.0.1 is in use: stop what holds it, or pass --http-port 0 for a free one"
    )


@pytest.mark.parametrize("host", ["192.0.2.1", "no such host", "host.invalid", "x" * 100])
async def test_a_host_that_cannot_be_listened_on_is_a_setting_to_correct(host: str) -> None:
    with pytest.raises(ConfigError, match=r"metrics\.host"):
        await Server(host=host).sidecar.start()


async def test_the_port_is_free_again_after_stop() -> None:
    first = await Server().start()
    await first.sidecar.stop()
    await first.sidecar.stop()
    second = await Server(port=first.port).start()
    await second.sidecar.stop()
    assert second.port == first.port


async def test_answers_of_a_server_that_drains_close_their_connections() -> None:
    server = await Server().start()
    async with aiohttp.ClientSession() as session:
        for is_draining, paths in ((False, ("/healthz",)), (True, ("/healthz", "/nothing"))):
            server.is_draining = is_draining
            for path in paths:
                async with session.get(f"http://127.0.0.1:{server.port}{path}") as answer:
                    assert (answer.headers.get("Connection") == "close") == is_draining
    await server.sidecar.stop()


async def test_stop_closes_what_is_open() -> None:
    server = await Server().start()
    idle_reader, idle = await asyncio.open_connection("127.0.0.1", server.port)
    idle.write(b"GET /readyz HTTP/1.1\r\nHost: localhost\r\n\r\n")
    await idle_reader.readuntil(b"\r\n\r\n")
    half_reader, half = await asyncio.open_connection("127.0.0.1", server.port)
    half.write(b"GET /met")
    await half.drain()
    async with asyncio.timeout(GUARD_S):
        await server.sidecar.stop()
        assert await half_reader.read() == b""
        assert (await idle_reader.read()).endswith(b"}")
    idle.close()
    half.close()
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection("127.0.0.1", server.port)
