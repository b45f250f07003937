"""A result's JSON document as Markdown. Everything said here is read from that document and its raw records."""

from collections.abc import Iterable, Mapping, Sequence
from enum import StrEnum
from typing import NamedTuple

from ml_inference_server.benchmark.load.records import Records
from ml_inference_server.benchmark.report import starts, tables
from ml_inference_server.benchmark.report.tables import figure, items_unit, plain
from ml_inference_server.benchmark.result import aggregate
from ml_inference_server.benchmark.result.aggregate import Row
from ml_inference_server.benchmark.result.document import (
    Document,
    InProcessFailed,
    Load,
    Machine,
    MeasuredServer,
    Probe,
    Quality,
    Run,
    Status,
)
from ml_inference_server.benchmark.result.figures import KEPT_UP_SHARE
from ml_inference_server.benchmark.result.stats import BEYOND
from ml_inference_server.benchmark.target.conditions import trouble
from ml_inference_server.utils.ranking import NDCG_GAIN
from ml_inference_server.utils.share import of_limit
from ml_inference_server.utils.stages import STAGES

# A client process that computes for so much of the time may be what was measured.
_BUSY_CLIENT = 0.85


class Doubt(StrEnum):
    """What a warning is about."""

    INTERRUPTED = "interrupted"
    ROWS_MISSING = "rows missing"
    ROW_NOT_VALID = "row not valid"
    NOT_STARTED = "variant not started"
    SERVER = "server"
    CONDITIONS = "conditions"
    NOT_COMPUTED = "texts not computed"
    DATASET = "dataset"


class Warned(NamedTuple):
    kind: Doubt
    text: str


def markdown(document: Document, raw: Mapping[str, Records], plot: str | None = None) -> str:
    """The whole report. plot: the file name of its plots."""
    rows = aggregate.rows_of_document(document, raw)
    parts = [f"# {title(document)}"]
    if document.description:
        parts.append(plain(document.description))
    parts += _bullets("**Note:** ", (warned.text for warned in warnings(document)))
    parts += ["## Results", tables.results(rows), _footnotes(rows), *summary(document, rows)]
    parts += [f"![Throughput and latency of each row]({plot})"] if plot else []
    comparison = tables.variants(rows)
    if comparison:
        parts += ["## Variants compared", comparison]
    if document.slo:
        parts += ["## The highest rate within the bound", _slo(document)]
    share = tables.server_share(rows)
    if share:
        parts += ["## Where the time went", share, _SHARE_NOTE]
    started = starts.table((server.variant, server) for server in document.servers)
    if started:
        parts += ["## Start and memory", started, starts.NOTE]
    quality = _quality(document)
    if quality:
        parts += ["## Quality", quality]
    parts += ["## What was measured", _facts(document)]
    return "\n\n".join(parts) + "\n"


_STAGES = ", ".join(f"*{stage.name}* ({stage.meaning})" for stage in STAGES if stage.wire)
_SHARE_NOTE = (
    f"Means over the answered requests, as the server timed them: {_STAGES};"
    " *outside* is the rest of the client's latency: gRPC, the wire, the client."
    " *padding* and *mean batch* (texts) are from the server's counters over the row."
)


def title(document: Document) -> str:
    """What really ran, in the servers' own words."""
    titles = list(dict.fromkeys(plain(server.info.title) for server in document.servers))
    return f"{document.name}: {' | '.join(titles)}" if document.kind == "suite" else " | ".join(titles)


def warnings(document: Document) -> list[Warned]:
    """All that a reader must know before believing a figure."""
    found = []
    rows = document.rows
    if document.interrupted:
        text = "the benchmark was interrupted; what stands here was measured before"
        found.append(Warned(Doubt.INTERRUPTED, text))
    missing = document.planned_rows - len(rows)
    if missing:
        text = f"{missing} of {document.planned_rows} rows were not run"
        found.append(Warned(Doubt.ROWS_MISSING, text))
    found += [Warned(Doubt.ROW_NOT_VALID, _invalid(run)) for run in rows if run.status is not Status.VALID]
    found += [
        Warned(
            Doubt.NOT_STARTED,
            f"variant {refused.variant} did not run (exit code {refused.exit_code}): {plain(refused.message)}",
        )
        for refused in document.not_started
    ]
    for server in document.servers:
        found += [Warned(Doubt.SERVER, text) for text in _about_server(server, document)]
    found += [Warned(Doubt.CONDITIONS, text) for text in _about_conditions(rows)]
    found += [Warned(Doubt.NOT_COMPUTED, _not_computed(run)) for run in rows if _is_partly_computed(run)]
    if document.dataset.note:
        found.append(Warned(Doubt.DATASET, plain(document.dataset.note)))
    return list(dict.fromkeys(found))


