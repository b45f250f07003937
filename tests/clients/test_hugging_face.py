"""InferenceClient of huggingface_hub, against the routes of Text Embeddings Inference."""

from typing import Any

import numpy as np
import pytest

from ml_inference_server.proto import inference_pb2 as pb
from tests.clients.environments import Environment
from tests.clients.served import LONG, MODEL, TEXTS, Served, same_bits, token_counts


@pytest.fixture(scope="module")
def answers(clients: Environment, embedder: Served) -> Any:
    return embedder.script(clients, "use_hugging_face.py")


def test_feature_extraction_gives_the_vectors_of_embed(answers: Any, embedder: Served) -> None:
    expected = embedder.embed(TEXTS)
    # This model normalises by itself, so that not to normalise changes nothing.
    for name in ("at_root", "many", "at_once", "not_normalized"):
        same_bits(answers[name], expected)
    same_bits(answers["alone"], expected[:1])


def test_options_are_obeyed(answers: Any, embedder: Served) -> None:
    left, right = (embedder.embed([LONG], overflow=each) for each in (pb.OVERFLOW_CUT_LEFT, pb.OVERFLOW_CUT))
    same_bits(answers["cut_left"], left)
    assert not np.array_equal(left, right)
    same_bits(answers["short"], embedder.embed(TEXTS[:1], dimensions=64))


def test_similarity_gives_the_cosines(answers: Any, embedder: Served) -> None:
    assert dict(enumerate(answers["similarity"])) == pytest.approx(dict(embedder.ranks()), abs=1e-6)


def test_the_server_is_healthy_and_tells_what_it_is(answers: Any) -> None:
    assert answers["healthy"] is True
    assert answers["info"]["model_id"] == MODEL
    assert answers["info"]["max_input_length"] == 256


def test_errors_arrive_as_the_packages_own_exceptions(answers: Any) -> None:
    assert answers["too_long"]["class"] == "HfHubHTTPError"
    assert "422" in answers["too_long"]["text"]
    assert f"{token_counts([LONG])[0]} tokens" in answers["too_long"]["text"]
    assert answers["nothing"]["class"] in ("BadRequestError", "HfHubHTTPError")
    assert "`inputs` cannot be empty" in answers["nothing"]["text"]
