"""HTTP calls as Ray's proxy hands them to a replica, which asks its own port. The proxy itself is in tests/ray."""

import asyncio
import base64
import contextlib
import json
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import pytest

from ml_inference_server.backends.fake import fake_embedding
from ml_inference_server.deploy.ray_http import HttpEnd, Relay, loopback_session
from ml_inference_server.door.rights import Right
from tests.conftest import FakeServer, fake_server, until
from tests.integration.door_kit import keys_file

TEXTS = {"model": "fake", "input": ["what is a cell", "Grüße 東京"]}
ONE_REPLICA = "this tells of one replica alone, and behind Ray Serve any of them may answer"


class Replica:
    """What Ray's proxy sees of one: calls with the scope that ASGI has for them."""

    def __init__(self, server: FakeServer, session: aiohttp.ClientSession) -> None:
        self.server = server
        self._relay = Relay(server.server, session)

    async def call(
        self,
        method: str,
        path: str,
        body: bytes = b"",
        headers: Mapping[str, str] | None = None,
        *,
        client: str = "192.0.2.1",
        root_path: str = "",
        query: bytes = b"",
        chunks: AsyncIterator[bytes] | None = None,
    ) -> HttpEnd:
        """path: decoded, as ASGI has it. chunks: of a body whose length is not told."""
        sent = {"host": "localhost:8000", "content-type": "application/json", **(headers or {})}
        if chunks is not None:
            sent["transfer-encoding"] = "chunked"
        elif body:
            sent.setdefault("content-length", str(len(body)))
        scope = {
            "type": "http",
            "method": method,
            "path": root_path + path,
            "root_path": root_path,
            "query_string": query,
            "headers": [(name.encode(), value.encode(errors="surrogateescape")) for name, value in sent.items()],
            "client": (client, 50_000),
        }
        return await self._relay.answer(scope, _once(body) if chunks is None else chunks)

    async def post(self, path: str, content: Any, headers: Mapping[str, str] | None = None, **more: Any) -> HttpEnd:
        return await self.call("POST", path, json.dumps(content).encode(), headers, **more)


async def _once(body: bytes) -> AsyncIterator[bytes]:
    """As starlette gives a body: its chunks, and an empty one."""
    yield body
    yield b""


@contextlib.asynccontextmanager
async def replica(**sections: dict[str, Any]) -> AsyncIterator[Replica]:
    async with loopback_session() as session, fake_server(**sections) as server:
        yield Replica(server, session)


@pytest.fixture
async def one() -> AsyncIterator[Replica]:
    async with replica(server={"enable_test_faults": True}) as made:
        yield made


def header(end: HttpEnd, name: str) -> str | None:
    """None where it is not there; it must not be there twice."""
    found = [value.decode() for each, value in end.headers if each.decode() == name]
    assert len(found) < 2, end.headers
    return found[0] if found else None


async def test_vectors_are_those_of_embed_to_the_last_bit(one: Replica) -> None:
    end = await one.post("/v1/embeddings", {**TEXTS, "encoding_format": "base64"}, {"x-request-id": "mine"})
    assert end.status == 200
    rows = [np.frombuffer(base64.b64decode(each["embedding"]), "<f4") for each in json.loads(end.body)["data"]]
    np.testing.assert_array_equal(rows, [fake_embedding(text) for text in TEXTS["input"]])
    assert header(end, "replica") == one.server.state.instance_id
    assert header(end, "content-length") == str(len(end.body))
    assert header(end, "x-request-id") is None, "Ray's proxy says it"
    assert not {b"server", b"date", b"connection"} & {name for name, _ in end.headers}, "Ray's proxy has its own"


async def test_a_binary_body_in_chunks_and_a_binary_answer_stay_as_they_are(one: Replica) -> None:
    text = b"\x0e\x00\x00\x00what is a cell"
    tensor = {
        "name": "TEXT",
        "shape": [1],
        "datatype": "BYTES",
        "parameters": {"binary_data_size": len(text)},
    }
    head = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()

    async def chunks() -> AsyncIterator[bytes]:
        for chunk in (head, b"", text[:5], text[5:], b""):
            yield chunk

    end = await one.call(
        "POST",
        "/v2/models/fake/infer",
        headers={"inference-header-content-length": str(len(head))},
        chunks=chunks(),
    )
    assert end.status == 200, end.body
    at = int(header(end, "inference-header-content-length") or 0)
    np.testing.assert_array_equal(np.frombuffer(end.body[at:][:32], "<f4"), fake_embedding("what is a cell"))


async def test_an_error_has_the_status_and_the_form_of_its_dialect(one: Replica) -> None:
    end = await one.post("/v1/embeddings", {"model": "fake", "input": []})
    assert (end.status, json.loads(end.body)["error"]["param"]) == (400, "input")
    end = await one.post("/embed", {"inputs": "!raise"})
    assert (end.status, json.loads(end.body)["error_type"]) == (424, "Backend")
    end = await one.post("/v2/embed", {"texts": ["a"], "model": "another"})
    assert (end.status, [*json.loads(end.body)]) == (404, ["message"])
    end = await one.call("GET", "/v1/nothing", query=b"a=b")
    assert (end.status, json.loads(end.body)["error"]["type"]) == (404, "invalid_request_error")


