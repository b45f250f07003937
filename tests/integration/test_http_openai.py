"""The OpenAI dialect over real HTTP: vectors of `Embed` to the last bit, its own errors, what was done to each text."""

import asyncio
import base64
from typing import Any

import numpy as np
import pytest

from ml_inference_server.backends.fake import DIMENSION, fake_embedding
from ml_inference_server.proto import inference_pb2 as pb
from tests.conftest import until
from tests.integration.http_kit import HttpClient, float32, http_client

PATH = "/v1/embeddings"
MODEL = "fake"
LONG = "word " * 400
TEXTS = ["b", "a longer text", "b", LONG]


def fake(**server: Any) -> Any:
    return http_client(model={"name": MODEL}, server=server)


async def embed(client: HttpClient, texts: list[str], **fields: Any) -> pb.EmbedResponse:
    reply: pb.EmbedResponse = await client.server.stub.Embed(pb.EmbedRequest(texts=texts, **fields))
    return reply


async def assert_still_serving(client: HttpClient) -> None:
    answer = await client.ask(PATH, {"input": "are you well", "model": MODEL})
    np.testing.assert_array_equal(float32(answer["data"][0]["embedding"]), fake_embedding("are you well"))
    assert client.server.model.admission.requests == 0


async def test_vectors_are_those_of_embed_in_both_forms() -> None:
    async with fake() as client:
        own = await embed(client, TEXTS)
        expected = np.frombuffer(own.embeddings, "<f4").reshape(own.count, own.dimension)
        floats = await client.ask(PATH, {"input": TEXTS, "model": MODEL})
        packed = await client.ask(PATH, {"input": TEXTS, "model": MODEL, "encoding_format": "base64"})
        np.testing.assert_array_equal(float32([each["embedding"] for each in floats["data"]]), expected)
        rows = [np.frombuffer(base64.b64decode(each["embedding"]), "<f4") for each in packed["data"]]
        np.testing.assert_array_equal(np.stack(rows), expected)
        assert [each["index"] for each in floats["data"]] == [0, 1, 2, 3]
        assert {each["object"] for each in floats["data"]} == {"embedding"}
        assert floats["object"] == "list"
        assert floats["model"] == MODEL


async def test_the_answer_tells_tokens_cuts_and_the_space() -> None:
    async with fake() as client:
        own = await embed(client, TEXTS)
        answer = await client.ask(PATH, {"input": TEXTS, "model": MODEL})
        assert answer["token_counts"] == list(own.token_counts) == [3, 5, 3, 402]
        assert answer["used_token_counts"] == list(own.used_token_counts) == [3, 5, 3, 256]
        assert answer["truncated_rows"] == list(own.truncated_rows) == [3]
        assert answer["usage"] == {"prompt_tokens": 267, "total_tokens": 267}
        assert answer["space_id"] == own.space_id
        assert len(own.space_id) == 16


async def test_a_large_answer_is_whole() -> None:
    async with fake() as client:
        texts = [f"text {i}" for i in range(1024)] * 3
        answer = await client.ask(PATH, {"input": texts[:1024], "model": MODEL})
        expected = np.stack([fake_embedding(text) for text in texts[:1024]])
        np.testing.assert_array_equal(float32([each["embedding"] for each in answer["data"]]), expected)


async def test_fewer_dimensions_are_cut_and_then_normalised() -> None:
    async with fake() as client:
        answer = await client.ask(PATH, {"input": "some text", "model": MODEL, "dimensions": 4})
        head = fake_embedding("some text")[:4].astype(np.float64)
        expected = (head / np.linalg.norm(head)).astype(np.float32)
        np.testing.assert_allclose(float32(answer["data"][0]["embedding"]), expected, rtol=2e-7)
        assert "Matryoshka" in answer["warnings"][0]
        whole = await client.ask(PATH, {"input": "some text", "model": MODEL, "dimensions": DIMENSION})
        np.testing.assert_array_equal(float32(whole["data"][0]["embedding"]), fake_embedding("some text"))
        assert whole["warnings"] == []
        assert answer["space_id"] != whole["space_id"]


async def test_smaller_numbers_come_with_what_it_takes_to_read_them() -> None:
    async with fake() as client:
        answer = await client.ask(PATH, {"input": "some text", "model": MODEL, "embed_dtype": "int8"})
        [item] = answer["data"]
        np.testing.assert_allclose(item["scale"] * np.array(item["embedding"]), fake_embedding("some text"), atol=0.01)


@pytest.mark.parametrize("fields", [{"input_type": "query"}, {"task": "retrieval.query"}, {"model": f"{MODEL}:query"}])
async def test_a_role_is_taken_and_a_model_without_prompts_says_that_it_changes_nothing(fields: dict[str, str]) -> None:
    async with fake() as client:
        answer = await client.ask(PATH, {"input": "x", "model": MODEL, **fields})
        assert "changes nothing" in answer["warnings"][0]


