"""The benchmark of a running server: one row, or with --experiment every row of an experiment file."""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from ml_inference_server.benchmark.load.channel import Address, Target
from ml_inference_server.benchmark.load.dataset import is_local, load_dataset
from ml_inference_server.benchmark.measure.one_server import Measurement, measure
from ml_inference_server.benchmark.measure.progress import Progress, work
from ml_inference_server.benchmark.measure.quality import load_slice
from ml_inference_server.benchmark.report.finish import finish
from ml_inference_server.benchmark.result.cell import planned_rows
from ml_inference_server.benchmark.result.document import ServerFacts
from ml_inference_server.benchmark.result.files import (
    Result,
    ResultFiles,
    exit_code,
    keep_partial,
    locked,
    new_document,
    result_files,
)
from ml_inference_server.benchmark.runner import START_TIMEOUT_S
from ml_inference_server.benchmark.target.interrupt import Interrupted, Stop, run_stoppable
from ml_inference_server.utils import connection
from ml_inference_server.utils.arguments import positive_int
from ml_inference_server.utils.config import Settings, load_settings
from ml_inference_server.utils.errors import EXIT_OK, ConfigError
from ml_inference_server.utils.installation import require, results_folder
from ml_inference_server.utils.layers import Given, experiment_file

CONNECT_TIMEOUT_S = 10.0
# A wildcard is a place to listen at, not one to call.
_CALLABLE = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - nothing is bound here


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Measures a running server. Without --experiment: one row with one batch size and concurrency."
    parser.add_argument("--experiment", action="store_true", help="run every row of the file given with --config")
    parser.add_argument(
        "--config", type=experiment_file, metavar="FILE", help="experiment file; a single run takes its defaults"
    )
    parser.add_argument(
        "--batch-size", type=positive_int, help="texts or pairs per request of a single run (default: 1)"
    )
    parser.add_argument("--concurrency", type=positive_int, help="requests in flight of a single run (default: 1)")
    parser.add_argument("--rate", type=float, metavar="N", help="open loop: N requests/s instead of a concurrency")
    parser.add_argument("--requests", type=positive_int, help="measured requests per row")
    parser.add_argument("--duration-s", type=float, metavar="S", help="measure each row for S seconds instead")
    parser.add_argument(
        "--repeats",
        type=positive_int,
        metavar="N",
        help="how often each row is measured (default: 1, of a suite the file's)",
    )
    parser.add_argument("--streaming", action="store_true", default=None, help="send over EmbedStream")
    parser.add_argument("--warmup", type=int, metavar="N", help="requests of one warm-up round, not measured")
    parser.add_argument("--workload", choices=("queries", "passages", "pairs"), help="embed texts, or score pairs")
    parser.add_argument("--dataset", metavar="SOURCE", help="auto, ms_marco[:v1.1|:v2.1], sample, or a file")
    parser.add_argument("--seed", type=int, metavar="N", help="order in which the texts are sent")
    parser.add_argument("--timeout-ms", type=positive_int, metavar="N", help="deadline of each request")
    parser.add_argument("--host", help="where the server is (default: server.host of the settings)")
    parser.add_argument("--port", type=positive_int, help="its gRPC port (default: server.port of the settings)")
    parser.add_argument("--http-port", type=positive_int, help="its metrics port (default: metrics.port that it tells)")
    parser.add_argument("--output", metavar="OUT.md", help="where the table goes")
    parser.add_argument("--json", metavar="OUT.json", help="where everything goes (default: beside the table)")
    parser.add_argument("--set", action="append", default=[], metavar="experiment.KEY=VALUE", help="override a setting")
    parser.add_argument(
        "--connect-timeout-s",
        type=float,
        default=CONNECT_TIMEOUT_S,
        help="how long to wait for a server that is not there yet (default: %(default)g)",
    )
    connection.add_arguments(parser)


def _overrides(arguments: argparse.Namespace) -> list[str | Given]:
    """The flags as settings, so that one place checks them; a flag beats --set."""
    for text in arguments.set:
        if not text.startswith(("experiment.", "server.host=", "server.port=")):
            raise ConfigError(f"--set {text}: the client obeys experiment.* only; give this to the server instead")
    flags = [
        ("benchmark_requests", "--requests", arguments.requests),
        ("warmup_iterations", "--warmup", arguments.warmup),
        ("workload", "--workload", arguments.workload),
        ("dataset", "--dataset", arguments.dataset),
        ("seed", "--seed", arguments.seed),
        ("request_timeout_ms", "--timeout-ms", arguments.timeout_ms),
        ("duration_s", "--duration-s", arguments.duration_s),
        ("repeats", "--repeats", arguments.repeats),
        ("streaming", "--streaming", arguments.streaming),
    ]
    given = [
        Given(f"experiment.{key}", value, flag if value is True else f"{flag} {value}")
        for key, flag, value in flags
        if value is not None
    ]
    return [*_single_row(arguments), *arguments.set, *given]


