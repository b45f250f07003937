"""All experiments beside each other: which to run, what it gains against the baseline, and what it loses."""

import math
import sys
from collections.abc import Sequence
from pathlib import Path

from ml_inference_server.benchmark.report import plots, report, starts, tables
from ml_inference_server.benchmark.report.contenders import Comparison, Configuration
from ml_inference_server.benchmark.report.tables import plain
from ml_inference_server.benchmark.result import aggregate
from ml_inference_server.benchmark.result.aggregate import Row
from ml_inference_server.benchmark.result.document import InProcess, Status, Summary, Verdict
from ml_inference_server.benchmark.result.files import ResultFiles
from ml_inference_server.benchmark.result.stats import Ratio
from ml_inference_server.benchmark.result.stored import to_json
from ml_inference_server.utils.share import of_limit


def markdown(document: Summary, plot_files: Sequence[str]) -> str:
    """The comparison report."""
    found = Comparison(document)
    parts = ["# All experiments compared", *_notes(document, found), "## Which one to run", _advice(found)]
    if found.comparable:
        parts += ["## All that ran the baseline's load", _table(found), _legend(found)]
        parts += [f"![{name}]({name})" for name in plot_files]
    own = _own_loads(found)
    if own:
        parts += ["## Under loads of their own", *own]
    missing = _missing(document)
    if missing:
        parts += ["## Did not run, or not soundly", missing]
    parts += ["## How it was measured", _facts(document)]
    return "\n\n".join(parts) + "\n"


def table(document: Summary) -> str:
    """For a terminal: the same table and advice."""
    found = Comparison(document)
    parts = [_table(found)] if found.comparable else []
    parts += [part for part in (_missing(document), _advice(found).replace("**", "")) if part]
    return "\n\n".join(parts)


def _table(found: Comparison) -> str:
    heavy, light = found.heaviest, found.lightest
    unit = tables.items_unit([heavy] if heavy else [])
    header = ["experiment", "what ran", f"{unit}/s", "to the baseline", "p50 ms alone", "to the baseline"]
    header += [
        "cosine to FP32 (mean / min)",
        "nDCG@10 change",
        "of in-process",
        "ready s",
        "memory MiB",
        "Pareto",
        "gate",
    ]
    lines = []
    for configuration in found.comparable:
        row = found.heavy(configuration)
        if row is None:
            continue
        alone = configuration.at(light.same_load) if light else None
        quality = configuration.figures
        is_base = configuration is found.baseline
        cells = [
            configuration.name,
            plain(configuration.entry.title),
            tables.figure(row.speed),
            "1" if is_base else tables.ratio(found.gain(configuration)),
            tables.latency(alone, 50) if alone else "-",
            "1" if is_base else tables.ratio(found.delay(configuration)),
            tables.alike(quality),
            tables.ndcg_change(quality),
            _of_in_process(configuration, row),
            starts.ready(configuration.entry.server),
            starts.memory(configuration.entry.server),
            "front" if configuration.name in found.front else "",
            _gate(row),
        ]
        lines.append(tables.struck(cells, row))
    return tables.grid(header, lines)


def _gate(row: Row) -> str:
    if row.status is not Status.VALID:
        return row.status.upper()
    gate = "-" if row.quality is None else "pass" if row.passed else "FAIL"
    return f"{gate}, disturbed" if row.is_disturbed else gate


def _of_in_process(configuration: Configuration, row: Row) -> str:
    server = configuration.entry.server
    inside = server.in_process if server else None
    if not isinstance(inside, InProcess) or aggregate.unlike_in_process(row, inside):
        return "-"
    return of_limit(row.texts_per_s / inside.texts_per_s)


def _legend(found: Comparison) -> str:
    heavy, light = found.heaviest, found.lightest
    base = found.baseline.name if found.baseline else "-"
    return (
        f"Throughput at the heaviest load (batch size {heavy and heavy.first.batch_size}, {heavy and heavy.load}),"
        f" latency at the lightest (batch size {light and light.first.batch_size}, {light and light.load}); ratios"
        f" are to {base}; [in brackets] 95 % intervals: a ratio whose interval holds 1 is no difference. *front*:"
        " nothing else is both faster and closer to FP32. *of in-process*: of what the same backend reaches with the"
        f" same requests without a server. {starts.NOTE} A row that is struck through failed its quality gate: do"
        " not run it."
    )


