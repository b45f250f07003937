"""From what the hot path noted down to counters, histograms and the window: many at a time, which costs a tenth.

The hot path notes into flat lists, WIDTH values for each request or batch, in the order of the names below. So nothing
that the garbage collector has to visit is kept: no tuple, no list. What is folded at once belongs to one slot.
"""

import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ml_inference_server.metrics.exposition import Series
from ml_inference_server.metrics.table import CODES, METHODS, REASONS
from ml_inference_server.metrics.window import Slot
from ml_inference_server.utils.stages import STAGE_NAMES, Stamps

REQUEST = ("method", "code", "seconds", "texts", "pairs", "truncated", "reason", "request_id", "trace_id", "caller")
NO_STAMPS = Stamps(*[0.0] * len(Stamps._fields))
"""Of a request that was not answered. The stamps stand behind the values of REQUEST."""
REQUEST_WIDTH = len(REQUEST) + len(NO_STAMPS)

TOKENIZED = ("texts", "tokens", "seconds", "caller")
TOKENIZED_WIDTH = len(TOKENIZED)

BATCH = ("texts", "tokens", "padded_tokens", "compute_s", "closed_by")
BATCH_WIDTH = len(BATCH)


def fold_requests(noted: Sequence[Any], series: Series, slot: Slot) -> None:
    columns = {name: noted[place::REQUEST_WIDTH] for place, name in enumerate(REQUEST)}
    seconds = np.array(columns["seconds"])
    stamps = np.array([noted[place::REQUEST_WIDTH] for place in range(len(REQUEST), REQUEST_WIDTH)])
    numbers, sums = series.numbers, slot.sums
    sums["requests"] += len(seconds)
    for caller, count in Counter(columns["caller"]).items():
        numbers["mlis_caller_requests_total"][(caller,)] += count
    for caller, reason in zip(columns["caller"], columns["reason"], strict=True):
        if reason == "CALLER_LIMIT":
            numbers["mlis_caller_limited_requests_total"][(caller,)] += 1
    members: defaultdict[tuple[str, str], list[int]] = defaultdict(list)
    for index, labels in enumerate(zip(columns["method"], columns["code"], strict=True)):
        members[labels].append(index)
    for (given_method, given_code), indexes in members.items():
        method = given_method if given_method in METHODS else "other"
        code = given_code if given_code in CODES else "UNKNOWN"
        numbers["mlis_requests_total"][method, code] += len(indexes)
        _observe_durations(columns, seconds, indexes, series, (method, "ok" if code == "OK" else "error"))
        if code != "OK":
            _count_errors([columns["reason"][index] for index in indexes], series, slot)
            continue
        for name, series_name, of_method in (
            ("texts", "mlis_texts_total", True),
            ("pairs", "mlis_pairs_total", True),
            ("truncated", "mlis_truncated_texts_total", False),
        ):
            amount = sum(columns[name][index] for index in indexes)
            numbers[series_name][(method,) if of_method else ()] += amount
            sums[name] += amount
        slot.times["latency"].add_many(seconds[indexes])
        begun = stamps[:, indexes]
        _observe_stages(begun, begun[0] + seconds[indexes], series, slot)


def _observe_durations(
    columns: dict[str, Sequence[Any]],
    seconds: NDArray[np.float64],
    indexes: list[int],
    series: Series,
    labels: tuple[str, str],
) -> None:
    histogram = series.histograms["mlis_request_duration_seconds"][labels]
    buckets = histogram.observe_many(seconds[indexes])
    now_s = time.time()
    for bucket, index in dict(zip(buckets, indexes, strict=True)).items():  # the latest one of each bucket
        request_id, trace_id = columns["request_id"][index], columns["trace_id"][index]
        if request_id:
            name = f'request_id="{request_id}"' + (f',trace_id="{trace_id}"' if trace_id else "")
            histogram.exemplars[bucket] = (name, columns["seconds"][index], now_s)


def _observe_stages(begun: NDArray[np.float64], ended: NDArray[np.float64], series: Series, slot: Slot) -> None:
    """begun: (stages, requests); ended: (requests,)."""
    answered = begun.any(axis=0)  # the others brought no stamps
    if not answered.any():
        return
    stages_s = np.diff(np.vstack((begun, ended))[:, answered], axis=0)
    for stage, of_stage_s in zip(STAGE_NAMES, stages_s, strict=True):
        series.histograms["mlis_request_stage_seconds"][(stage,)].observe_many(of_stage_s)
        slot.sums[f"stage_{stage}_ns"] += round(1e9 * float(of_stage_s.sum()))


def _count_errors(reasons: Sequence[str], series: Series, slot: Slot) -> None:
    for reason, count in Counter(reason if reason in REASONS else "other" for reason in reasons).items():
        series.numbers["mlis_request_errors_total"][(reason,)] += count
        slot.sums[f"reason_{reason}"] += count
    slot.sums["errors"] += len(reasons)


def fold_tokenized(noted: Sequence[Any], series: Series) -> None:
    """TOKENIZED of each request."""
    texts, tokens, seconds, callers = (noted[place::TOKENIZED_WIDTH] for place in range(TOKENIZED_WIDTH))
    series.numbers["mlis_tokenized_texts_total"][()] += sum(texts)
    series.numbers["mlis_tokenized_tokens_total"][()] += sum(tokens)
    series.histograms["mlis_tokenize_duration_seconds"][()].observe_many(np.array(seconds))
    of_caller = series.numbers["mlis_caller_tokens_total"]
    for caller, count in zip(callers, tokens, strict=True):
        of_caller[(caller,)] += count


def fold_loop_lags(seconds: Sequence[float], series: Series, slot: Slot) -> None:
    series.histograms["mlis_event_loop_lag_seconds"][()].observe_many(np.array(seconds))
    slot.times["loop_lag"].add_many(np.array(seconds))


def fold_batches(
    noted: Sequence[Any], waits_s: Sequence[float], lengths: Sequence[int], series: Series, slot: Slot
) -> None:
    """Batches that the model answered, and of all their texts the waits and the lengths."""
    sums, numbers, histograms = slot.sums, series.numbers, series.histograms
    columns = {name: noted[place::BATCH_WIDTH] for place, name in enumerate(BATCH)}
    texts, tokens, padded_tokens = (sum(columns[name]) for name in ("texts", "tokens", "padded_tokens"))
    numbers["mlis_tokens_total"][()] += tokens
    numbers["mlis_padding_tokens_total"][()] += padded_tokens - tokens
    histograms["mlis_batch_tokens"][()].observe_many(np.array(columns["padded_tokens"]))
    histograms["mlis_batch_compute_seconds"][()].observe_many(np.array(columns["compute_s"]))
    histograms["mlis_queue_wait_seconds"][()].observe_many(np.array(waits_s, float))
    for name, values in (("batch_texts", columns["texts"]), ("text_tokens", lengths)):
        buckets = histograms[f"mlis_{name}"][()].observe_many(np.array(values, np.int64))
        for bucket, count in Counter(buckets).items():
            sums[name, bucket] += count
    for reason, count in Counter(columns["closed_by"]).items():
        numbers["mlis_batches_total"][reason, "ok"] += count
        sums[f"closed_by_{reason}"] += count
    sums["batches"] += len(columns["texts"])
    sums["batch_texts"] += texts
    sums["tokens"] += tokens
    sums["padded_tokens"] += padded_tokens
    sums["queue_ns"] += round(sum(waits_s) * 1e9)
    sums["queued_texts"] += len(waits_s)
    sums["compute_ns"] += round(sum(columns["compute_s"]) * 1e9)
