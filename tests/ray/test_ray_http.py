"""The HTTP dialects through Ray Serve's real proxy: answers to the last bit, errors in their form, a lost replica."""

import asyncio
import base64
import contextlib
import io
import json
import os
import signal
import struct
from collections import Counter
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import psutil
import pytest

from ml_inference_server.backends.fake import fake_embedding
from ml_inference_server.door.rights import Right
from ml_inference_server.proto import inference_pb2 as pb
from tests.integration.door_kit import keys_file
from tests.ray.cluster import Cluster

LIMIT_S = 90.0
TEXTS = ["what is a cell", "Grüße 東京"]
OPENAI = {"model": "fake", "input": TEXTS, "encoding_format": "base64"}
CALLERS = 8
JSON = {"Content-Type": "application/json"}
SETTINGS = ("server.accept_any_model=true", "server.max_message_bytes=8388608")


@pytest.fixture(scope="module", autouse=True)
def replicas(ray: Cluster) -> None:
    assert ray.deploy("model.name=fake:base_ms=2", *SETTINGS, replicas=2) == ""


async def until(reached: Callable[..., bool]) -> None:
    """Asked in a thread: it may ask Ray."""
    async with asyncio.timeout(LIMIT_S):
        while not await asyncio.to_thread(reached):  # noqa: ASYNC110 - of other processes
            await asyncio.sleep(0.05)


@pytest.fixture
async def http(ray: Cluster) -> AsyncIterator[aiohttp.ClientSession]:
    url, timeout = f"http://127.0.0.1:{ray.http_port}", aiohttp.ClientTimeout(total=LIMIT_S)
    async with aiohttp.ClientSession(url, timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session:
        yield session


def vectors(answer: Any) -> list[np.ndarray]:
    """Of an answer of /v1/embeddings in base64."""
    return [np.frombuffer(base64.b64decode(each["embedding"]), "<f4") for each in answer["data"]]


@pytest.mark.ray_slice
async def test_each_dialect_answers_what_embed_does(ray: Cluster, http: aiohttp.ClientSession) -> None:
    with ray.stub() as stub:
        reply = stub.Embed(pb.EmbedRequest(texts=TEXTS), timeout=30)
    rows = np.frombuffer(reply.embeddings, "<f4").reshape(reply.count, reply.dimension)
    np.testing.assert_array_equal(rows, [fake_embedding(text) for text in TEXTS])
    seen = set()
    for _ in range(40):
        async with http.post("/v1/embeddings", json=OPENAI, headers={"x-request-id": "mine"}) as answer:
            assert answer.status == 200
            np.testing.assert_array_equal(vectors(await answer.json()), rows)
            seen.add(answer.headers["replica"])
            for name, value in {"x-request-id": "mine", "server": "uvicorn"}.items():
                assert answer.headers.getall(name) == [value]
    assert len(seen) == 2
    async with http.post("/embed", json={"inputs": TEXTS}) as answer:
        np.testing.assert_array_equal(np.array(await answer.json(), np.float32), rows)
        assert answer.headers["x-compute-tokens"].isdigit()
    async with http.post("/v2/embed", json={"texts": TEXTS, "embedding_types": ["float"]}) as answer:
        np.testing.assert_array_equal(np.array((await answer.json())["embeddings"]["float"], np.float32), rows)


async def test_tensors_in_binary_form_pass_both_ways(http: aiohttp.ClientSession) -> None:
    data = b"".join(struct.pack("<I", len(text.encode())) + text.encode() for text in TEXTS)
    parameters = {"binary_data_size": len(data)}
    tensor = {"name": "TEXT", "shape": [len(TEXTS)], "datatype": "BYTES", "parameters": parameters}
    head = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
    headers = {"Inference-Header-Content-Length": str(len(head)), "Content-Type": "application/octet-stream"}
    async with http.post("/v2/models/fake/infer", data=head + data, headers=headers) as answer:
        assert answer.status == 200, await answer.text()
        raw = (await answer.read())[int(answer.headers["Inference-Header-Content-Length"]) :]
    rows = [fake_embedding(text) for text in TEXTS]
    np.testing.assert_array_equal(np.frombuffer(raw[: 4 * sum(map(len, rows))], "<f4").reshape(len(rows), -1), rows)


async def test_large_bodies_pass_both_ways(http: aiohttp.ClientSession) -> None:
    documents = [f"{number} " + "x" * 6000 for number in range(1000)]
    body = {"query": "a", "documents": documents, "return_documents": True}
    async with http.post("/v1/rerank", data=io.BytesIO(json.dumps(body).encode()), headers=JSON) as answer:
        assert answer.status == 200
        found = (await answer.json())["results"]
    assert sorted(each["document"]["text"] for each in found) == sorted(documents)


@pytest.mark.ray_slice
async def test_errors_have_the_status_and_the_form_of_their_dialect(http: aiohttp.ClientSession) -> None:
    async def refused(path: str, body: Any, more: dict[str, str] | None = None) -> tuple[int, Any]:
        sent = io.BytesIO(json.dumps(body).encode())
        async with http.post(path, data=sent, headers=JSON | (more or {})) as answer:
            return answer.status, await answer.json()

    status, body = await refused("/v1/embeddings", {"model": "fake", "input": []})
    assert (status, body["error"]["param"]) == (400, "input")
    status, body = await refused("/embed", {"inputs": "!raise"})
    assert (status, body["error_type"]) == (424, "Backend")
    status, body = await refused("/v2/models/fake/infer", {"inputs": []})
    assert (status, [*body]) == (400, ["error"])
    late = {"x-request-timeout-ms": "50"}
    status, body = await refused("/v1/embeddings", {"model": "fake", "input": ["!slow:300 a"]}, late)
    assert (status, body["error"]["code"]) == (504, "deadline_exceeded")
    status, body = await refused("/v1/embeddings", {"model": "fake", "input": ["x" * 9_000_000]})
    assert (status, body["error"]["code"]) == (413, "body_too_long")


async def test_what_tells_of_one_replica_is_refused_and_the_rest_is_there(http: aiohttp.ClientSession) -> None:
    for path in ("/", "/metrics", "/api/v1/stream", "/v2/models/fake/stats", "/api/v1/%62enchmark"):
        async with http.get(path) as answer:
            assert answer.status == 501, path
            assert "this tells of one replica alone" in await answer.text()
    for path in ("/openapi.json", "/docs", "/docs.js", "/readyz", "/v1/models", "/v2/health/ready"):
        async with http.get(path) as answer:
            assert answer.status == 200, path
    async with http.get("/readyz", headers={"Host": "rebound.example"}) as answer:
        assert answer.status == 421


async def test_a_key_and_a_prefix_of_the_application(ray: Cluster, http: aiohttp.ClientSession, tmp_path: Path) -> None:
    keys = keys_file(tmp_path)
    assert ray.deploy(f"server.auth.keys_file={keys.path}", name="locked", replicas=1) == ""
    try:
        async with http.post("/locked/v1/embeddings", json=OPENAI) as answer:
            assert (answer.status, (await answer.json())["error"]["code"]) == (401, "unauthenticated")
        bearer = {"Authorization": keys.bearer(Right.INFER.value)}
        async with http.post("/locked/v1/embeddings", json=OPENAI, headers=bearer) as answer:
            assert answer.status == 200
            np.testing.assert_array_equal(vectors(await answer.json()), [fake_embedding(text) for text in TEXTS])
    finally:
        ray.tell("forget", name="locked")


async def test_a_caller_who_leaves_is_not_computed_for(ray: Cluster, http: aiohttp.ClientSession) -> None:
    before = cancelled(ray)
    give_up_at = asyncio.get_running_loop().time() + LIMIT_S
    while cancelled(ray) == before:
        leaving = http.post("/v1/embeddings", json={"model": "fake", "input": ["!slow:600 a"]})
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.2), leaving as answer:
                await answer.read()
        assert asyncio.get_running_loop().time() < give_up_at