@pytest.mark.parametrize(
    "path",
    ["/openapi.json", "/docs", "/docs.js", "/style.css", "/info", "/healthz", "/readyz", "/v1/models", "/health"],
)
async def test_what_all_replicas_say_alike_is_answered(one: Replica, path: str) -> None:
    assert (await one.call("GET", path)).status == 200


async def test_head_is_answered_without_a_body(one: Replica) -> None:
    whole, head = await one.call("GET", "/healthz"), await one.call("HEAD", "/healthz")
    assert (head.status, head.body, header(head, "content-length")) == (200, b"", str(len(whole.body)))


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/"),
        ("HEAD", "/"),
        ("GET", "/metrics"),
        ("GET", "/metrics/prometheus"),
        ("GET", "/api/v1/live"),
        ("GET", "/api/v1/stream"),
        ("GET", "/api/v1/history"),
        ("POST", "/api/v1/benchmark"),
    ],
)
async def test_what_tells_of_one_replica_is_refused_in_a_sentence(one: Replica, method: str, path: str) -> None:
    end = await one.call(method, path, root_path="/app")
    assert (end.status, header(end, "content-type")) == (501, "application/json; charset=utf-8")
    assert json.loads(end.body)["error"]["message"].startswith(ONE_REPLICA)


async def test_a_models_figures_are_refused_in_the_form_of_their_protocol(one: Replica) -> None:
    for path in ("/v2/models/fake/stats", "/v2/models/fake/versions/1/stats"):
        end = await one.call("GET", path)
        assert end.status == 501
        assert json.loads(end.body)["error"].startswith(ONE_REPLICA)


async def test_no_spelling_of_a_path_reaches_what_is_for_this_machine_only(one: Replica) -> None:
    """The port takes the progress of a benchmark from loopback, where all calls of a relay come from."""
    for path in (
        "/x/../api/v1/benchmark",
        "//api/v1/benchmark",
        "/./api/v1/benchmark",
        "/api/v1/benchmark/",
        "/api/v1/%62enchmark",
        "/api%2Fv1/benchmark",
        "/api/v1/benchmark?a",
        "/api/v1/benchmark#a",
        "/api/v1/benchmark;a",
        "http://localhost/api/v1/benchmark",
    ):
        end = await one.post(path, {"state": "running"})
        assert end.status in (404, 400), (path, end)


async def test_a_key_passes_and_without_one_the_refusal_has_its_form(tmp_path: Path) -> None:
    keys = keys_file(tmp_path)
    async with replica(server={"auth": {"keys_file": str(keys.path)}}) as one:
        end = await one.post("/v1/embeddings", TEXTS)
        assert (end.status, json.loads(end.body)["error"]["code"]) == (401, "unauthenticated")
        assert (header(end, "www-authenticate") or "").startswith("Bearer")
        end = await one.post("/v1/embeddings", TEXTS, {"authorization": keys.bearer(Right.METRICS.value)})
        assert end.status == 403
        end = await one.post("/v1/embeddings", TEXTS, {"authorization": keys.bearer(Right.INFER.value)})
        assert end.status == 200


async def test_limits_are_those_of_the_address_that_ray_knows() -> None:
    async with replica(server={"limits": {"requests_per_s": 0.01}}) as one:
        assert (await one.post("/embed", {"inputs": "a"}, client="192.0.2.1")).status == 200
        forged = {"x-relayed-from": f"{'0' * 64} 192.0.2.9"}
        end = await one.post("/embed", {"inputs": "a"}, forged, client="192.0.2.1")
        assert end.status == 429
        assert int(header(end, "retry-after-ms") or 0) > 1000
        assert (await one.post("/embed", {"inputs": "a"}, client="2001:db8::1")).status == 200


async def test_who_asks_the_port_itself_cannot_say_for_whom(one: Replica) -> None:
    """What does not have the key of this process is taken for any other header."""
    async with aiohttp.ClientSession() as session:
        for value in ("", " 192.0.2.1", "\u20ac 192.0.2.1", f"{'0' * 64} 192.0.2.1"):
            sent = {"x-relayed-from": value}
            async with session.post(f"{one.server.url}/embed", json={"inputs": "a"}, headers=sent) as answer:
                assert answer.status == 200
        async with session.get(f"{one.server.url}/info") as answer:
            assert one.server.state.relay_key not in await answer.text()
    assert one.server.state.relay_key not in repr(one.server.state)


