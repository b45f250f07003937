"""What the calls of all dialects have in common: texts in, float32 rows or scores out, one kind of failure."""

import itertools
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import NamedTuple

import aiohttp
import grpc
import numpy as np
from numpy.typing import NDArray

from ml_inference_server.benchmark.load.channel import RequestFailed

TIMEOUT_S = 60.0
Floats = NDArray[np.float32]
EmbedCall = Callable[[Sequence[str]], Awaitable[Floats]]
RerankCall = Callable[[str, Sequence[str]], Awaitable[Floats]]


class DialectMissing(RequestFailed):
    """The server has no such route or method."""


class EmbedDialect(NamedTuple):
    """A way to ask for embeddings: a row for each text."""

    name: str
    call: EmbedCall


class RerankDialect(NamedTuple):
    """A way to ask for scores: a raw one for each document, in the order of the documents."""

    name: str
    call: RerankCall


def embed_dialect(name: str, call: EmbedCall) -> EmbedDialect:
    async def checked(texts: Sequence[str]) -> Floats:
        rows = await _told(call(texts))
        if rows.ndim != 2 or len(rows) != len(texts) or not np.isfinite(rows).all():
            raise RequestFailed("INVALID_RESPONSE", f"no finite row for each of {len(texts)} texts: {rows.shape}")
        return rows

    return EmbedDialect(name, checked)


def rerank_dialect(name: str, call: RerankCall) -> RerankDialect:
    async def checked(query: str, documents: Sequence[str]) -> Floats:
        scores = await _told(call(query, documents))
        if scores.shape != (len(documents),) or not np.isfinite(scores).all():
            raise RequestFailed("INVALID_RESPONSE", f"no finite score for each of {len(documents)} documents")
        return scores

    return RerankDialect(name, checked)


def scores_of(ranks: Iterable[tuple[int, float]], documents: int) -> Floats:
    """(index, score) of all documents, best first, as scores in the documents' own order."""
    indexes, scores = zip(*ranks, strict=True)
    if sorted(indexes) != list(range(documents)) or any(a < b for a, b in itertools.pairwise(scores)):
        raise RequestFailed("INVALID_RESPONSE", "the ranking does not hold each document once, best first")
    found = np.empty(documents, np.float32)
    found[list(indexes)] = scores
    return found


async def _told(work: Awaitable[Floats]) -> Floats:
    """RequestFailed for whatever goes wrong, DialectMissing among it."""
    try:
        return await work
    except grpc.aio.AioRpcError as error:
        kind = DialectMissing if error.code() is grpc.StatusCode.UNIMPLEMENTED else RequestFailed
        raise kind(error.code().name, str(error.details())[:300]) from None
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        raise RequestFailed("UNAVAILABLE", f"{type(error).__name__}: {error}"[:300]) from None
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise RequestFailed("INVALID_RESPONSE", f"{type(error).__name__}: {error}"[:300]) from None
