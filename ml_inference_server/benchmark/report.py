"""A result's JSON document as Markdown. Everything said here is read from that document."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

# With fewer samples the 99th percentile is the worst request under another name.
P99_SAMPLES = 100

Document = Mapping[str, Any]
Run = Mapping[str, Any]


def markdown(document: Document) -> str:
    """The whole report."""
    parts = [f"# {title(document)}"]
    if document["description"]:
        parts.append(plain(document["description"]))
    parts += _bullets("**Note:** ", warnings(document))
    parts += ["## Results", table(document["runs"]), *_footnotes(document["runs"]), *_best(document["runs"])]
    comparison = compare_variants(document["runs"])
    if comparison:
        parts += ["## Variants compared", comparison]
    parts += ["## What was measured", _facts(document)]
    return "\n\n".join(parts) + "\n"


def title(document: Document) -> str:
    """What really ran, in the servers' own words."""
    titles = list(dict.fromkeys(plain(server["info"]["title"]) for server in document["servers"]))
    return f"{document['name']}: {' | '.join(titles)}" if document["kind"] == "suite" else " | ".join(titles)


def plain(text: str) -> str:
    """One line that cannot end a heading or a table cell."""
    return " ".join(text.split()).replace("|", "\\|")


def warnings(document: Document) -> list[str]:
    """All that a reader must know before believing a figure."""
    found = []
    if document["interrupted"]:
        found.append("the benchmark was interrupted; what stands here was measured before")
    missing = document["planned_rows"] - len(document["runs"])
    if missing:
        found.append(f"{missing} of {document['planned_rows']} rows were not run")
    for run in document["runs"]:
        if run["status"] != "valid":
            first = run["first_error"]
            after = (
                f" (first after {first['after_s']:.2f} s: {first['code']} {plain(first['message'])})" if first else ""
            )
            found.append(f"{_label(run)} is {run['status'].upper()}: {plain(run['reason'])}{after}")
    found += [
        f"variant {refused['variant']} did not run (exit code {refused['exit_code']}): {plain(refused['message'])}"
        for refused in document["not_started"]
    ]
    for server in document["servers"]:
        who = f"{server['variant']}: " if server["variant"] else ""
        info = server["info"]
        found += [f"{who}not as requested: {plain(fallback)}" for fallback in info["fallbacks"]]
        if info["resolved"]["random_weights"]:
            found.append(f"{who}the model's weights are random: only speed can be read from this result")
        if info["resolved"]["backend"] == "fake":
            found.append(f"{who}the fake backend ran, so this is the cost of the server without a model")
        if server.get("died"):
            found.append(f"{who}the server ended by itself: {plain(server['died'])}")
        if info["experiment"] != document["name"] and document["kind"] == "suite":
            found.append(f"the server runs the experiment {info['experiment']}, not {document['name']}")
    if document["dataset"]["note"]:
        found.append(plain(document["dataset"]["note"]))
    return list(dict.fromkeys(found))


def _label(run: Run) -> str:
    variant = f"{run['variant']}, " if run["variant"] else ""
    return f"the row {variant}batch size {run['batch_size']}, concurrency {run['concurrency']}"


def items_unit(runs: Sequence[Run]) -> str:
    """pairs or texts: what the throughput column counts; items where the rows differ in it."""
    units = {"pairs" if run["workload"] == "pairs" else "texts" for run in runs}
    return units.pop() if len(units) == 1 else "items"


def items_per_s(run: Run) -> float:
    return float(run["pairs_per_s"] if run["workload"] == "pairs" else run["texts_per_s"]) if run["ok"] else 0.0


