"""The repeats of each row put together: figures with their intervals, and whether the row may be believed."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ml_inference_server.benchmark.load.records import Records, ok_only
from ml_inference_server.benchmark.result import stats
from ml_inference_server.benchmark.result.cell import load_of
from ml_inference_server.benchmark.result.document import (
    Document,
    InProcess,
    MeasuredServer,
    Quality,
    QualityNotMeasured,
    Run,
    SameLoad,
    Status,
)
from ml_inference_server.benchmark.result.figures import KEPT_UP_SHARE
from ml_inference_server.benchmark.result.stats import Figure
from ml_inference_server.benchmark.target.conditions import trouble

PERCENTILES = (50, 95, 99)
# So far apart may the tokens of a text be for two figures to be of the same work.
_SAME_WORK = 0.05


@dataclass(frozen=True)
class Row:
    """One row of a table. `latency_ms` holds a percentile only where the answers of all repeats have earned it.

    quality: the server's, None where none was measured; `passed`: it did not fail its gate.
    """

    runs: Sequence[Run]
    speed: Figure | None
    latency_ms: Mapping[int, Figure | None]
    answered: int
    status: Status
    quality: Quality | QualityNotMeasured | None

    @property
    def first(self) -> Run:
        return self.runs[0]

    @property
    def variant(self) -> str:
        return self.first.variant

    @property
    def figures(self) -> Quality | None:
        """Of its quality, where that was measured."""
        return self.quality if isinstance(self.quality, Quality) else None

    @property
    def passed(self) -> bool:
        return self.quality is None or self.quality.gate.passed

    @property
    def is_disturbed(self) -> bool:
        """Something else used the machine, or took it away, during one of the repeats."""
        return any(run.conditions and trouble(run.conditions) for run in self.runs)

    @property
    def is_sound(self) -> bool:
        """Fit to be called the best: every repeat valid, and the quality not found wanting."""
        return self.status is Status.VALID and self.passed and self.speed is not None

    @property
    def fell_behind(self) -> bool:
        """Whether a repeat of an open loop was answered more slowly than it was offered."""
        return _fell_behind(self.runs)

    @property
    def load(self) -> str:
        """Of an open loop, also what was answered of it."""
        return _load(self.runs)

    @property
    def answered_per_s(self) -> float:
        """Requests, the median of the repeats."""
        return _answered_per_s(self.runs)

    @property
    def same_load(self) -> SameLoad:
        return self.first.same_load

    @property
    def texts_per_s(self) -> float:
        """The median of the repeats; a pair is two texts."""
        return float(statistics.median(run.texts_per_s for run in self.runs))

    @property
    def tokens_per_text(self) -> float | None:
        """Real tokens that the server computed, over the texts that were sent; None where it did not tell."""
        known = [(run.batches.tokens, run.texts) for run in self.runs if run.batches and run.batches.tokens]
        tokens, texts = (sum(part) for part in zip(*known, strict=True)) if known else (0, 0)
        return tokens / texts if texts else None

    def __str__(self) -> str:
        return described(self.runs)


def described(runs: Sequence[Run]) -> str:
    """The repeats of a row, or some of them, by variant and load."""
    variant = f"{runs[0].variant}, " if runs[0].variant else ""
    return f"{variant}batch size {runs[0].batch_size}, {_load(runs)}"


def _load(runs: Sequence[Run]) -> str:
    load = load_of(runs[0].concurrency, runs[0].rate_per_s)
    if not runs[0].is_open:
        return load
    return f"{load}, {_answered_per_s(runs):.3g} answered" + (" (fell behind)" if _fell_behind(runs) else "")


def _answered_per_s(runs: Sequence[Run]) -> float:
    return float(statistics.median(run.requests_per_s for run in runs))


def _fell_behind(runs: Sequence[Run]) -> bool:
    return any(_one_fell_behind(run) for run in runs)


def _one_fell_behind(run: Run) -> bool:
    if run.fell_behind is not None or not run.rate_per_s or not run.latency_ms:
        return bool(run.fell_behind)
    # A summary of an earlier version has no records. A row that takes longer than its schedule may have been drawn
    # sparse, or have waited for its last answer; where a queue grew, latencies are spread over all that it took longer.
    longer_ms = 1e3 * (run.seconds - run.requests / run.rate_per_s)
    spread_ms = run.latency_ms.p95 - run.latency_ms.p50
    return bool(run.requests_per_s < KEPT_UP_SHARE * run.rate_per_s and spread_ms > longer_ms / 4)


def items_per_s(run: Run) -> float:
    return (run.texts_per_s if run.pairs_per_s is None else run.pairs_per_s) if run.ok else 0.0


def rows_of(all_runs: Sequence[Run], servers: Sequence[MeasuredServer], raw: Mapping[str, Records]) -> list[Row]:
    """All rows but the probes of a search, in the order in which they were first measured."""
    grouped: dict[tuple[str, SameLoad], list[Run]] = {}
    for run in all_runs:
        if not run.is_probe:
            grouped.setdefault((run.variant, run.same_load), []).append(run)
    quality = {server.variant: server.quality for server in servers}
    return [_row(runs, raw, quality.get(runs[0].variant)) for runs in grouped.values()]


def rows_of_document(document: Document, raw: Mapping[str, Records]) -> list[Row]:
    return rows_of(document.runs, document.servers, raw)


def _row(runs: Sequence[Run], raw: Mapping[str, Records], quality: Quality | QualityNotMeasured | None) -> Row:
    answered = sum(run.ok for run in runs)
    doubtful = [run.status for run in runs if run.status is not Status.VALID]
    return Row(
        runs,
        _speed(runs, raw),
        {p: _latency(runs, raw, p) if answered >= stats.samples_needed(p) else None for p in PERCENTILES},
        answered,
        doubtful[0] if doubtful else Status.VALID,
        quality,
    )


def _speed(runs: Sequence[Run], raw: Mapping[str, Records]) -> Figure | None:
    values = [items_per_s(run) for run in runs if run.ok]
    if len(values) != 1:
        return stats.of_repeats(values)
    run = next(run for run in runs if run.ok)
    records = raw.get(run.raw)
    if records is None:
        return stats.of_repeats(values)
    return stats.of_one_run(values[0], stats.rates_of_stretches(ok_only(records)["done_s"], run.batch_size))


def _latency(runs: Sequence[Run], raw: Mapping[str, Records], percentile: int) -> Figure | None:
    answered = [(run.raw, run.latency_ms) for run in runs if run.latency_ms]
    if len(answered) == 1 and (records := raw.get(answered[0][0])) is not None:
        done = ok_only(records)
        return stats.of_percentile((done["done_s"] - done["due_s"]) * 1e3, percentile)
    return stats.of_repeats([latency_ms.at(percentile) for _, latency_ms in answered])


def unlike_in_process(row: Row, inside: InProcess) -> str:
    """Why the backend without a server did other work than this row, so that no share can be told; "" if it did not."""
    if inside.batch_size is None or inside.tokens_per_text is None:
        return "it ran other texts, as earlier versions did"
    if (row.first.workload, row.first.batch_size) != (inside.workload, inside.batch_size):
        return f"it ran requests of batch size {inside.batch_size}"
    ours, theirs = row.tokens_per_text, inside.tokens_per_text
    if ours is not None and abs(ours / theirs - 1) > _SAME_WORK:
        return f"it ran other work, {theirs:.1f} tokens a text for {ours:.1f}"
    return ""


def best(rows: Sequence[Row]) -> tuple[Row, Row] | None:
    """(highest throughput in items, lowest median latency) among the sound rows; None where there is none.

    What an open loop answers is at most what it was offered, so the throughput is that of a closed loop where there is
    one. The latency of a row that fell behind grows with its length, so it is the lowest only where there is no other.
    """
    sound = [row for row in rows if row.is_sound]
    if not sound:
        return None
    steady = [row for row in sound if not row.fell_behind] or sound
    by_latency = [row for row in steady if row.latency_ms[50] is not None] or steady
    closed = [row for row in sound if row.first.concurrency] or sound
    return max(closed, key=_speed_of), min(by_latency, key=median_ms)


def _speed_of(row: Row) -> float:
    return row.speed.value if row.speed else 0.0


def median_ms(row: Row) -> float:
    """The median latency, earned or not: to order by."""
    figure = row.latency_ms[50]
    if figure:
        return figure.value
    return row.first.latency_ms.p50 if row.first.latency_ms else float("inf")


def pareto(points: Mapping[str, tuple[float, float]]) -> set[str]:
    """The names of the points that no other one beats: (more is better, more is better)."""
    return {
        name
        for name, (x, y) in points.items()
        if not any(a >= x and b >= y and (a, b) != (x, y) for a, b in points.values())
    }
