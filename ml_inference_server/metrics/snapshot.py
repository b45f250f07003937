"""From what was recorded to the JSON that GET /metrics answers. docs/metrics.md describes it field by field."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ml_inference_server.metrics.system import SystemFigures
from ml_inference_server.metrics.table import CLOSED_BY, METHODS, REASONS, buckets_of
from ml_inference_server.metrics.window import Distribution, Slot
from ml_inference_server.utils.stages import STAGE_NAMES

SCHEMA_VERSION = 1

_HISTOGRAMS = {"batch_texts": buckets_of("mlis_batch_texts"), "text_tokens": buckets_of("mlis_text_tokens")}


@dataclass(frozen=True, slots=True)
class Gauges:
    """What holds at one moment. slots: batches that the model can work on at a time, 0 before it is loaded."""

    recording: bool
    uptime_s: float
    window_s: int
    queue_texts: int
    queue_tokens: int
    batches_in_flight: int
    slots: int
    in_flight: dict[str, int]
    system: SystemFigures


def snapshot(view: Slot, covered_s: float, now: Gauges) -> dict[str, Any]:
    """The figures of a window that covers `covered_s` seconds, and of this moment."""
    sums = view.sums
    return {
        "schema_version": SCHEMA_VERSION,
        "recording": now.recording,
        "time_unix_s": time.time(),
        "uptime_s": now.uptime_s,
        "window_s": now.window_s,
        "requests_per_s": sums["requests"] / covered_s,
        "answered_per_s": (sums["requests"] - sums["errors"]) / covered_s,
        "errors_per_s": sums["errors"] / covered_s,
        "texts_per_s": sums["texts"] / covered_s,
        "pairs_per_s": sums["pairs"] / covered_s,
        "tokens_per_s": sums["tokens"] / covered_s,
        "latency_ms": times_ms(view.times["latency"]),
        "stages_ms": _stages_ms(view),
        "errors_by_reason": {name: count for name in REASONS if (count := sums[f"reason_{name}"])},
        "truncated_texts": sums["truncated"],
        "batch": _batch(view, covered_s, now.slots),
        "distributions": {name: _distribution(view, name) for name in _HISTOGRAMS},
        "queue": {
            "texts": now.queue_texts,
            "tokens": now.queue_tokens,
            "batches_in_flight": now.batches_in_flight,
            "batch_slots": now.slots,
        },
        "in_flight": now.in_flight,
        "cpu_percent": now.system.cpu_percent,
        "machine_cpu_percent": now.system.machine_cpu_percent,
        "cpu_count": now.system.cpu_count,
        "rss_bytes": now.system.rss_bytes,
        "gpu": now.system.gpu,
        "loop_lag_ms": times_ms(view.times["loop_lag"]),
    }


def _batch(view: Slot, covered_s: float, slots: int) -> dict[str, Any]:
    sums = view.sums
    padding_share = ratio(sums["padded_tokens"] - sums["tokens"], sums["padded_tokens"])
    compute_ms = ratio(sums["compute_ns"] / 1e6, sums["batches"])
    return {
        "mean_size": ratio(sums["batch_texts"], sums["batches"]),
        "per_s": sums["batches"] / covered_s,
        "padding_share": padding_share,
        "mean_compute_ms": compute_ms,
        "mean_padding_ms": None if compute_ms is None or padding_share is None else compute_ms * padding_share,
        "mean_queue_ms": ratio(sums["queue_ns"] / 1e6, sums["queued_texts"]),
        "busy_share": min(1.0, sums["compute_ns"] / 1e9 / covered_s / slots) if slots else None,
        "closed_by": {reason: sums[f"closed_by_{reason}"] for reason in CLOSED_BY},
    }


def _stages_ms(view: Slot) -> dict[str, float] | None:
    """The mean request; `other` is what no stage accounts for, so that the stages and it add up to `total`."""
    latency = view.times["latency"]
    if latency.mean_s is None:
        return None
    stages = {stage: view.sums[f"stage_{stage}_ns"] / 1e6 / latency.count for stage in STAGE_NAMES}
    total = latency.mean_s * 1e3
    return {**stages, "other": max(0.0, total - sum(stages.values())), "total": total}


def _distribution(view: Slot, name: str) -> dict[str, list[Any]]:
    bounds = _HISTOGRAMS[name]
    return {
        "le": [*(int(bound) for bound in bounds), None],
        "counts": [view.sums[name, bucket] for bucket in range(len(bounds) + 1)],
    }


def totals(numbers: Mapping[str, Mapping[tuple[str, ...], float]]) -> dict[str, Any]:
    """What was counted since the start: the field `totals`."""
    requests, batches = numbers["mlis_requests_total"], numbers["mlis_batches_total"]
    by_method: dict[str, dict[str, float]] = {method: {} for method in METHODS}
    for (method, code), count in requests.items():
        if count:
            by_method[method][code] = count
    total = sum(requests.values())
    return {
        "requests": total,
        "errors": total - sum(requests[method, "OK"] for method in METHODS),
        "texts": sum(numbers["mlis_texts_total"].values()),
        "truncated_texts": numbers["mlis_truncated_texts_total"][()],
        "pairs": sum(numbers["mlis_pairs_total"].values()),
        "tokens": numbers["mlis_tokens_total"][()],
        "padding_tokens": numbers["mlis_padding_tokens_total"][()],
        "shared_texts": numbers["mlis_shared_texts_total"][()],
        "cache_hits": numbers["mlis_cache_hits_total"][()],
        "cache_misses": numbers["mlis_cache_misses_total"][()],
        "batches": sum(batches.values()),
        "failed_batches": sum(batches[reason, "error"] for reason in CLOSED_BY),
        "by_method_and_code": by_method,
        "errors_by_reason": {
            reason: count for (reason,), count in numbers["mlis_request_errors_total"].items() if count
        },
    }


def ratio(part: float, whole: int) -> float | None:
    return part / whole if whole else None


def times_ms(times: Distribution) -> dict[str, float] | None:
    """Mean and percentiles; None when nothing was added."""
    found_s = times.percentiles_s(0.5, 0.95, 0.99)
    if found_s is None or times.mean_s is None:
        return None
    return {"avg": times.mean_s * 1e3, **{f"p{n}": s * 1e3 for n, s in zip((50, 95, 99), found_s, strict=True)}}
