"""The figures of several processes as those of one server."""

import time
from collections.abc import Callable
from typing import Any

from ml_inference_server.metrics.exposition import Series
from ml_inference_server.metrics.model_figures import ModelFigures, model_figures
from ml_inference_server.metrics.report import Labels, Report, summed_gpu
from ml_inference_server.metrics.snapshot import Gauges, snapshot, totals
from ml_inference_server.metrics.system import SystemFigures, SystemSampler
from ml_inference_server.metrics.table import MOST_CALLERS, OTHER_CALLER, TABLE
from ml_inference_server.metrics.window import Slot

_KINDS = {row.name: row.kind for row in TABLE}
_OF_CALLERS = frozenset(row.name for row in TABLE if row.labels == ("caller",))


class MergedMetrics:
    """What `Metrics` says of one process, said of all that report, and of this one's CPU time and memory.

    Counters and histograms are added up, those of processes that have ended included: what such a one counted after its
    last report is lost, and nothing falls. Gauges are those of the processes that run. Percentiles are of all requests
    together, as each process sends its distributions and not its percentiles.

    ready: how many processes answer; restarts: how many were started again.
    """

    def __init__(
        self,
        *,
        window_s: int,
        ready: Callable[[], int] = int,
        restarts: Callable[[], int] = int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._window_s = window_s
        self._ready, self._restarts = ready, restarts
        self._clock = clock
        self._start_s = clock()
        self._system = SystemSampler(self._start_s)
        self._reports: dict[int, Report] = {}
        self._ended = Series()
        self._ended_cpu_s = 0.0
        self._last_batch_unix_s = 0.0
        self._series = Series()
        self._callers = {OTHER_CALLER}
        self._closed = Slot()
        self._closed_s: dict[int, float] = {}

    def put(self, process: int, report: Report) -> None:
        """Its newest figures."""
        self._reports[process] = report
        self._closed.merge(report.closed)
        self._closed_s[process] = self._closed_s.get(process, 0.0) + report.closed_s
        self._last_batch_unix_s = max(self._last_batch_unix_s, report.last_batch_unix_s)

    def retire(self, process: int) -> None:
        """It has ended: what it counted stays, what it held goes. Nothing happens where it never reported."""
        report = self._reports.pop(process, None)
        if report is not None:
            self._add(report, self._ended, with_gauges=False)
            self._ended_cpu_s += report.gauges.system.cpu_seconds

    def take_closed(self) -> tuple[Slot, float]:
        """What was recorded in the slots that closed since the last call, and how many seconds they cover, on average.

        The processes do not begin their slots in the same moment.
        """
        closed, covered = self._closed, list(self._closed_s.values())
        self._closed, self._closed_s = Slot(), {}
        return closed, sum(covered) / len(covered) if covered else 0.0

    def snapshot(self) -> dict[str, Any]:
        """The JSON of GET /metrics, as docs/metrics.md describes it."""
        whole, reports = Slot(), list(self._reports.values())
        for report in reports:
            whole.merge(report.view)
        covered_s = max((report.covered_s for report in reports), default=1.0)
        return {**snapshot(whole, covered_s, self.gauges()), "totals": totals(self._added_up().numbers)}

    def prometheus(self, accept: str) -> tuple[bytes, str]:
        """Body and content type: OpenMetrics where the Accept header names it, else Prometheus text."""
        return self._added_up().text(accept)

    def model_figures(self) -> ModelFigures:
        """What the model did since the start."""
        return model_figures(self._added_up(), self._last_batch_unix_s)

    def gauges(self) -> Gauges:
        """What holds at this moment, as far as the processes have told."""
        each = [report.gauges for report in self._reports.values()]
        in_flight: dict[str, int] = {}
        for gauges in each:
            for method, count in gauges.in_flight.items():
                in_flight[method] = in_flight.get(method, 0) + count
        return Gauges(
            recording=all(gauges.recording for gauges in each),
            uptime_s=self._clock() - self._start_s,
            window_s=self._window_s,
            queue_texts=sum(gauges.queue_texts for gauges in each),
            queue_tokens=sum(gauges.queue_tokens for gauges in each),
            batches_in_flight=sum(gauges.batches_in_flight for gauges in each),
            slots=sum(gauges.slots for gauges in each),
            in_flight=in_flight,
            system=self._system_figures([gauges.system for gauges in each]),
        )

    def _system_figures(self, each: list[SystemFigures]) -> SystemFigures:
        mine = self._system.sample(self._clock())
        every = [mine, *each]
        return SystemFigures(
            cpu_percent=sum(figures.cpu_percent for figures in every),
            machine_cpu_percent=mine.machine_cpu_percent,
            cpu_count=mine.cpu_count,
            cpu_seconds=self._ended_cpu_s + sum(figures.cpu_seconds for figures in every),
            rss_bytes=sum(figures.rss_bytes for figures in every),
            gpu=summed_gpu([figures.gpu for figures in each]),
        )

    def _added_up(self) -> Series:
        """Sums of fractions depend on their order in the last digit; to Prometheus one that falls has begun anew."""
        series, now = self._series, self.gauges()
        cpu_told_s = series.numbers["process_cpu_seconds_total"][()]
        told = [(each, each.total) for of_name in series.histograms.values() for each in of_name.values()]
        for name, by_labels in series.numbers.items():
            for labels in by_labels:
                by_labels[labels] = self._ended.numbers[name].get(labels, 0)
        for name, of_name in series.histograms.items():
            for labels, histogram in of_name.items():
                histogram.clear()
                histogram.add(self._ended.histograms[name][labels].state())
        for report in self._reports.values():
            self._add(report, series, with_gauges=True)
        for name, value in (
            ("mlis_workers", self._ready()),
            ("mlis_worker_restarts_total", self._restarts()),
            ("mlis_uptime_seconds", now.uptime_s),
            ("process_cpu_seconds_total", max(cpu_told_s, now.system.cpu_seconds)),
            ("process_resident_memory_bytes", now.system.rss_bytes),
        ):
            series.numbers[name][()] = value
        for histogram, total in told:
            histogram.total = max(histogram.total, total)
        return series

    def _add(self, report: Report, series: Series, *, with_gauges: bool) -> None:
        for name, by_labels in report.numbers.items():
            if with_gauges or _KINDS[name] == "counter":
                numbers = series.numbers[name]
                for labels, number in by_labels.items():
                    mine = self._caller(labels) if name in _OF_CALLERS else labels
                    numbers[mine] += number
        for name, of_name in report.histograms.items():
            for labels, state in of_name.items():
                series.histograms[name][labels].add(state)

    def _caller(self, labels: Labels) -> Labels:
        """Each process names the first callers that it meets; all together name as many as one."""
        (name,) = labels
        if name not in self._callers:
            if len(self._callers) > MOST_CALLERS:
                return (OTHER_CALLER,)
            self._callers.add(name)
            for series in (self._series, self._ended):
                series.add_caller(name)
        return labels
