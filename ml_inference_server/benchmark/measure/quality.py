"""How well the server under test ranks, and how far its answers are from FP32, asked through its own port."""

import asyncio
import hashlib
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from numpy.typing import NDArray

from ml_inference_server.benchmark.load.channel import OK, Target, check_embeddings, check_scores
from ml_inference_server.benchmark.load.dataset import PairRow, read_file
from ml_inference_server.benchmark.result.document import Difference, Gate, PerQuery, QualityFigures, SliceFacts
from ml_inference_server.benchmark.result.stats import paired_bootstrap
from ml_inference_server.utils import sample
from ml_inference_server.utils.errors import ConfigError
from ml_inference_server.utils.experiment import QualitySettings
from ml_inference_server.utils.ranking import NDCG_GAIN, Qrels, mrr_at, ndcg_at, read_qrels

DEPTH = 10
_BATCH = 32
_IN_FLIGHT = 4
Floats = NDArray[np.float32]


class QualityUnknown(Exception):
    """The server did not answer the labelled texts, so nothing can be said."""


@dataclass(frozen=True)
class Slice:
    """Labelled pairs, each query's candidates to be ranked; only queries that have judgements."""

    name: str
    rows: tuple[PairRow, ...]
    qrels: Qrels
    sha256: str

    @property
    def texts(self) -> list[str]:
        """Every distinct query and passage."""
        return list(dict.fromkeys(text for row in self.rows for text in (row.query, row.passage)))

    def facts(self) -> SliceFacts:
        queries = len({row.qid for row in self.rows})
        return SliceFacts(name=self.name, sha256=self.sha256, queries=queries, pairs=len(self.rows))


@dataclass(frozen=True)
class Answers:
    """score: one for each row of the slice. vectors: one for each of its texts, None of a cross-encoder."""

    scores: Floats
    vectors: Floats | None


def load_slice(settings: QualitySettings) -> Slice:
    """ConfigError if the files do not fit together."""
    if bool(settings.pairs) != bool(settings.qrels):
        raise ConfigError(
            "experiment.quality.pairs and experiment.quality.qrels belong together: give both, or neither for the"
            " bundled sample"
        )
    pairs = Path(settings.pairs) if settings.pairs else sample.PAIRS
    qrels_file = Path(settings.qrels) if settings.qrels else sample.QRELS
    name = pairs.name if settings.pairs else "sample (bundled)"
    dataset = read_file(pairs, name=name)
    qrels = read_qrels(qrels_file)
    rows = tuple(row for row in dataset.rows if row.passage and row.qid in qrels)
    if not rows:
        raise ConfigError(
            f"{pairs} and {qrels_file} have no query in common: quality needs the layout"
            " qid<TAB>pid<TAB>query<TAB>passage and judgements of those query ids"
        )
    digest = hashlib.sha256(f"{dataset.sha256} {sorted(qrels.items())}".encode()).hexdigest()
    return Slice(name, rows, qrels, digest)


async def ask(
    target: Target, labelled: Slice, cross_encoder: bool, timeout_s: float, on_done: Callable[[float], None]
) -> Answers:
    """The server's answers; `on_done` hears the share that is done. QualityUnknown says what went wrong."""
    if cross_encoder:
        pairs = [(row.query, row.passage) for row in labelled.rows]
        scores = await in_batches(pairs, lambda batch: _score(target, batch, timeout_s), on_done)
        return Answers(scores.reshape(-1), None)
    return by_cosine(
        labelled, await in_batches(labelled.texts, lambda batch: _embed(target, batch, timeout_s), on_done)
    )


def by_cosine(labelled: Slice, vectors: Floats) -> Answers:
    """vectors: of `labelled.texts`, in their order."""
    texts = labelled.texts
    unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    place = {text: number for number, text in enumerate(texts)}
    queries = unit[[place[row.query] for row in labelled.rows]]
    passages = unit[[place[row.passage] for row in labelled.rows]]
    return Answers((queries * passages).sum(axis=1), vectors)


async def in_batches(
    items: Sequence[Any], send: Callable[[Any], Awaitable[Floats]], on_done: Callable[[float], None]
) -> Floats:
    """What `send` gives for all items, a few requests at a time; `on_done` hears the share that is done."""
    starts = range(0, len(items), _BATCH)
    found: dict[int, Floats] = {}
    gate = asyncio.Semaphore(_IN_FLIGHT)

    async def one(start: int) -> None:
        async with gate:
            found[start] = await send(items[start : start + _BATCH])
            on_done(len(found) / len(starts))

    try:
        async with asyncio.TaskGroup() as group:
            for start in starts:
                group.create_task(one(start))
    except* grpc.aio.AioRpcError as errors:
        error: Any = errors.exceptions[0]
        raise QualityUnknown(f"the server refused labelled texts: {error.code().name} {error.details()}") from None
    except* QualityUnknown as errors:
        raise QualityUnknown(str(errors.exceptions[0])) from None
    return np.concatenate([found[start] for start in starts])


async def _embed(target: Target, texts: Sequence[str], timeout_s: float) -> Floats:
    response = await target.embed(texts, timeout_s)
    reply = check_embeddings(response, len(texts))
    if reply != OK:
        raise QualityUnknown(f"a wrong answer to labelled texts: {reply.message}")
    return np.frombuffer(response.embeddings, "<f4").reshape(response.count, response.dimension)


async def _score(target: Target, pairs: Sequence[tuple[str, str]], timeout_s: float) -> Floats:
    response = await target.score(pairs, timeout_s)
    reply = check_scores(response, len(pairs))
    if reply != OK:
        raise QualityUnknown(f"a wrong answer to labelled pairs: {reply.message}")
    return np.asarray(response.scores, dtype=np.float32)