def cancelled(ray: Cluster) -> int:
    """Calls on both replicas whose callers have left."""
    by_replica: dict[str, int] = {}
    with ray.stub() as stub:
        while len(by_replica) < 2:
            # Ray's proxy may still know of another application.
            to = (("application", "default"),)
            reply, call = stub.GetMetrics.with_call(pb.GetMetricsRequest(), timeout=30, metadata=to)
            by_replica[dict(call.trailing_metadata())["replica"]] = reply.requests_by_code["CANCELLED"]
    return sum(by_replica.values())


async def test_who_finds_all_queues_full_is_told_when_to_come_again(ray: Cluster, http: aiohttp.ClientSession) -> None:
    """That of the replica, and that of Ray's proxy before it."""
    assert ray.deploy("batching.max_queue_requests=1", *SETTINGS, name="full", replicas=1) == ""
    refused: Counter[str] = Counter()

    async def ask(number: int) -> None:
        body = {"model": "fake", "input": [f"!slow:200 {number}"]}
        async with http.post("/full/v1/embeddings", json=body) as answer:
            if answer.status != 200:
                assert answer.status == 429, await answer.text()
                assert int(answer.headers["Retry-After"]) > 0
                refused["replica" if "replica" in answer.headers else "proxy"] += 1

    try:
        while set(refused) != {"replica", "proxy"}:
            await asyncio.gather(*map(ask, range(300)))
    finally:
        ray.tell("forget", name="full")


async def test_callers_who_ask_again_lose_no_call_when_a_replica_is_killed(
    ray: Cluster, http: aiohttp.ClientSession
) -> None:
    """Ray's proxy itself answers for what the replica had in work: with 500, which a client repeats."""
    assert ray.deploy("model.name=fake:base_ms=50", "batching.max_batch_size=2", *SETTINGS, replicas=2) == ""
    statuses: Counter[int] = Counter()
    texts: dict[int, set[str]] = {}
    over = asyncio.Event()

    async def ask(caller: int) -> None:
        number = 0
        while not over.is_set():
            number += 1
            text = f"{caller} {number}"
            async with http.post("/v1/embeddings", json={**OPENAI, "input": [text]}) as answer:
                statuses[answer.status] += 1
                if answer.status != 200:
                    texts.setdefault(answer.status, set()).add(await answer.text())
                    continue
                np.testing.assert_array_equal(vectors(await answer.json()), [fake_embedding(text)])

    async def more(calls: int) -> None:
        wanted = statuses[200] + calls
        await until(lambda: statuses[200] >= wanted)

    async with asyncio.TaskGroup() as callers:
        for caller in range(CALLERS):
            callers.create_task(ask(caller))
        while not texts:  # Ray may have kept to the other one for a moment
            await more(20)
            victim = (await asyncio.to_thread(ray.pids)).pop()
            os.kill(victim, signal.SIGKILL)
            await until(lambda gone=victim: not psutil.pid_exists(gone) and ray.tell("states") == {"RUNNING": 2})
        await more(50)
        over.set()
    assert set(statuses) <= {200, 500, 503}, (statuses, texts)
    assert all("Traceback" not in text for said in texts.values() for text in said), texts
