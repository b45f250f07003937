"""Every figure of the server: written by the hot path, read by the dashboard, Prometheus and GetMetrics.

All methods belong to one thread, the event loop's. Writing costs a few dictionary operations; whatever is dearer
happens when somebody reads.
"""

import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric

from ml_inference_server.metrics.system import SystemSampler
from ml_inference_server.metrics.table import CLOSED_BY, CODES, METHODS, TABLE, Row
from ml_inference_server.metrics.window import Distribution, SlidingWindow

SCHEMA_VERSION = 1


class _Histogram:
    """Counts between fixed upper bounds, and the sum, since the start."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value


class _Series:
    """The values behind the table, and what prometheus_client collects."""

    def __init__(self, before_collect: Callable[[], None]) -> None:
        self._before_collect = before_collect
        self.numbers: dict[str, dict[tuple[str, ...], float]] = {
            row.name: dict.fromkeys(row.label_sets(), 0) for row in TABLE if row.kind != "histogram"
        }
        self.histograms: dict[str, dict[tuple[str, ...], _Histogram]] = {
            row.name: {labels: _Histogram(row.buckets) for labels in row.label_sets()}
            for row in TABLE
            if row.kind == "histogram"
        }

    def collect(self) -> Iterator[Metric]:
        # Families are built here because the library's own counters add a `_created` series to each, and can be told
        # not to only for the whole process.
        self._before_collect()
        for row in TABLE:
            family = Metric(row.name.removesuffix("_total"), row.help, row.kind, row.unit)
            if row.kind == "histogram":
                for values, histogram in self.histograms[row.name].items():
                    _add_histogram(family, row, dict(zip(row.labels, values, strict=True)), histogram)
            else:
                for values, number in self.numbers[row.name].items():
                    family.add_sample(row.name, dict(zip(row.labels, values, strict=True)), number)
            yield family


def _add_histogram(family: Metric, row: Row, labels: dict[str, str], histogram: _Histogram) -> None:
    seen = 0
    bounds = (*(f"{bound:.10g}" for bound in row.buckets), "+Inf")
    for bound, count in zip(bounds, histogram.counts, strict=True):
        seen += count
        family.add_sample(f"{row.name}_bucket", {**labels, "le": bound}, seen)
    family.add_sample(f"{row.name}_count", labels, seen)
    family.add_sample(f"{row.name}_sum", labels, histogram.total)


class Metrics:
    """What the server counts. `window_s`: how far the rates and percentiles of `snapshot` look back."""

    def __init__(self, *, window_s: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._start_s = clock()
        self._window_s = window_s
        self._window = SlidingWindow(window_s, self._start_s)
        self._system = SystemSampler(self._start_s)
        self._queue_texts: Callable[[], int] = int
        self._queue_tokens: Callable[[], int] = int
        self._batches_in_flight: Callable[[], int] = int
        self._series = _Series(self._fill_gauges)
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self._series)

        numbers, histograms = self._series.numbers, self._series.histograms
        self._requests = numbers["mlis_requests_total"]
        self._in_flight = numbers["mlis_in_flight_requests"]
        self._texts = numbers["mlis_texts_total"]
        self._pairs = numbers["mlis_pairs_total"]
        self._batches = numbers["mlis_batches_total"]
        self._durations = histograms["mlis_request_duration_seconds"]
        self._tokenize = histograms["mlis_tokenize_duration_seconds"][()]
        self._queue_wait = histograms["mlis_queue_wait_seconds"][()]
        self._batch_texts = histograms["mlis_batch_texts"][()]
        self._batch_tokens = histograms["mlis_batch_tokens"][()]
        self._compute = histograms["mlis_batch_compute_seconds"][()]
        self._loop_lag = histograms["mlis_event_loop_lag_seconds"][()]

    def request_started(self, method: str) -> None:
        self._in_flight[(method if method in METHODS else "other",)] += 1

    def request_finished(self, method: str, code: str, seconds: float, *, texts: int = 0, pairs: int = 0) -> None:
        """Call once for each `request_started`, whatever the outcome.

        code: a gRPC status name, any other counts as UNKNOWN. texts, pairs: how many were answered.
        """
        method = method if method in METHODS else "other"
        code = code if code in CODES else "UNKNOWN"
        self._in_flight[(method,)] -= 1
        self._requests[method, code] += 1
        self._texts[(method,)] += texts
        self._pairs[(method,)] += pairs
        self._durations[method, "ok" if code == "OK" else "error"].observe(seconds)
        slot = self._window.at(self._clock())
        slot.sums["requests"] += 1
        slot.sums["texts"] += texts
        slot.sums["pairs"] += pairs
        if code == "OK":
            slot.times["latency"].add(seconds)
        else:
            slot.sums["errors"] += 1

    def tokenized(self, texts: int, tokens: int, seconds: float) -> None:
        """The texts of one request were turned into `tokens` tokens in `seconds`."""
        self._series.numbers["mlis_tokenized_texts_total"][()] += texts
        self._series.numbers["mlis_tokenized_tokens_total"][()] += tokens
        self._tokenize.observe(seconds)

    def batch_finished(
        self,
        *,
        texts: int,
        tokens: int,
        padded_tokens: int,
        queue_s: Sequence[float],
        compute_s: float,
        closed_by: str,
        ok: bool,
    ) -> None:
        """padded_tokens: rows times length, so that padding is `padded_tokens - tokens`. queue_s: one wait per text.

        A batch that raised (not ok) counts as such and nowhere else: its texts come back in later batches.
        KeyError for a `closed_by` that the table does not know.
        """
        self._batches[closed_by, "ok" if ok else "error"] += 1
        if not ok:
            return
        self._series.numbers["mlis_tokens_total"][()] += tokens
        self._series.numbers["mlis_padding_tokens_total"][()] += padded_tokens - tokens
        self._batch_texts.observe(texts)
        self._batch_tokens.observe(padded_tokens)
        self._compute.observe(compute_s)
        for waited_s in queue_s:
            self._queue_wait.observe(waited_s)
        slot = self._window.at(self._clock())
        sums = slot.sums
        sums["batches"] += 1
        sums[f"closed_by_{closed_by}"] += 1
        sums["batch_texts"] += texts
        sums["tokens"] += tokens
        sums["padded_tokens"] += padded_tokens
        sums["queue_ns"] += round(sum(queue_s) * 1e9)
        sums["queued_texts"] += len(queue_s)
        sums["compute_ns"] += round(compute_s * 1e9)

    def watch(
        self, *, queue_texts: Callable[[], int], queue_tokens: Callable[[], int], batches_in_flight: Callable[[], int]
    ) -> None:
        """Where to look up the queue when somebody asks; until then it is empty."""
        self._queue_texts = queue_texts
        self._queue_tokens = queue_tokens
        self._batches_in_flight = batches_in_flight

    def observe_loop_lag(self, seconds: float) -> None:
        """How late the event loop ran a callback that was due."""
        self._loop_lag.observe(seconds)
        self._window.at(self._clock()).times["loop_lag"].add(seconds)

    def sample_system(self) -> None:
        """Look at CPU and memory, at most once a second; called every second, they always cover the last one."""
        self._system.sample(self._clock())

    def snapshot(self) -> dict[str, Any]:
        """The JSON of GET /metrics, as docs/metrics.md describes it."""
        now_s = self._clock()
        view = self._window.view(now_s)
        covered_s = self._window.covered_s(now_s)
        sums = view.sums
        system = self._system.sample(now_s)
        return {
            "schema_version": SCHEMA_VERSION,
            "time_unix_s": time.time(),
            "uptime_s": now_s - self._start_s,
            "window_s": self._window_s,
            "requests_per_s": sums["requests"] / covered_s,
            "errors_per_s": sums["errors"] / covered_s,
            "texts_per_s": sums["texts"] / covered_s,
            "pairs_per_s": sums["pairs"] / covered_s,
            "tokens_per_s": sums["tokens"] / covered_s,
            "latency_ms": _times_ms(view.times["latency"]),
            "batch": {
                "mean_size": _ratio(sums["batch_texts"], sums["batches"]),
                "per_s": sums["batches"] / covered_s,
                "padding_share": _ratio(sums["padded_tokens"] - sums["tokens"], sums["padded_tokens"]),
                "mean_compute_ms": _ratio(sums["compute_ns"] / 1e6, sums["batches"]),
                "mean_queue_ms": _ratio(sums["queue_ns"] / 1e6, sums["queued_texts"]),
                "closed_by": {reason: sums[f"closed_by_{reason}"] for reason in CLOSED_BY},
            },
            "queue": {
                "texts": self._queue_texts(),
                "tokens": self._queue_tokens(),
                "batches_in_flight": self._batches_in_flight(),
            },
            "in_flight": {method: self._in_flight[(method,)] for method in METHODS},
            "cpu_percent": system.cpu_percent,
            "machine_cpu_percent": system.machine_cpu_percent,
            "rss_bytes": system.rss_bytes,
            "gpu": system.gpu,
            "loop_lag_ms": _times_ms(view.times["loop_lag"]),
            "totals": self._totals(),
        }

    def prometheus(self, accept: str) -> tuple[bytes, str]:
        """Body and content type: OpenMetrics where the Accept header names it, else Prometheus text."""
        encode, content_type = choose_encoder(accept)
        return encode(self._registry), content_type

    def _totals(self) -> dict[str, Any]:
        numbers = self._series.numbers
        by_method: dict[str, dict[str, float]] = {method: {} for method in METHODS}
        for (method, code), count in self._requests.items():
            if count:
                by_method[method][code] = count
        requests = sum(self._requests.values())
        return {
            "requests": requests,
            "errors": requests - sum(self._requests[method, "OK"] for method in METHODS),
            "texts": sum(self._texts.values()),
            "pairs": sum(self._pairs.values()),
            "tokens": numbers["mlis_tokens_total"][()],
            "padding_tokens": numbers["mlis_padding_tokens_total"][()],
            "batches": sum(self._batches.values()),
            "failed_batches": sum(self._batches[reason, "error"] for reason in CLOSED_BY),
            "by_method_and_code": by_method,
        }

    def _fill_gauges(self) -> None:
        now_s = self._clock()
        system = self._system.sample(now_s)
        numbers = self._series.numbers
        for name, value in (
            ("mlis_queue_texts", self._queue_texts()),
            ("mlis_queue_tokens", self._queue_tokens()),
            ("mlis_in_flight_batches", self._batches_in_flight()),
            ("mlis_uptime_seconds", now_s - self._start_s),
            ("mlis_gpu_memory_bytes", system.gpu["memory_bytes"] if system.gpu else 0),
            ("process_cpu_seconds_total", system.cpu_seconds),
            ("process_resident_memory_bytes", system.rss_bytes),
        ):
            numbers[name][()] = value


def _ratio(part: float, whole: int) -> float | None:
    return part / whole if whole else None


def _times_ms(times: Distribution) -> dict[str, float] | None:
    found_s = times.percentiles_s(0.5, 0.95, 0.99)
    if found_s is None or times.mean_s is None:
        return None
    return {"avg": times.mean_s * 1e3, **{f"p{n}": s * 1e3 for n, s in zip((50, 95, 99), found_s, strict=True)}}