def _invalid(run: Run) -> str:
    first = run.first_error
    after = f" (first after {first.after_s:.2f} s: {first.code} {plain(first.message)})" if first else ""
    repeat = f", repeat {run.repeat}" if run.repeat > 1 else ""
    return f"the row {aggregate.described([run])}{repeat} is {run.status.upper()}: {plain(run.reason)}{after}"


def _about_server(server: MeasuredServer, document: Document) -> list[str]:
    info, found = server.info, []
    who = f"{server.variant}: " if server.variant else ""
    found += [f"{who}not as requested: {plain(fallback)}" for fallback in info.fallbacks]
    quality = server.quality
    if quality and not quality.gate.passed:
        reasons = "; ".join(map(plain, quality.gate.reasons))
        found.append(f"{who}QUALITY GATE FAILED, so its rows are struck through and never the best: {reasons}")
    if info.resolved.random_weights:
        found.append(f"{who}the model's weights are random: only speed can be read from this result")
    if info.resolved.backend == "fake":
        found.append(f"{who}the fake backend ran, so this is the cost of the server without a model")
    if server.died:
        found.append(f"{who}the server ended by itself: {plain(server.died)}")
    if info.experiment != document.name and document.kind == "suite":
        found.append(f"the server runs the experiment {info.experiment}, not {document.name}")
    return found


def _is_partly_computed(run: Run) -> bool:
    return bool(run.batches and (run.batches.shared_texts or run.batches.cached_texts))


def _not_computed(run: Run) -> str:
    assert run.batches is not None  # noqa: S101 - the caller looked
    shared, cached = run.batches.shared_texts, run.batches.cached_texts
    repeat = f", repeat {run.repeat}" if run.repeat > 1 else ""
    parts = [f"{shared:.0f} shared the computation of an equal text in flight"] * bool(shared)
    parts += [f"{cached:.0f} came out of the cache"] * bool(cached)
    return f"in the row {aggregate.described([run])}{repeat}, not every text was computed: {' and '.join(parts)}"


def _about_conditions(runs: Sequence[Run]) -> list[str]:
    """What disturbed the measuring: each kind once, at its worst, with how many runs it touched."""
    touched: dict[str, list[tuple[float, str]]] = {}
    for run in runs:
        for kind, said in trouble(run.conditions).items() if run.conditions else ():
            touched.setdefault(kind, []).append(said)
        busy = run.client.cpu_share or 0.0
        if busy > _BUSY_CLIENT:
            said = (busy, f"the client computed for {busy:.0%} of the time and may be the limit")
            touched.setdefault("client", []).append(said)
        if not run.warmup.settled:
            touched.setdefault("warm-up", []).append((1, "the warm-up still got faster when its rounds were over"))
    return [
        f"{max(said)[1]} ({len(said)} of {len(runs)} runs" + (", this is the worst)" if len(said) > 1 else ")")
        for said in touched.values()
    ]


def _footnotes(rows: Sequence[Row]) -> str:
    notes = [
        "Values are medians over the repeats, [in brackets] their 95 % interval, under *repeats* the lowest and the"
        f" highest. A percentile is shown where at least {BEYOND} answers lie beyond it (n/a: too few, n of them)."
    ]
    if any(row.first.rate_per_s for row in rows):
        notes.append(
            "Latency counts from when a request was due, also in a row with a rate: a stall is not left out because"
            " the client waited, too."
        )
    if any(row.fell_behind for row in rows):
        notes.append(
            "A row that fell behind was answered more slowly than it was offered: its latency grows with its length and"
            " says nothing about the server."
        )
    if any(row.status is not Status.VALID for row in rows):
        notes.append("Latency and throughput count answered requests only; rows that are not valid are never the best.")
    return " ".join(notes)


