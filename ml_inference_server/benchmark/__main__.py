"""python -m ml_inference_server.benchmark report FILE... | compare A.json B.json"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from ml_inference_server.benchmark.load import records
from ml_inference_server.benchmark.load.records import Records
from ml_inference_server.benchmark.report import advice, report
from ml_inference_server.benchmark.report.finish import contents, show
from ml_inference_server.benchmark.report.regression import compare, text
from ml_inference_server.benchmark.result import figures
from ml_inference_server.benchmark.result.document import Document, Summary
from ml_inference_server.benchmark.result.files import ResultFiles
from ml_inference_server.benchmark.result.stored import read
from ml_inference_server.utils.errors import EXIT_OK, ConfigError, StartError
from ml_inference_server.utils.files import replace_file, replaceable
from ml_inference_server.utils.installation import require
from ml_inference_server.utils.process import begin_process

EXIT_REGRESSION = 1


def load(path: Path) -> tuple[Document, dict[str, Records]]:
    """A result with its raw records, every figure made again from them. ConfigError if one of the files is damaged."""
    document = read(path)
    if isinstance(document, Summary):
        raise ConfigError(f"{path}: a summary of experiments, where the result of one is needed")
    raw_file = path.with_suffix(".npz")
    if not raw_file.exists():
        print(f"Warning: {raw_file} is missing: the figures are those that stand in {path.name}", file=sys.stderr)
        return document, {}
    raw = records.read(raw_file)
    runs = []
    for run in document.runs:
        if run.raw not in raw:
            raise ConfigError(f"{raw_file}: holds no records of {run.raw}: not the file that belongs to {path}")
        found = figures.figures(raw[run.raw], batch_size=run.batch_size, scores=run.scores, is_open=run.is_open)
        if found.ok != run.ok or found.errors != run.errors:
            raise ConfigError(f"{raw_file}: {run.raw} has other counts than {path}: one of the files was changed")
        runs.append(run.model_copy(update=dict(found)))
    return document.model_copy(update={"runs": runs}), raw


def _report(files: Sequence[Path], output: Path | None) -> int:
    if output is not None and len(files) > 1:
        raise ConfigError("--output is for one file; without it, each report is written beside its JSON")
    for path in files:
        markdown = replaceable(output or path.with_suffix(".md"))
        if isinstance(summary := read(path), Summary):
            found = advice.contents(summary, ResultFiles(markdown, path))
        else:
            document, raw = load(path)
            show(document, raw)
            found = contents(document, raw, ResultFiles(markdown, path))
        for name in (name for name in found if name.suffix in (".md", ".svg")):
            content = found[name]
            replace_file(name, content)
            print(f"Written: {name}")
    return EXIT_OK


def _compare(before: Path, after: Path, max_regression: float) -> int:
    (a, raw_a), (b, raw_b) = load(before), load(after)
    found = compare(a, b, (raw_a, raw_b), max_regression)
    print(f"before: {report.title(a)} ({a.started_at})\nafter:  {report.title(b)} ({b.started_at})\n")
    print(text(found, max_regression))
    return EXIT_REGRESSION if found.regressions else EXIT_OK


def _share(text: str) -> float:
    value = float(text.removesuffix("%")) / 100 if text.endswith("%") else float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a share between 0 and 1, such as 5% or 0.05")
    return value


def add_report_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Writes the report of each result again, from its JSON and raw records."
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE.json", help="results, or a summary")
    parser.add_argument("--output", type=Path, metavar="OUT.md", help="where the report goes (default: beside)")


def add_compare_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Says what changed from A to B; exit code 1 if something got worse."
    parser.add_argument("before", type=Path, metavar="A.json")
    parser.add_argument("after", type=Path, metavar="B.json")
    parser.add_argument(
        "--max-regression",
        type=_share,
        default=0.05,
        metavar="SHARE",
        help="how much throughput, or median latency at a fixed rate, may be lost (default: 5%%)",
    )


def run_report(arguments: argparse.Namespace) -> int:
    return _run(lambda: _report(arguments.files, arguments.output))


def run_compare(arguments: argparse.Namespace) -> int:
    return _run(lambda: _compare(arguments.before, arguments.after, arguments.max_regression))


def _run(work: Callable[[], int]) -> int:
    try:
        begin_process()
        require("bench")
        return work()
    except StartError as error:
        print(f"Error: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        print(f"Error: the report cannot be written: {error.strerror}: {error.filename}", file=sys.stderr)
        return 5


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m ml_inference_server.benchmark",
        description="Builds reports from results that are there, and compares two of them.",
        epilog="Exit codes: 0 fine, 1 compare found a regression, 2 a file or an argument is wrong.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(required=True)
    report_parser = commands.add_parser(
        "report", help="write the report of each result again, from its JSON and raw records"
    )
    add_report_arguments(report_parser)
    report_parser.set_defaults(run=run_report)
    compare_parser = commands.add_parser("compare", help="say what changed from A to B; exit 1 if something got worse")
    add_compare_arguments(compare_parser)
    compare_parser.set_defaults(run=run_compare)
    arguments = parser.parse_args(argv)
    return int(arguments.run(arguments))


if __name__ == "__main__":
    sys.exit(main())
