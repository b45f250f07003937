"""Cohere's embed and rerank over HTTP, by a real client against a real server."""

import base64
import json
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest

from ml_inference_server.backends.fake import fake_embedding, fake_logit
from ml_inference_server.server.similarity import probability
from tests.integration.http_kit import NO_OBJECTS, HttpClient, float32, http_client

LONG = "word " * 300
TEXTS = ["one", "two words", "three words more"]
VECTORS = np.array([fake_embedding(text) for text in TEXTS])


@pytest.fixture
async def http() -> AsyncIterator[HttpClient]:
    async with http_client() as client:
        yield client


@pytest.mark.parametrize("asked", [{}, {"embedding_types": None}, {"embedding_types": []}])
async def test_version_1_answers_a_bare_list_where_no_type_is_asked_for(
    http: HttpClient, asked: dict[str, Any]
) -> None:
    answer = await http.ask("/v1/embed", {"texts": TEXTS, **asked})
    assert (float32(answer["embeddings"]) == VECTORS).all()
    assert (answer["response_type"], answer["texts"]) == ("embeddings_floats", TEXTS)
    assert answer["meta"]["api_version"] == {"version": "1"}


@pytest.mark.parametrize("version", ["1", "2"])
async def test_every_embedding_type(http: HttpClient, version: str) -> None:
    types = ["float", "int8", "uint8", "binary", "ubinary", "base64"]
    answer = await http.ask(f"/v{version}/embed", {"texts": TEXTS, "embedding_types": types})
    found = answer["embeddings"]
    assert (answer["response_type"], list(found)) == ("embeddings_by_type", types)
    assert (float32(found["float"]) == VECTORS).all()
    assert b"".join(map(base64.b64decode, found["base64"])) == VECTORS.astype("<f4").tobytes()
    bits = np.packbits(VECTORS > 0, axis=1)
    assert found["ubinary"] == bits.tolist()
    assert found["binary"] == (bits.astype(int) - 128).tolist()
    assert (np.array(found["uint8"]) == np.array(found["int8"]) + 128).all()
    restored = np.array(found["int8"]) * np.array(answer["meta"]["scales"])[:, None]
    assert restored == pytest.approx(VECTORS, abs=0.005)


async def test_version_2_answers_float_where_no_type_is_asked_for(http: HttpClient) -> None:
    answer = await http.ask("/v2/embed", {"texts": TEXTS})
    assert (list(answer["embeddings"]), answer["response_type"]) == (["float"], "embeddings_by_type")
    assert "scales" not in answer["meta"]


async def test_inputs_of_one_text_each_are_texts(http: HttpClient) -> None:
    inputs = [{"content": [{"type": "text", "text": text}]} for text in TEXTS]
    answer = await http.ask("/v2/embed", {"inputs": inputs})
    assert (float32(answer["embeddings"]["float"]) == VECTORS).all()


async def test_embed_tells_what_was_done_to_each_text(http: HttpClient) -> None:
    reply = await http.post("/v2/embed", {"texts": ["one", LONG], "truncate": "END"})
    meta = reply.json["meta"]
    assert (meta["token_counts"], meta["used_token_counts"]) == ([3, 302], [3, 256])
    assert meta["truncated_rows"] == [1]
    assert meta["billed_units"] == {"input_tokens": 259}
    assert meta["space_id"] == reply.headers["x-space-id"]
    reply = await http.post("/v2/embed", {"texts": ["one", LONG], "truncate": "NONE"})
    assert reply.status == 400
    assert reply.json["message"].startswith("texts[1]: ")


async def test_start_is_cut_off_a_long_text_where_it_is_asked_for(http: HttpClient) -> None:
    answer = await http.ask("/v2/embed", {"texts": [LONG + "end"], "truncate": "START"})
    assert (float32(answer["embeddings"]["float"]) == [fake_embedding("word " * 253 + "end")]).all()
    assert answer["meta"]["truncated_rows"] == [0]


async def test_no_more_tokens_of_a_document_are_used_than_asked_for(http: HttpClient) -> None:
    body = {"query": "one two", "documents": ["one two three four", "three"], "max_tokens_per_doc": 2}
    answer = await http.ask("/v2/rerank", body)
    assert answer["results"][0] == {
        "index": 0,
        "relevance_score": pytest.approx(1.0),
        "raw_score": pytest.approx(1.0),
    }
    assert answer["meta"]["truncated_rows"] == [0]
    assert answer["meta"]["token_counts"] == [6, 3]


async def test_a_role_that_changes_nothing_is_told(http: HttpClient) -> None:
    for role in ("search_query", "search_document", "classification", "clustering", "query", "document"):
        answer = await http.ask("/v2/embed", {"texts": ["one"], "input_type": role})
        assert (float32(answer["embeddings"]["float"]) == [fake_embedding("one")]).all()
        assert role in answer["meta"]["warnings"][0]
    assert "warnings" not in (await http.ask("/v2/embed", {"texts": ["one"]}))["meta"]


