"""The tables of a report."""

import math
from collections.abc import Iterable, Sequence

from ml_inference_server.benchmark.result import stats
from ml_inference_server.benchmark.result.aggregate import PERCENTILES, Row
from ml_inference_server.benchmark.result.document import Difference, Quality, Run, Status, Verdict
from ml_inference_server.benchmark.result.stats import Figure, Ratio
from ml_inference_server.utils.ranking import NDCG_GAIN


def plain(text: str) -> str:
    """One line that cannot end a heading or a table cell."""
    return " ".join(text.split()).replace("|", "\\|")


def grid(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; columns of figures stand right."""
    lines = [list(header), *map(list, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    left = [not any(line[i].lstrip("~+-")[:1].isdigit() for line in lines[1:]) for i in range(len(header))]

    def row(cells: Sequence[str]) -> str:
        return (
            "| "
            + " | ".join(c.ljust(w) if le else c.rjust(w) for c, w, le in zip(cells, widths, left, strict=True))
            + " |"
        )

    rule = "| " + " | ".join("-" * w if le else "-" * (w - 1) + ":" for w, le in zip(widths, left, strict=True)) + " |"
    return "\n".join([row(lines[0]), rule, *map(row, lines[1:])])


def number(value: float) -> str:
    """Three digits and more: 0.123, 1.23, 12.3, 123, 1234."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else "-"
    return f"{value:.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"


def figure(found: Figure | None) -> str:
    """Value and 95 % interval."""
    if found is None:
        return "-"
    if math.isnan(found.low):
        return number(found.value)
    return f"{number(found.value)} [{number(found.low)}, {number(found.high)}]"


def spread(found: Figure | None) -> str:
    return "-" if found is None or found.n < 2 else f"{number(found.least)}-{number(found.most)}"


def ratio(found: Ratio | None) -> str:
    if found is None:
        return "-"
    if math.isnan(found.low):
        return f"{found.value:.2f}x"
    return f"{found.value:.2f}x [{found.low:.2f}, {found.high:.2f}]"


def signed(found: Difference | None) -> str:
    """A difference with its interval."""
    if found is None:
        return "-"
    return f"{found.value:+.4f} [{found.low:+.4f}, {found.high:+.4f}]"


def of_gain(cell: str, quality: Quality) -> str:
    """A cell with a figure of nDCG, marked where it is not the nDCG of this version."""
    is_ours = quality.ndcg_gain == NDCG_GAIN
    return cell if is_ours or cell == "-" else f"{cell} (gain {quality.ndcg_gain})"


def ndcg_change(quality: Quality | None) -> str:
    """nDCG@10 less that of FP32, with its interval."""
    if quality is None:
        return "-"
    return of_gain(signed(quality.ndcg10_difference), quality)


def alike(quality: Quality | None) -> str:
    """Mean and least cosine to FP32, of a cross-encoder the correlation."""
    if quality is None:
        return "-"
    if quality.cosine_mean is not None:
        return f"{quality.cosine_mean:.5f} / {quality.cosine_min:.5f}"
    return "-" if quality.correlation is None else f"{quality.correlation:.5f}"


def measure_of(qualities: Iterable[Quality | None]) -> str:
    """What `alike` tells in a column."""
    known = [quality for quality in qualities if quality]
    return "correlation" if known and all(quality.correlation is not None for quality in known) else "cosine"


def struck(cells: Sequence[str], row: Row) -> list[str]:
    """A row that failed its quality gate is struck through, so that no figure of it is taken for a result."""
    return list(cells) if row.passed else [f"~~{cell}~~" if cell not in ("-", "") else cell for cell in cells]


def items_unit(rows: Sequence[Row]) -> str:
    """pairs or texts: what the throughput column counts; items where the rows differ in it."""
    units = {"pairs" if row.first.scores else "texts" for row in rows}
    return units.pop() if len(units) == 1 else "items"


def results(rows: Sequence[Row]) -> str:
    """Speed, latency and quality: one line for each row, its repeats together."""
    has_variants = any(row.variant for row in rows)
    header = ["variant"] if has_variants else []
    header += ["batch size", "load", "ok", "errors", f"{items_unit(rows)}/s", "repeats"]
    header += [f"p{p} ms" for p in PERCENTILES] + [measure_of([row.figures for row in rows]) + " to FP32"]
    header += ["nDCG@10 change", "status"]
    return grid(header, (struck(_result(row, has_variants), row) for row in rows))


def _result(row: Row, has_variants: bool) -> list[str]:
    quality = row.figures
    return [
        *([row.variant] if has_variants else []),
        str(row.first.batch_size),
        row.load + (" (stream)" if row.first.streaming else "") + (" (SLO)" if row.first.slo else ""),
        str(row.answered),
        errors(row.runs),
        figure(row.speed),
        spread(row.speed) if len(row.runs) > 1 else "1",
        *(latency(row, p) for p in PERCENTILES),
        alike(quality),
        ndcg_change(quality),
        status(row),
    ]


def verdict(found: Verdict, exit_code: int) -> str:
    """How an experiment ended, in words."""
    return f"{found} (exit code {exit_code})" if found is Verdict.FAILED else found


def status(row: Row) -> str:
    if row.status is not Status.VALID:
        return row.status.upper()
    return "valid" if row.passed else "QUALITY"


def latency(row: Row, percentile: int) -> str:
    if row.answered and row.answered < stats.samples_needed(percentile):
        return f"n/a (n={row.answered})"
    return figure(row.latency_ms[percentile])


def errors(runs: Sequence[Run]) -> str:
    counted: dict[str, int] = {}
    for run in runs:
        for code, count in run.errors.items():
            counted[code] = counted.get(code, 0) + count
    unfinished = sum(run.unfinished for run in runs)
    told = ", ".join(f"{count} {code}" for code, count in counted.items()) or "0"
    return told + (f" + {unfinished} unfinished" if unfinished else "")


def server_share(rows: Sequence[Row]) -> str:
    """Where the time of a request went, and what the batches were like; "" where the servers did not tell."""
    if not any(run.server_ms for row in rows for run in row.runs):
        return ""
    has_variants = any(row.variant for row in rows)
    header = ["variant"] if has_variants else []
    header += ["batch size", "load", "tokenize ms", "queue ms", "engine ms", "outside ms", "padding", "mean batch"]
    header += ["client CPU", "sender's lag p99 ms"]
    return grid(header, (struck(_share(row, has_variants), row) for row in rows))


def _share(row: Row, has_variants: bool) -> list[str]:
    runs = row.runs

    def mean(values: Iterable[float | None], form: str) -> str:
        known = [value for value in values if value is not None]
        return format(sum(known) / len(known), form) if known else "-"

    parts = [run.server_ms for run in runs if run.server_ms]
    batches = [run.batches for run in runs if run.batches]
    return [
        *([row.variant] if has_variants else []),
        str(row.first.batch_size),
        row.load,
        mean((part.tokenize for part in parts), ".2f"),
        mean((part.queue for part in parts), ".2f"),
        mean((part.compute for part in parts), ".2f"),
        mean((part.outside for part in parts), ".2f"),
        mean((batch.padding_share for batch in batches), ".1%"),
        mean((batch.mean_batch for batch in batches), ".1f"),
        mean((run.client.cpu_share for run in runs), ".0%"),
        mean((run.lag_ms.p99 for run in runs if run.lag_ms), ".2f"),
    ]


def variants(rows: Sequence[Row]) -> str:
    """The same load under each variant, as ratios to the first one; "" without variants."""
    names = list(dict.fromkeys(row.variant for row in rows))
    if len(names) < 2:
        return ""
    sound = {(row.variant, row.same_load): row for row in rows if row.is_sound}
    lines: list[list[str]] = []
    gains: dict[str, list[Ratio]] = {name: [] for name in names[1:]}
    for load in [load for name, load in sound if name == names[0]]:
        base = sound[names[0], load]
        for name in names:
            row = sound.get((name, load))
            if row is None or row.speed is None or base.speed is None:
                continue
            against = stats.ratio(row.speed, base.speed)
            if row is not base:
                gains[name].append(against)
            lines.append(
                [
                    name,
                    str(row.first.batch_size),
                    row.load,
                    figure(row.speed),
                    "1" if row is base else ratio(against),
                ]
                + [cell for p in (50, 95) for cell in _latency_ratio(row, base, p)]
            )
    unit = items_unit(rows)
    header = ["variant", "batch size", "load", f"{unit}/s", "ratio", "p50 ms", "ratio", "p95 ms", "ratio"]
    said = [f"- {said_of(name, gain, names[0], unit)}" for name in gains if (gain := stats.mean_ratio(gains[name]))]
    if not said:
        return "No load has a sound row under two variants, so there is nothing to compare."
    note = f"Ratios are to {plain(names[0])} under the same load, with 95 % intervals."
    return grid(header, lines) + f"\n\n{note}\n\n" + "\n".join(said)


def said_of(name: str, gain: Ratio, base: str, unit: str) -> str:
    """A ratio in words; no winner where the interval does not show one."""
    if math.isnan(gain.low):
        return f"**{plain(name)}** gives {gain.value:.2f}x the {unit}/s of {plain(base)} (one repeat: no interval)"
    if not gain.is_significant:
        return f"**{plain(name)}** and {plain(base)}: no significant difference in {unit}/s, {ratio(gain)}"
    return f"**{plain(name)}** gives {ratio(gain)} the {unit}/s of {plain(base)}"


def _latency_ratio(row: Row, base: Row, percentile: int) -> tuple[str, str]:
    ours, theirs = row.latency_ms[percentile], base.latency_ms[percentile]
    if ours is None or theirs is None:
        return latency(row, percentile), "-"
    return figure(ours), "1" if row is base else ratio(stats.ratio(ours, theirs))