def table(runs: Sequence[Run]) -> str:
    """One line a run, aligned so that it can be read in a terminal too."""
    has_variants = any(run["variant"] for run in runs)
    header = ["variant"] if has_variants else []
    header += ["batch size", "concurrency", "requests", "ok", "errors", "requests/s", f"{items_unit(runs)}/s"]
    header += ["avg ms", "p50 ms", "p95 ms", "p99 ms", "status"]
    rows = []
    for run in runs:
        latency = run["latency_ms"] or {}
        unanswered = f" + {run['unfinished']} unfinished" if run["unfinished"] else ""
        errors = ", ".join(f"{count} {code}" for code, count in run["errors"].items()) or "0"
        rows.append(
            ([run["variant"]] if has_variants else [])
            + [str(run["batch_size"]), str(run["concurrency"]), str(run["requests"]), str(run["ok"])]
            + [errors + unanswered, f"{run['requests_per_s']:.1f}" if run["ok"] else "-"]
            + [f"{items_per_s(run):.1f}" if run["ok"] else "-"]
            + [_ms(latency.get(key)) for key in ("avg", "p50", "p95")]
            + [_ms(latency.get("p99")) if run["ok"] >= P99_SAMPLES else "-"]
            + [run["status"] if run["status"] == "valid" else run["status"].upper()]
        )
    return grid(header, rows)


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def grid(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; columns of figures stand right."""
    lines = [list(header), *map(list, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    left = [not any(line[i][:1].isdigit() for line in lines[1:]) for i in range(len(header))]

    def row(cells: Sequence[str]) -> str:
        return (
            "| "
            + " | ".join(c.ljust(w) if le else c.rjust(w) for c, w, le in zip(cells, widths, left, strict=True))
            + " |"
        )

    rule = "| " + " | ".join("-" * w if le else "-" * (w - 1) + ":" for w, le in zip(widths, left, strict=True)) + " |"
    return "\n".join([row(lines[0]), rule, *map(row, lines[1:])])


def _footnotes(runs: Sequence[Run]) -> list[str]:
    notes = []
    if any(run["ok"] < P99_SAMPLES for run in runs):
        notes.append(f"p99 is shown from {P99_SAMPLES} answered requests on; below, it would only be the slowest one.")
    if any(run["status"] != "valid" for run in runs):
        notes.append("Latency and throughput count answered requests only; rows that are not valid are never the best.")
    return ["\n".join(notes)] if notes else []


def best(runs: Sequence[Run]) -> tuple[Run, Run] | None:
    """(highest throughput in items, lowest median latency) among the valid rows; None where there is none."""
    valid = [run for run in runs if run["status"] == "valid"]
    if not valid:
        return None
    return max(valid, key=items_per_s), min(valid, key=lambda run: run["latency_ms"]["p50"])


def _best(runs: Sequence[Run]) -> list[str]:
    found = best(runs)
    if not found:
        return ["No row is valid, so there is no best one."]
    fastest, quickest = found
    return [
        f"- **Best throughput:** {items_per_s(fastest):.1f} {items_unit(runs)}/s"
        f" ({fastest['requests_per_s']:.1f} requests/s), {_label(fastest).removeprefix('the row ')}\n"
        f"- **Best latency:** p50 {quickest['latency_ms']['p50']:.2f} ms, p95 {quickest['latency_ms']['p95']:.2f} ms,"
        f" {_label(quickest).removeprefix('the row ')}"
    ]


def compare_variants(runs: Sequence[Run]) -> str:
    """The same load under each variant, as ratios to the first one; "" without variants."""
    variants = list(dict.fromkeys(run["variant"] for run in runs))
    if len(variants) < 2:
        return ""
    valid = {(run["variant"], run["batch_size"], run["concurrency"]): run for run in runs if run["status"] == "valid"}
    rows: list[list[str]] = []
    gains: dict[str, list[float]] = {variant: [] for variant in variants[1:]}
    for _, batch_size, concurrency in [key for key in valid if key[0] == variants[0]]:
        base = valid[variants[0], batch_size, concurrency]
        for variant in variants:
            run = valid.get((variant, batch_size, concurrency))
            if run is None:
                continue
            ratio = items_per_s(run) / items_per_s(base)
            if run is not base:
                gains[variant].append(ratio)
            rows.append(
                [variant, str(batch_size), str(concurrency), f"{items_per_s(run):.1f}", f"{ratio:.2f}x"]
                + [f for key in ("p50", "p95") for f in _latency_ratio(run, base, key)]
            )
    unit = items_unit(runs)
    header = ["variant", "batch size", "concurrency", f"{unit}/s", "ratio", "p50 ms", "ratio", "p95 ms", "ratio"]
    lines = [
        f"- **{plain(variant)}** gives {_geometric_mean(ratios):.2f}x the {unit}/s of {plain(variants[0])}"
        f" ({min(ratios):.2f}x to {max(ratios):.2f}x over {len(ratios)} loads)"
        for variant, ratios in gains.items()
        if ratios
    ]
    if not lines:
        return "No load has a valid row under two variants, so there is nothing to compare."
    return grid(header, rows) + f"\n\nRatios are to {plain(variants[0])} under the same load.\n\n" + "\n".join(lines)


def _latency_ratio(run: Run, base: Run, key: str) -> tuple[str, str]:
    return _ms(run["latency_ms"][key]), f"{run['latency_ms'][key] / base['latency_ms'][key]:.2f}x"


def _geometric_mean(ratios: Sequence[float]) -> float:
    return math.exp(math.fsum(map(math.log, ratios)) / len(ratios))


def _bullets(prefix: str, texts: Iterable[str]) -> list[str]:
    lines = "\n".join(f"- {prefix}{text}" for text in texts)
    return [lines] if lines else []


def _facts(document: Document) -> str:
    dataset, machine, git = document["dataset"], document["machine"], document["git"]
    runs = document["runs"]
    lines = []
    for server in document["servers"]:
        lines += _server_facts(server)
    lines += dict.fromkeys(
        f"Load: closed loop, {load['benchmark_requests']} requests a row after {load['warmup_iterations']} of"
        f" warm-up, workload {load['workload']}, seed {load['seed']}, deadline {load['request_timeout_ms']} ms"
        for load in (server["load"] for server in document["servers"])
    )
    lines += [
        f"Dataset: {plain(dataset['name'])}, {dataset['queries']} queries, {dataset['passages']} passages,"
        f" sha256 {dataset['sha256'][:16]}; at most {max((run['distinct_texts'] for run in runs), default=0)} distinct"
        f" texts in a row, repeated when they run out",
        f"Client's machine: {machine['cpu']} ({machine['instruction_set']}), {machine['cpus']} CPUs,"
        f" {machine['memory_gib']} GiB, {machine['os']}, load {machine['load_average_1min']} at the start",
        "Client's versions: " + ", ".join(f"{name} {version}" for name, version in document["versions"].items()),
        f"Commit: {git['commit'] or 'not a git checkout'}{', with uncommitted changes' if git['modified'] else ''}",
        f"Measured: {document['started_at']} to {document['finished_at']}",
        f"Command: `{document['command']}`",
    ]
    return "\n".join(f"- {line}" for line in lines)


def _server_facts(server: Mapping[str, Any]) -> list[str]:
    info, who = server["info"], f" ({plain(server['variant'])})" if server["variant"] else ""
    asked, ran = info["requested"], info["resolved"]
    device = f"{ran['backend']} on {ran['device']}" + (f" ({ran['device_name']})" if ran["device_name"] else "")
    threads = f"{ran['concurrency']} batches in flight of {ran['threads']} threads each"
    how = [ran["model"], device, ran["dtype"], ran["instruction_set"], threads, f"at most {ran['max_tokens']} tokens"]
    lines = [
        f"Requested{who}: {plain(asked['model'])}, {asked['backend']}, device {asked['device']},"
        f" quantization {asked['quantization']}",
        f"Ran{who}: " + ", ".join(plain(part) for part in (*how, ran["execution_provider"]) if part),
    ]
    if ran["weights_file"]:
        lines.append(
            f"Weights{who}: {plain(ran['weights_file'])} ({plain(ran['source'])}), sha256 {ran['weights_sha256'][:16]}"
        )
    return lines