async def test_output_dimension_is_cut_and_told(http: HttpClient) -> None:
    answer = await http.ask("/v2/embed", {"texts": ["one"], "output_dimension": 4})
    kept = fake_embedding("one")[:4]
    assert answer["embeddings"]["float"][0] == pytest.approx(kept / np.linalg.norm(kept), abs=1e-6)
    reply = await http.post("/v2/embed", {"texts": ["one"], "output_dimension": 9})
    assert (reply.status, reply.json["message"][:17]) == (400, "output_dimension:")


@pytest.mark.parametrize("path", ["/rerank", "/v1/rerank", "/v2/rerank"])
async def test_rerank_answers_scores_within_0_and_1_and_the_raw_ones(http: HttpClient, path: str) -> None:
    documents = ["a b", {"text": "query"}, "d e f"]
    cosines = np.array([fake_embedding("query") @ fake_embedding(text) for text in ("a b", "query", "d e f")])
    answer = await http.ask(path, {"query": "query", "documents": documents})
    order = np.argsort(-cosines).tolist()
    assert [result["index"] for result in answer["results"]] == order
    for result in answer["results"]:
        assert set(result) == {"index", "relevance_score", "raw_score"}
        assert result["raw_score"] == pytest.approx(cosines[result["index"]], abs=1e-6)
        assert result["relevance_score"] == pytest.approx((1 + result["raw_score"]) / 2, abs=1e-6)
    assert answer["meta"]["billed_units"] == {"search_units": 1}
    assert answer["meta"]["token_counts"] == [4, 3, 5]
    assert answer["usage"] == {"prompt_tokens": 15, "total_tokens": 15}
    assert answer["model"] == http.server.model.service.names.served


async def test_a_cross_encoder_ranks_by_the_probability_of_its_logit() -> None:
    async with http_client(model={"task": "cross_encoder"}) as http:
        documents = ["a b", "c", "d e f"]
        logits = np.array([fake_logit("q", document) for document in documents], np.float32)
        answer = await http.ask("/v2/rerank", {"query": "q", "documents": documents, "top_n": 2})
        best = np.argsort(-logits)[:2]
        assert [result["index"] for result in answer["results"]] == best.tolist()
        assert [np.float32(result["raw_score"]) for result in answer["results"]] == logits[best].tolist()
        expected = probability("logit", logits)[best].tolist()
        assert [np.float32(result["relevance_score"]) for result in answer["results"]] == expected


async def test_documents_come_back_as_they_were_sent(http: HttpClient) -> None:
    documents = ["a", {"text": "b", "id": 7, "more": {"x": [1.5, None]}}]
    answer = await http.ask("/v1/rerank", {"query": "a", "documents": documents, "return_documents": True})
    assert [result["document"] for result in answer["results"]] == [{"text": "a"}, documents[1]]


async def test_rank_fields_name_the_keys_to_read(http: HttpClient) -> None:
    documents = [{"title": "one", "body": "two", "text": "three"}, {"title": "one"}, "one two"]
    body = {"query": "one two", "documents": documents, "rank_fields": ["title", "body"]}
    answer = await http.ask("/v1/rerank", body)
    raw = {result["index"]: result["raw_score"] for result in answer["results"]}
    assert (raw[0], raw[2]) == (pytest.approx(1.0), pytest.approx(1.0))
    assert raw[1] == pytest.approx(fake_embedding("one two") @ fake_embedding("one"), abs=1e-6)
    reply = await http.post("/v1/rerank", {"query": "q", "documents": [*documents, {"year": "1"}, {"title": 3}]})
    assert reply.status == 400
    assert reply.json["message"].startswith("documents[1]: an object needs its text")


async def test_what_changes_nothing_is_told_in_warnings(http: HttpClient) -> None:
    body = {"query": "q", "documents": ["a"], "priority": 3, "max_chunks_per_doc": 10}
    warnings = (await http.ask("/v1/rerank", body))["meta"]["warnings"]
    assert [warning.split()[0] for warning in warnings] == ["priority", "max_chunks_per_doc"]


async def test_a_model_of_another_name_is_not_found(http: HttpClient) -> None:
    served = http.server.model.service.names.served
    for path, body in (
        ("/v1/embed", {"texts": ["a"]}),
        ("/v2/embed", {"texts": ["a"]}),
        ("/rerank", {"query": "q", "documents": ["a"]}),
        ("/v2/rerank", {"query": "q", "documents": ["a"]}),
    ):
        assert (await http.post(path, body | {"model": served})).status == 200
        reply = await http.post(path, body | {"model": "rerank-v3.5"})
        assert (reply.status, list(reply.json)) == (404, ["message"])
        assert served in reply.json["message"]


