"""One experiment from start to end: python -m ml_inference_server.benchmark.runner FILE."""

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ml_inference_server.benchmark.channel import Target
from ml_inference_server.benchmark.dataset import Dataset, load_dataset
from ml_inference_server.benchmark.interrupt import Interrupted, Stop
from ml_inference_server.benchmark.results import DOCS, exit_code, new_document, output_paths
from ml_inference_server.benchmark.server_process import (
    COMMAND,
    LOOPBACK,
    ServerOptions,
    ServerProcess,
)
from ml_inference_server.benchmark.session import finish, measure, run_to_exit_code
from ml_inference_server.benchmark.suite import Progress, cells_of
from ml_inference_server.utils.config import Settings, load_settings
from ml_inference_server.utils.errors import EXIT_OK, StartError

# The first start may fetch the model over a slow line.
START_TIMEOUT_S = 600.0


@dataclass(frozen=True)
class Experiment:
    """One experiment file and how to run it. `server_command` is what the server's arguments are added to."""

    file: Path
    overrides: Sequence[str] = ()
    output: str | None = None
    json_output: str | None = None
    output_dir: Path = DOCS / "experiments"
    port: int = 0
    http_port: int = 0
    start_timeout_s: float = START_TIMEOUT_S
    server_command: Sequence[str] = COMMAND

    def settings(self, variant: str = "") -> Settings:
        return load_settings(self.file, overrides=self.overrides, variant=variant)

    def command(self) -> list[str]:
        """What repeats this run, from the folder that this process was started in."""
        overrides = [argument for override in self.overrides for argument in ("--set", override)]
        return ["python", "-m", "ml_inference_server.benchmark.runner", os.path.relpath(self.file), *overrides]

    def server_options(self, variant: str, log: Path) -> ServerOptions:
        server = self.settings(variant).server
        arguments = ["--experiment", str(self.file.resolve()), "--host", LOOPBACK]
        arguments += ["--port", str(self.port), "--http-port", str(self.http_port)]
        arguments += ["--variant", variant] if variant else []
        arguments += [argument for override in self.overrides for argument in ("--set", override)]
        drain_timeout_s = (server.drain_timeout_ms + server.drain_delay_ms) / 1e3
        return ServerOptions(arguments, log, self.start_timeout_s, drain_timeout_s, self.server_command)


@dataclass(frozen=True)
class Outcome:
    """How an experiment ended; without a document nothing was measured, and `message` says why."""

    exit_code: int
    message: str = ""
    document: dict[str, Any] | None = None
    markdown: Path | None = None


async def run_experiment(experiment: Experiment, stop: Stop, datasets: dict[str, Dataset]) -> Outcome:
    """Serve, measure and stop once for each variant; what was measured before an interruption is written too.

    `datasets` keeps what was loaded, by source, for the next experiment. StartError before any server is started, or
    when the results cannot be written.
    """
    settings = experiment.settings()
    variants = {variant: experiment.settings(variant) for variant in settings.variants or ("",)}
    markdown, data = output_paths(
        experiment.output, experiment.json_output, experiment.output_dir / f"{settings.name}_results.md"
    )
    log = markdown.with_name(f"{markdown.stem}_server.log")
    log.write_bytes(b"")
    document: dict[str, Any] | None = None
    code = EXIT_OK
    try:
        source = settings.experiment.dataset
        if source not in datasets:
            datasets[source] = await stop.race(load_dataset(source))
        document = new_document("suite", settings, datasets[source], experiment.command())
        await _run_variants(experiment, variants, datasets[source], document, log, stop)
    except Interrupted as interrupted:
        code = interrupted.exit_code
    if document is None or not (document["runs"] or document["not_started"]):
        return Outcome(code, "interrupted before anything was measured")
    refused = document["not_started"]
    if not document["runs"]:
        return Outcome(code or refused[0]["exit_code"], refused[0]["message"])
    document["interrupted"] = code != EXIT_OK
    finish(document, markdown, data)
    code = code or exit_code(document) or (refused[0]["exit_code"] if refused else EXIT_OK)
    return Outcome(code, "", document, markdown)


async def _run_variants(
    experiment: Experiment,
    variants: dict[str, Settings],
    dataset: Dataset,
    document: dict[str, Any],
    log: Path,
    stop: Stop,
) -> None:
    cells = {variant: cells_of(settings.experiment) for variant, settings in variants.items()}
    items = 0
    for variant, settings in variants.items():
        dataset.workload(settings.experiment.workload, settings.experiment.seed)  # refused now rather than half way
        items += sum(cell.batch_size for cell in cells[variant]) * settings.experiment.benchmark_requests
    document["planned_rows"] = sum(map(len, cells.values()))
    progress = Progress(document["planned_rows"], items)
    try:
        for variant, settings in variants.items():
            options = experiment.server_options(variant, log)
            try:
                async with ServerProcess(options, stop) as server:
                    progress.say(f"starting the server{f' for variant {variant}' if variant else ''}; its log is {log}")
                    ports = await stop.race(server.start())
                    progress.say(
                        f"serving on port {ports['grpc_port']}; live figures: http://{LOOPBACK}:{ports['http_port']}"
                    )
                    async with Target(LOOPBACK, ports["grpc_port"]) as target:
                        await measure(
                            target, settings.experiment, cells[variant], dataset, document, stop=stop, progress=progress
                        )
                    if document["runs"][-1]["status"] == "invalid":
                        document["servers"][-1]["died"] = await server.death()
            except StartError as error:
                progress.skip(len(cells[variant]))
                document["planned_rows"] -= len(cells[variant])
                document["not_started"].append(
                    {"variant": variant, "exit_code": error.exit_code, "message": str(error)}
                )
    finally:
        progress.close()


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="run_experiment.sh",
        description="Starts the server for one experiment file, measures it, stops it, and writes the results.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "file", type=Path, help="the experiment, e.g. ml_inference_server/experiments/minilm_baseline.yaml"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY.PATH=VALUE", help="override a setting (repeatable)"
    )
    parser.add_argument(
        "--output", metavar="OUT.md", help="where the table goes; default: docs/experiments/<name>_results.md"
    )
    parser.add_argument("--json", metavar="OUT.json", help="where everything goes; default: beside the table")
    parser.add_argument("--port", type=int, default=0, help="gRPC port of the server; default 0: a free one")
    parser.add_argument("--http-port", type=int, default=0, help="port of its dashboard; default 0: a free one")
    parser.add_argument(
        "--start-timeout-s",
        type=float,
        default=START_TIMEOUT_S,
        help="how long the server may take to load and warm up its model (default: %(default)g)",
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _arguments(argv)
    experiment = Experiment(
        file=arguments.file,
        overrides=arguments.set,
        output=arguments.output,
        json_output=arguments.json,
        port=arguments.port,
        http_port=arguments.http_port,
        start_timeout_s=arguments.start_timeout_s,
    )

    async def run(stop: Stop) -> int:
        outcome = await run_experiment(experiment, stop, {})
        if outcome.message:
            print(f"Error: {outcome.message}", file=sys.stderr)
        return outcome.exit_code

    return run_to_exit_code(run)


if __name__ == "__main__":
    sys.exit(main())
