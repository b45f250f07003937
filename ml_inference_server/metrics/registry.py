"""Every figure of the server: written by the hot path, read by the dashboard, Prometheus and GetMetrics.

All methods belong to one thread, the event loop's. Writing costs a few dictionary operations; whatever is dearer
happens when somebody reads.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any

from ml_inference_server.metrics.exposition import Series
from ml_inference_server.metrics.snapshot import Gauges, snapshot, totals
from ml_inference_server.metrics.system import SystemFigures, SystemSampler
from ml_inference_server.metrics.table import CODES, METHODS, REASONS, STAGES
from ml_inference_server.metrics.tracing import Tracer
from ml_inference_server.metrics.window import SlidingWindow, Slot

_STAGE_SUMS = tuple(f"stage_{stage}_ns" for stage in STAGES)


class Metrics:
    """What the server counts.

    window_s: how far the rates and percentiles of `snapshot` look back. enabled: False records nothing, which is for
    measuring what recording costs. `tracer` is there where spans are sent.
    """

    def __init__(self, *, window_s: int, enabled: bool = True, clock: Callable[[], float] = time.monotonic) -> None:
        self.enabled = enabled
        self.tracer: Tracer | None = None
        self._clock = clock
        self._start_s = clock()
        self._window_s = window_s
        self._window = SlidingWindow(window_s, self._start_s)
        self._system = SystemSampler(self._start_s)
        self._queue_texts: Callable[[], int] = int
        self._queue_tokens: Callable[[], int] = int
        self._batches_in_flight: Callable[[], int] = int
        self._slots = 0
        self._series = Series()
        numbers, histograms = self._series.numbers, self._series.histograms
        self._requests = numbers["mlis_requests_total"]
        self._errors = numbers["mlis_request_errors_total"]
        self._in_flight = numbers["mlis_in_flight_requests"]
        self._texts = numbers["mlis_texts_total"]
        self._pairs = numbers["mlis_pairs_total"]
        self._truncated = numbers["mlis_truncated_texts_total"]
        self._batches = numbers["mlis_batches_total"]
        self._durations = histograms["mlis_request_duration_seconds"]
        self._stages = tuple(histograms["mlis_request_stage_seconds"][(stage,)] for stage in STAGES)
        self._tokenize = histograms["mlis_tokenize_duration_seconds"][()]
        self._queue_wait = histograms["mlis_queue_wait_seconds"][()]
        self._batch_texts = histograms["mlis_batch_texts"][()]
        self._batch_tokens = histograms["mlis_batch_tokens"][()]
        self._text_tokens = histograms["mlis_text_tokens"][()]
        self._compute = histograms["mlis_batch_compute_seconds"][()]
        self._loop_lag = histograms["mlis_event_loop_lag_seconds"][()]

    def request_started(self, method: str) -> None:
        if self.enabled:
            self._in_flight[(method if method in METHODS else "other",)] += 1

    def request_finished(
        self,
        method: str,
        code: str,
        seconds: float,
        *,
        texts: int = 0,
        pairs: int = 0,
        truncated: int = 0,
        stages_s: Sequence[float] = (),
        reason: str = "",
        exemplar: str = "",
    ) -> None:
        """Call once for each `request_started`, whatever the outcome.

        code: a gRPC status name, any other counts as UNKNOWN. texts, pairs, truncated: how many were answered, and how
        many of the texts were cut. stages_s: the time in each of STAGES; with status OK only. reason: of an error; one
        that the table does not know counts as other. exemplar: labels that lead to this request, `request_id="..."`.
        """
        if not self.enabled:
            return
        method = method if method in METHODS else "other"
        code = code if code in CODES else "UNKNOWN"
        ok = code == "OK"
        now_s = self._clock()
        sums = (slot := self._window.at(now_s)).sums
        self._in_flight[(method,)] -= 1
        self._requests[method, code] += 1
        durations = self._durations[method, "ok" if ok else "error"]
        bucket = durations.observe(seconds)
        if exemplar:
            durations.exemplars[bucket] = (exemplar, seconds, time.time())
        sums["requests"] += 1
        if not ok:
            reason = reason if reason in REASONS else "other"
            self._errors[(reason,)] += 1
            sums["errors"] += 1
            sums[f"reason_{reason}"] += 1
            return
        self._texts[(method,)] += texts
        self._pairs[(method,)] += pairs
        self._truncated[()] += truncated
        sums["texts"] += texts
        sums["pairs"] += pairs
        sums["truncated"] += truncated
        slot.times["latency"].add(seconds)
        for histogram, name, stage_s in zip(self._stages, _STAGE_SUMS, stages_s, strict=False):
            histogram.observe(stage_s)
            sums[name] += int(stage_s * 1e9)

    def tokenized(self, texts: int, tokens: int, seconds: float) -> None:
        """The texts of one request were turned into `tokens` tokens in `seconds`."""
        if not self.enabled:
            return
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
        lengths: Sequence[int] = (),
    ) -> None:
        """padded_tokens: rows times length, so that padding is `padded_tokens - tokens`. queue_s: one wait per text.

        lengths: the tokens of each text. A batch that raised (not ok) counts as such and nowhere else: its texts come
        back in later batches. KeyError for a `closed_by` that the table does not know.
        """
        if not self.enabled:
            return
        self._batches[closed_by, "ok" if ok else "error"] += 1
        if not ok:
            return
        self._series.numbers["mlis_tokens_total"][()] += tokens
        self._series.numbers["mlis_padding_tokens_total"][()] += padded_tokens - tokens
        sums = self._window.at(self._clock()).sums
        sums["batch_texts", self._batch_texts.observe(texts)] += 1
        self._batch_tokens.observe(padded_tokens)
        self._compute.observe(compute_s)
        for waited_s in queue_s:
            self._queue_wait.observe(waited_s)
        for length in lengths:
            sums["text_tokens", self._text_tokens.observe(length)] += 1
        sums["batches"] += 1
        sums[f"closed_by_{closed_by}"] += 1
        sums["batch_texts"] += texts
        sums["tokens"] += tokens
        sums["padded_tokens"] += padded_tokens
        sums["queue_ns"] += round(sum(queue_s) * 1e9)
        sums["queued_texts"] += len(queue_s)
        sums["compute_ns"] += round(compute_s * 1e9)

    def watch(
        self,
        *,
        queue_texts: Callable[[], int],
        queue_tokens: Callable[[], int],
        batches_in_flight: Callable[[], int],
        slots: int = 1,
    ) -> None:
        """Where to look up the queue when somebody asks; until then it is empty. slots: batches at a time."""
        self._queue_texts = queue_texts
        self._queue_tokens = queue_tokens
        self._batches_in_flight = batches_in_flight
        self._slots = slots

    def observe_loop_lag(self, seconds: float) -> None:
        """How late the event loop ran a callback that was due."""
        if self.enabled:
            self._loop_lag.observe(seconds)
            self._window.at(self._clock()).times["loop_lag"].add(seconds)

    def sample_system(self) -> SystemFigures:
        """CPU and memory, looked at once a second at most; called every second, they always cover the last one."""
        return self._system.sample(self._clock())

    def take_closed(self) -> tuple[Slot, float]:
        """What was recorded in the slots that closed since the last call, and how many seconds they cover."""
        return self._window.take_closed(self._clock())

    def snapshot(self) -> dict[str, Any]:
        """The JSON of GET /metrics, as docs/metrics.md describes it."""
        now_s = self._clock()
        return {
            **snapshot(self._window.view(now_s), self._window.covered_s(now_s), self.gauges()),
            "totals": totals(self._series.numbers),
        }

    def gauges(self) -> Gauges:
        """What holds at this moment."""
        return Gauges(
            recording=self.enabled,
            uptime_s=self._clock() - self._start_s,
            window_s=self._window_s,
            queue_texts=self._queue_texts(),
            queue_tokens=self._queue_tokens(),
            batches_in_flight=self._batches_in_flight(),
            slots=self._slots,
            in_flight={method: int(self._in_flight[(method,)]) for method in METHODS},
            system=self.sample_system(),
        )

    def prometheus(self, accept: str) -> tuple[bytes, str]:
        """Body and content type: OpenMetrics where the Accept header names it, else Prometheus text."""
        now, numbers = self.gauges(), self._series.numbers
        for name, value in (
            ("mlis_queue_texts", now.queue_texts),
            ("mlis_queue_tokens", now.queue_tokens),
            ("mlis_in_flight_batches", now.batches_in_flight),
            ("mlis_batch_slots", now.slots),
            ("mlis_uptime_seconds", now.uptime_s),
            ("mlis_gpu_memory_bytes", now.system.gpu["memory_bytes"] if now.system.gpu else 0),
            ("process_cpu_seconds_total", now.system.cpu_seconds),
            ("process_resident_memory_bytes", now.system.rss_bytes),
        ):
            numbers[name][()] = value
        return self._series.text(accept)