def _advice(found: Comparison) -> str:
    sound = [c for c in found.comparable if found.is_sound(c)]
    if not sound:
        return "Nothing ran the baseline's load soundly, so there is nothing to recommend."
    fastest = sound[0]
    lines = _disturbed(found)
    lines += [f"- **Fastest: `{fastest.name}`** ({plain(fastest.entry.title)}): {_said(found, fastest)}."]
    level = [c for c in sound[1:] if (gain := found.gain(c, fastest)) and not gain.is_significant]
    if level:
        names = ", ".join(f"`{c.name}`" for c in level)
        lines.append(f"- No significant difference in throughput to it: {names}.")
        closest = max([fastest, *level], key=lambda c: c.likeness if c.likeness is not None else -1.0)
        if closest is not fastest and round(closest.likeness or 0, 4) > round(fastest.likeness or 0, 4):
            lines.append(f"- **Closest to FP32 among these: `{closest.name}`**: {_said(found, closest)}.")
    exact = [c for c in sound if (server := c.entry.server) and server.info.resolved.dtype == "float32"]
    if exact and exact[0] is not fastest:
        lines.append(f"- **If nothing may be lost: `{exact[0].name}`** (FP32): {_said(found, exact[0])}.")
    quick = [c for c in sound if found.lightest and (row := c.at(found.lightest.same_load)) and row.is_sound]
    if quick and found.lightest:
        load = found.lightest.same_load
        quickest = min(quick, key=lambda c: aggregate.median_ms(c.at(load) or found.lightest))  # type: ignore[arg-type]
        if quickest is not fastest:
            lines.append(f"- **Lowest latency for one caller: `{quickest.name}`**: {_said(found, quickest)}.")
    failed = [c.name for c in found.comparable if c.quality and not c.quality.gate.passed]
    if failed:
        lines.append(f"- Do not run {', '.join(f'`{name}`' for name in failed)}: the quality gate failed.")
    return "\n".join(lines)


def _disturbed(found: Comparison) -> list[str]:
    """The experiments ran one after the other, so what disturbed some of them bends the ratios between all."""
    names = [c.name for c in found.comparable if (row := found.heavy(c)) and row.is_disturbed]
    if not names:
        return []
    return [
        "- **Do not rely on these ratios:** something else used the machine while"
        f" {', '.join(f'`{name}`' for name in names)} ran (each experiment's own report says what). Run this again when"
        " the machine is idle."
    ]


def _said(found: Comparison, configuration: Configuration) -> str:
    """Gain and loss of one configuration in words."""
    gain, delay = found.gain(configuration), found.delay(configuration)
    said = []
    if configuration is found.baseline:
        said.append("the baseline itself")
    else:
        base = found.baseline.name if found.baseline else "-"
        if gain:
            same = "" if gain.is_significant or math.isnan(gain.low) else " (no significant difference)"
            said.append(f"{tables.ratio(gain)} the throughput of `{base}`{same}")
        if delay:
            said.append(f"{tables.ratio(delay)} its latency for one caller")
    quality = configuration.figures
    if quality is None:
        return ", ".join([*said, "quality not measured"])
    change, said_change = quality.ndcg10_difference, tables.ndcg_change(quality)
    if quality.cosine_mean is not None:
        said.append(f"mean cosine to FP32 {quality.cosine_mean:.5f}")
    if change:
        lost = "no significant change" if change.low <= 0 <= change.high else "a significant change"
        said.append(f"nDCG@10 {said_change}, {lost} over {quality.slice.queries} queries")
    return ", ".join(said)


def _own_loads(found: Comparison) -> list[str]:
    parts = []
    for name in dict.fromkeys(c.entry.experiment for c in found.others):
        own = [c for c in found.others if c.entry.experiment == name]
        rows = [row for c in own for row in c.rows]
        started = starts.table((c.entry.variant, c.entry.server) for c in own if c.entry.server)
        parts += [f"### {name}", tables.variants(rows) or tables.results(rows), *([started] if started else [])]
    return parts


