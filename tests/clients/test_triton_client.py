"""Triton's clients over gRPC and HTTP: the Open Inference Protocol."""

from typing import Any

import numpy as np
import pytest

from tests.clients.environments import Environment
from tests.clients.served import MODEL, TEXTS, Served, same_bits, token_counts


@pytest.fixture(scope="module", params=["grpc", "http"])
def triton(request: pytest.FixtureRequest, clients: Environment, embedder: Served) -> Any:
    return embedder.script(clients, f"use_triton_{request.param}.py") | {"protocol": request.param}


def test_vectors_are_those_of_embed(triton: Any, embedder: Served) -> None:
    expected = embedder.embed(TEXTS)
    assert {"default", "at once"} < triton["vectors"].keys()
    for vectors in triton["vectors"].values():
        same_bits(vectors, expected)
    assert triton["counts"] == token_counts(TEXTS)
    assert triton["id"] == "seven"


def test_scores_are_those_of_rerank(triton: Any, embedder: Served) -> None:
    ranks = sorted(embedder.ranks())
    same_bits(triton["scores"], np.array([score for _, score in ranks], np.float32))


def test_the_server_is_ready_and_tells_what_it_takes(triton: Any) -> None:
    assert [triton[name] for name in ("live", "ready", "model_ready")] == [True] * 3
    tensors = {each["name"]: each["datatype"] for each in triton["metadata"]["inputs"] + triton["metadata"]["outputs"]}
    assert tensors["TEXT"] == "BYTES"
    assert tensors["EMBEDDING"] == "FP32"
    assert "statistics" in triton["server"]["extensions"]
    config = triton["config"].get("config", triton["config"])  # gRPC puts it into a field
    assert config["name"] == MODEL


def test_statistics_count_the_calls(triton: Any) -> None:
    (model,) = triton["statistics"]["model_stats"]
    assert int(model["inference_count"]) >= len(TEXTS)


def test_errors_arrive_as_the_packages_own_exceptions(triton: Any) -> None:
    status = {"grpc": ("NOT_FOUND", "INVALID_ARGUMENT"), "http": ("[404]", "[400]")}[triton["protocol"]]
    cases = {
        "unknown_model": (status[0], MODEL),
        "unknown_input": (status[1], "TEXT"),
        "unknown_output": (status[1], "EMBEDDING"),
    }
    for name, words in cases.items():
        assert triton[name]["class"] == "InferenceServerException"
        assert all(word in triton[name]["text"] for word in words), triton[name]
