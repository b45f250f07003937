"""One experiment from start to end: python -m ml_inference_server.benchmark.runner [FILE]."""

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ml_inference_server.benchmark.load.channel import Address
from ml_inference_server.benchmark.load.dataset import Dataset, load_dataset
from ml_inference_server.benchmark.measure.one_server import Measurement, measure
from ml_inference_server.benchmark.measure.progress import Progress, work
from ml_inference_server.benchmark.measure.quality import load_slice
from ml_inference_server.benchmark.report.contenders import BASELINE
from ml_inference_server.benchmark.report.finish import finish
from ml_inference_server.benchmark.result.cell import planned_rows
from ml_inference_server.benchmark.result.document import Document, InProcess, InProcessFailed, Start
from ml_inference_server.benchmark.result.files import (
    Result,
    ResultFiles,
    exit_code,
    keep_partial,
    locked,
    new_document,
    result_files,
)
from ml_inference_server.benchmark.target.in_process import requests_of, time_in_process
from ml_inference_server.benchmark.target.interrupt import Interrupted, Stop, run_stoppable
from ml_inference_server.benchmark.target.memory import memory_of_server
from ml_inference_server.benchmark.target.server_process import COMMAND, LOOPBACK, ServerOptions, ServerProcess
from ml_inference_server.utils.cache import cached_files, writable_root
from ml_inference_server.utils.config import Settings, load_settings
from ml_inference_server.utils.errors import EXIT_OK, ConfigError, StartError
from ml_inference_server.utils.installation import checkout, require, results_folder
from ml_inference_server.utils.layers import EXPERIMENTS_DIR, QUICKSTART, Given, experiment_file

# The first start may fetch the model over a slow line.
START_TIMEOUT_S = 600.0


@dataclass(frozen=True)
class Experiment:
    """One experiment file and how to run it. `server_command` is what the server's arguments are added to."""

    file: Path
    overrides: Sequence[str] = ()
    output: str | None = None
    json_output: str | None = None
    output_dir: Path = results_folder() / "experiments"
    port: int | None = None
    http_port: int | None = None
    start_timeout_s: float = START_TIMEOUT_S
    server_command: Sequence[str] = COMMAND

    def settings(self, variant: str = "") -> Settings:
        """Those of the server that is measured: on free ports of this machine, unless somebody names others."""
        # A row would say how often the texts of a dataset repeat, and not how fast the server is.
        distinct = Given("batching.share_equal_texts", False, "the runner")
        free = [distinct, *(Given(key, 0, "a free port of the runner") for key in ("server.port", "metrics.port"))]
        flags = [
            *(Given(key, LOOPBACK, "the runner") for key in ("server.host", "metrics.host")),
            *([] if self.port is None else [Given("server.port", self.port, f"--port {self.port}")]),
            *(
                []
                if self.http_port is None
                else [Given("metrics.port", self.http_port, f"--http-port {self.http_port}")]
            ),
        ]
        return load_settings(self.file, overrides=[*self.overrides, *flags], variant=variant, programs=free)

    def command(self) -> list[str]:
        """What repeats this run, from the folder that this process was started in."""
        overrides = [argument for override in self.overrides for argument in ("--set", override)]
        return ["python", "-m", "ml_inference_server.benchmark.runner", os.path.relpath(self.file), *overrides]

    def files(self) -> ResultFiles:
        """Where the results go. ConfigError if they cannot be written there."""
        default = self.output_dir / f"{self.settings().name}_results.md"
        return result_files(self.output, self.json_output, default)

    def settings_arguments(self, variant: str) -> list[str]:
        """What gives another program of ours, in the same environment, the settings of this experiment."""
        settings = self.settings(variant)
        own = [
            f"{name}={value}"
            for name, value in (
                ("server.host", settings.server.host),
                ("server.port", settings.server.port),
                ("metrics.host", settings.metrics.host),
                ("metrics.port", settings.metrics.port),
                ("batching.share_equal_texts", str(settings.batching.share_equal_texts).lower()),
            )
        ]
        arguments = ["--experiment", str(self.file.resolve())]
        arguments += ["--variant", variant] if variant else []
        return arguments + [argument for override in (*self.overrides, *own) for argument in ("--set", override)]

    def server_options(self, variant: str, log: Path) -> ServerOptions:
        """ConfigError for a server that would not let the benchmark in."""
        server = self.settings(variant).server
        if server.tls.cert or server.auth.keys_file:
            raise ConfigError(
                "server.tls and server.auth are for servers of others, and this one is for the benchmark alone: leave "
                "them out here, or start a server with them and measure it with run_client.sh"
            )
        drain_timeout_s = (server.drain_timeout_ms + server.drain_delay_ms) / 1e3
        return ServerOptions(
            self.settings_arguments(variant), log, self.start_timeout_s, drain_timeout_s, self.server_command
        )