def rankings(labelled: Slice, scores: Floats) -> dict[str, list[str]]:
    """Passage ids of each query, best first; equal scores in descending order of the ids, as trec_eval breaks them."""
    found: dict[str, list[tuple[float, str]]] = {}
    for row, score in zip(labelled.rows, scores, strict=True):
        found.setdefault(row.qid, []).append((float(score), row.pid))
    return {qid: [pid for _, pid in sorted(scored, reverse=True)] for qid, scored in found.items()}


def judge(labelled: Slice, ours: Answers, fp32: Answers | None) -> QualityFigures:
    """All figures of the slice; those that need FP32 are None without it. Intervals: 95 %, over the queries."""
    ranked = rankings(labelled, ours.scores)
    queries = list(ranked)
    ndcg = np.array([ndcg_at(DEPTH, ranked[q], labelled.qrels[q]) for q in queries])
    mrr = np.array([mrr_at(DEPTH, ranked[q], labelled.qrels[q]) for q in queries])
    found = QualityFigures(
        slice=labelled.facts(),
        ndcg_gain=NDCG_GAIN,
        ndcg10=float(ndcg.mean()),
        mrr10=float(mrr.mean()),
        per_query=PerQuery(qid=queries, ndcg10=_rounded(ndcg), mrr10=_rounded(mrr)),
        cosine_mean=None,
        cosine_min=None,
        correlation=None,
        overlap10=None,
        ndcg10_difference=None,
        mrr10_difference=None,
    )
    if fp32 is None:
        return found
    reference = rankings(labelled, fp32.scores)
    ndcg_fp32 = np.array([ndcg_at(DEPTH, reference[q], labelled.qrels[q]) for q in queries])
    mrr_fp32 = np.array([mrr_at(DEPTH, reference[q], labelled.qrels[q]) for q in queries])
    against: dict[str, Any] = {
        "overlap10": _overlap(labelled, ours, fp32),
        "ndcg10_difference": _difference(ndcg - ndcg_fp32),
        "mrr10_difference": _difference(mrr - mrr_fp32),
    }
    if ours.vectors is None or fp32.vectors is None:
        against["correlation"] = float(np.corrcoef(ours.scores, fp32.scores)[0, 1])
    elif ours.vectors.shape == fp32.vectors.shape:
        norms = np.linalg.norm(ours.vectors, axis=1) * np.linalg.norm(fp32.vectors, axis=1)
        cosines = (ours.vectors * fp32.vectors).sum(axis=1) / np.maximum(norms, 1e-12)
        against |= {"cosine_mean": float(cosines.mean()), "cosine_min": float(cosines.min())}
    else:
        against |= {"cosine_mean": 0.0, "cosine_min": 0.0}  # another dimension: not comparable, so not alike
    return found.model_copy(update=against)


def _overlap(labelled: Slice, ours: Answers, fp32: Answers) -> float | None:
    """Mean share of each query's ten best that FP32 ranks there, too; None where too few are ranked to say.

    Of embeddings among all passages of the slice, of a cross-encoder among each query's own candidates.
    """
    if ours.vectors is None or fp32.vectors is None:
        a, b = rankings(labelled, ours.scores), rankings(labelled, fp32.scores)
        tops = [(set(a[q][:DEPTH]), set(b[q][:DEPTH])) for q in a if len(a[q]) > DEPTH]
        return float(np.mean([len(x & y) / DEPTH for x, y in tops])) if tops else None
    place = {text: number for number, text in enumerate(labelled.texts)}
    queries = [place[text] for text in dict.fromkeys(row.query for row in labelled.rows)]
    passages = [place[text] for text in dict.fromkeys(row.passage for row in labelled.rows)]
    if len(passages) <= DEPTH:
        return None
    near, near_fp32 = (_nearest(vectors, queries, passages) for vectors in (ours.vectors, fp32.vectors))
    return float(np.mean([len(x & y) / DEPTH for x, y in zip(near, near_fp32, strict=True)]))


def _nearest(vectors: Floats, queries: Sequence[int], passages: Sequence[int]) -> list[set[int]]:
    unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    best = np.argsort(-(unit[queries] @ unit[passages].T), axis=1, kind="stable")[:, :DEPTH]
    return [set(row.tolist()) for row in best]


def _rounded(values: NDArray[np.float64]) -> list[float]:
    return [round(float(value), 5) for value in values]


def _difference(differences: NDArray[np.float64]) -> Difference:
    low, high = paired_bootstrap(differences) if len(differences) > 1 else (float("-inf"), float("inf"))
    return Difference(value=float(differences.mean()), low=max(low, -1.0), high=min(high, 1.0))


def gate(found: QualityFigures, settings: QualitySettings) -> Gate:
    """Whether the figures are within the bounds of the experiment file, with a reason for each that is not."""
    reasons = []
    alike = found.likeness
    what = "mean cosine" if found.cosine_mean is not None else "correlation"
    if alike is not None and not alike >= settings.min_cosine:
        reasons.append(f"{what} to FP32 is {alike:.4f}, quality.min_cosine is {settings.min_cosine:g}")
    loss = -found.ndcg10_difference.value if found.ndcg10_difference else 0.0
    if loss > settings.max_ndcg_loss:
        reasons.append(f"nDCG@10 is {loss:.4f} below FP32, quality.max_ndcg_loss is {settings.max_ndcg_loss:g}")
    if found.ndcg10 < settings.min_ndcg:
        reasons.append(f"nDCG@10 is {found.ndcg10:.4f}, quality.min_ndcg is {settings.min_ndcg:g}")
    return Gate(passed=not reasons, reasons=reasons)
