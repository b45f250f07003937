"""The configurations of a comparison, measured against the baseline under the same loads."""

from dataclasses import dataclass
from functools import cached_property

from ml_inference_server.benchmark.result import aggregate, stats
from ml_inference_server.benchmark.result.aggregate import Row
from ml_inference_server.benchmark.result.document import Entry, Quality, QualityNotMeasured, SameLoad, Status, Summary
from ml_inference_server.benchmark.result.stats import Ratio

BASELINE = "minilm_baseline"
# Cosines that differ by less are the same quality: the noise of summing in another order.
_QUALITY_DIGITS = 4


@dataclass(frozen=True)
class Configuration:
    """One variant of one experiment, as an entry of the summary's JSON."""

    entry: Entry

    @property
    def name(self) -> str:
        return self.entry.name

    @cached_property
    def rows(self) -> list[Row]:
        server = self.entry.server
        return aggregate.rows_of(self.entry.runs, [server] if server else [], {})

    @property
    def quality(self) -> Quality | QualityNotMeasured | None:
        return self.entry.server.quality if self.entry.server else None

    @property
    def figures(self) -> Quality | None:
        """Of its quality, where that was measured."""
        return self.entry.server.figures if self.entry.server else None

    @property
    def likeness(self) -> float | None:
        """Mean cosine to FP32, of a cross-encoder the correlation; None where it was not measured."""
        return self.figures.likeness if self.figures else None

    def at(self, load: SameLoad) -> Row | None:
        return next((row for row in self.rows if row.same_load == load), None)


class Comparison:
    """The configurations against the baseline, at the heaviest and at the lightest closed load that it was run at."""

    def __init__(self, document: Summary) -> None:
        self.all = [Configuration(entry) for entry in document.experiments]
        measured = [c for c in self.all if any(row.status is Status.VALID and row.speed for row in c.rows)]
        named = [c for c in measured if c.entry.experiment == BASELINE]
        self.baseline = next(iter(named or measured), None)
        rows = self.baseline.rows if self.baseline else []
        weight = [
            (row.first.batch_size * row.first.concurrency, row)
            for row in rows
            if row.first.concurrency and row.status is Status.VALID
        ]
        self.heaviest = max(weight, key=lambda pair: pair[0])[1] if weight else None
        self.lightest = min(weight, key=lambda pair: pair[0])[1] if weight else None
        self.comparable = [c for c in measured if self.heavy(c) is not None]
        self.comparable.sort(key=lambda c: -self.speed(c))
        self.others = [c for c in measured if c not in self.comparable]
        self.front = aggregate.pareto(
            {
                c.name: (self.speed(c), round(c.likeness, _QUALITY_DIGITS))
                for c in self.comparable
                if c.likeness is not None and self.is_sound(c)
            }
        )

    def heavy(self, configuration: Configuration) -> Row | None:
        """Its row at the heaviest load; None if it has none, or one without a figure."""
        row = configuration.at(self.heaviest.same_load) if self.heaviest else None
        return row if row and row.speed else None

    def is_sound(self, configuration: Configuration) -> bool:
        row = self.heavy(configuration)
        return row is not None and row.is_sound

    def speed(self, configuration: Configuration) -> float:
        row = self.heavy(configuration)
        return row.speed.value if row and row.speed else 0.0

    def gain(self, configuration: Configuration, against: Configuration | None = None) -> Ratio | None:
        """Throughput at the heaviest load, as a ratio."""
        base = against or self.baseline
        ours, theirs = self.heavy(configuration), base and self.heavy(base)
        if not ours or not theirs or not ours.speed or not theirs.speed or ours.status is not Status.VALID:
            return None
        return stats.ratio(ours.speed, theirs.speed)

    def delay(self, configuration: Configuration) -> Ratio | None:
        """Median latency at the lightest load, as a ratio to the baseline."""
        if self.lightest is None:
            return None
        row = configuration.at(self.lightest.same_load)
        ours, theirs = row and row.status is Status.VALID and row.latency_ms[50], self.lightest.latency_ms[50]
        return stats.ratio(ours, theirs) if ours and theirs else None