@dataclass(frozen=True)
class Outcome:
    """How an experiment ended; without a document nothing was measured, and `message` says why."""

    exit_code: int
    message: str = ""
    document: Document | None = None
    files: ResultFiles | None = None


async def run_experiment(experiment: Experiment, stop: Stop, datasets: dict[str, Dataset]) -> Outcome:
    """Serve, measure and stop once for each variant; what was measured before an interruption is written too.

    `datasets` keeps what was loaded, by source, for the next experiment. StartError before any server is started, or
    when the results cannot be written.
    """
    settings = experiment.settings()
    variants = {variant: experiment.settings(variant) for variant in settings.variants or ("",)}
    files = experiment.files()
    writable_root(quiet=True)  # what one server puts into the cache is for all of them
    with locked(files):
        keep_partial(files)
        return await _run_locked(experiment, settings, variants, files, stop, datasets)


async def _run_locked(
    experiment: Experiment,
    settings: Settings,
    variants: dict[str, Settings],
    files: ResultFiles,
    stop: Stop,
    datasets: dict[str, Dataset],
) -> Outcome:
    log = files.server_log
    log.write_bytes(b"")
    result: Result | None = None
    code = EXIT_OK
    try:
        source = settings.experiment.dataset
        if source not in datasets:
            datasets[source] = await stop.race(load_dataset(source))
        result = Result(new_document("suite", settings, datasets[source], experiment.command()), files)
        await _Visits(experiment, variants, datasets[source], result, log, stop).run()
    except Interrupted as interrupted:
        code = interrupted.exit_code
    if result is None or not (result.document.runs or result.document.not_started):
        return Outcome(code, "interrupted before anything was measured")
    refused = result.document.not_started
    if not result.document.runs:
        return Outcome(code or refused[0].exit_code, refused[0].message)
    result.set(interrupted=code != EXIT_OK)
    finish(result)
    code = code or exit_code(result.document) or (refused[0].exit_code if refused else EXIT_OK)
    return Outcome(code, "", result.document, files)