def _settings(arguments: argparse.Namespace, overrides: Sequence[str | Given], variant: str = "") -> Settings:
    """A single run is one row with a batch size and a concurrency of 1, where nobody asks for another."""
    wanted: dict[str, Any] = {"metrics.port": 0}  # the server says it
    if not arguments.experiment:
        row = {
            "batch_sizes": [1],
            "concurrency_levels": [1],
            "arrival.rates": [],
            "repeats": 1,
            "quality.enabled": False,
        }
        wanted |= {f"experiment.{key}": value for key, value in row.items()}
    programs = [Given(key, value, "a single run") for key, value in wanted.items()]
    return load_settings(arguments.config, overrides=overrides, variant=variant, programs=programs)


def _single_row(arguments: argparse.Namespace) -> list[Given]:
    """The row that flags ask for, below --set, which can ask for more; nothing for a suite."""
    rate, concurrency, batch_size = arguments.rate, arguments.concurrency, arguments.batch_size
    if rate and concurrency:
        raise ConfigError("--rate sends whether or not answers come, so it has no --concurrency: give one of them")
    if not arguments.experiment:
        loop = f"--rate {rate}" if rate else f"--concurrency {concurrency}"
        row = [
            ("batch_sizes", [batch_size], f"--batch-size {batch_size}", batch_size),
            ("concurrency_levels", [] if rate else [concurrency], loop, rate or concurrency),
            ("arrival.rates", [rate] if rate else [], loop, rate or concurrency),
        ]
        return [Given(f"experiment.{key}", value, flag) for key, value, flag, is_given in row if is_given]
    if arguments.config is None:
        raise ConfigError("--experiment needs --config FILE, which says what rows to run")
    if batch_size or concurrency or rate:
        raise ConfigError(
            "--batch-size and --concurrency are for a single run, and so is --rate; with --experiment use"
            " --set experiment.batch_sizes=[4], experiment.concurrency_levels=[8], experiment.arrival.rates=[50]"
        )
    return []


def _address(arguments: argparse.Namespace, settings: Settings) -> Address:
    host = arguments.host or settings.server.host
    port = arguments.port or settings.server.port
    if not port:
        raise ConfigError("server.port is 0, so the server took a free one: name it with --port")
    return Address(_CALLABLE.get(host, host), port, connection.connection_from(arguments))


async def _run(arguments: argparse.Namespace, command: Sequence[str], stop: Stop) -> int:
    require("bench")
    overrides = _overrides(arguments)
    settings = _settings(arguments, overrides)
    suite_file = results_folder() / "experiments" / f"{settings.name}_results.md"
    default = suite_file if arguments.experiment else results_folder() / "experiment_results.md"
    files = result_files(arguments.output, arguments.json, default)
    with locked(files):
        keep_partial(files)
        return await _run_locked(arguments, command, overrides, settings, files, stop)


async def _run_locked(
    arguments: argparse.Namespace,
    command: Sequence[str],
    overrides: Sequence[str | Given],
    settings: Settings,
    files: ResultFiles,
    stop: Stop,
) -> int:
    source = settings.experiment.dataset
    dataset = await load_dataset(source) if is_local(source) else None
    address = _address(arguments, settings)
    async with Target(*address) as target:
        await stop.race(target.wait_until_serving(arguments.connect_timeout_s))
        info = ServerFacts.model_validate(await stop.race(target.server_info()))
    if info.variant in settings.variants:
        settings = _settings(arguments, overrides, info.variant)
    load = settings.experiment
    labelled = load_slice(load.quality) if load.quality.enabled else None
    if dataset is None:
        dataset = await stop.race(load_dataset(source))
    result = Result(new_document("suite" if arguments.experiment else "single", settings, dataset, command), files)
    result.plan(planned_rows(load))
    progress = Progress(settings.name, result.document.planned_rows, work(load))
    http_port = arguments.http_port or info.settings.get("metrics", {}).get("port", 0)
    code = EXIT_OK
    try:
        await measure(
            address,
            address._replace(port=http_port),
            Measurement(load, dataset, labelled, range(1, load.repeats + 1), START_TIMEOUT_S),
            result,
            stop,
            progress,
        )
    except Interrupted as interrupted:
        if not result.document.runs:
            raise
        result.set(interrupted=True)
        code = interrupted.exit_code
    finally:
        progress.close()
    finish(result)
    return code or exit_code(result.document)


def run(arguments: argparse.Namespace, command: Sequence[str]) -> int:
    """`command` is what repeats the measurement; it stands in the result."""
    return run_stoppable(lambda stop: _run(arguments, command, stop))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="run_client.sh", allow_abbrev=False)
    add_arguments(parser)
    given = sys.argv[1:] if argv is None else argv
    return run(parser.parse_args(given), ["python", "-m", "ml_inference_server.client", *given])


if __name__ == "__main__":
    sys.exit(main())
