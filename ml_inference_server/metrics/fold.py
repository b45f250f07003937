"""From what the hot path noted down to counters, histograms and the window: many at a time, which costs a tenth.

What is folded at once belongs to one slot of the window.
"""

import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np

from ml_inference_server.metrics.exposition import Series
from ml_inference_server.metrics.table import CODES, METHODS, REASONS, STAGES
from ml_inference_server.metrics.window import Slot


class Request(NamedTuple):
    """One that ended; see `Metrics.request_finished`."""

    method: str
    code: str
    seconds: float
    texts: int
    pairs: int
    truncated: int
    stamps: Sequence[float]
    reason: str
    request_id: str
    trace_id: str


class Batch(NamedTuple):
    """One that the model ended; see `Metrics.batch_finished`."""

    texts: int
    tokens: int
    padded_tokens: int
    queue_s: Sequence[float]
    compute_s: float
    closed_by: str
    ok: bool
    lengths: Sequence[int]


def fold_requests(requests: Sequence[Request], series: Series, slot: Slot) -> None:
    sums, numbers = slot.sums, series.numbers
    counts: Counter[tuple[str, str]] = Counter()
    by_outcome: defaultdict[tuple[str, str], list[Request]] = defaultdict(list)
    for request in requests:
        method = request.method if request.method in METHODS else "other"
        code = request.code if request.code in CODES else "UNKNOWN"
        counts[method, code] += 1
        by_outcome[method, "ok" if code == "OK" else "error"].append(request)
    for labels, count in counts.items():
        numbers["mlis_requests_total"][labels] += count
    sums["requests"] += len(requests)
    for (method, outcome), members in by_outcome.items():
        _observe_durations(members, series, (method, outcome))
        if outcome == "error":
            _count_errors(members, series, slot)
            continue
        texts, pairs, truncated = (sum(column) for column in zip(*(member[3:6] for member in members), strict=True))
        numbers["mlis_texts_total"][(method,)] += texts
        numbers["mlis_pairs_total"][(method,)] += pairs
        numbers["mlis_truncated_texts_total"][()] += truncated
        sums["texts"] += texts
        sums["pairs"] += pairs
        sums["truncated"] += truncated
        slot.times["latency"].add_many(np.array([member.seconds for member in members]))
        staged = [member.stamps for member in members if member.stamps]
        if staged:
            _observe_stages(np.diff(np.array(staged), axis=1), series, slot)


def _observe_durations(members: Sequence[Request], series: Series, labels: tuple[str, str]) -> None:
    histogram = series.histograms["mlis_request_duration_seconds"][labels]
    buckets = histogram.observe_many(np.array([member.seconds for member in members]))
    now_s = time.time()
    for bucket, member in dict(zip(buckets, members, strict=True)).items():
        if member.request_id:
            name = f'request_id="{member.request_id}"'
            name += f',trace_id="{member.trace_id}"' if member.trace_id else ""
            histogram.exemplars[bucket] = (name, member.seconds, now_s)


def _observe_stages(stages_s: np.ndarray, series: Series, slot: Slot) -> None:
    """stages_s: (requests, stages)."""
    totals_ns = np.rint(1e9 * stages_s.sum(axis=0)).astype(np.int64).tolist()
    for place, stage in enumerate(STAGES):
        series.histograms["mlis_request_stage_seconds"][(stage,)].observe_many(stages_s[:, place])
        slot.sums[f"stage_{stage}_ns"] += totals_ns[place]


def _count_errors(members: Sequence[Request], series: Series, slot: Slot) -> None:
    reasons = Counter(member.reason if member.reason in REASONS else "other" for member in members)
    for reason, count in reasons.items():
        series.numbers["mlis_request_errors_total"][(reason,)] += count
        slot.sums[f"reason_{reason}"] += count
    slot.sums["errors"] += len(members)


def fold_tokenized(noted: Sequence[tuple[int, int, float]], series: Series) -> None:
    """noted: (texts, tokens, seconds) of each request."""
    texts, tokens, seconds = zip(*noted, strict=True)
    series.numbers["mlis_tokenized_texts_total"][()] += sum(texts)
    series.numbers["mlis_tokenized_tokens_total"][()] += sum(tokens)
    series.histograms["mlis_tokenize_duration_seconds"][()].observe_many(np.array(seconds))


def fold_batches(batches: Sequence[Batch], series: Series, slot: Slot) -> None:
    sums, numbers, histograms = slot.sums, series.numbers, series.histograms
    for batch in batches:
        numbers["mlis_batches_total"][batch.closed_by, "ok" if batch.ok else "error"] += 1
    sound = [batch for batch in batches if batch.ok]
    if not sound:
        return
    texts, tokens, padded_tokens, queue_s, compute_s, closed_by, _, lengths = zip(*sound, strict=True)
    waits_s = np.fromiter(chain.from_iterable(queue_s), float)
    numbers["mlis_tokens_total"][()] += sum(tokens)
    numbers["mlis_padding_tokens_total"][()] += sum(padded_tokens) - sum(tokens)
    histograms["mlis_batch_tokens"][()].observe_many(np.array(padded_tokens))
    histograms["mlis_batch_compute_seconds"][()].observe_many(np.array(compute_s))
    histograms["mlis_queue_wait_seconds"][()].observe_many(waits_s)
    for name, values in (
        ("batch_texts", np.array(texts)),
        ("text_tokens", np.fromiter(chain.from_iterable(lengths), np.int64)),
    ):
        for bucket, count in Counter(histograms[f"mlis_{name}"][()].observe_many(values)).items():
            sums[name, bucket] += count
    for reason, count in Counter(closed_by).items():
        sums[f"closed_by_{reason}"] += count
    sums["batches"] += len(sound)
    sums["batch_texts"] += sum(texts)
    sums["tokens"] += sum(tokens)
    sums["padded_tokens"] += sum(padded_tokens)
    sums["queue_ns"] += round(waits_s.sum() * 1e9)
    sums["queued_texts"] += len(waits_s)
    sums["compute_ns"] += round(sum(compute_s) * 1e9)