async def test_a_body_that_is_too_long_is_refused_before_it_has_come() -> None:
    async with replica(server={"max_message_bytes": 1 << 20}) as one:
        for told in (True, False):
            sent = 0

            async def chunks() -> AsyncIterator[bytes]:
                nonlocal sent
                for _ in range(400):
                    sent += 1 << 16
                    yield b"x" * (1 << 16)
                    await asyncio.sleep(0.001)

            if told:
                headers = {"content-length": str(400 << 16)}
                end = await one.call("POST", "/v1/embeddings", b"x" * (1 << 22), headers)
            else:
                end = await one.call("POST", "/v1/embeddings", chunks=chunks())
                assert sent < 200 << 16
            assert (end.status, json.loads(end.body)["error"]["code"]) == (413, "body_too_long")
        assert (await one.post("/v1/embeddings", TEXTS)).status == 200


async def test_a_caller_who_leaves_is_not_computed_for(one: Replica) -> None:
    call = asyncio.create_task(one.post("/v1/embeddings", {"model": "fake", "input": ["!slow:60000 a"]}))
    others = [asyncio.create_task(one.post("/v1/embeddings", {"model": "fake", "input": [f"b {n}"]})) for n in range(3)]
    await until(lambda: one.server.model.admission.requests == 4)
    for each in others:
        each.cancel()
    await asyncio.gather(*others, return_exceptions=True)
    await until(lambda: one.server.model.admission.requests == 1)
    one.server.backend.release()
    call.cancel()
    await asyncio.gather(call, return_exceptions=True)


async def test_the_callers_own_limit_of_time_counts(one: Replica) -> None:
    end = await one.post("/v1/embeddings", {"model": "fake", "input": ["!slow:300 a"]}, {"x-request-timeout-ms": "50"})
    assert end.status == 504


async def test_who_waits_for_100_continue_is_answered(one: Replica) -> None:
    assert (await one.post("/v1/embeddings", TEXTS, {"expect": "100-continue"})).status == 200
    assert (await one.post("/v1/embeddings", TEXTS, {"expect": "wonders"})).status == 417


async def test_headers_of_one_connection_and_bytes_that_are_no_utf8_do_no_harm(one: Replica) -> None:
    sent = {"x-request-id": "\udcff", "connection": "close, x-expect-space-id", "x-expect-space-id": "another"}
    assert (await one.post("/v1/embeddings", TEXTS, sent)).status == 200


async def test_a_port_that_does_not_answer_is_told_with_a_hint() -> None:
    async with loopback_session() as session:
        async with fake_server() as server:
            one = Replica(server, session)
            assert (await one.post("/v1/embeddings", TEXTS)).status == 200
        end = await one.post("/v1/embeddings", TEXTS)
        assert (end.status, header(end, "retry-after"), header(end, "retry-after-ms")) == (503, "1", "1000")
        assert json.loads(end.body)["error"]["code"] == "replica_lost"
        end = await one.post("/embed", {"inputs": "a"})
        assert (end.status, json.loads(end.body)["error_type"]) == (503, "Unhealthy")


async def test_who_waits_too_long_for_his_turn_is_told_to_come_again() -> None:
    session = aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=1), timeout=aiohttp.ClientTimeout(total=None, connect=0.05)
    )
    async with session, fake_server(server={"enable_test_faults": True}) as server:
        one = Replica(server, session)
        first = asyncio.create_task(one.post("/v1/embeddings", {"model": "fake", "input": ["!slow:1000 a"]}))
        await until(lambda: server.model.admission.requests == 1)
        end = await one.post("/v1/embeddings", TEXTS)
        assert (end.status, header(end, "retry-after-ms")) == (429, "1000")
        assert (await first).status == 200


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "localhost"])
async def test_a_port_that_is_open_to_others_is_found(host: str) -> None:
    async with replica(metrics={"host": host}) as one:
        assert (await one.post("/v1/embeddings", TEXTS)).status == 200


async def test_a_host_that_is_no_name_of_the_server_is_refused() -> None:
    async with replica(metrics={"hosts": ["embeddings.example"]}) as one:
        for host in ("embeddings.example", "192.0.2.7:8000", "[2001:db8::1]:8000"):
            assert (await one.call("GET", "/v1/models", headers={"host": host})).status == 200
        end = await one.call("GET", "/v1/models", headers={"host": "rebound.example"})
        assert (end.status, json.loads(end.body)["error"]["code"]) == (421, 421)


async def test_an_applications_prefix_is_not_part_of_the_path(one: Replica) -> None:
    assert (await one.post("/v1/embeddings", TEXTS, root_path="/app")).status == 200
    assert (await one.post("", {"inputs": "a"}, root_path="/app")).status == 200, "POST / of TEI"
    assert (await one.call("GET", "/v2/models/sentence-transformers/all-MiniLM-L6-v2", root_path="/a b")).status == 200


async def test_a_large_answer_comes_whole(one: Replica) -> None:
    texts = [f"text {number}" for number in range(1000)]
    end = await one.post("/v1/embeddings", {"model": "fake", "input": texts})
    assert end.status == 200
    rows = np.array([each["embedding"] for each in json.loads(end.body)["data"]], np.float32)
    np.testing.assert_array_equal(rows, [fake_embedding(text) for text in texts])