def _missing(document: Summary) -> str:
    lines = [
        [entry.name, tables.verdict(entry.verdict, entry.exit_code),
         plain(entry.message) or "-"]
        for entry in document.experiments if entry.verdict is not Verdict.OK
    ]  # fmt: skip
    lines += [[name, "not run", "the run was interrupted before it"] for name in document.not_run]
    return tables.grid(["experiment", "verdict", "why"], lines) if lines else ""


def _notes(document: Summary, found: Comparison) -> list[str]:
    notes = []
    if not document.finished:
        notes.append("the run was not finished: `--resume` goes on with it")
    if document.quick:
        notes.append("a quick run: few requests a row, so intervals are wide; leave `--quick` out before deciding much")
    commits = sorted({str(entry.commit)[:10] for entry in document.experiments if entry.commit})
    if len(commits) > 1:
        notes.append(f"the experiments were measured at different commits: {', '.join(commits)}")
    machines = {entry.fingerprint for entry in document.experiments if entry.fingerprint}
    if len(machines) > 1:
        notes.append("the experiments were measured on different machines, so the ratios mean little")
    gains: dict[str, list[str]] = {}
    for configuration in found.all:
        if quality := configuration.figures:
            gains.setdefault(quality.ndcg_gain, []).append(configuration.name)
    if len(gains) > 1:
        each = "; ".join(f"{gain} for {', '.join(names)}" for gain, names in gains.items())
        notes.append(f"nDCG@10 was computed with different gains, so its changes cannot be compared: {each}")
    who: dict[str, list[str]] = {}
    for configuration in found.all:
        for said in configuration.entry.warnings:
            who.setdefault(said, []).append(configuration.entry.experiment)
    notes += [f"{said} ({', '.join(dict.fromkeys(names))})" for said, names in who.items()]
    return ["\n".join(f"- **Note:** {note}" for note in notes)] if notes else []


def _facts(document: Summary) -> str:
    git = document.git
    names = dict.fromkeys(entry.result for entry in document.experiments)
    links = [f"[{name}]({name})" for name in names if name]
    data = dict.fromkeys(entry.dataset for entry in document.experiments if entry.dataset)
    lines = [
        f"Each experiment's own report: {', '.join(links) or 'none was written'}",
        f"Texts: {'; '.join(map(plain, data)) or '-'}",
        report.machine_fact(document.machine),
        f"Commit: {git.commit or 'not a git checkout'}{', with uncommitted changes' if git.modified else ''}",
        f"Measured: {document.started_at} to {document.finished_at}",
        f"Command: `{document.command}`",
    ]
    return "\n".join(f"- {line}" for line in lines)


def contents(document: Summary, files: ResultFiles) -> dict[Path, str | bytes]:
    """The files of the comparison, ready to be written. A report without plots is better than none."""
    found = Comparison(document)
    drawn: dict[Path, str | bytes] = {}
    latency = files.markdown.with_name(f"{files.markdown.stem}_latency.svg")
    try:
        for path, plot in ((files.plot, _quality_plot(found)), (latency, _latency_plot(found))):
            if plot:
                drawn[path] = plot
    except Exception as error:
        print(f"Warning: no plots: {type(error).__name__}: {error}", file=sys.stderr)
    names = [path.name for path in drawn]
    return {files.markdown: markdown(document, names), files.data: to_json(document), **drawn}


def _quality_plot(found: Comparison) -> bytes | None:
    points = []
    for c in found.comparable:
        gain = Ratio(1.0, 1.0, 1.0) if c is found.baseline else found.gain(c)
        if gain and c.likeness is not None:
            sound = found.is_sound(c)
            points.append(
                plots.Point(c.name, gain.value, gain.low, gain.high, c.likeness, sound, c.name in found.front)
            )
    return plots.speed_against_quality(points, "throughput", "mean cosine to FP32")


def _latency_plot(found: Comparison) -> bytes | None:
    sound = [c for c in found.comparable if found.is_sound(c)]
    curves: dict[str, list[tuple[float, float]]] = {}
    for c in sound:
        closed = [row for row in c.rows if row.first.concurrency]
        points = {str(row): (row.speed.value, -aggregate.median_ms(row)) for row in closed if row.speed}
        best = aggregate.pareto(points)
        curves[c.name] = [(speed, -delay) for name, (speed, delay) in points.items() if name in best]
    unit = tables.items_unit([row for c in sound for row in c.rows])
    return plots.throughput_against_latency(curves, unit)