async def test_an_index_of_another_space_is_refused_with_412() -> None:
    async with fake() as client:
        right = (await client.ask(PATH, {"input": "x", "model": MODEL}))["space_id"]
        assert (await client.post(PATH, {"input": "x", "model": MODEL}, {"x-expect-space-id": right})).status == 200
        for headers, fields in (({"x-expect-space-id": "0" * 16}, {}), ({}, {"expect_space_id": "0" * 16})):
            reply = await client.post(PATH, {"input": "x", "model": MODEL, **fields}, headers)
            assert reply.status == 412
            assert reply.json["error"]["code"] == "space_mismatch"
            assert right in reply.json["error"]["message"]
        await assert_still_serving(client)


WRONG: dict[str, tuple[dict[str, Any], int, str, str]] = {
    "no input": ({"model": MODEL}, 400, "input", "field required"),
    "no model": ({"input": "x"}, 400, "model", "field required"),
    "empty list": ({"input": [], "model": MODEL}, 400, "input", "at least one is required"),
    "empty text": ({"input": ["a", " "], "model": MODEL}, 400, "input[1]", "text is empty"),
    "a number": ({"input": ["a", {}], "model": MODEL}, 400, "input", "item 1 must be a string"),
    "token ids": ({"input": [1, 2], "model": MODEL}, 400, "input", "check_embedding_ctx_length=False"),
    "lists of ids": ({"input": [[1, 2]], "model": MODEL}, 400, "input", "check_embedding_ctx_length=False"),
    "format": ({"input": "x", "model": MODEL, "encoding_format": "hex"}, 400, "encoding_format", "'float' or 'base64'"),
    "no dimension": ({"input": "x", "model": MODEL, "dimensions": 0}, 400, "dimensions", "expected 1 to 8"),
    "too many": ({"input": "x", "model": MODEL, "dimensions": 9}, 400, "dimensions", "expected 1 to 8"),
    "huge": ({"input": "x", "model": MODEL, "dimensions": 10**400}, 400, "dimensions", ""),
    "another model": ({"input": "x", "model": "gpt-4"}, 404, "", f"served: {MODEL}"),
    "a role that is none": ({"input": "x", "model": MODEL, "input_type": "image"}, 400, "input_type", "no such role"),
    "two roles": ({"input": "x", "model": MODEL, "input_type": "query", "task": "document"}, 400, "task", "send one"),
    "unknown prompt": ({"input": "x", "model": MODEL, "prompt_name": "p"}, 400, "prompt_name", "Available prompts: []"),
    "half a character": ({"input": "\ud800", "model": MODEL}, 400, "input[0]", "not valid Unicode"),
    "overflow": ({"input": LONG, "model": MODEL, "overflow": "refuse"}, 400, "input[0]", "402 tokens"),
    "overflow that is none": ({"input": "x", "model": MODEL, "overflow": "fold"}, 400, "overflow", "'cut'"),
}


@pytest.mark.parametrize("name", WRONG)
async def test_a_wrong_request_is_refused_in_openais_own_form_and_the_next_one_served(name: str) -> None:
    body, status, param, words = WRONG[name]
    async with fake() as client:
        reply = await client.post(PATH, body)
        assert reply.status == status, reply.body
        error = reply.json["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["type"] == "invalid_request_error"
        assert error["param"] == (param or None)
        assert words in error["message"]
        assert len(error["message"]) < 600
        await assert_still_serving(client)


async def test_models_are_listed_by_every_name() -> None:
    async with http_client(
        model={"name": "/some/folder/fake"}, server={"model_aliases": ["text-embedding-3-small"]}
    ) as client:
        listed = (await client.get("/v1/models")).json
        assert [each["id"] for each in listed["data"]] == ["fake", "text-embedding-3-small"]
        one = await client.get("/v1/models/text-embedding-3-small")
        assert one.json["object"] == "model"
        assert (await client.get("/v1/models/gpt-4")).status == 404


async def test_a_full_queue_says_when_to_come_back() -> None:
    async with http_client(
        model={"name": "fake:base_ms=200"}, batching={"max_queue_requests": 1}, server={"accept_any_model": True}
    ) as client:
        running = asyncio.create_task(client.post(PATH, {"input": "a", "model": "m"}))
        await until(lambda: client.server.model.admission.requests == 1)
        reply = await client.post(PATH, {"input": "b", "model": "m"})
        assert reply.status == 429
        assert reply.json["error"]["type"] == "rate_limit_error"
        assert int(reply.headers["retry-after-ms"]) > 0
        assert int(reply.headers["Retry-After"]) >= 1
        assert (await running).status == 200


async def test_a_deadline_in_a_header_is_kept() -> None:
    async with http_client(model={"name": "fake:base_ms=500"}, server={"accept_any_model": True}) as client:
        reply = await client.post(PATH, {"input": "a", "model": "m"}, {"x-request-timeout-ms": "20"})
        assert reply.status == 504
        assert (await client.post(PATH, {"input": "a", "model": "m"}, {"x-request-timeout-ms": "soon"})).status == 400
