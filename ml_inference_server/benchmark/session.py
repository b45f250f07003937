"""What the client and the runner have in common: measure one server, write and show the result, end the process."""

import asyncio
import contextlib
import sys
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

from ml_inference_server.benchmark.load import records as raw_records
from ml_inference_server.benchmark.load.channel import Target
from ml_inference_server.benchmark.load.dataset import Dataset
from ml_inference_server.benchmark.load.loops import event_loop
from ml_inference_server.benchmark.load.records import Records
from ml_inference_server.benchmark.measure.progress import Progress, search_work
from ml_inference_server.benchmark.measure.quality import Slice
from ml_inference_server.benchmark.measure.rate_search import search
from ml_inference_server.benchmark.measure.reference import measure_quality
from ml_inference_server.benchmark.measure.suite import Bench, refuse_oversized, run_suite
from ml_inference_server.benchmark.report import plots, report, tables
from ml_inference_server.benchmark.result import aggregate
from ml_inference_server.benchmark.result.document import Document, Load, MeasuredServer, ServerFacts, to_json
from ml_inference_server.benchmark.result.files import Result, ResultFiles, ResultsNotWritten, now, rescue
from ml_inference_server.benchmark.result.files import write_results as write
from ml_inference_server.benchmark.target.counters import ServerCounters
from ml_inference_server.benchmark.target.interrupt import Interrupted, Stop
from ml_inference_server.utils.errors import EXIT_INTERRUPTED, StartError
from ml_inference_server.utils.experiment import ExperimentSettings
from ml_inference_server.utils.process import begin_process, leave_dead_streams


async def measure(
    address: tuple[str, int],
    http: tuple[str, int],
    load: ExperimentSettings,
    dataset: Dataset,
    labelled: Slice | None,
    result: Result,
    *,
    repeats: Sequence[int],
    start_timeout_s: float,
    stop: Stop,
    progress: Progress,
) -> None:
    """Add the rows of one server to `result`, once for each of `repeats`; with the first one, its quality, too.

    http: the server's HTTP port, 0 where it is not known. ConfigError before any load if a row cannot be run as asked.
    """
    async with Target(*address) as target, ServerCounters(*http) as sidecar:
        info = ServerFacts.model_validate(await stop.race(target.server_info()))
        refuse_oversized(load.batch_sizes, info)
        is_first = result.server(info.variant) is None
        if is_first:
            as_asked = Load.model_validate(load.model_dump())
            result.add_server(MeasuredServer(variant=info.variant, info=info, load=as_asked))
        workload = dataset.workload(load.workload, load.seed)
        bench = Bench(target, address, sidecar, info, load, workload, stop, progress, result)
        progress.sidecar = sidecar
        try:
            is_there = await run_suite(bench, repeats)
            if load.slo.p99_ms is not None and is_first:
                for batch_size in load.batch_sizes:
                    is_there = is_there and await search(bench, batch_size, search_work(batch_size, load))
            if labelled is not None and is_first and is_there:
                log = result.files.server_log
                quality = await measure_quality(target, info, load, labelled, log, start_timeout_s, stop, progress)
                result.about_server(info.variant, quality=quality)
        finally:
            await progress.leave()


def contents(document: Document, raw: dict[str, Records], files: ResultFiles) -> dict[Path, str | bytes]:
    """The files of one result, ready to be written. A report without plots is better than none."""
    rows = aggregate.rows_of_document(document, raw)
    try:
        plot = plots.of_rows(rows, raw, report.title(document))
    except Exception as error:
        print(f"Warning: no plots: {type(error).__name__}: {error}", file=sys.stderr)
        plot = None
    found: dict[Path, str | bytes] = {
        files.markdown: report.markdown(document, raw, files.plot.name if plot else None),
        files.data: to_json(document),
        files.raw: raw_records.encode(raw),
    }
    return found | ({files.plot: plot} if plot else {})


def finish(result: Result) -> None:
    """Show the table on standard output, then write all files.

    ResultsNotWritten when there is no room for them; then they lie in a temporary folder, which the message names.
    """
    result.set(finished_at=now())
    document, raw = result.document, result.raw
    leave_dead_streams()
    with contextlib.suppress(OSError):  # a terminal may go at any moment, and the files count more
        show(document, raw)
    files = contents(document, raw, result.files)
    try:
        write(files)
    except ResultsNotWritten as error:
        folder = rescue(files)
        if folder is None:
            print(to_json(document))
            raise ResultsNotWritten(f"{error}; there is no room anywhere, so all figures stand above as JSON") from None
        raise ResultsNotWritten(f"{error}; they are in {folder} instead") from None
    result.forget_partial()
    with contextlib.suppress(OSError):
        print(f"Results: {result.files.markdown} and {result.files.data}", flush=True)


def show(document: Document, raw: dict[str, Records]) -> None:
    """The tables and all warnings, for a terminal."""
    rows = aggregate.rows_of_document(document, raw)
    print(f"\n{report.title(document)}\n\n{tables.results(rows)}\n")
    print("\n".join(report.summary(document, rows)).replace("**", "") + "\n")
    for warning in report.warnings(document):
        print(f"Note: {warning.text}")
    comparison = tables.variants(rows)
    if comparison:
        print(f"\n{comparison}\n")
    sys.stdout.flush()


def run_to_exit_code(work: Callable[[Stop], Coroutine[Any, Any, int]]) -> int:
    """Run `work` with the signals under control; every expected failure is one line on stderr and its exit code."""

    async def listening() -> int:
        stop = Stop()
        stop.listen()
        return await work(stop)

    try:
        begin_process()
        with asyncio.Runner(loop_factory=event_loop) as runner:
            return runner.run(listening())
    except StartError as error:
        print(f"Error: {error}", file=sys.stderr)
        return error.exit_code
    except Interrupted as interrupted:
        print("Interrupted before anything was measured.", file=sys.stderr)
        return interrupted.exit_code
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