def summary(document: Document, rows: Sequence[Row]) -> list[str]:
    """What to take from the table."""
    found = aggregate.best(rows)
    if not found:
        return ["No row is valid and within its quality gate, so there is no best one."]
    fastest, quickest = found
    unit = items_unit(rows)
    lines = [
        f"- **Best throughput:** {figure(fastest.speed)} {unit}/s at {fastest}{_all_offered(fastest)}",
        f"- **Best latency:** p50 {aggregate.median_ms(quickest):.2f} ms at {quickest}",
    ]
    for server in document.servers:
        lines += _tax(server, rows)
    return ["\n".join(lines)]


def _all_offered(row: Row) -> str:
    """A server that keeps up with a fixed rate could perhaps do more."""
    rate = row.first.rate_per_s
    if not rate or row.fell_behind:
        return ""
    said = ", which is what was offered"
    return said if row.answered_per_s >= KEPT_UP_SHARE * rate else f"{said}: its schedule was drawn sparser than that"


def _tax(server: MeasuredServer, rows: Sequence[Row]) -> list[str]:
    """How the server's best row of the same requests stands to the same backend without a server."""
    inside = server.in_process
    if not inside:
        return []
    who = f" ({plain(server.variant)})" if server.variant else ""
    if isinstance(inside, InProcessFailed):
        return [f"- **In process{who}:** not measured: {plain(inside.error)}"]
    ours = [row for row in rows if row.variant == server.variant and row.speed and row.status is Status.VALID]
    alike = [row for row in ours if not aggregate.unlike_in_process(row, inside)]
    against = ""
    if alike:
        best = max(alike, key=lambda row: row.texts_per_s)
        share = of_limit(best.texts_per_s / inside.texts_per_s)
        against = f"; the server's best row of the same requests ({best}) reaches {share} of it"
    elif ours:
        against = f"; no row can be set against it: {aggregate.unlike_in_process(ours[-1], inside)}"
    other = "" if inside.title == server.info.title else f" (there ran {plain(inside.title)})"
    return [
        f"- **In process{who}:** the same backend without a server runs {inside.texts_per_s:.1f} texts/s"
        f" ({inside.lowest:.1f}-{inside.highest:.1f}){other}{against}"
    ]


def _slo(document: Document) -> str:
    lines = []
    for found in document.slo:
        who = f"{plain(found.variant)}, " if found.variant else ""
        bound = f"{who}batch size {found.batch_size}, p99 <= {found.p99_ms:g} ms"
        tried = f"Tried: {', '.join(map(_probe, found.probes)) or 'nothing'}"
        failed = [probe for probe in found.probes if not probe.met]
        if found.rate_per_s is None:
            why = next((probe.reason for probe in reversed(failed) if probe.reason), "")
            lines.append(f"- {bound}: **no rate was confirmed**{f' ({plain(why)})' if why else ''}. {tried}")
            continue
        by_client = bool(failed) and all(probe.client_late for probe in failed)
        least, beyond = ("at least ", "; beyond it the client, not the server, was too slow") if by_client else ("", "")
        lines.append(
            f"- {bound}: **{least}{found.rate_per_s:g} requests/s**, confirmed under fresh schedules of"
            f" {found.requests} requests{beyond}. {tried}"
        )
    return "\n".join(lines)


def _probe(probe: Probe) -> str:
    verdict = "met" if probe.met else "client late" if probe.client_late else "not met"
    p99 = "" if probe.p99_ms is None else f", p99 {probe.p99_ms:.1f} ms"
    return f"{probe.rate_per_s:g} ({verdict}{p99})"


def _quality(document: Document) -> str:
    measured = [(server, server.quality) for server in document.servers if server.quality]
    figures = [server.figures for server in document.servers if server.figures]
    header = ["variant", "nDCG@10", "change", "MRR@10", "change", "top-10 overlap"]
    header += [f"{tables.measure_of(figures)} to FP32", "gate"]
    if not measured:
        return ""
    lines = []
    for server, found in measured:
        verdict = "pass" if found.gate.passed else "FAIL"
        if not isinstance(found, Quality):
            lines.append([server.variant or "-", *["-"] * 6, verdict])
            continue
        overlap = "-" if found.overlap10 is None else f"{found.overlap10:.3f}"
        lines.append(
            [
                server.variant or "-",
                tables.of_gain(f"{found.ndcg10:.4f}", found),
                tables.ndcg_change(found),
                f"{found.mrr10:.4f}",
                tables.signed(found.mrr10_difference),
                overlap,
                tables.alike(found),
                verdict,
            ]
        )
    facts = measured[0][1].slice
    reference = figures[0].reference if figures else None
    return tables.grid(header, lines) + (
        f"\n\nThrough the server, over the {facts.queries} judged queries ({facts.pairs} pairs) of"
        f" {plain(facts.name)}; changes are to {plain(reference.title) if reference else 'nothing'}"
        f"{', weights sha256 ' + reference.weights_sha256[:16] if reference else ''}, query by query, with 95 %"
        f" intervals by paired bootstrap. {_gains(figures)}"
    )