class _Visits:
    """Servers are started in turn, one at a time; with variants, each of them once for each repeat."""

    def __init__(
        self,
        experiment: Experiment,
        variants: dict[str, Settings],
        dataset: Dataset,
        result: Result,
        log: Path,
        stop: Stop,
    ) -> None:
        self._experiment, self._variants, self._dataset = experiment, variants, dataset
        self._result, self._log, self._stop = result, log, stop
        for settings in variants.values():
            # Refused now rather than half way.
            dataset.workload(settings.experiment.workload, settings.experiment.seed)
        self._labelled = {
            variant: load_slice(settings.experiment.quality) if settings.experiment.quality.enabled else None
            for variant, settings in variants.items()
        }
        result.plan(sum(planned_rows(settings.experiment) for settings in variants.values()))
        total = sum(work(settings.experiment) for settings in variants.values())
        self._progress = Progress(result.document.name, result.document.planned_rows, total)
        self._refused: set[str] = set()
        self._timed: dict[tuple[Any, ...], InProcess | InProcessFailed] = {}

    async def run(self) -> None:
        """Interrupted as soon as the stop comes; what was measured is in the result."""
        repeats = {variant: range(1, s.experiment.repeats + 1) for variant, s in self._variants.items()}
        try:
            if len(self._variants) == 1:
                ((variant, all_repeats),) = repeats.items()
                await self._visit(variant, all_repeats, is_last=True)
                return
            for repeat in range(1, max(map(len, repeats.values())) + 1):
                for variant, wanted in repeats.items():
                    if repeat in wanted and variant not in self._refused:
                        await self._visit(variant, [repeat], is_last=repeat == len(wanted))
        finally:
            self._progress.close()

    async def _visit(self, variant: str, repeats: Sequence[int], *, is_last: bool) -> None:
        load, result, progress = self._variants[variant].experiment, self._result, self._progress
        try:
            options = self._experiment.server_options(variant, self._log)
            async with ServerProcess(options, self._stop) as server:
                await self._start_and_measure(server, variant, repeats)
                if result.document.runs and result.document.runs[-1].lost:
                    result.about_server(variant, died=await server.death())
            if is_last and load.in_process_s:
                await self._time_in_process(variant)
        except StartError as error:
            if not any(run.variant == variant for run in result.document.runs):
                progress.skip(planned_rows(load), work(load))
                result.plan(-planned_rows(load))
            self._refused.add(variant)
            result.refuse(variant, error.exit_code, str(error))

    async def _start_and_measure(self, server: ServerProcess, variant: str, repeats: Sequence[int]) -> None:
        result, progress, stop = self._result, self._progress, self._stop
        labelled, patience_s = self._labelled[variant], self._experiment.start_timeout_s
        who = f" for variant {variant}" if variant else ""
        progress.say(f"starting the server{who}; its log is {self._log}")
        in_cache = cached_files()
        ports = await stop.race(server.start())
        start = Start(ready_s=server.ready_s, filled_cache=bool(cached_files() - in_cache), memory=None)
        progress.say(f"serving on port {ports['grpc_port']}; live figures: http://{LOOPBACK}:{ports['http_port']}")
        try:
            await measure(
                Address(LOOPBACK, ports["grpc_port"]),
                Address(LOOPBACK, ports["http_port"]),
                Measurement(self._variants[variant].experiment, self._dataset, labelled, repeats, patience_s),
                result,
                stop,
                progress,
            )
            start = start.model_copy(update={"memory": memory_of_server(server.pid)})
        finally:
            result.add_start(variant, start)

    async def _time_in_process(self, variant: str) -> None:
        """Once for each model among the variants: what the variants change besides it is the server's business."""
        settings = self._variants[variant]
        if self._result.server(variant) is None or settings.model.backend == "fake":
            return
        load = settings.experiment
        batch_size = max(load.batch_sizes)
        most = None if load.duration_s else load.benchmark_requests
        same = (settings.model.model_dump_json(), load.workload, load.seed, batch_size, most)
        if same not in self._timed:
            self._progress.say("timing the same backend without a server")
            timed = await self._stop.race(
                time_in_process(
                    sys.executable,
                    self._experiment.settings_arguments(variant),
                    requests_of(self._dataset.workload(load.workload, load.seed), batch_size, most),
                    load.in_process_s,
                    self._experiment.start_timeout_s,
                )
            )
            if isinstance(timed, InProcess):
                timed = timed.model_copy(update={"workload": load.workload, "batch_size": batch_size})
            self._timed[same] = timed
        self._result.about_server(variant, in_process=self._timed[same])


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="run_experiment.sh",
        description="Starts the server for one experiment file, measures it, stops it, and writes the results.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "file",
        nargs="?",
        type=experiment_file,
        help="the experiment, e.g. ml_inference_server/experiments/minilm_baseline.yaml; without one: the baseline on"
        " few rows, for a first look",
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY.PATH=VALUE", help="override a setting (repeatable)"
    )
    parser.add_argument(
        "--output",
        metavar="OUT.md",
        help=f"where the table goes; default: {results_folder() / 'experiments' / '<name>_results.md'}",
    )
    parser.add_argument("--json", metavar="OUT.json", help="where everything goes; default: beside the table")
    parser.add_argument("--port", type=int, help="gRPC port of the server; default: a free one")
    parser.add_argument("--http-port", type=int, help="port of its dashboard; default: a free one")
    parser.add_argument(
        "--start-timeout-s",
        type=float,
        default=START_TIMEOUT_S,
        help="how long the server may take to load and warm up its model (default: %(default)g)",
    )
    return parser.parse_args(argv)


def _whole_baseline() -> str:
    root = checkout()
    if root is None:
        return f"mlis experiments {BASELINE}"
    script, file = (
        os.path.relpath(path) for path in (root / "run_experiment.sh", EXPERIMENTS_DIR / f"{BASELINE}.yaml")
    )
    return shlex.join([script if "/" in script else f"./{script}", file])


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _arguments(argv)
    experiment = Experiment(
        file=arguments.file or QUICKSTART,
        overrides=arguments.set,
        output=arguments.output,
        json_output=arguments.json,
        port=arguments.port,
        http_port=arguments.http_port,
        start_timeout_s=arguments.start_timeout_s,
    )

    async def run(stop: Stop) -> int:
        require("bench")
        outcome = await run_experiment(experiment, stop, {})
        if outcome.message:
            print(f"Error: {outcome.message}", file=sys.stderr)
        elif arguments.file is None:
            print(f"This was a first look on few rows. The whole baseline takes some minutes: {_whole_baseline()}")
        return outcome.exit_code

    return run_stoppable(run)


if __name__ == "__main__":
    sys.exit(main())
