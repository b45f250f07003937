"""What a caller gets who asks for more than he may: the same refusal on every wire, with the time to come back."""

from pathlib import Path

import aiohttp
import grpc
import yaml

from ml_inference_server.door.rights import Right
from ml_inference_server.proto import inference_pb2 as pb
from tests.conftest import fake_server, refusal
from tests.integration.door_kit import keys_file

ONE = pb.EmbedRequest(texts=["a cell"])


async def test_over_grpc_he_is_told_when_to_come_back() -> None:
    async with fake_server(server={"limits": {"requests_per_s": 0.01}}) as server:
        await server.stub.Embed(ONE)
        error = await refusal(server.stub.Embed(ONE))
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "this caller may ask for no more per second" in (error.details() or "")
        trailers = {key: str(value) for key, value in error.trailing_metadata() or ()}
        assert 90_000 < int(trailers["grpc-retry-pushback-ms"]) <= 100_000
        assert server.metrics.snapshot()["errors_by_reason"] == {"CALLER_LIMIT": 1}


async def test_over_http_he_is_told_when_to_come_back() -> None:
    body = {"model": "fake", "input": ["a cell"]}
    async with (
        fake_server(server={"limits": {"tokens_per_s": 1}}) as server,
        aiohttp.ClientSession(server.url) as session,
    ):
        async with session.post("/v1/embeddings", json=body) as answer:
            assert answer.status == 200
        async with session.post("/v1/embeddings", json=body) as answer:
            assert answer.status == 429
            assert 0 < int(answer.headers["retry-after-ms"]) <= 1000 * int(answer.headers["Retry-After"])
            assert (await answer.json())["error"]["code"] == "caller_limit"
        async with session.post("/embed", json={"inputs": "a cell"}) as answer:  # another dialect, the same caller
            assert answer.status == 429
            assert (await answer.json())["error_type"] == "Overloaded"


async def test_a_key_has_limits_of_its_own_and_is_counted_by_its_name(tmp_path: Path) -> None:
    keys = keys_file(tmp_path, [])
    for name in ("slow", "fast"):
        keys.add(name, [Right.INFER])
    content = yaml.safe_load(keys.path.read_text())
    content["keys"][0]["limits"] = {"requests_per_s": 0.01}
    keys.path.write_text(yaml.safe_dump(content))
    async with fake_server(server={"auth": {"keys_file": str(keys.path)}}) as server:
        as_slow, as_fast = ((("authorization", keys.bearer(name)),) for name in ("slow", "fast"))
        await server.stub.Embed(ONE, metadata=as_slow)
        error = await refusal(server.stub.Embed(ONE, metadata=as_slow))
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        for _ in range(3):
            await server.stub.Embed(ONE, metadata=as_fast)
        text = server.metrics.prometheus("")[0].decode()
    assert 'mlis_caller_requests_total{caller="slow"} 2' in text
    assert 'mlis_caller_limited_requests_total{caller="slow"} 1' in text
    assert 'mlis_caller_requests_total{caller="fast"} 3' in text
    assert "127.0.0.1" not in text
