"""Every experiment file, one after the other, and one table of them all."""

import argparse
import sys
import traceback
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from ml_inference_server.benchmark import report
from ml_inference_server.benchmark.dataset import Dataset
from ml_inference_server.benchmark.interrupt import Stop
from ml_inference_server.benchmark.machine import client_versions, git_facts, machine_facts
from ml_inference_server.benchmark.results import DOCS, SCHEMA, encode, now, output_paths, write_results
from ml_inference_server.benchmark.runner import START_TIMEOUT_S, Experiment, Outcome, run_experiment
from ml_inference_server.benchmark.session import run_to_exit_code
from ml_inference_server.utils.config import BASE_CONFIG, EXPERIMENTS_DIR, load_settings
from ml_inference_server.utils.errors import (
    EXIT_FAILED_RUN,
    EXIT_INTERNAL,
    EXIT_MODEL,
    EXIT_OK,
    ConfigError,
    StartError,
)

# Too few for a p99, enough to see what works and roughly how fast.
QUICK_REQUESTS = 40
QUICK_WARMUP = 5


def quick(path: Path) -> list[str]:
    """Overrides for a first look: the corners of the file's own grid, with few requests."""
    try:
        experiment = load_settings(path).experiment
    except ConfigError:  # told when its turn comes
        return []
    sizes, levels = experiment.batch_sizes, experiment.concurrency_levels
    return [
        f"experiment.batch_sizes={sorted({sizes[0], sizes[-1]})}",
        f"experiment.concurrency_levels={sorted({levels[0], levels[-1]})}",
        f"experiment.benchmark_requests={min(QUICK_REQUESTS, experiment.benchmark_requests)}",
        f"experiment.warmup_iterations={min(QUICK_WARMUP, experiment.warmup_iterations)}",
    ]


def choose(files: Sequence[Path], only: str | None) -> list[Path]:
    """The files to run, in order. ConfigError if none is left."""
    found = list(files) or [path for path in sorted(EXPERIMENTS_DIR.glob("*.yaml")) if path != BASE_CONFIG]
    chosen = [path for path in found if only is None or fnmatch(path.name, only) or fnmatch(path.stem, only)]
    if not chosen:
        raise ConfigError(f"--only {only}: no experiment is called that; there are: {', '.join(p.stem for p in found)}")
    return chosen


async def run_all(experiments: Sequence[Experiment], stop: Stop) -> list[Outcome]:
    """One outcome for each experiment that was begun; a failing one does not keep the next from running."""
    outcomes: list[Outcome] = []
    datasets: dict[str, Dataset] = {}
    for number, experiment in enumerate(experiments, 1):
        if stop.requested.is_set():
            break
        print(f"\n=== {number}/{len(experiments)} {experiment.file.name} ===", file=sys.stderr, flush=True)
        try:
            outcome = await run_experiment(experiment, stop, datasets)
        except StartError as error:
            outcome = Outcome(error.exit_code, str(error))
        except Exception as error:
            traceback.print_exc()
            outcome = Outcome(EXIT_INTERNAL, f"{type(error).__name__}: {error}")
        outcomes.append(outcome)
        if outcome.message:
            print(f"{verdict(outcome)}: {outcome.message}", file=sys.stderr, flush=True)
    return outcomes


def verdict(outcome: Outcome) -> str:
    """A refused experiment is one whose model, device or precision cannot be had here: a clean answer, no failure."""
    if outcome.exit_code == EXIT_OK:
        return "ok"
    if outcome.exit_code == EXIT_MODEL:
        return "refused in part" if outcome.document else "refused"
    if outcome.exit_code == EXIT_FAILED_RUN:
        return "FAILURES"
    return f"FAILED (exit code {outcome.exit_code})"


