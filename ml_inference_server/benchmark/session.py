"""What the client and the runner have in common: measure one server, write and show the result, end the process."""

import asyncio
import sys
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

from ml_inference_server.benchmark import report
from ml_inference_server.benchmark.channel import Target
from ml_inference_server.benchmark.dataset import Dataset
from ml_inference_server.benchmark.interrupt import Interrupted, Stop
from ml_inference_server.benchmark.results import encode, now, write_results
from ml_inference_server.benchmark.suite import Cell, Progress, Suite, refuse_oversized, run_suite
from ml_inference_server.utils.config import ExperimentSettings
from ml_inference_server.utils.errors import EXIT_INTERRUPTED, StartError


async def measure(
    target: Target,
    load: ExperimentSettings,
    cells: Sequence[Cell],
    dataset: Dataset,
    document: dict[str, Any],
    *,
    stop: Stop,
    progress: Progress,
) -> None:
    """Append one server and its rows to `document`. ConfigError before any load if a row cannot be run as asked."""
    workload = dataset.workload(load.workload, load.seed)
    info = await stop.race(target.server_info())
    refuse_oversized(cells, info)
    document["servers"].append({"variant": info["variant"], "info": info, "load": load.model_dump()})
    suite = Suite(cells, workload, load.benchmark_requests, load.warmup_iterations, load.request_timeout_ms / 1e3)
    await run_suite(target, suite, info, stop, progress, document["runs"])


def finish(document: dict[str, Any], markdown: Path, data: Path) -> None:
    """Write both files and show the table on standard output."""
    document["finished_at"] = now()
    write_results({markdown: report.markdown(document), data: encode(document)})
    print(f"\n{report.title(document)}\n\n{report.table(document['runs'])}\n")
    for warning in report.warnings(document):
        print(f"Note: {warning}")
    comparison = report.compare_variants(document["runs"])
    if comparison:
        print(f"\n{comparison}\n")
    print(f"Results: {markdown} and {data}", flush=True)


def run_to_exit_code(work: Callable[[Stop], Coroutine[Any, Any, int]]) -> int:
    """Run `work` with the signals under control; every expected failure is one line on stderr and its exit code."""

    async def listening() -> int:
        stop = Stop()
        stop.listen()
        return await work(stop)

    try:
        return asyncio.run(listening())
    except StartError as error:
        print(f"Error: {error}", file=sys.stderr)
        return error.exit_code
    except Interrupted as interrupted:
        print("Interrupted before anything was measured.", file=sys.stderr)
        return interrupted.exit_code
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
