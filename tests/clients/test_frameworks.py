"""Frameworks that speak to this server through their integrations: Haystack, llama-index and LangChain."""

from typing import Any

import numpy as np
import pytest

from tests.clients.environments import Environment
from tests.clients.served import DOCUMENTS, TEXTS, Served, likeness, same_bits


@pytest.fixture(scope="module", params=["http", "grpc"])
def haystack(request: pytest.FixtureRequest, clients: Environment, embedder: Served) -> Any:
    return embedder.script(clients, "use_haystack.py", request.param)


def test_haystack_gets_the_vectors_of_embed(haystack: Any, embedder: Served) -> None:
    expected = embedder.embed(TEXTS)
    for name in ("alone", "default"):
        same_bits(haystack[name], expected[:1])
    for name in ("many", "at_once"):
        same_bits(haystack[name], expected)


def test_haystack_ranks_as_rerank(haystack: Any, embedder: Served) -> None:
    expected = embedder.ranks()
    assert [text for text, _ in haystack["raw"]] == [DOCUMENTS[index] for index, _ in expected]
    assert [np.float32(score) for _, score in haystack["raw"]] == [np.float32(score) for _, score in expected]
    assert [text for text, _ in haystack["ranks"]] == [DOCUMENTS[index] for index, _ in expected]
    assert [score for _, score in haystack["ranks"]] == pytest.approx([likeness(raw) for _, raw in expected], abs=1e-6)


def test_haystack_raises_our_refusals(haystack: Any) -> None:
    assert "empty" in haystack["nothing"]["text"]
    assert haystack["nothing"]["class"] in ("_InactiveRpcError", "BadRequestError", "HfHubHTTPError")


def test_llama_index_gets_our_vectors_and_ranks(clients: Environment, embedder: Served) -> None:
    answers = embedder.script(clients, "use_llama_index.py")
    expected = embedder.embed(TEXTS)
    same_bits(answers["many"], expected)
    same_bits(answers["query"], expected[:1])
    same_bits(answers["at_once"], expected)
    ranks = embedder.ranks()
    assert [text for text, _ in answers["ranks"]] == [DOCUMENTS[index] for index, _ in ranks]
    assert [score for _, score in answers["ranks"]] == pytest.approx([likeness(raw) for _, raw in ranks], abs=1e-6)


def test_langchain_gets_the_vectors_of_embed(clients: Environment, embedder: Served) -> None:
    answers = embedder.script(clients, "use_langchain.py")
    expected = embedder.embed(TEXTS)
    same_bits(answers["many"], expected)
    same_bits(answers["query"], expected[:1])
    same_bits(answers["at_once"], expected)
