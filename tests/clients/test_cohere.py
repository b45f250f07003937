"""The Python package of Cohere: the client of its first API, of its second, and the asynchronous one."""

from typing import Any

import numpy as np
import pytest

from ml_inference_server.proto import inference_pb2 as pb
from tests.clients.environments import Environment
from tests.clients.served import DOCUMENTS, MODEL, TEXTS, Served, likeness, same_bits, token_counts


@pytest.fixture(scope="module")
def answers(clients: Environment, embedder: Served) -> Any:
    return embedder.script(clients, "use_cohere.py")


ENCODINGS = {
    "int8": (pb.ENCODING_INT8, np.int8),
    "binary": (pb.ENCODING_BINARY, np.int8),
    "ubinary": (pb.ENCODING_UBINARY, np.uint8),
}


def same_types(typed: Any, server: Served) -> None:
    same_bits(typed["float"], server.embed(TEXTS))
    for name, (encoding, dtype) in ENCODINGS.items():
        expected = np.frombuffer(server.answer(TEXTS, encoding=encoding).embeddings, dtype)
        assert typed[name] == expected.reshape(len(TEXTS), -1).tolist()


def test_embed_of_both_generations_gives_the_vectors_of_embed(answers: Any, embedder: Served) -> None:
    expected = embedder.embed(TEXTS)
    same_bits(answers["first"]["plain"], expected)
    same_types(answers["first"]["typed"], embedder)
    same_types(answers["second"]["typed"], embedder)
    same_bits(answers["second"]["short"], embedder.embed(TEXTS, dimensions=64))
    same_bits(answers["at_once"], expected)
    assert answers["first"]["texts"] == answers["second"]["texts"] == TEXTS
    assert answers["first"]["input_tokens"] == sum(token_counts(TEXTS))


def test_texts_that_the_client_sends_in_several_calls_come_back_in_order(answers: Any, embedder: Served) -> None:
    same_bits(answers["first"]["many"], embedder.embed([f"text number {number}" for number in range(100)]))


def test_rerank_of_both_generations_ranks_as_rerank(answers: Any, embedder: Served) -> None:
    expected = embedder.ranks()
    for generation in ("first", "second"):
        ranks, top = answers[generation]["ranks"], answers[generation]["top"]
        assert [rank["index"] for rank in ranks] == [index for index, _ in expected]
        assert [rank["score"] for rank in ranks] == pytest.approx([likeness(raw) for _, raw in expected], abs=1e-6)
        assert [rank["index"] for rank in top] == [index for index, _ in expected[:2]]
    assert [rank["document"] for rank in answers["first"]["top"]] == [DOCUMENTS[index] for index, _ in expected[:2]]


def test_errors_arrive_as_the_packages_own_exceptions(answers: Any) -> None:
    first, second = answers["first"], answers["second"]
    for refused in (first["unknown_model"], first["unknown_model_rerank"], second["unknown_model"]):
        assert refused["class"] == "NotFoundError"
        assert MODEL in refused["text"]
    assert second["too_long"]["class"] in ("BadRequestError", "UnprocessableEntityError")
    assert "256" in second["too_long"]["text"]
    assert second["nothing"]["class"] in ("BadRequestError", "UnprocessableEntityError")