def _gains(qualities: Iterable[Quality]) -> str:
    gains = {found.ndcg_gain for found in qualities}
    lines = [
        "The gain of nDCG is the grade, as trec_eval has it."
        if gain == NDCG_GAIN
        else f"The gain of nDCG is {gain}, as earlier versions had it: compare it neither with published figures nor"
        " with results of later versions."
        for gain in sorted(gains)
    ]
    return " ".join(lines)


def _bullets(prefix: str, texts: Iterable[str]) -> list[str]:
    lines = "\n".join(f"- {prefix}{text}" for text in texts)
    return [lines] if lines else []


def _facts(document: Document) -> str:
    dataset, git = document.dataset, document.git
    runs = document.runs
    lines = []
    for server in document.servers:
        lines += _server_facts(server)
    lines += dict.fromkeys(_load(server.load) for server in document.servers)
    distinct = max((run.distinct_texts for run in runs), default=0)
    lines += [
        f"Dataset: {plain(dataset.name)}, {dataset.queries} queries, {dataset.passages} passages,"
        f" sha256 {dataset.sha256[:16]}; at most {distinct} distinct texts in a row, repeated when they run out",
        machine_fact(document.machine),
        "Client's versions: " + ", ".join(f"{name} {version}" for name, version in document.versions.items()),
        f"Commit: {git.commit or 'not a git checkout'}{', with uncommitted changes' if git.modified else ''}",
        f"Measured: {document.started_at} to {document.finished_at}",
        f"Command: `{document.command}`",
    ]
    return "\n".join(f"- {line}" for line in lines)


def machine_fact(machine: Machine) -> str:
    return (
        f"Client's machine: {plain(machine.cpu)} ({machine.instruction_set}), {machine.cpus} CPUs,"
        f" {machine.memory_gib} GiB, {machine.os}, load {machine.load_average_1min} at the start,"
        f" fingerprint {machine.fingerprint}"
    )


def _load(load: Load) -> str:
    amount = f"{load.duration_s:g} s" if load.duration_s else f"{load.benchmark_requests} requests"
    kinds = ["closed loop"] if load.concurrency_levels else []
    if load.arrival.rates:
        kinds.append(f"open loop ({load.arrival.process} arrivals, fixed before the run)")
    over = "EmbedStream" if load.streaming else "unary calls"
    return (
        f"Load: {' and '.join(kinds) or 'search for a rate'} over {over}, {amount} a row and repeat,"
        f" {load.repeats} repeats in turn, after warm-up rounds of at least {load.warmup_iterations} requests,"
        f" workload {load.workload}, seed {load.seed}, deadline {load.request_timeout_ms} ms"
    )


def _server_facts(server: MeasuredServer) -> list[str]:
    info, who = server.info, f" ({plain(server.variant)})" if server.variant else ""
    asked, ran = info.requested, info.resolved
    device = f"{ran.backend} on {ran.device}" + (f" ({ran.device_name})" if ran.device_name else "")
    threads = f"{ran.concurrency} batches in flight of {ran.threads} threads each"
    how = [ran.model, device, ran.dtype, ran.instruction_set, threads, f"at most {ran.max_tokens} tokens"]
    lines = [
        f"Requested{who}: {plain(asked.model)}, {asked.backend}, device {asked.device},"
        f" quantization {asked.quantization}",
        f"Ran{who}: " + ", ".join(plain(part) for part in (*how, ran.execution_provider) if part),
    ]
    if ran.weights_file:
        lines.append(f"Weights{who}: {plain(ran.weights_file)} ({plain(ran.source)}), sha256 {ran.weights_sha256[:16]}")
    return lines
