"""Requests with a word of its own in each place that takes one, right ones and wrong ones."""

import json
from collections.abc import Callable, Iterator
from typing import Any

from ml_inference_server.proto import inference_pb2 as pb
from ml_inference_server.proto.foreign import grpc_service_pb2 as triton
from ml_inference_server.proto.foreign import tei_pb2 as tei
from tests.scoreboard.inputs.case import OWN
from tests.scoreboard.inputs.grpc_own import message_with
from tests.scoreboard.inputs.grpc_triton import TRITON, packed, tensor


def grpc_messages(word: Callable[[str], str]) -> Iterator[tuple[str, str, Any]]:
    """(name, path, message): right ones and wrong ones, with a word in each field that takes one."""
    embed = f"{OWN}/Embed"
    yield "Embed", embed, pb.EmbedRequest(texts=[word("a text"), f"a {word('a later text')}"])
    yield "Embed that is cut", embed, pb.EmbedRequest(texts=[f"{word('a long text')} " + "a " * 300 + word("its end")])
    for name in ("prompt_name", "input_type", "expect_space_id", "model"):
        request = pb.EmbedRequest(texts=[word(f"a text beside {name}")])
        setattr(request, name, word(name))
        yield f"Embed with {name}", embed, request
    for fault in ("!raise", "!nan", "!short", "!oom:0"):
        yield f"Embed on which the engine fails ({fault})", embed, pb.EmbedRequest(texts=[f"{fault} {word(fault)}"])
    yield "Embed of no UTF-8", embed, message_with(1, word("bytes of no UTF-8").encode() + b"\xff")
    yield "Embed of noise", embed, word("noise").encode()
    yield "Embed of too many", embed, pb.EmbedRequest(texts=[word("one of too many")] * 1025)
    yield "Embed of too much", embed, pb.EmbedRequest(texts=[word("a text too long") * 60_000])
    pair = pb.Pair(query=word("a query"), passage=word("a passage"))
    yield "Score", f"{OWN}/Score", pb.ScoreRequest(pairs=[pair], model=word("a model of Score"))
    yield (
        "Rerank",
        f"{OWN}/Rerank",
        pb.RerankRequest(query=word("a query of Rerank"), documents=[word("a document"), ""]),
    )
    yield "no method", f"{OWN}/{word('a method')}", b""
    yield (
        "tei Embed",
        "tei.v1.Embed/Embed",
        tei.EmbedRequest(inputs=word("a text of tei"), prompt_name=word("a prompt")),
    )
    yield "tei Predict", "tei.v1.Predict/Predict", tei.PredictRequest(inputs=word("a text to predict"))
    yield (
        "tei Rerank",
        "tei.v1.Rerank/Rerank",
        tei.RerankRequest(query=word("a query of tei"), texts=[word("a text to rank")]),
    )
    echoed = tei.RerankRequest(query="q", texts=[word("a text to return")], return_text=True)
    yield "tei Rerank that returns", "tei.v1.Rerank/Rerank", echoed
    yield "tei Tokenize", "tei.v1.Tokenize/Tokenize", tei.EncodeRequest(inputs=f"!slow {word('a text to tokenise')}")
    yield from _tensors(word)


def _tensors(word: Callable[[str], str]) -> Iterator[tuple[str, str, Any]]:
    infer = f"{TRITON}/ModelInfer"

    def text(place: str) -> bytes:
        return packed(word(place).encode())

    yield "ModelInfer", infer, tensor(1, raw=text("a text in a tensor"))
    yield "ModelInfer of no UTF-8", infer, tensor(1, raw=packed(word("bytes in a tensor").encode() + b"\xff"))
    yield "ModelInfer of a wrong shape", infer, tensor(7, raw=text("a text in a wrong shape"))
    yield (
        "ModelInfer of another name",
        infer,
        tensor(1, raw=text("a text in another tensor"), name=word("a tensor's name")),
    )
    yield "ModelInfer of another type", infer, tensor(1, raw=text("a text of another type"), datatype=word("a type"))
    yield (
        "ModelInfer with parameters",
        infer,
        tensor(1, raw=text("a text beside"), **{word("a parameter"): word("its value")}),
    )
    for name in ("overflow", "prompt_name", "input_type", "expect_space_id"):
        yield (
            f"ModelInfer with {name}",
            infer,
            tensor(1, raw=text(f"a text of {name}"), **{name: word(f"{name} of a tensor")}),
        )
    other = tensor(1, raw=text("a text to another model"))
    other.model_name, other.model_version = word("a model's name"), word("a model's version")
    yield "ModelInfer of another model", infer, other
    output = tensor(1, raw=text("a text to another output"))
    output.outputs.add(name=word("an output"))
    yield "ModelInfer with another output", infer, output
    yield "ModelReady", f"{TRITON}/ModelReady", triton.ModelReadyRequest(name=word("a model that is asked for"))


def http_bodies(word: Callable[[str], str]) -> Iterator[tuple[str, str, bytes]]:
    """(name, path, body)."""
    good: dict[str, dict[str, Any]] = {
        "/v1/embeddings": {"input": [word("an input")], "model": "fake", "user": word("a user")},
        "/embed": {"inputs": word("inputs"), word("a key"): word("the value of a key")},
        "/v2/embed": {"texts": [word("texts")]},
        "/v2/rerank": {"query": word("query"), "documents": [{"text": word("documents")}]},
        "/rerank": {"query": word("a query over HTTP"), "texts": [word("a text over HTTP")], "return_text": True},
        "/similarity": {"inputs": {"source_sentence": word("a sentence"), "sentences": [word("sentences")]}},
        "/tokenize": {"inputs": word("a text for its tokens")},
        "/v2/models/fake/infer": {
            "inputs": [{"name": "TEXT", "shape": [1], "datatype": "BYTES", "data": [word("data")]}]
        },
    }
    for path, body in good.items():
        yield path, path, json.dumps(body).encode()
        for key in body:
            wrong = body | {key: [word(f"{key} of {path} in a list"), 7]}
            yield f"{path} with a wrong {key}", path, json.dumps(wrong).encode()
        wrong = body | {"model": word(f"the model of {path}"), "prompt_name": word(f"the prompt of {path}")}
        yield f"{path} with names", path, json.dumps(wrong).encode()
        yield f"{path} cut off", path, json.dumps({word(f"a key of {path}"): word(f"half of {path}")}).encode()[:-2]
        yield f"{path} of no UTF-8", path, b'{"inputs": "%b\xff"}' % word(f"bytes of {path}").encode()
        yield f"{path} twice", path, b'{"%b": 1, "%b": 2}' % ((word(f"a key twice to {path}").encode(),) * 2)
    for fault in ("!raise", "!nan"):
        yield (
            f"/embed on which the engine fails ({fault})",
            "/embed",
            json.dumps({"inputs": f"{fault} {word(fault)}"}).encode(),
        )
    yield "the benchmark", "/api/v1/benchmark", json.dumps({word("a key of progress"): word("progress")}).encode()
