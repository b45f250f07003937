"""TEI over HTTP, by a real client against a real server."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest

from ml_inference_server.backends.fake import DIMENSION, fake_embedding, fake_logit
from ml_inference_server.metrics import http_connections
from ml_inference_server.server.similarity import probability
from tests.conftest import until
from tests.integration.http_kit import NO_OBJECTS, HttpClient, float32, http_client

LONG = "word " * 300
CROSS_ENCODER = {"task": "cross_encoder"}
TIMINGS = ("x-compute-time", "x-total-time", "x-tokenization-time", "x-queue-time", "x-inference-time")


@pytest.fixture
async def http() -> AsyncIterator[HttpClient]:
    async with http_client() as client:
        yield client


@pytest.fixture
async def pairs() -> AsyncIterator[HttpClient]:
    """Of a cross-encoder."""
    async with http_client(model=dict(CROSS_ENCODER)) as client:
        yield client


@pytest.mark.parametrize("path", ["/embed", "/", "/invocations"])
async def test_embed_answers_the_vectors_to_the_last_bit(http: HttpClient, path: str) -> None:
    assert (float32(await http.ask(path, {"inputs": "one text"})) == [fake_embedding("one text")]).all()
    texts = ["one", "two words", "three words more"]
    got = float32(await http.ask(path, {"inputs": texts, "truncate": None, "prompt_name": None, "normalize": True}))
    assert (got == [fake_embedding(text) for text in texts]).all()


async def test_numbers_are_written_as_short_as_float32_allows(http: HttpClient) -> None:
    reply = await http.post("/embed", {"inputs": "one"})
    written = reply.body.decode().strip("[]").split(",")
    assert [float(each) for each in written] == [float(str(number)) for number in fake_embedding("one")]
    assert max(map(len, written)) < 14


async def test_dimensions_are_cut_and_scaled(http: HttpClient) -> None:
    got = float32(await http.ask("/embed", {"inputs": "one", "dimensions": 4}))
    kept = fake_embedding("one")[:4]
    assert got[0] == pytest.approx(kept / np.linalg.norm(kept), abs=1e-6)
    reply = await http.post("/embed", {"inputs": "one", "dimensions": DIMENSION + 1})
    assert (reply.status, reply.json["error_type"]) == (422, "Validation")


async def test_a_long_text_is_cut_unless_that_is_refused(http: HttpClient) -> None:
    for truncate in ({}, {"truncate": None}, {"truncate": True}):
        reply = await http.post("/embed", {"inputs": ["short", LONG], **truncate})
        assert (float32(reply.json[1]) == fake_embedding(LONG)).all()
        assert (reply.headers["x-truncated-texts"], reply.headers["x-truncated-rows"]) == ("1", "1")
        assert (reply.headers["x-token-counts"], reply.headers["x-used-token-counts"]) == ("3,302", "3,256")
    reply = await http.post("/embed", {"inputs": ["short", LONG], "truncate": False})
    assert (reply.status, reply.json["error_type"]) == (422, "Validation")
    assert reply.json["error"].startswith("Input validation error: inputs[1]: ")


@pytest.mark.parametrize("direction", ["Left", "left"])
async def test_the_end_of_a_long_text_is_kept_where_the_left_is_cut(http: HttpClient, direction: str) -> None:
    reply = await http.post("/embed", {"inputs": LONG + "end", "truncation_direction": direction})
    assert (float32(reply.json) == [fake_embedding("word " * 253 + "end")]).all()
    assert (reply.headers["x-token-counts"], reply.headers["x-used-token-counts"]) == ("303", "256")


async def test_a_cross_encoder_cuts_no_pair_on_the_left(pairs: HttpClient) -> None:
    reply = await pairs.post("/rerank", {"query": "q", "texts": ["a"], "truncation_direction": "Left"})
    assert (reply.status, reply.json["error_type"]) == (422, "Validation")
    assert "cross-encoder" in reply.json["error"]


async def test_answers_tell_their_times_counts_and_space(http: HttpClient) -> None:
    headers = (await http.post("/embed", {"inputs": ["one", "two words"]})).headers
    assert all(headers[name].isdigit() for name in TIMINGS)
    assert (headers["x-compute-characters"], headers["x-compute-tokens"]) == ("12", "7")
    assert headers["x-compute-type"] == "cpu"
    space = headers["x-space-id"]
    assert len(space) == 16
    reply = await http.post("/embed", {"inputs": "one"}, {"x-expect-space-id": space})
    assert reply.status == 200
    reply = await http.post("/embed", {"inputs": "one"}, {"x-expect-space-id": "0" * 16})
    assert (reply.status, reply.json["error_type"]) == (412, "Validation")


async def test_rerank_orders_texts_by_a_score_within_0_and_1(http: HttpClient) -> None:
    texts = ["a b", "query", "d e f"]
    cosines = np.array([fake_embedding("query") @ fake_embedding(text) for text in texts])
    ranks = await http.ask("/rerank", {"query": "query", "texts": texts})
    assert [rank["index"] for rank in ranks] == np.argsort(-cosines).tolist()
    assert ranks[0] == {"index": 1, "score": pytest.approx(1.0)}
    expected = (1 + cosines[[rank["index"] for rank in ranks]]) / 2
    assert [rank["score"] for rank in ranks] == pytest.approx(expected, abs=1e-6)
    ranks = await http.ask("/rerank", {"query": "query", "texts": texts, "raw_scores": True, "return_text": True})
    for rank in ranks:
        assert rank["text"] == texts[rank["index"]]
        assert rank["score"] == pytest.approx(cosines[rank["index"]], abs=1e-6)


@pytest.mark.parametrize("path", ["/rerank", "/", "/invocations"])
async def test_a_cross_encoder_reranks(pairs: HttpClient, path: str) -> None:
    texts = ["a b", "c", "d e f"]
    logits = np.array([fake_logit("q", text) for text in texts], np.float32)
    ranks = await pairs.ask(path, {"query": "q", "texts": texts})
    assert [rank["index"] for rank in ranks] == np.argsort(-logits).tolist()
    expected = probability("logit", logits)
    assert [np.float32(rank["score"]) for rank in ranks] == [expected[rank["index"]] for rank in ranks]
    raw = await pairs.ask(path, {"query": "q", "texts": texts, "raw_scores": True})
    assert [np.float32(rank["score"]) for rank in raw] == [logits[rank["index"]] for rank in raw]


async def test_similarity_is_the_cosine(http: HttpClient) -> None:
    body: dict[str, Any] = {"inputs": {"source_sentence": "one", "sentences": ["two", "one"]}}
    expected = [fake_embedding("one") @ fake_embedding("two"), 1.0]
    for path in ("/similarity", "/"):
        for parameters in ({}, {"parameters": None}, {"parameters": {"truncate": True}}):
            assert await http.ask(path, body | parameters) == pytest.approx(expected, abs=1e-6)


async def test_a_bad_sentence_is_named_by_its_own_field(http: HttpClient) -> None:
    for source, sentences, field in (
        (" ", ["a"], "inputs.source_sentence"),
        ("a", ["b", " "], "inputs.sentences[1]"),
    ):
        reply = await http.post("/similarity", {"inputs": {"source_sentence": source, "sentences": sentences}})
        assert reply.status == 422
        assert reply.json["error"] == f"Input validation error: {field}: text is empty"
    reply = await http.post("/similarity", {"inputs": {"source_sentence": "a", "sentences": []}})
    assert (reply.status, reply.json) == (
        400,
        {"error": "`inputs.sentences` cannot be empty", "error_type": "Empty"},
    )


@pytest.mark.parametrize("path", ["/predict", "/"])
async def test_predict_scores_pairs(pairs: HttpClient, path: str) -> None:
    first, second = fake_logit("q", "a"), fake_logit("q", "b c")
    raw = {"raw_scores": True}
    assert await pairs.ask(path, {"inputs": ["q", "a"], **raw}) == [{"score": pytest.approx(first), "label": "LABEL_0"}]
    answer = await pairs.ask(path, {"inputs": [["q", "a"], ["q", "b c"]], **raw})
    assert [row[0]["score"] for row in answer] == pytest.approx([first, second])
    answer = await pairs.ask(path, {"inputs": [["q", "a"]]})
    assert answer == [[{"score": pytest.approx(1 / (1 + np.exp(-first))), "label": "LABEL_0"}]]


async def test_predict_needs_pairs(pairs: HttpClient) -> None:
    for inputs in ("q", ["q"], [["q", "a"], ["q"]]):
        reply = await pairs.post("/predict", {"inputs": inputs})
        assert (reply.status, reply.json["error_type"]) == (422, "Validation")
        assert "scores pairs" in reply.json["error"]


async def test_another_task_is_a_failed_dependency(http: HttpClient, pairs: HttpClient) -> None:
    for client, path, body in (
        (http, "/predict", {"inputs": ["q", "a"]}),
        (http, "/embed_all", {"inputs": "a"}),
        (http, "/embed_sparse", {"inputs": "a"}),
        (pairs, "/embed", {"inputs": "a"}),
        (pairs, "/similarity", {"inputs": {"source_sentence": "a", "sentences": ["b"]}}),
    ):
        reply = await client.post(path, body)
        assert (reply.status, reply.json["error_type"]) == (424, "Backend"), path


async def test_the_body_of_rerank_says_whose_it_is(http: HttpClient) -> None:
    documents = await http.ask("/rerank", {"query": "q", "documents": ["a"]})
    assert documents["results"][0]["index"] == 0
    assert isinstance(await http.ask("/rerank", {"query": "q", "texts": ["a"], "documents": None}), list)
    for body, found in (
        ({"query": "q", "texts": ["a"], "documents": ["a"]}, "both are there"),
        ({"query": "q"}, "neither is there"),
    ):
        reply = await http.post("/rerank", body)
        assert (reply.status, reply.json["error_type"]) == (422, "Validation")
        assert found in reply.json["error"]
    assert (await http.post("/rerank", {"query": "q", "texts": []})).json["error_type"] == "Empty"
    reply = await http.post("/rerank", {"query": "q", "documents": []})
    assert (reply.status, reply.json) == (400, {"message": "documents: at least one is required"})


async def test_health_is_an_empty_200_or_says_why_not(http: HttpClient) -> None:
    for path in ("/health", "/ping"):
        reply = await http.get(path)
        assert (reply.status, reply.body) == (200, b"")
    http.server.state.draining.set()
    for path in ("/health", "/ping"):
        reply = await http.get(path)
        assert (reply.status, reply.json) == (503, {"error": "draining", "error_type": "Unhealthy"})
    http.server.state.draining.clear()


async def test_tokenize_tells_each_token_and_decode_makes_the_text_of_them(http: HttpClient) -> None:
    rows = await http.ask("/tokenize", {"inputs": ["one two", "one"]})
    assert [[token["text"] for token in row] for row in rows] == [
        ["[START]", "one", "two", "[END]"],
        ["[START]", "one", "[END]"],
    ]
    start, one, two, _ = rows[0]
    assert (start["special"], start["start"], start["stop"]) == (True, None, None)
    assert (two["special"], two["start"], two["stop"]) == (False, 4, 7)
    assert list(one) == ["id", "text", "special", "start", "stop"]
    bare = await http.ask("/tokenize", {"inputs": "one two", "add_special_tokens": False, "prompt_name": None})
    assert bare == [[one, two]]
    ids = [[token["id"] for token in row] for row in rows]
    assert await http.ask("/decode", {"ids": ids}) == ["one two", "one"]
    assert await http.ask("/decode", {"ids": ids[1]}) == ["one"]
    shown = await http.ask("/decode", {"ids": ids[1], "skip_special_tokens": False})
    assert shown == ["[START] one [END]"]


async def test_a_text_is_tokenized_to_its_end(http: HttpClient) -> None:
    (row,) = await http.ask("/tokenize", {"inputs": LONG})
    assert len(row) == 302


async def test_the_prompts_that_there_are_stand_in_the_error(http: HttpClient) -> None:
    for path in ("/embed", "/tokenize"):
        reply = await http.post(path, {"inputs": "a", "prompt_name": "nobody"})
        assert reply.json["error"].endswith("prompts. Available prompts: []")


async def test_info_has_the_keys_of_tei_beside_the_servers_own(http: HttpClient, pairs: HttpClient) -> None:
    info = (await http.get("/info")).json
    assert info["instance_id"] == http.server.state.instance_id
    assert info["model_id"] == info["served_model_name"] == http.server.model.service.names.served
    assert (info["model_dtype"], info["max_input_length"], info["max_client_batch_size"]) == ("float32", 256, 1024)
    assert (info["auto_truncate"], info["sha"], info["docker_label"]) == (True, None, None)
    for name in ("max_concurrent_requests", "max_batch_tokens", "max_batch_requests", "tokenization_workers"):
        assert isinstance(info[name], int)
    assert list(info["model_type"]) == ["embedding"]
    assert "model_metadata" not in info
    kind = (await pairs.get("/info")).json["model_type"]
    assert kind == {"reranker": {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}}


async def test_a_full_queue_is_told_as_overload() -> None:
    async with http_client(batching={"max_queue_requests": 1}) as client:
        client.server.backend.hold()
        waiting = asyncio.create_task(client.post("/embed", {"inputs": "one"}))
        await until(lambda: client.server.model.admission.requests == 1)
        reply = await client.post("/embed", {"inputs": "two"})
        assert reply.status == 429
        assert reply.json["error_type"] == "Overloaded"
        assert reply.json["error"].startswith("Model is overloaded: ")
        assert int(reply.headers["retry-after-ms"]) > 0
        client.server.backend.release()
        assert (await waiting).status == 200


BAD: list[tuple[str, Any, int]] = [
    ("/embed", {}, 422),
    ("/embed", {"inputs": None}, 422),
    ("/embed", {"inputs": 1}, 422),
    ("/embed", {"inputs": True}, 422),
    ("/embed", {"inputs": []}, 400),
    ("/embed", {"inputs": ""}, 422),
    ("/embed", {"inputs": ["a", " "]}, 422),
    ("/embed", {"inputs": ["a", None]}, 422),
    ("/embed", {"inputs": [["a"]]}, 422),
    ("/embed", {"inputs": ["a", ["b"]]}, 422),
    ("/embed", {"inputs": [101, 7592, 102]}, 422),
    ("/embed", {"inputs": [[101, 7592, 102]]}, 422),
    ("/embed", {"inputs": ["a", 101]}, 422),
    ("/embed", {"inputs": "\ud800"}, 422),
    ("/embed", {"inputs": ["a"] * 1025}, 422),
    ("/embed", {"inputs": "a" * 1_048_577}, 422),
    ("/embed", {"inputs": "a", "truncate": "yes"}, 422),
    ("/embed", {"inputs": "a", "truncation_direction": "Up"}, 422),
    ("/embed", {"inputs": "a", "normalize": None}, 422),
    ("/embed", {"inputs": "a", "prompt_name": 3}, 422),
    ("/embed", {"inputs": "a", "prompt_name": "nobody"}, 422),
    ("/embed", {"inputs": "a", "dimensions": 0}, 422),
    ("/embed", {"inputs": "a", "dimensions": -1}, 422),
    ("/embed", {"inputs": "a", "dimensions": 1.5}, 422),
    ("/embed", {"inputs": "a", "dimensions": 1e300}, 422),
    ("/embed", {"inputs": "a", "dimensions": 10**400}, 422),
    ("/rerank", {"texts": ["a"]}, 422),
    ("/rerank", {"query": 1, "texts": ["a"]}, 422),
    ("/rerank", {"query": " ", "texts": ["a"]}, 422),
    ("/rerank", {"query": "q", "texts": "a"}, 422),
    ("/rerank", {"query": "q", "texts": [1]}, 422),
    ("/rerank", {"query": "q", "texts": [["a"]]}, 422),
    ("/rerank", {"query": "q", "texts": ["a"], "raw_scores": 1}, 422),
    ("/similarity", {"inputs": "a"}, 422),
    ("/similarity", {"inputs": {"source_sentence": "a"}}, 422),
    ("/similarity", {"inputs": {"source_sentence": ["a"], "sentences": ["a"]}}, 422),
    ("/similarity", {"inputs": {"source_sentence": "a", "sentences": ["a"] * 1024}}, 422),
    ("/predict", {"inputs": []}, 424),
    ("/predict", {"inputs": {"a": "b"}}, 422),
    ("/predict", {"inputs": ["a", "b", "c"]}, 422),
    ("/predict", {"inputs": [["a", 1]]}, 422),
    ("/tokenize", {"inputs": []}, 400),
    ("/tokenize", {"inputs": [1]}, 422),
    ("/tokenize", {"inputs": "a", "add_special_tokens": "no"}, 422),
    ("/tokenize", {"inputs": "a", "prompt_name": "nobody"}, 422),
    ("/tokenize", {"inputs": ["a"] * 1025}, 422),
    ("/tokenize", {"inputs": "\ud800"}, 422),
    ("/tokenize", {"inputs": "a " * 600_000}, 422),
    ("/decode", {"ids": []}, 400),
    ("/decode", {"ids": "a"}, 422),
    ("/decode", {"ids": [1.5]}, 422),
    ("/decode", {"ids": [True]}, 422),
    ("/decode", {"ids": [-1]}, 422),
    ("/decode", {"ids": [2**31]}, 422),
    ("/decode", {"ids": [99]}, 422),
    ("/decode", {"ids": [[1], 2]}, 422),
    ("/decode", {"ids": [[[1]]]}, 422),
    ("/decode", {"ids": [[1]] * 1025}, 422),
    ("/decode", {"ids": [1] * 300_000}, 422),
]


async def test_nonsense_is_answered_in_teis_form_and_the_server_goes_on(http: HttpClient) -> None:
    for path, body, status in BAD:
        reply = await http.post(path, body)
        shown = (path, str(body)[:60], reply.status, reply.body[:300])
        assert reply.status == status, shown
        assert set(reply.json) == {"error", "error_type"}, shown
        assert reply.json["error_type"] == {400: "Empty", 422: "Validation", 424: "Backend"}[status], shown
        assert 0 < len(reply.json["error"]) < 600, shown
        assert (float32(await http.ask("/embed", {"inputs": "one"})) == [fake_embedding("one")]).all()


@pytest.mark.parametrize("path", ["/embed", "/", "/rerank", "/tokenize"])
async def test_a_body_that_is_no_object_is_refused(http: HttpClient, path: str) -> None:
    for name, body in NO_OBJECTS.items():
        reply = await http.send(path, body)
        assert (reply.status, reply.json["error_type"]) == (400, "Validation"), (name, reply.body[:300])
    assert (await http.post("/embed", {"inputs": "one"})).status == 200


async def test_what_is_no_post_of_json_is_refused_in_teis_form(http: HttpClient) -> None:
    good = json.dumps({"inputs": "one"}).encode()
    for headers, status in (
        ({"Content-Type": "text/plain"}, 415),
        ({"Content-Type": "application/x-www-form-urlencoded"}, 415),
        ({}, 415),
        ({"Content-Type": "application/json", "Content-Encoding": "gzip"}, 415),
    ):
        reply = await http.send("/embed", good, headers)
        assert (reply.status, set(reply.json)) == (status, {"error", "error_type"})
    for path in ("/embed", "/rerank", "/similarity", "/predict", "/tokenize", "/decode", "/invocations"):
        for method in ("GET", "PUT", "DELETE"):
            reply = await http.send(path, b"", {}, method=method)
            assert (reply.status, set(reply.json)) == (405, {"error", "error_type"}), (method, path)
            assert reply.headers["Allow"] == "POST"
    reply = await http.send("/embed", b" " * (17 << 20))
    assert (reply.status, set(reply.json)) == (413, {"error", "error_type"})
    assert (await http.post("/embed", {"inputs": "one"})).status == 200


async def test_too_many_connections_are_an_overload(http: HttpClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_connections, "MAX_CONNECTIONS", 0)
    reply = await http.post("/embed", {"inputs": "one"})
    assert (reply.status, reply.json["error_type"]) == (503, "Overloaded")
    assert "too many connections" in reply.json["error"]
