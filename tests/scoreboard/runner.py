"""Runs rows one after another; after each one the files hold what is known by then."""

import asyncio
import logging
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from tqdm import tqdm

from ml_inference_server.benchmark.target.machine import git_facts, machine_facts
from ml_inference_server.utils.files import replace_file
from tests.scoreboard.markdown import markdown, verdict
from tests.scoreboard.registry import Line
from tests.scoreboard.results import Origin, Recorded, Results, read, write
from tests.scoreboard.row import Figure, NotRun, Row, Scope

log = logging.getLogger(__name__)

MARKDOWN_NAME = "scoreboard.md"
# A quick row that takes longer hangs: it should be over after 30 s.
_QUICK_LIMIT_S = 180.0
_MOST_ERROR_CHARACTERS = 300


class Board:
    """Rows, and the folder that their results go to."""

    def __init__(self, lines: Sequence[Line], folder: Path) -> None:
        """BrokenResults where the folder holds something else; OSError where it cannot be made."""
        folder.mkdir(parents=True, exist_ok=True)
        self._lines = lines
        self._folder = folder
        self.results: Results = read(folder)

    async def run(self, rows: Sequence[Row], *, is_quick: bool, seed: int) -> int:
        """How many of them failed. What was done before it is cancelled is in the files."""
        failed = 0
        self._save()
        for row in rows:
            recorded = await _run_one(row, is_quick=is_quick, seed=seed)
            self.results = self.results.with_row(row.key, recorded)
            self._save()
            print(f"{row.key} {verdict(recorded).strip('*')}: {recorded.text} {recorded.note}".rstrip(), flush=True)
            failed += recorded.passed is False
        return failed

    def _save(self) -> None:
        write(self._folder, self.results)
        replace_file(self._folder / MARKDOWN_NAME, markdown(self._lines, self.results))


async def _run_one(row: Row, *, is_quick: bool, seed: int) -> Recorded:
    started_at = time.monotonic()
    was_run = True
    with _bar(row) as tell:
        try:
            async with asyncio.timeout(_QUICK_LIMIT_S if is_quick else None):
                figure = await row.run(Scope(is_quick=is_quick, seed=seed, tell=tell))
        except NotRun as lacking:
            was_run, figure = False, Figure(text="", passed=None, note=str(lacking))
        except Exception as error:
            log.exception("row %s raised", row.key)
            said = " ".join(f"{type(error).__name__}: {error}".split())[:_MOST_ERROR_CHARACTERS]
            figure = Figure(text="raised", passed=False, note=said)
    return Recorded(
        title=row.title,
        pass_line=row.pass_line,
        was_run=was_run,
        text=figure.text,
        passed=figure.passed,
        note=figure.note,
        details=dict(figure.details),
        origin=_origin(row.key, time.monotonic() - started_at, is_quick=is_quick, seed=seed),
    )


# What the rows before this one wrote makes the tree no other.
_OWN_FILES = tuple(f"ml_inference_server/docs/scoreboard.{kind}" for kind in ("json", "md"))


def _origin(key: str, took_s: float, *, is_quick: bool, seed: int) -> Origin:
    git, machine = git_facts(but_for=_OWN_FILES), machine_facts()
    quick = "--quick " if is_quick else ""
    return Origin(
        ended_at=datetime.now(UTC).isoformat(timespec="seconds"),
        took_s=round(took_s, 1),
        commit=f"{git['commit']}{'+' if git['modified'] else ''}" if git["commit"] else "not a checkout",
        machine=f"{machine['cpu']}, {machine['cpus']} CPUs, {machine['memory_gib']} GiB, {machine['os']}",
        python=platform.python_version(),
        seed=seed,
        is_quick=is_quick,
        command=f"python -m tests.scoreboard {quick}--rows {key} --seed {seed}",
    )


@contextmanager
def _bar(row: Row) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on a terminal; without one, nothing."""
    with tqdm(desc=f"{row.key} {row.title}", total=1, leave=False, disable=None) as bar:

        def tell(done: int, of: int) -> None:
            bar.total = of
            bar.update(done - bar.n)

        yield tell
