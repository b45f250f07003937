"""The package `tei-client` over HTTP and gRPC."""

from typing import Any

import numpy as np
import pytest

from tests.clients.environments import Environment
from tests.clients.served import DOCUMENTS, LONG, MODEL, TEXTS, Served, same_bits, token_counts

PROTOCOLS = ["http", "grpc"]


@pytest.fixture(scope="module", params=PROTOCOLS)
def tei(request: pytest.FixtureRequest, clients: Environment, embedder: Served) -> Any:
    return embedder.script(clients, "use_tei.py", request.param)


@pytest.fixture(scope="module", params=PROTOCOLS)
def tei_reranker(request: pytest.FixtureRequest, clients: Environment, reranker: Served) -> Any:
    return reranker.script(clients, "use_tei.py", request.param)


def test_tei_client_gets_the_vectors_of_embed(tei: Any, embedder: Served) -> None:
    expected = embedder.embed(TEXTS)
    same_bits(tei["alone"], expected[:1])
    same_bits(tei["many"], expected)
    same_bits(tei["at_once"], expected)
    same_bits(tei["not_normalized"], expected)  # this model does so by itself


def test_tei_client_is_told_what_the_server_is(tei: Any) -> None:
    assert tei["healthy"] is True
    info = tei["info"]
    assert (info["server_model_id"], info["server_model_type"]) == (MODEL, "embedding")
    assert info["max_input_length"] == 256
    assert tei["prompt_names"] == ["query", "document"]  # both empty, as sentence-transformers has them
    assert tei["rerank"]["class"] == "AssertionError"  # the client itself refuses what the model cannot do


def test_tei_client_tokenizes_and_decodes(tei: Any) -> None:
    assert [len(tokens) for tokens in tei["tokens"]] == token_counts(TEXTS)
    assert tei["bare_token_counts"] == [count - 2 for count in token_counts(TEXTS)]
    first = tei["tokens"][0]
    assert [token["text"] for token in first[1:5]] == ["What", "is", "the", "capital"]  # as they were sent
    assert [TEXTS[0][token["start"] : token["stop"]] for token in first[1:5]] == ["What", "is", "the", "capital"]
    assert [token["special"] for token in first] == [True] + [False] * (len(first) - 2) + [True]
    assert tei["decoded"][0] == "what is the capital of france?"


def test_a_text_that_tei_client_does_not_let_be_cut_is_refused(tei: Any) -> None:
    """Over HTTP it takes the error for vectors: it never looks at the status."""
    assert f"{token_counts([LONG])[0]} tokens" in tei["too_long"]


def test_tei_client_ranks_as_rerank(tei_reranker: Any, reranker: Served) -> None:
    expected = reranker.ranks()
    ranks, raw = tei_reranker["ranks"], tei_reranker["raw"]
    assert [rank["index"] for rank in ranks] == [rank["index"] for rank in raw] == [index for index, _ in expected]
    assert [np.float32(rank["score"]) for rank in raw] == [np.float32(score) for _, score in expected]
    logistic = [1 / (1 + np.exp(-score)) for _, score in expected]
    assert [rank["score"] for rank in ranks] == pytest.approx(logistic, abs=1e-6)
    assert [rank["text"] for rank in raw] == [DOCUMENTS[index] for index, _ in expected]
    assert tei_reranker["info"]["server_model_type"] == "reranker"
    assert tei_reranker["embed"]["class"] == "AssertionError"
