"""What changed between two results: row by row, with intervals, and whether something got worse than allowed."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ml_inference_server.benchmark.load.records import Records
from ml_inference_server.benchmark.measure.rate_search import PRECISION
from ml_inference_server.benchmark.report import tables
from ml_inference_server.benchmark.result import aggregate, stats
from ml_inference_server.benchmark.result.aggregate import Row
from ml_inference_server.benchmark.result.document import Document, SameLoad
from ml_inference_server.benchmark.result.stats import Ratio
from ml_inference_server.utils.errors import ConfigError


@dataclass(frozen=True)
class Change:
    """One row in both results. speed: more is better; latency: less is better; None where one side lacks it."""

    row: Row
    speed: Ratio | None
    p50: Ratio | None
    p95: Ratio | None


@dataclass(frozen=True)
class RowComparison:
    changes: Sequence[Change]
    regressions: Sequence[str]
    notes: Sequence[str]


def compare(
    before: Document,
    after: Document,
    raw: tuple[Mapping[str, Records], Mapping[str, Records]],
    max_regression: float,
) -> RowComparison:
    """ConfigError if the results have no load in common.

    A row has regressed when its speed lost, or its median latency gained, more than `max_regression` (0.05 is 5 %),
    and the interval says that this is no accident.
    """
    ours = {_key(row): row for row in aggregate.rows_of_document(after, raw[1])}
    theirs = {_key(row): row for row in aggregate.rows_of_document(before, raw[0])}
    common = [key for key in theirs if key in ours]
    if not common and not _rates(before, after):
        raise ConfigError("the two results have no row with the same variant and load: there is nothing to compare")
    changes, regressions = [], []
    for key in common:
        a, b = theirs[key], ours[key]
        change = Change(b, _speed(b, a), _latency(b, a, 50), _latency(b, a, 95))
        changes.append(change)
        regressions += _worse(change, a, max_regression)
    for key, row in theirs.items():
        if key not in ours and row.is_sound and not row.first.slo:
            regressions.append(f"{row}: was measured before and is missing now")
    rates = _rates(before, after)
    # The search knows a rate to within its precision only.
    regressions += [said for said, ratio in rates if ratio < min(1 - max_regression, 1 / PRECISION)]
    regressions += _quality(before, after)
    return RowComparison(changes, regressions, [*(said for said, _ in rates), *unlike(before, after)])


def _rates(before: Document, after: Document) -> list[tuple[str, float]]:
    """The highest rates that both searched for, in words and as a ratio."""
    theirs = {(f.variant, f.batch_size, f.p99_ms): f.rate_per_s or 0.0 for f in before.slo}
    found = []
    for ours in after.slo:
        was = theirs.get((ours.variant, ours.batch_size, ours.p99_ms))
        if was:
            rate = ours.rate_per_s or 0.0
            bound = f"batch size {ours.batch_size}, p99 <= {ours.p99_ms:g} ms"
            found.append((f"{bound}: highest rate {was:g} before, {rate:g} requests/s now", rate / was))
    return found


def _key(row: Row) -> tuple[str, SameLoad]:
    return row.variant, row.same_load


def _speed(b: Row, a: Row) -> Ratio | None:
    return stats.ratio(b.speed, a.speed) if a.speed and b.speed else None


def _latency(b: Row, a: Row, percentile: int) -> Ratio | None:
    ours, theirs = b.latency_ms[percentile], a.latency_ms[percentile]
    return stats.ratio(ours, theirs) if ours and theirs else None


def _worse(change: Change, before: Row, bound: float) -> list[str]:
    row = change.row
    if before.is_sound and not row.is_sound:
        return [f"{row}: was sound before and is {tables.status(row)} now"]
    found = []
    speed, p50 = change.speed, change.p50
    # Both must say so: the interval excludes "no change", and the figure itself is beyond the bound.
    if speed and speed.value < 1 - bound and (math.isnan(speed.high) or speed.high < 1):
        found.append(f"{row}: throughput {tables.ratio(speed)} of before")
    if row.fell_behind and not before.fell_behind:
        found.append(f"{row}: kept up with what was offered before")
    is_open = row.first.is_open
    if p50 and is_open and p50.value > 1 + bound and (math.isnan(p50.low) or p50.low > 1):
        found.append(f"{row}: median latency {tables.ratio(p50)} of before")
    return found


def _quality(before: Document, after: Document) -> list[str]:
    """A server that failed its gate although it passed before."""
    passed = {s.variant for s in before.servers if s.quality and s.quality.gate.passed}
    return [
        f"{server.variant or 'the server'} fails its quality gate: {'; '.join(server.quality.gate.reasons)}"
        for server in after.servers
        if server.variant in passed and server.quality and not server.quality.gate.passed
    ]


def unlike(before: Document, after: Document) -> list[str]:
    """What else differs between the two, so that a change may have another cause."""
    found = []
    for what, a, b in (
        ("machines", before.machine.fingerprint, after.machine.fingerprint),
        ("datasets", before.dataset.sha256, after.dataset.sha256),
        ("commits", before.git.commit, after.git.commit),
        ("weights", _weights(before), _weights(after)),
        ("what ran", _titles(before), _titles(after)),
    ):
        if a != b:
            found.append(f"the {what} differ: {a} before, {b} now" if what != "what ran" else f"before {a}, now {b}")
    a, b = _model_files(before), _model_files(after)
    if a and b and a != b and _weights(before) == _weights(after):
        found.append(f"the models differ in other files than their weights: {a} before, {b} now")
    a, b = _gains(before), _gains(after)
    if a and b and a != b:
        found.append(f"nDCG@10 has the gain {a} before and {b} now: its figures and its gates cannot be compared")
    return found


def _gains(document: Document) -> str:
    return ", ".join(sorted({server.figures.ndcg_gain for server in document.servers if server.figures}))


def _model_files(document: Document) -> str:
    """Empty for results of versions that told only the hash of the weights."""
    return ", ".join(sorted({s.info.resolved.model_sha256[:16] for s in document.servers}))


def _weights(document: Document) -> str:
    return ", ".join(sorted({s.info.resolved.weights_sha256[:16] for s in document.servers}))


def _titles(document: Document) -> str:
    return " | ".join(dict.fromkeys(server.info.title for server in document.servers))


def text(found: RowComparison, max_regression: float) -> str:
    """For a terminal and a CI log."""
    header = ["row", "throughput", "p50", "p95", "verdict"]
    lines = [
        [str(c.row), tables.ratio(c.speed), tables.ratio(c.p50), tables.ratio(c.p95), _verdict(c)]
        for c in found.changes
    ]
    parts = [tables.grid(header, lines)] if lines else []
    parts += ["Ratios are after / before, with 95 % intervals."]
    parts += ["\n".join(f"Note: {note}" for note in found.notes)] if found.notes else []
    if found.regressions:
        parts.append(f"REGRESSION beyond {max_regression:.1%}:")
        parts.append("\n".join(f"- {said}" for said in found.regressions))
    else:
        parts.append(f"No regression beyond {max_regression:.1%}.")
    return "\n\n".join(parts)


def _verdict(change: Change) -> str:
    if change.speed is None:
        return "not comparable"
    if math.isnan(change.speed.low):
        return "one repeat: no interval"
    if not change.speed.is_significant:
        return "no significant difference"
    return "faster" if change.speed.value > 1 else "slower"
