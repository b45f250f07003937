"""Every experiment file, one after the other, and one comparison of them all."""

import argparse
import hashlib
import sys
import time
import traceback
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ml_inference_server.benchmark.load.dataset import Dataset
from ml_inference_server.benchmark.report import advice, report, tables
from ml_inference_server.benchmark.report.contenders import BASELINE
from ml_inference_server.benchmark.report.report import Doubt
from ml_inference_server.benchmark.result.document import Document, Entry, Git, Machine, Summary, Verdict
from ml_inference_server.benchmark.result.files import (
    ResultFiles,
    ResultsNotWritten,
    keep_earlier,
    locked,
    now,
    rescue,
    result_files,
)
from ml_inference_server.benchmark.result.stored import read
from ml_inference_server.benchmark.runner import START_TIMEOUT_S, Experiment, Outcome, run_experiment
from ml_inference_server.benchmark.target.interrupt import Stop, run_stoppable
from ml_inference_server.benchmark.target.machine import client_versions, git_facts, machine_facts
from ml_inference_server.utils.arguments import positive_int
from ml_inference_server.utils.config import BASE_CONFIG
from ml_inference_server.utils.errors import (
    EXIT_FAILED_RUN,
    EXIT_HUNG_UP,
    EXIT_INTERNAL,
    EXIT_INTERRUPTED,
    EXIT_MODEL,
    EXIT_OK,
    EXIT_TERMINATED,
    ConfigError,
    StartError,
)
from ml_inference_server.utils.files import replace_file
from ml_inference_server.utils.installation import require, results_folder
from ml_inference_server.utils.layers import EXPERIMENTS_DIR, QUICKSTART, command_to_repeat, experiment_file

# Too few for a p99, enough to see what works and roughly how fast.
QUICK = {"benchmark_requests": 24, "warmup_iterations": 4, "in_process_s": 0.5}


def quick(path: Path) -> list[str]:
    """Overrides for a first look: the corners of the file's own grid, with few requests."""
    try:
        experiment = Experiment(path).settings().experiment
    except ConfigError:  # told when its turn comes
        return []
    sizes, levels, rates = experiment.batch_sizes, experiment.concurrency_levels, experiment.arrival.rates
    return [
        f"experiment.batch_sizes={sorted({sizes[0], sizes[-1]})}",
        *([f"experiment.concurrency_levels={sorted({levels[0], levels[-1]})}"] if levels else []),
        *([f"experiment.arrival.rates={sorted({rates[0], rates[-1]})}"] if rates else []),
        *(["experiment.slo.p99_ms=null"] if levels or rates else []),  # a search takes minutes
        *(f"experiment.{name}={min(most, getattr(experiment, name))}" for name, most in QUICK.items()),
    ]


def choose(files: Sequence[Path], only: str | None) -> list[Path]:
    """The files to run, in order, the baseline first. ConfigError if none is left."""
    found = list(files) or [
        path for path in sorted(EXPERIMENTS_DIR.glob("*.yaml")) if path not in (BASE_CONFIG, QUICKSTART)
    ]
    chosen = [path for path in found if only is None or fnmatch(path.name, only) or fnmatch(path.stem, only)]
    if not chosen:
        raise ConfigError(f"--only {only}: no experiment is called that; there are: {', '.join(p.stem for p in found)}")
    return sorted(chosen, key=lambda path: path.stem != BASELINE)


def verdict(outcome: Outcome) -> Verdict:
    """A refused experiment is one whose model, device or precision cannot be had here: a clean answer, no failure."""
    if outcome.exit_code == EXIT_OK:
        return Verdict.OK
    if outcome.exit_code == EXIT_MODEL:
        return Verdict.REFUSED_IN_PART if outcome.document else Verdict.REFUSED
    if outcome.exit_code == EXIT_FAILED_RUN:
        return Verdict.FAILURES
    if outcome.exit_code in (EXIT_HUNG_UP, EXIT_INTERRUPTED, EXIT_TERMINATED):
        return Verdict.INTERRUPTED
    return Verdict.FAILED


def settings_digest(experiment: Experiment) -> str:
    """Changes with everything that the experiment asks for; "" where the file cannot be read."""
    try:
        settings = experiment.settings()
        all_of_it = [experiment.settings(variant) for variant in settings.variants or ("",)]
    except ConfigError:
        return ""
    return hashlib.sha256("".join(s.model_dump_json() for s in all_of_it).encode()).hexdigest()


