"""A known load over all protocols, and /metrics against what its callers wrote down."""

import asyncio
import json
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import grpc

from ml_inference_server.proto import inference_pb2 as pb
from ml_inference_server.proto import inference_pb2_grpc as rpc
from tests.scoreboard.chaos_callers import error_details
from tests.scoreboard.real_server import RealServer, Scrape, real_server

_IN_FLIGHT, _QUEUE_REQUESTS = 24, 20
_SETTINGS = (
    "model.name=fake:base_ms=2",
    "server.enable_test_faults=true",
    "server.accept_any_model=true",
    "cache.max_mb=0",
    f"batching.max_queue_requests={_QUEUE_REQUESTS}",
)
_MOST_TOKENS = 256
_JSON = {"Content-Type": "application/json"}
# Status of HTTP -> the name under which the metrics count it.
_CODES = {
    200: "OK",
    400: "INVALID_ARGUMENT",
    422: "INVALID_ARGUMENT",
    413: "INVALID_ARGUMENT",
    429: "RESOURCE_EXHAUSTED",
}
_CODES |= {500: "INTERNAL", 424: "INTERNAL", 503: "UNAVAILABLE", 504: "DEADLINE_EXCEEDED"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """A request whose outcome is known: what it counts where it is answered, and the reason where it is not.

    path: of HTTP; "" for gRPC. reason: "" where it must be answered.
    """

    method: str
    request: Any
    path: str = ""
    texts: int = 0
    pairs: int = 0
    truncated: int = 0
    reason: str = ""


@dataclass(slots=True)
class Ledger:
    """What the callers saw, by the labels that /metrics has. wrong: ends that nobody planned."""

    requests: Counter[tuple[str, str]] = field(default_factory=Counter)
    texts: Counter[str] = field(default_factory=Counter)
    pairs: Counter[str] = field(default_factory=Counter)
    truncated: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def add(self, known: Known, code: str, reason: str) -> None:
        """The end of one request."""
        self.requests[known.method, code] += 1
        if code == "OK":
            self.texts[known.method] += known.texts
            self.pairs[known.method] += known.pairs
            self.truncated += known.truncated
        elif code == "RESOURCE_EXHAUSTED":
            self.reasons["QUEUE_FULL"] += 1
        else:
            self.reasons[known.reason] += 1
        if code != "RESOURCE_EXHAUSTED" and (code == "OK") != (known.reason == ""):
            self.wrong.append(f"{known.method} {known.path}: {code} {reason}, planned: {known.reason or 'OK'}")
        elif reason and code != "RESOURCE_EXHAUSTED" and reason != known.reason:
            self.wrong.append(f"{known.method} {known.path}: {reason}, planned: {known.reason}")


def _texts(number: int, count: int) -> list[str]:
    return [f"text {number} {i}" for i in range(count)]


def _grpc(number: int, count: int) -> list[Known]:
    texts = _texts(number, count)
    embed, word = pb.EmbedRequest, f"number {number}"
    pairs = [pb.Pair(query=f"q {text}", passage=f"p {text}") for text in texts]
    return [
        Known(method="Embed", request=embed(texts=texts), texts=count),
        Known(method="Embed", request=embed(texts=[f"{word} " * _MOST_TOKENS]), texts=1, truncated=1),
        Known(method="Score", request=pb.ScoreRequest(pairs=pairs), pairs=count),
        Known(method="Rerank", request=pb.RerankRequest(query=f"q {number}", documents=texts), pairs=count),
        Known(method="EmbedStream", request=embed(texts=texts), texts=count),
        Known(method="EmbedStream", request=embed(texts=[" "]), reason="EMPTY_TEXT"),
        Known(method="Embed", request=embed(), reason="EMPTY_REQUEST"),
        Known(method="Embed", request=embed(texts=[*texts, " "]), reason="EMPTY_TEXT"),
        Known(method="Embed", request=embed(texts=[f"{word} " * _MOST_TOKENS], truncate=False), reason="TEXT_TOO_LONG"),
        Known(method="Embed", request=embed(texts=texts, dimensions=9), reason="INVALID_FIELD"),
        Known(method="Embed", request=embed(texts=texts, expect_space_id="0" * 16), reason="SPACE_MISMATCH"),
        Known(method="Embed", request=embed(texts=[f"!raise {word}"]), reason="BACKEND_ERROR"),
        Known(method="Score", request=pb.ScoreRequest(), reason="EMPTY_REQUEST"),
        Known(
            method="Rerank", request=pb.RerankRequest(query="q", documents=[f"!nan {word}"]), reason="NON_FINITE_OUTPUT"
        ),
    ]


def _http(number: int, count: int) -> list[Known]:
    texts = _texts(number, count)
    first, named = texts[0], {"model": "fake"}
    tensor = {"name": "TEXT", "shape": [count], "datatype": "BYTES", "data": texts}
    rerank = {"query": f"q {number}", "documents": texts, **named}
    cohere = {"texts": texts, "input_type": "search_document", "embedding_types": ["float"], **named}
    similar = {"source_sentence": f"s {number}", "sentences": texts}
    return [
        Known(method="openai.embeddings", path="/v1/embeddings", request={"input": texts, **named}, texts=count),
        Known(method="cohere.embed", path="/v2/embed", request=cohere, texts=count),
        Known(method="cohere.rerank", path="/v2/rerank", request=rerank, pairs=count),
        Known(method="tei.embed", path="/embed", request={"inputs": texts}, texts=count),
        Known(method="tei.rerank", path="/rerank", request={"query": f"q {number}", "texts": texts}, pairs=count),
        Known(method="tei.similarity", path="/similarity", request={"inputs": similar}, texts=count + 1),
        Known(method="tei.tokenize", path="/tokenize", request={"inputs": first}),
        Known(method="kserve.infer", path="/v2/models/fake/infer", request={"inputs": [tensor]}, texts=count),
        Known(
            method="openai.embeddings", path="/v1/embeddings", request={"input": [], **named}, reason="EMPTY_REQUEST"
        ),
        Known(method="tei.embed", path="/embed", request={"inputs": [first, " "]}, reason="EMPTY_TEXT"),
        Known(method="tei.embed", path="/embed", request={"inputs": f"!raise {first}"}, reason="BACKEND_ERROR"),
        Known(method="kserve.infer", path="/v2/models/fake/infer", request={"inputs": None}, reason="INVALID_FIELD"),
    ]


def known_load(rng: random.Random, number: int) -> Known:
    """The next request, at random."""
    kinds = _grpc if rng.random() < 0.7 else _http
    return rng.choice(kinds(number, rng.choice((1, 2, 5))))


async def _one_grpc(stub: Any, known: Known) -> tuple[str, str]:
    if known.method == "EmbedStream":
        messages = [pb.EmbedStreamRequest(id=1, request=known.request)]
        (answer,) = [answer async for answer in stub.EmbedStream(iter(messages))]
        if answer.WhichOneof("outcome") == "response":
            return "OK", ""
        (code,) = [code.name for code in grpc.StatusCode if code.value[0] == answer.error.code]
        return code, answer.error.reason
    try:
        await getattr(stub, known.method)(known.request, timeout=60)
    except grpc.aio.AioRpcError as error:
        trailers = dict(error.trailing_metadata() or ())
        return error.code().name, error_details(trailers.get("grpc-status-details-bin", b""))[0]
    return "OK", ""


async def _one_http(session: aiohttp.ClientSession, known: Known) -> tuple[str, str]:
    body = json.dumps(known.request)
    async with session.post(known.path, data=body, headers=_JSON) as answer:
        await answer.read()
        return _CODES.get(answer.status, f"HTTP {answer.status}"), ""


def differences(ledger: Ledger, figures: Scrape) -> list[tuple[str, int]]:
    """What /metrics counts more or less than the ledger, by series; series that agree are left out."""
    expected: dict[tuple[str, tuple[tuple[str, str], ...]], int] = {
        ("mlis_truncated_texts_total", ()): ledger.truncated,
        **{
            ("mlis_requests_total", (("code", code), ("method", method))): count
            for (method, code), count in ledger.requests.items()
        },
        **{("mlis_request_errors_total", (("reason", reason),)): count for reason, count in ledger.reasons.items()},
        **{("mlis_texts_total", (("method", method),)): count for method, count in ledger.texts.items()},
        **{("mlis_pairs_total", (("method", method),)): count for method, count in ledger.pairs.items()},
    }
    names = {name for name, _ in expected} | {"mlis_in_flight_requests", "mlis_queue_texts", "mlis_queue_tokens"}
    series = expected.keys() | {key for key in figures if key[0] in names}
    found = [
        (f"{name}{dict(labels)}", int(figures.get((name, labels), 0)) - expected.get((name, labels), 0))
        for name, labels in series
    ]
    return sorted((name, off) for name, off in found if off)


async def metrics_truth(
    folder: Path, requests: int, seed: int, tell: Callable[[int, int], None]
) -> tuple[Ledger, list[tuple[str, int]]]:
    """The ledger of so many requests to a server of its own, and where /metrics differs from it."""
    ledger = Ledger()
    async with real_server(folder, *_SETTINGS) as server:
        await _load(server, ledger, requests, seed, tell)
        await server.at_rest()
        found = differences(ledger, await server.scrape())
        await server.stop()
    return ledger, found


async def _load(server: RealServer, ledger: Ledger, requests: int, seed: int, tell: Callable[[int, int], None]) -> None:
    rng = random.Random(seed)
    planned: Sequence[Known] = [known_load(rng, number) for number in range(requests)]
    left = iter(planned)
    async with (
        grpc.aio.insecure_channel(server.address) as channel,
        aiohttp.ClientSession(server.url) as session,
    ):
        stub = rpc.InferenceServiceStub(channel)

        async def call_until_over() -> None:
            for known in left:
                ledger.add(known, *(await (_one_http(session, known) if known.path else _one_grpc(stub, known))))
                tell(ledger.requests.total(), requests)

        await asyncio.gather(*(call_until_over() for _ in range(_IN_FLIGHT)))
