"""The real model behind a real server: the vector of a text alone, and among others in a batch."""

import asyncio
import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from numpy.typing import NDArray

from ml_inference_server.proto import inference_pb2 as pb
from ml_inference_server.proto import inference_pb2_grpc as rpc
from ml_inference_server.utils.sample import sample_pairs
from tests.scoreboard.real_server import RealServer, real_server, sum_of

PATHS = {"PyTorch": "false", "compiled": "true"}
_TIMEOUT_S = 300.0
_QUERIES_AT_ONCE = 2
_LONG_WORDS = 400
# A batch in which nothing shares the pass with a text says nothing: so many texts in the mean at least.
_LEAST_MEAN_BATCH = 4.0
_REQUEST_TEXTS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Independence:
    """texts: tried. compared: vectors in a batch against the same text's alone. cosine: the lowest of them.

    swaps: pairs of documents whose order for a query differs; pairs: of all. batch_texts: the mean batch, alone and
    among others.
    """

    texts: int
    compared: int
    cosine: float
    swaps: int
    pairs: int
    batch_texts: tuple[float, float]

    def breaches(self) -> list[str]:
        found = []
        if self.batch_texts[0] != 1:
            found.append(f"texts that were to be alone shared batches of {self.batch_texts[0]:.2f} texts in the mean")
        if self.batch_texts[1] < _LEAST_MEAN_BATCH:
            found.append(f"batches had {self.batch_texts[1]:.2f} texts in the mean only")
        return found


def tried_texts(count: int, seed: int) -> list[str]:
    """Distinct ones of all lengths: of the sample, words of it, and beginnings that are longer than the model takes."""
    rng = random.Random(seed)
    pairs = sample_pairs()
    passages = list(dict.fromkeys(passage for _, passage in pairs))
    words = " ".join(passages).split()
    long = [" ".join(rng.choices(words, k=_LONG_WORDS)) for _ in range(count // 8)]
    short = [" ".join(rng.choices(words, k=rng.randint(1, 6))) for _ in range(count // 4)]
    return list(
        dict.fromkeys([*long, *short, *rng.sample(passages, min(len(passages), count - len(long) - len(short)))])
    )


async def independence(
    folder: Path, *, compiled: str, texts: int, queries: int, rounds: int, seed: int, tell: Callable[[int, int], None]
) -> Independence:
    """compiled: setting model.compile. rounds: how often all texts travel in batches, each time with others."""
    asked = tried_texts(texts, seed)
    of_queries = list(dict.fromkeys(query for query, _ in sample_pairs()))[:queries]
    settings = (
        "model.backend=pytorch",
        "model.device=cpu",
        f"model.compile={compiled}",
        "batching.share_equal_texts=false",
        "server.default_timeout_ms=300000",
    )
    async with (
        real_server(folder, *settings) as server,
        grpc.aio.insecure_channel(server.address) as channel,
    ):
        stub = rpc.InferenceServiceStub(channel)
        total = len(asked) * (1 + rounds)
        alone: list[NDArray[np.float32]] = []
        for text in [*asked, *of_queries]:
            alone += await _vectors(stub, [text])
            tell(len(alone), total)
        batches, counted = await _batches(server)
        mean_alone = counted / batches
        worst = 1.0
        rng = random.Random(seed)
        for number in range(rounds):
            order = rng.sample(range(len(asked)), len(asked))
            found = await _in_batches(stub, asked, order)
            worst = min(worst, min(_cosine(found[place], alone[place]) for place in order))
            tell(len(asked) * (2 + number), total)
        swaps, pairs = await _swaps(stub, asked, of_queries, alone)
        later, counted_later = await _batches(server)
        await server.stop()
    return Independence(
        texts=len(asked),
        compared=rounds * len(asked),
        cosine=worst,
        swaps=swaps,
        pairs=pairs,
        batch_texts=(mean_alone, (counted_later - counted) / (later - batches)),
    )


async def _batches(server: RealServer) -> tuple[int, int]:
    """How many there were, and texts in them."""
    figures = await server.scrape("mlis_batch_texts")
    return sum_of(figures, "mlis_batch_texts_count"), sum_of(figures, "mlis_batch_texts_sum")


async def _vectors(stub: Any, texts: Sequence[str]) -> list[NDArray[np.float32]]:
    reply = await stub.Embed(pb.EmbedRequest(texts=texts), timeout=_TIMEOUT_S)
    return list(np.frombuffer(reply.embeddings, "<f4").reshape(reply.count, reply.dimension))


async def _in_batches(stub: Any, texts: Sequence[str], order: Sequence[int]) -> dict[int, NDArray[np.float32]]:
    """By place, sent at once: half of them in requests of their own, the rest in requests of many."""
    half = len(order) // 2
    parts = [order[at : at + 1] for at in range(half)]
    parts += [order[at : at + _REQUEST_TEXTS] for at in range(half, len(order), _REQUEST_TEXTS)]
    answers = await asyncio.gather(*(_vectors(stub, [texts[place] for place in part]) for part in parts))
    return {
        place: row for part, rows in zip(parts, answers, strict=True) for place, row in zip(part, rows, strict=True)
    }


async def _swaps(
    stub: Any, texts: Sequence[str], queries: Sequence[str], alone: Sequence[NDArray[np.float32]]
) -> tuple[int, int]:
    """(pairs of documents that these queries, some asked at once, put in another order; pairs)."""
    some = asyncio.Semaphore(_QUERIES_AT_ONCE)

    async def reranked(query: str) -> pb.RerankResponse:
        async with some:
            reply: pb.RerankResponse = await stub.Rerank(
                pb.RerankRequest(query=query, documents=texts), timeout=_TIMEOUT_S
            )
        return reply

    replies = await asyncio.gather(*(reranked(query) for query in queries))
    documents = np.stack(alone[: len(texts)]).astype(np.float64)
    swaps = pairs = 0
    for reply, query in zip(replies, alone[len(texts) :], strict=True):
        scores = documents @ query.astype(np.float64)
        ranked = scores[[rank.index for rank in reply.ranks]]
        swaps += sum(
            int(ranked[first] < ranked[second]) for first, second in itertools.combinations(range(len(ranked)), 2)
        )
        pairs += len(ranked) * (len(ranked) - 1) // 2
    return swaps, pairs


def _cosine(one: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    a, b = one.astype(np.float64), other.astype(np.float64)
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))
