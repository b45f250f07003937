"""The scoreboard: what the server promises, tried against real servers. `python -m tests.scoreboard --help`"""

import argparse
import asyncio
import logging
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from ml_inference_server.utils.errors import EXIT_CONFIG, EXIT_INTERRUPTED, EXIT_OK
from tests.scoreboard import (
    rows_ceiling,
    rows_fairness,
    rows_faults,
    rows_inputs,
    rows_load,
    rows_nothing_lost,
    rows_of_tests,
    rows_refusals,
)
from tests.scoreboard.registry import Line, UnknownRow, chosen, table
from tests.scoreboard.results import BrokenResults
from tests.scoreboard.row import Row
from tests.scoreboard.runner import Board

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "ml_inference_server" / "docs"
QUICK_FOLDER = Path("scoreboard")
EXIT_ROW_FAILED = 1

ROWS: tuple[Row, ...] = (
    *rows_load.ROWS,
    *rows_fairness.ROWS,
    *rows_ceiling.ROWS,
    *rows_refusals.ROWS,
    *rows_faults.ROWS,
    *rows_inputs.ROWS,
    *rows_nothing_lost.ROWS,
    *rows_of_tests.ROWS,
)


def all_lines() -> list[Line]:
    """The whole table."""
    return table(ROWS, {})


def main(arguments: Sequence[str] | None = None, lines: Sequence[Line] | None = None) -> int:
    """The exit code: 1 where a row failed, 2 where nothing could be begun, 130 where it was interrupted."""
    given = _parse(arguments)
    lines = all_lines() if lines is None else lines
    if given.list:
        for line in lines:
            print(f"{line.key:4}{line.title}{'' if line.row else '   (nothing tries it yet)'}")
        return EXIT_OK
    try:
        rows = chosen(lines, given.rows)
        board = Board(lines, given.out or (QUICK_FOLDER if given.quick else DOCS))
    except (UnknownRow, BrokenResults, OSError) as error:
        print(error, file=sys.stderr)
        return EXIT_CONFIG
    try:
        failed = asyncio.run(_until_signal(board, rows, given))
    except (KeyboardInterrupt, asyncio.CancelledError):
        print("interrupted: the rows that had ended are in the files", file=sys.stderr)
        return EXIT_INTERRUPTED
    return EXIT_ROW_FAILED if failed else EXIT_OK


async def _until_signal(board: Board, rows: Sequence[Row], given: argparse.Namespace) -> int:
    """A signal ends it so that a row can end the processes that it started, also where a shell has SIGINT ignored."""
    task = asyncio.current_task()
    assert task is not None
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    return await board.run(rows, is_quick=given.quick, seed=given.seed)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.scoreboard", description="Try what the server promises, and write the table of figures."
    )
    parser.add_argument("--quick", action="store_true", help="a slice of each row, half a minute at most")
    parser.add_argument("--rows", default="", metavar="KEYS", help="only these rows or groups, as G1,F (default: all)")
    parser.add_argument("--seed", type=int, default=1, help="of all that is drawn at random (default: %(default)s)")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help=f"where scoreboard.json and scoreboard.md are, and stay, up to date (default: {DOCS.relative_to(ROOT)}, "
        f"with --quick ./{QUICK_FOLDER})",
    )
    parser.add_argument("--list", action="store_true", help="print the rows and end")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    sys.exit(main())