EMBED: list[tuple[dict[str, Any], int]] = [
    ({}, 400),
    ({"texts": None}, 400),
    ({"texts": []}, 400),
    ({"texts": "a"}, 400),
    ({"texts": [1, 2]}, 400),
    ({"texts": [[1, 2]]}, 400),
    ({"texts": ["a", None]}, 400),
    ({"texts": ["a", [["b"]]]}, 400),
    ({"texts": ["a", " "]}, 400),
    ({"texts": ["\ud800"]}, 400),
    ({"texts": ["a"] * 1025}, 400),
    ({"texts": ["a" * 1_048_577]}, 400),
    ({"texts": ["a"], "inputs": []}, 400),
    ({"inputs": []}, 400),
    ({"inputs": [{"content": []}]}, 400),
    ({"inputs": [{"content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, 400),
    ({"inputs": [{"content": [{"type": "text"}]}]}, 400),
    ({"images": ["data:image/png;base64,AAAA"]}, 400),
    ({"texts": ["a"], "input_type": "image"}, 400),
    ({"texts": ["a"], "input_type": 3}, 400),
    ({"texts": ["a"], "embedding_types": ["float64"]}, 400),
    ({"texts": ["a"], "embedding_types": "float"}, 400),
    ({"texts": ["a"], "output_dimension": 0}, 400),
    ({"texts": ["a"], "output_dimension": 10**400}, 400),
    ({"texts": ["a"], "output_dimension": 2.5}, 400),
    ({"texts": ["a"], "truncate": "MIDDLE"}, 400),
    ({"texts": ["a"], "truncate": True}, 400),
    ({"texts": ["a"], "max_tokens": 10}, 400),
    ({"texts": ["a"], "model": 3}, 400),
    ({"texts": ["a"], "model": "x" * 5000}, 404),
]
RERANK: list[tuple[dict[str, Any], int]] = [
    ({"documents": ["a"]}, 400),
    ({"query": " ", "documents": ["a"]}, 400),
    ({"query": ["q"], "documents": ["a"]}, 400),
    ({"query": "q", "documents": "a"}, 400),
    ({"query": "q", "documents": [1]}, 400),
    ({"query": "q", "documents": [["a"]]}, 400),
    ({"query": "q", "documents": [{}]}, 400),
    ({"query": "q", "documents": [{"text": 1}]}, 400),
    ({"query": "q", "documents": ["a", " "]}, 400),
    ({"query": "q", "documents": ["a"] * 1025}, 400),
    ({"query": "q", "documents": ["a"], "top_n": 0}, 400),
    ({"query": "q", "documents": ["a"], "top_n": "1"}, 400),
    ({"query": "q", "documents": ["a"], "top_n": 10**400}, 400),
    ({"query": "q", "documents": ["a"], "return_documents": 1}, 400),
    ({"query": "q", "documents": ["a"], "rank_fields": "text"}, 400),
    ({"query": "q", "documents": ["a"], "max_tokens_per_doc": 0}, 400),
    ({"query": "q", "documents": ["a"], "relevant_spans": {"mode": "enabled"}}, 400),
    ({"query": "q", "documents": [{"text": "a", "x": "\ud800"}], "return_documents": True}, 400),
    ({"query": "q", "documents": [{"text": "a", "x": 2**70}], "return_documents": True}, 400),
]
TABLES = {"/v1/embed": EMBED, "/v2/embed": EMBED, "/rerank": RERANK, "/v1/rerank": RERANK, "/v2/rerank": RERANK}


@pytest.mark.parametrize("path", TABLES)
async def test_nonsense_is_answered_in_coheres_form_and_the_server_goes_on(http: HttpClient, path: str) -> None:
    for body, status in TABLES[path]:
        reply = await http.post(path, body)
        shown = (path, str(body)[:60], reply.status, reply.body[:300])
        assert reply.status == status, shown
        assert list(reply.json) == ["message"], shown
        assert 0 < len(reply.json["message"]) < 600, shown
        assert (await http.ask("/v1/embed", {"texts": ["one"]}))["texts"] == ["one"]


@pytest.mark.parametrize("path", ["/v1/embed", "/v2/rerank"])
async def test_what_is_no_post_of_a_json_object_is_refused_in_coheres_form(http: HttpClient, path: str) -> None:
    for name, body in NO_OBJECTS.items():
        reply = await http.send(path, body)
        assert (reply.status, list(reply.json)) == (400, ["message"]), (name, reply.body[:300])
    good = json.dumps({"texts": ["a"], "query": "q", "documents": ["a"]}).encode()
    for headers in ({"Content-Type": "text/plain"}, {}, {"Content-Type": "application/json", "Content-Encoding": "br"}):
        reply = await http.send(path, good, headers)
        assert (reply.status, list(reply.json)) == (415, ["message"])
    for method in ("GET", "PUT", "DELETE"):
        reply = await http.send(path, b"", {}, method=method)
        assert (reply.status, list(reply.json), reply.headers["Allow"]) == (405, ["message"], "POST")
    reply = await http.send(path, b" " * (17 << 20))
    assert (reply.status, list(reply.json)) == (413, ["message"])
    assert (await http.send(path, good)).status == 200
