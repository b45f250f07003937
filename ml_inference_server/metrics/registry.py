"""Every figure of the server: written by the hot path, read by the dashboard, Prometheus and GetMetrics.

All methods belong to one thread, the event loop's. The hot path only notes down; what it noted is counted many at a
time, once a second or when somebody reads.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from ml_inference_server.metrics.exposition import Series
from ml_inference_server.metrics.fold import NO_STAMPS, fold_batches, fold_loop_lags, fold_requests, fold_tokenized
from ml_inference_server.metrics.model_figures import ModelFigures, model_figures
from ml_inference_server.metrics.report import Report
from ml_inference_server.metrics.snapshot import Gauges, snapshot, totals
from ml_inference_server.metrics.system import SystemFigures, SystemSampler
from ml_inference_server.metrics.table import METHODS, MOST_CALLERS, OTHER_CALLER
from ml_inference_server.metrics.tracing import Tracer
from ml_inference_server.metrics.window import SlidingWindow, Slot
from ml_inference_server.utils.stages import Stamps

MOST_NOTED = 100_000
"""Values that are noted before they are counted."""


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
        self._last_batch_s: float | None = None
        self._window_s = window_s
        self._window = SlidingWindow(window_s, self._start_s)
        self._system = SystemSampler(self._start_s)
        self._queue_texts: Callable[[], int] = int
        self._queue_tokens: Callable[[], int] = int
        self._batches_in_flight: Callable[[], int] = int
        self._restarts: Callable[[], int] = int
        self._cache_bytes: Callable[[], int] = int
        self._tasks: Callable[[], int] = int
        self._slots = 0
        self._series = Series()
        self._callers = {OTHER_CALLER}
        self._in_flight: defaultdict[str, int] = defaultdict(int)
        # Noted by the hot path, of the current slot only; `_settle` counts it.
        self._requests: list[Any] = []
        self._tokenized: list[Any] = []
        self._loop_lags_s: list[float] = []
        self._batches: list[Any] = []
        self._waits_s: list[float] = []
        self._lengths: list[int] = []
        self._slot_ends_s = self._window.current_ends_s

    def request_started(self, method: str) -> None:
        if self.enabled:
            self._in_flight[method] += 1

    def request_finished(
        self,
        method: str,
        code: str,
        seconds: float,
        *,
        texts: int = 0,
        pairs: int = 0,
        truncated: int = 0,
        stamps: Stamps | None = None,
        reason: str = "",
        request_id: str = "",
        trace_id: str = "",
        caller: str = "",
    ) -> None:
        """Call once for each `request_started`, whatever the outcome.

        code: a gRPC status name, any other counts as UNKNOWN. texts, pairs, truncated: how many were answered, and how
        many of the texts were cut. stamps: None for a request that was not answered. reason: of an error; one that the
        table does not know counts as other. The ids lead from a bucket of the histogram to this request. caller: one
        that is not among the named ones counts as other.
        """
        if not self.enabled:
            return
        self._in_flight[method] -= 1
        self._open_slot()
        label = caller if caller in self._callers else OTHER_CALLER
        self._requests += (method, code, seconds, texts, pairs, truncated, reason, request_id, trace_id, label)
        self._requests += stamps or NO_STAMPS

    def name_callers(self, names: Iterable[str]) -> None:
        """Names of keys, for the label `caller`: the first ones that are ever told keep their place."""
        for name in names:
            if len(self._callers) > MOST_CALLERS:
                return
            if name not in self._callers:
                self._callers.add(name)
                self._series.add_caller(name)

    def tokenized(self, texts: int, tokens: int, seconds: float, caller: str = "") -> None:
        """The texts of one request were turned into `tokens` tokens in `seconds`."""
        if self.enabled:
            self._tokenized += (texts, tokens, seconds, caller if caller in self._callers else OTHER_CALLER)

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
        """padded_tokens: rows times length, so that padding is `padded_tokens - tokens`.

        queue_s: a wait for each text, and of a text that several requests share for each of them.

        lengths: the tokens of each text. A batch that raised (not ok) counts as such and nowhere else: its texts come
        back in later batches. closed_by: one of CLOSED_BY.
        """
        if not self.enabled:
            return
        if not ok:
            self._series.numbers["mlis_batches_total"][closed_by, "error"] += 1
            return
        self._open_slot()
        self._last_batch_s = self._clock()
        self._batches += (texts, tokens, padded_tokens, compute_s, closed_by)
        self._waits_s += queue_s
        self._lengths += lengths

    def texts_shared(self, texts: int) -> None:
        """So many texts got the row of an equal one that was computed for another request."""
        if self.enabled:
            self._series.numbers["mlis_shared_texts_total"][()] += texts

    def cache_looked_up(self, *, hits: int, misses: int) -> None:
        """The texts of one request that the cache had, and those that it had not."""
        if self.enabled:
            self._series.numbers["mlis_cache_hits_total"][()] += hits
            self._series.numbers["mlis_cache_misses_total"][()] += misses

    def _open_slot(self) -> None:
        """Before something is noted: what was noted in an earlier slot, or piles up, is counted."""
        now_s = self._clock()
        if now_s >= self._slot_ends_s or len(self._requests) >= MOST_NOTED or len(self._lengths) >= MOST_NOTED:
            self._settle(now_s)

    def _settle(self, now_s: float) -> None:
        """Count what was noted, into the slot that it belongs to, then go to the slot of `now_s`."""
        slot = self._window.current
        if self._requests:
            requests, self._requests = self._requests, []
            fold_requests(requests, self._series, slot)
        if self._tokenized:
            tokenized, self._tokenized = self._tokenized, []
            fold_tokenized(tokenized, self._series)
        if self._batches:
            noted = self._batches, self._waits_s, self._lengths
            self._batches, self._waits_s, self._lengths = [], [], []
            fold_batches(*noted, self._series, slot)
        if self._loop_lags_s:
            loop_lags_s, self._loop_lags_s = self._loop_lags_s, []
            fold_loop_lags(loop_lags_s, self._series, slot)
        self._window.at(now_s)
        self._slot_ends_s = self._window.current_ends_s

    def watch(
        self,
        *,
        queue_texts: Callable[[], int],
        queue_tokens: Callable[[], int],
        batches_in_flight: Callable[[], int],
        slots: int = 1,
        pids: Callable[[], Sequence[int]] = tuple,
        restarts: Callable[[], int] = int,
        cache_bytes: Callable[[], int] = int,
        tasks: Callable[[], int] = int,
    ) -> None:
        """Where to look up the queue when somebody asks; until then it is empty. slots: batches at a time.

        pids: of the processes that the model runs in, besides this one; restarts: how many were replaced. cache_bytes:
        what the cache of finished rows holds. tasks: of the event loop.
        """
        self._queue_texts = queue_texts
        self._queue_tokens = queue_tokens
        self._batches_in_flight = batches_in_flight
        self._slots = slots
        self._system.pids = pids
        self._restarts = restarts
        self._cache_bytes = cache_bytes
        self._tasks = tasks

    def observe_loop_lag(self, seconds: float) -> None:
        """How late the event loop ran a callback that was due."""
        if self.enabled:
            self._open_slot()
            self._loop_lags_s.append(seconds)

    def sample_system(self) -> SystemFigures:
        """CPU and memory, looked at once a second at most; called every second, they always cover the last one."""
        return self._system.sample(self._clock())

    def take_closed(self) -> tuple[Slot, float]:
        """What was recorded in the slots that closed since the last call, and how many seconds they cover."""
        now_s = self._clock()
        self._settle(now_s)
        return self._window.take_closed(now_s)

    def snapshot(self) -> dict[str, Any]:
        """The JSON of GET /metrics, as docs/metrics.md describes it."""
        now_s = self._clock()
        self._settle(now_s)
        return {
            **snapshot(self._window.view(now_s), self._window.covered_s(now_s), self.gauges()),
            "totals": totals(self._series.numbers),
        }

    def model_figures(self) -> ModelFigures:
        """What the model did since the start."""
        now_s = self._clock()
        self._settle(now_s)
        last_s = self._last_batch_s
        return model_figures(self._series, 0.0 if last_s is None else time.time() - (now_s - last_s))

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
            in_flight=self._in_flight_by_method(),
            system=self.sample_system(),
        )

    def _in_flight_by_method(self) -> dict[str, int]:
        by_method = dict.fromkeys(METHODS, 0)
        for method, count in self._in_flight.items():
            by_method[method if method in METHODS else "other"] += count
        return by_method

    def prometheus(self, accept: str) -> tuple[bytes, str]:
        """Body and content type: OpenMetrics where the Accept header names it, else Prometheus text."""
        self._settle(self._clock())
        self._number_gauges(self.gauges())
        return self._series.text(accept)

    def report(self) -> Report:
        """Everything, for a supervisor that adds up several processes. What closed is handed out once."""
        closed, closed_s = self.take_closed()
        now_s, now, last_s = self._clock(), self.gauges(), self._last_batch_s
        self._number_gauges(now)
        return Report(
            numbers=self._series.numbers,
            histograms={
                name: {labels: histogram.state() for labels, histogram in by_labels.items()}
                for name, by_labels in self._series.histograms.items()
            },
            view=self._window.view(now_s),
            covered_s=self._window.covered_s(now_s),
            closed=closed,
            closed_s=closed_s,
            gauges=now,
            last_batch_unix_s=0.0 if last_s is None else time.time() - (now_s - last_s),
        )

    def _number_gauges(self, now: Gauges) -> None:
        numbers = self._series.numbers
        for name, value in (
            ("mlis_queue_texts", now.queue_texts),
            ("mlis_queue_tokens", now.queue_tokens),
            ("mlis_in_flight_batches", now.batches_in_flight),
            ("mlis_batch_slots", now.slots),
            ("mlis_engine_restarts_total", self._restarts()),
            ("mlis_cache_bytes", self._cache_bytes()),
            ("mlis_event_loop_tasks", self._tasks()),
            ("mlis_workers", 1),
            ("mlis_uptime_seconds", now.uptime_s),
            ("mlis_gpu_memory_bytes", now.system.gpu["memory_bytes"] if now.system.gpu else 0),
            ("process_cpu_seconds_total", now.system.cpu_seconds),
            ("process_resident_memory_bytes", now.system.rss_bytes),
        ):
            numbers[name][()] = value
        for method, count in now.in_flight.items():
            numbers["mlis_in_flight_requests"][(method,)] = count
