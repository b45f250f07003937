"""`buf curl`: a client that knows nothing but what reflection tells it."""

import base64
import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np

from tests.clients.environments import Environment
from tests.clients.served import DOCUMENTS, QUERY, TEXTS, Served, same_bits
from tests.integration.script_copies import clean_env

SERVICES = {
    "grpc.health.v1.Health",
    "inference.GRPCInferenceService",
    "ml_inference_server.v1.InferenceService",
    "tei.v1.Embed",
    "tei.v1.Info",
    "tei.v1.Predict",
    "tei.v1.Rerank",
    "tei.v1.Tokenize",
}


def buf(clients: Environment, *arguments: str) -> subprocess.CompletedProcess[str]:
    command: list[str | Path] = [clients.buf, "curl", "--protocol", "grpc", "--http2-prior-knowledge", *arguments]
    return subprocess.run(command, env=clean_env(), capture_output=True, text=True, timeout=60, check=False)


def call(clients: Environment, server: Served, method: str, request: dict[str, Any]) -> Any:
    done = buf(clients, "--data", json.dumps(request), "--emit-defaults", f"http://{server.grpc}/{method}")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_reflection_lists_every_service(clients: Environment, embedder: Served) -> None:
    done = buf(clients, "--list-services", f"http://{embedder.grpc}")
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) >= SERVICES


def test_vectors_are_those_of_embed(clients: Environment, embedder: Served) -> None:
    expected = embedder.embed(TEXTS[:1])
    own = call(clients, embedder, "ml_inference_server.v1.InferenceService/Embed", {"texts": TEXTS[:1]})
    same_bits(np.frombuffer(base64.b64decode(own["embeddings"]), "<f4")[None], expected)
    tei = call(clients, embedder, "tei.v1.Embed/Embed", {"inputs": TEXTS[0], "truncate": True})
    same_bits([tei["embeddings"]], expected)
    tensor = {"name": "TEXT", "datatype": "BYTES", "shape": [1]}
    content = {"bytes_contents": [base64.b64encode(TEXTS[0].encode()).decode()]}
    request = {"model_name": embedder.model, "inputs": [tensor | {"contents": content}]}
    triton = call(clients, embedder, "inference.GRPCInferenceService/ModelInfer", request)
    same_bits(np.frombuffer(base64.b64decode(triton["rawOutputContents"][0]), "<f4")[None], expected)


def test_ranks_are_those_of_rerank(clients: Environment, embedder: Served) -> None:
    request = {"query": QUERY, "texts": DOCUMENTS, "raw_scores": True}
    ranks = call(clients, embedder, "tei.v1.Rerank/Rerank", request)["ranks"]
    assert [(rank["index"], np.float32(rank["score"])) for rank in ranks] == [
        (index, np.float32(score)) for index, score in embedder.ranks()
    ]


def test_a_refusal_is_shown_with_its_code(clients: Environment, embedder: Served) -> None:
    done = buf(clients, "--data", '{"inputs": ""}', f"http://{embedder.grpc}/tei.v1.Embed/Embed")
    assert done.returncode >> 3 == 3
    assert json.loads(done.stderr)["code"] == "invalid_argument"