def entries(experiment: Experiment, outcome: Outcome) -> list[Entry]:
    """One entry of the summary for each variant; `result` names the experiment's own report."""
    document = outcome.document
    whole = Entry(
        experiment=experiment.file.stem,
        variant="",
        verdict=verdict(outcome),
        exit_code=outcome.exit_code,
        message=outcome.message,
        title="",
        settings_sha256=settings_digest(experiment),
        result=outcome.files.markdown.name if outcome.files else None,
        commit=document.git.commit if document else None,
        fingerprint=document.machine.fingerprint if document else None,
        dataset=document.dataset.name if document else None,
        server=None,
        warnings=[],
        runs=[],
    )
    if document is None:
        return [whole]
    # A variant that did not run has an entry of its own.
    warnings = [warning.text for warning in report.warnings(document) if warning.kind is not Doubt.NOT_STARTED]
    found = [
        whole.model_copy(
            update={
                "variant": server.variant,
                "title": server.info.title,
                "server": server,
                "runs": [run for run in document.runs if run.variant == server.variant],
                "warnings": [] if number else warnings,
            }
        )
        for number, server in enumerate(document.servers)
    ]
    refused = [whole.model_copy(update={"verdict": Verdict.REFUSED, **dict(one)}) for one in document.not_started]
    return found + refused


class SummaryWriter:
    """The comparison while it grows; saved after each experiment, so that an interruption loses one at most."""

    def __init__(self, files: ResultFiles, command: Sequence[str], is_quick: bool) -> None:
        self.files = files
        self.document = Summary(
            command=command_to_repeat(command),
            quick=is_quick,
            started_at=now(),
            finished_at=now(),
            finished=False,
            machine=Machine(**machine_facts()),
            versions=client_versions(),
            git=Git(**git_facts()),
            not_run=[],
            experiments=[],
        )

    def _set(self, **fields: Any) -> None:
        self.document = self.document.model_copy(update=fields)

    def begin(self, experiments: Sequence[Experiment], *, resume: bool) -> list[Experiment]:
        """The experiments that are still to be run. An earlier summary is kept, or gone on with."""
        done: set[str] = set()
        latency = self.files.markdown.with_name(f"{self.files.markdown.stem}_latency.svg")
        if resume and self.files.data.exists():
            done = self._take_over(experiments)
        else:
            if resume:
                print("There is nothing to resume here: all experiments are run.", file=sys.stderr)
            keep_earlier([self.files.markdown, self.files.data, self.files.plot, latency])
        return [experiment for experiment in experiments if experiment.file.stem not in done]

    def _take_over(self, experiments: Sequence[Experiment]) -> set[str]:
        earlier = read(self.files.data)
        if isinstance(earlier, Document):
            raise ConfigError(f"{self.files.data}: not a summary of experiments, so there is nothing to resume")
        done = set()
        for experiment in experiments:
            name = experiment.file.stem
            theirs = [entry for entry in earlier.experiments if entry.experiment == name]
            sound = theirs and all(entry.exit_code == EXIT_OK for entry in theirs)
            if sound and theirs[0].settings_sha256 != settings_digest(experiment):
                print(f"{name}: its settings changed since, so it is run again", file=sys.stderr)
            elif sound:
                print(f"{name}: there already", file=sys.stderr)
                done.add(name)
                self._set(experiments=[*self.document.experiments, *theirs])
        self._set(started_at=earlier.started_at)
        return done

    def add(self, found: list[Entry], left: Sequence[Experiment]) -> None:
        not_run = [experiment.file.stem for experiment in left]
        self._set(experiments=[*self.document.experiments, *found], not_run=not_run)
        try:
            self._write()
        except OSError as error:
            print(f"Warning: the comparison so far cannot be saved: {error.strerror}", file=sys.stderr)

    def finish(self, *, finished: bool) -> None:
        """ResultsNotWritten when there is no room; then it lies in a temporary folder, which the message names."""
        self._set(finished=finished)
        try:
            self._write()
        except OSError as error:
            folder = rescue(advice.contents(self.document, self.files))
            where = f"; it is in {folder} instead" if folder else ""
            raise ResultsNotWritten(f"the comparison cannot be written: {error.strerror}{where}") from None

    def _write(self) -> None:
        self._set(finished_at=now())
        for path, content in advice.contents(self.document, self.files).items():
            replace_file(path, content)


