"""The values behind the table, and their text for Prometheus.

The text is put together here because the library's encoder builds and escapes every label of every line at each scrape.
These lines never change, so they are prepared once. Tests hold the result to the library's parsers, and a real
Prometheus scrapes it. The library still decides which form an Accept header asks for.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from prometheus_client.exposition import choose_encoder

from ml_inference_server.metrics.table import TABLE, MetricRow

Exemplar = tuple[str, float, float]
"""Labels, value, time."""

HistogramState = tuple[list[int], float, list[Exemplar | None]]
"""Counts, sum, exemplars."""


class Histogram:
    """Counts between fixed upper bounds, and the sum, since the start."""

    __slots__ = ("bounds", "counts", "exemplars", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = np.array(bounds)
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0
        # For each bucket the latest one that came with the ids of its request.
        self.exemplars: list[Exemplar | None] = [None] * len(self.counts)

    def observe_many(self, values: NDArray[Any]) -> list[int]:
        """The index of the bucket that each value fell into."""
        buckets = np.searchsorted(self.bounds, values)
        for bucket, count in enumerate(np.bincount(buckets, minlength=len(self.counts)).tolist()):
            self.counts[bucket] += count
        self.total += float(values.sum())
        found: list[int] = buckets.tolist()
        return found

    def state(self) -> HistogramState:
        """What `add` takes; it goes on changing."""
        return self.counts, self.total, self.exemplars

    def add(self, state: HistogramState) -> None:
        """What another process counted; of two exemplars the later one stays."""
        counts, total, exemplars = state
        self.counts = [mine + other for mine, other in zip(self.counts, counts, strict=True)]
        self.total += total
        self.exemplars = [
            max(filter(None, pair), key=lambda exemplar: exemplar[2], default=None)
            for pair in zip(self.exemplars, exemplars, strict=True)
        ]

    def clear(self) -> None:
        self.counts, self.total, self.exemplars = [0] * len(self.counts), 0.0, [None] * len(self.counts)


class Series:
    """One number or histogram for each row of the table and each of its label sets."""

    def __init__(self) -> None:
        self.numbers: dict[str, dict[tuple[str, ...], float]] = {
            row.name: dict.fromkeys(row.label_sets(), 0) for row in TABLE if row.kind != "histogram"
        }
        self.histograms: dict[str, dict[tuple[str, ...], Histogram]] = {
            row.name: {labels: Histogram(row.buckets) for labels in row.label_sets()}
            for row in TABLE
            if row.kind == "histogram"
        }
        self._names = {(row.name, values): _names(row, values) for row in TABLE for values in row.label_sets()}

    def add_caller(self, name: str) -> None:
        """One more value of the label `caller`; a name of a key needs no escaping."""
        for row in TABLE:
            if row.labels == ("caller",):
                self.numbers[row.name].setdefault((name,), 0)
                self._names[row.name, (name,)] = _names(row, (name,))

    def text(self, accept: str) -> tuple[bytes, str]:
        """Body and content type: OpenMetrics where the Accept header names it, else Prometheus text."""
        _, content_type = choose_encoder(accept)
        is_open = content_type.startswith("application/openmetrics-text")
        lines: list[str] = []
        for row in TABLE:
            family = row.name.removesuffix("_total") if is_open else row.name
            lines.append(f"# HELP {family} {row.help}\n# TYPE {family} {row.kind}\n")
            if is_open:
                lines.append(f"# UNIT {family} {row.unit}\n")
            if row.kind == "histogram":
                for values, histogram in self.histograms[row.name].items():
                    lines.extend(_histogram_lines(self._names[row.name, values], histogram, is_open))
            else:
                for values, number in self.numbers[row.name].items():
                    lines.append(f"{self._names[row.name, values][0]}{number}\n")
        if is_open:
            lines.append("# EOF\n")
        return "".join(lines).encode(), content_type


def _names(row: MetricRow, values: tuple[str, ...]) -> list[str]:
    """What stands before the value in each of the row's lines; a histogram's sum and count come last.

    Label values are the fixed words of the table, so nothing has to be escaped.
    """
    labels = [f'{name}="{value}"' for name, value in zip(row.labels, values, strict=True)]
    plain = f"{{{','.join(labels)}}}" if labels else ""
    if row.kind != "histogram":
        return [f"{row.name}{plain} "]
    bounds = [*(f"{bound:.10g}" if bound % 1 else f"{bound:.1f}" for bound in row.buckets), "+Inf"]
    buckets = ["{}_bucket{{{}}} ".format(row.name, ",".join([*labels, f'le="{bound}"'])) for bound in bounds]
    return [*buckets, f"{row.name}_count{plain} ", f"{row.name}_sum{plain} "]


def _histogram_lines(names: list[str], histogram: Histogram, is_open: bool) -> Iterator[str]:
    seen = 0
    for name, count, exemplar in zip(names, histogram.counts, histogram.exemplars, strict=False):
        seen += count
        if is_open and exemplar is not None:
            labels, value, time_s = exemplar
            yield f"{name}{seen} # {{{labels}}} {value:.9g} {time_s:.3f}\n"
        else:
            yield f"{name}{seen}\n"
    yield f"{names[-2]}{seen}\n"
    yield f"{names[-1]}{histogram.total}\n"