def summary(experiments: Sequence[Experiment], outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """The JSON of the summary: one entry for each variant of each experiment, `result` naming its own file."""
    entries: list[dict[str, Any]] = []
    for experiment, outcome in zip(experiments, outcomes, strict=False):
        entry = {
            "experiment": experiment.file.stem,
            "variant": "",
            "verdict": verdict(outcome),
            "exit_code": outcome.exit_code,
            "message": outcome.message,
            "title": "",
            "result": outcome.markdown.name if outcome.markdown else None,
        }
        if outcome.document is None:
            entries.append({**entry, "runs": []})
            continue
        for server in outcome.document["servers"]:
            runs = [
                {key: value for key, value in run.items() if key != "raw"}
                for run in outcome.document["runs"]
                if run["variant"] == server["variant"]
            ]
            entries.append({**entry, "variant": server["variant"], "title": server["info"]["title"], "runs": runs})
        for refused in outcome.document["not_started"]:
            entries.append({**entry, **refused, "verdict": "refused", "runs": []})
    begun = len(outcomes)
    return {
        "schema": SCHEMA,
        "kind": "summary",
        "finished_at": now(),
        "machine": machine_facts(),
        "versions": client_versions(),
        "git": git_facts(),
        "not_run": [experiment.file.stem for experiment in experiments[begun:]],
        "experiments": entries,
        "runs": [],
    }


def summary_table(document: dict[str, Any]) -> str:
    header = ["experiment", "what ran", "verdict", "valid rows", "best throughput", "at", "best p50 ms", "at"]
    rows = []
    for entry in document["experiments"]:
        name = entry["experiment"] + (f" / {entry['variant']}" if entry["variant"] else "")
        runs = entry["runs"]
        valid = f"{sum(run['status'] == 'valid' for run in runs)} of {len(runs)}" if runs else "-"
        found = report.best(runs)
        figures = ["-", "-", "-", "-"]
        if found:
            fastest, quickest = found
            unit = report.items_unit(runs)
            figures = [f"{report.items_per_s(fastest):.1f} {unit}/s", _at(fastest)]
            figures += [f"{quickest['latency_ms']['p50']:.2f}", _at(quickest)]
        rows.append([name, report.plain(entry["title"] or entry["message"]), entry["verdict"], valid, *figures])
    rows += [[name, "-", "not run", "-", "-", "-", "-", "-"] for name in document["not_run"]]
    return report.grid(header, rows)


def _at(run: report.Run) -> str:
    return f"batch {run['batch_size']} x {run['concurrency']}"


def summary_markdown(document: dict[str, Any]) -> str:
    machine, git = document["machine"], document["git"]
    links = [f"[{name}]({name})" for name in dict.fromkeys(e["result"] for e in document["experiments"]) if name]
    return (
        "# All experiments\n\n"
        f"{summary_table(document)}\n\n"
        "Throughput and latency are the best of each experiment's valid rows; `batch B x C` is the row's batch size and"
        f" concurrency. Each experiment's own report: {', '.join(links) or 'none was written'}.\n\n"
        f"- Machine: {report.plain(machine['cpu'])} ({machine['instruction_set']}), {machine['cpus']} CPUs,"
        f" {machine['memory_gib']} GiB, {machine['os']}\n"
        f"- Commit: {git['commit'] or 'not a git checkout'}{', with uncommitted changes' if git['modified'] else ''}\n"
        f"- Finished: {document['finished_at']}\n"
    )


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="run_all_experiments.py",
        description="Runs every experiment file one after the other and ends with a table of them all.",
        epilog="Exit codes: 0 all ran or were cleanly refused, 2 bad arguments, 5 something failed, 130 interrupted.",
        allow_abbrev=False,
    )
    parser.add_argument("files", nargs="*", type=Path, help="experiment files (default: all that ship)")
    parser.add_argument("--only", metavar="GLOB", help="only files whose name matches, e.g. 'minilm_*'")
    parser.add_argument("--quick", action="store_true", help="few rows with few requests: a first look")
    parser.add_argument("--set", action="append", default=[], metavar="KEY.PATH=VALUE", help="override a setting")
    parser.add_argument("--output-dir", type=Path, default=DOCS / "experiments", help="default: docs/experiments")
    parser.add_argument("--start-timeout-s", type=float, default=START_TIMEOUT_S, help="see run_experiment.sh --help")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _arguments(argv)

    async def run(stop: Stop) -> int:
        experiments = [
            Experiment(
                file=path,
                overrides=[*(quick(path) if arguments.quick else ()), *arguments.set],
                output_dir=arguments.output_dir,
                start_timeout_s=arguments.start_timeout_s,
            )
            for path in choose(arguments.files, arguments.only)
        ]
        markdown, data = output_paths(None, None, arguments.output_dir / "summary.md")
        outcomes = await run_all(experiments, stop)
        document = summary(experiments, outcomes)
        write_results({markdown: summary_markdown(document), data: encode(document)})
        print(f"\n{summary_table(document)}\n\nSummary: {markdown} and {data}", flush=True)
        if stop.requested.is_set():
            return stop.exit_code
        return EXIT_OK if all(o.exit_code in (EXIT_OK, EXIT_MODEL) for o in outcomes) else EXIT_FAILED_RUN

    return run_to_exit_code(run)