async def run_all(experiments: Sequence[Experiment], stop: Stop, summary: SummaryWriter) -> list[Outcome]:
    """One outcome for each experiment that was begun; a failing one does not keep the next from running."""
    outcomes: list[Outcome] = []
    datasets: dict[str, Dataset] = {}
    began_s = time.monotonic()
    for number, experiment in enumerate(experiments, 1):
        if stop.requested.is_set():
            break
        left_s = (time.monotonic() - began_s) / (number - 1) * (len(experiments) - number + 1) if number > 1 else 0
        left = f", about {tqdm.format_interval(left_s)} left" if left_s else ""
        print(f"\n=== {number}/{len(experiments)} {experiment.file.name}{left} ===", file=sys.stderr, flush=True)
        try:
            outcome = await run_experiment(experiment, stop, datasets)
        except StartError as error:
            outcome = Outcome(error.exit_code, str(error))
        except Exception as error:
            traceback.print_exc()
            outcome = Outcome(EXIT_INTERNAL, f"{type(error).__name__}: {error}")
        outcomes.append(outcome)
        if outcome.message:
            print(
                f"{tables.verdict(verdict(outcome), outcome.exit_code)}: {outcome.message}", file=sys.stderr, flush=True
            )
        summary.add(entries(experiment, outcome), experiments[number:])
    return outcomes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Runs every experiment file one after the other and ends with a comparison of them all."
    parser.epilog = (
        "Exit codes: 0 all ran or were cleanly refused, 2 bad arguments, 5 something failed, 130 interrupted."
    )
    parser.add_argument(
        "files",
        nargs="*",
        type=experiment_file,
        help="experiment files, or names of some that ship (default: all of them)",
    )
    parser.add_argument("--only", metavar="GLOB", help="only files whose name matches, e.g. 'minilm_*'")
    parser.add_argument("--quick", action="store_true", help="few rows with few requests: a first look")
    parser.add_argument("--resume", action="store_true", help="leave out what an interrupted run has measured already")
    parser.add_argument(
        "--repeats", type=positive_int, metavar="N", help="how often each row is measured (default: the file's)"
    )
    parser.add_argument("--set", action="append", default=[], metavar="KEY.PATH=VALUE", help="override a setting")
    parser.add_argument(
        "--output-dir",
        type=Path,
        default=results_folder() / "experiments",
        help="where results go (default: %(default)s)",
    )
    parser.add_argument(
        "--start-timeout-s",
        type=float,
        default=START_TIMEOUT_S,
        help="how long each server may take to load and warm up its model (default: %(default)g)",
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="run_all_experiments.py", allow_abbrev=False)
    add_arguments(parser)
    given = sys.argv[1:] if argv is None else argv
    return run(parser.parse_args(given), ["python", "run_all_experiments.py", *given])


def run(arguments: argparse.Namespace, command: Sequence[str]) -> int:
    """`command` is what repeats it; it stands in the summary."""
    repeats = [] if arguments.repeats is None else [f"experiment.repeats={arguments.repeats}"]

    async def every_one(stop: Stop) -> int:
        require("bench")
        experiments = [
            Experiment(
                file=path,
                overrides=[*(quick(path) if arguments.quick else ()), *arguments.set, *repeats],
                output_dir=arguments.output_dir,
                start_timeout_s=arguments.start_timeout_s,
            )
            for path in choose(arguments.files, arguments.only)
        ]
        files = result_files(None, None, arguments.output_dir / "summary.md")
        with locked(files):
            summary = SummaryWriter(files, command, arguments.quick)
            left = summary.begin(experiments, resume=arguments.resume)
            outcomes = await run_all(left, stop, summary)
            print(f"\n{advice.table(summary.document)}\n", flush=True)
            summary.finish(finished=len(outcomes) == len(left) and not stop.requested.is_set())
            print(f"Comparison: {files.markdown} and {files.data}", flush=True)
        if stop.requested.is_set():
            return stop.exit_code
        return EXIT_OK if all(o.exit_code in (EXIT_OK, EXIT_MODEL) for o in outcomes) else EXIT_FAILED_RUN

    return run_stoppable(every_one)
