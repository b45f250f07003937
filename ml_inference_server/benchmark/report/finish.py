"""The end of a run: its tables on the terminal, its files on the disk."""

import contextlib
import sys
from pathlib import Path

from ml_inference_server.benchmark.load import records as raw_records
from ml_inference_server.benchmark.load.records import Records
from ml_inference_server.benchmark.report import plots, report, tables
from ml_inference_server.benchmark.result import aggregate
from ml_inference_server.benchmark.result.document import Document
from ml_inference_server.benchmark.result.files import (
    Result,
    ResultFiles,
    ResultsNotWritten,
    now,
    rescue,
    write_results,
)
from ml_inference_server.benchmark.result.stored import to_json
from ml_inference_server.utils.process import leave_dead_streams


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
        write_results(files)
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
