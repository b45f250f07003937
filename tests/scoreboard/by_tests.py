"""Rows that tests of ours hold: pytest in a process of its own, and what came of each case, read from its report."""

import asyncio
import contextlib
import os
import signal
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_PYTEST_OK, _PYTEST_FAILED = 0, 1
_LAST_LINES = 15
_MOST_WHY_CHARACTERS = 200


class TestsNotRun(Exception):
    """pytest ended without trying the tests: a selector leads to none, or they cannot be imported."""

    __test__ = False


@dataclass(frozen=True, slots=True)
class TestCount:
    """Cases by their end; one that errors in a fixture counts as failed. failures: "name: why" of those that failed.

    recorded: sums of the whole numbers that tests gave to pytest's `record_property`, by name.
    """

    __test__ = False

    passed: int
    failed: int
    skipped: int
    failures: tuple[str, ...] = ()
    recorded: Mapping[str, int] = field(default_factory=dict)

    @property
    def tried(self) -> int:
        return self.passed + self.failed


async def tests_pass(*selectors: str, tell: Callable[[int, int], None] | None = None) -> TestCount:  # noqa: PT028
    """Run tests of ours ("tests/unit/test_x.py::test_y", or a folder) and count. TestsNotRun where none was tried.

    tell: (cases done, cases).
    """
    return await run_pytest(selectors, tell=tell)


tests_pass.__test__ = False  # type: ignore[attr-defined]  # pytest takes it for a test where one imports it


async def run_pytest(
    selectors: Sequence[str],
    *,
    tell: Callable[[int, int], None] | None = None,
    root: Path = ROOT,
    environment: Mapping[str, str] | None = None,
    extra: Sequence[str] = (),
) -> TestCount:
    """As `tests_pass`, on the package and the tests in `root`.

    environment: beside that of this process. extra: further arguments of pytest.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [
            sys.executable,
            "-P",
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "-o",
            "console_output_style=count",
            "-o",
            "junit_family=xunit1",  # the one in which tests may record figures
        ]
        command += [f"--junitxml={report}", *extra, *selectors]
        variables = {**os.environ, **(environment or {}), "PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1"}
        process = await asyncio.create_subprocess_exec(
            *command,
            cwd=root,
            env=variables,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            output = await _output(process, tell)
            code = await process.wait()
        finally:
            # Cancelled, or a test left something behind: nothing of this session outlives the row.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
        if code not in (_PYTEST_OK, _PYTEST_FAILED) or not report.exists():
            last = " / ".join(line.strip() for line in output.splitlines()[-_LAST_LINES:] if line.strip())
            raise TestsNotRun(f"pytest ended with code {code} on {' '.join(selectors)}: {last}")
        count = read_report(report.read_text(encoding="utf-8"))
    if not count.tried and not count.skipped:
        raise TestsNotRun(f"no test was found by {' '.join(selectors)}")
    return count


async def _output(process: asyncio.subprocess.Process, tell: Callable[[int, int], None] | None) -> str:
    """All that it says; meanwhile tells how far it is, as "[ 3/10]" at the end of a line says."""
    assert process.stdout is not None
    said = ""
    while chunk := await process.stdout.read(4096):
        said += chunk.decode(errors="replace")
        if tell is not None and (at := progress(said)) is not None:
            tell(*at)
    return said


def progress(output: str) -> tuple[int, int] | None:
    """(done, of) as pytest's last count says; None before there is one."""
    _, bracket, rest = output.rpartition("[")
    counts, closing, _ = rest.partition("]")
    done, slash, of = counts.partition("/")
    if not (bracket and closing and slash and done.strip().isdecimal() and of.strip().isdecimal()):
        return None
    return int(done), int(of)


def read_report(xml: str) -> TestCount:
    """What a JUnit report of pytest says."""
    passed = skipped = 0
    failures: dict[str, str] = {}
    recorded: Counter[str] = Counter()
    for case in ElementTree.fromstring(xml).iter("testcase"):  # noqa: S314 - pytest of ours wrote it a moment ago
        why = {child.tag: child.get("message", "") for child in case}
        if (failure := why.get("failure", why.get("error"))) is not None:
            name = f"{case.get('classname')}::{case.get('name')}"
            failures.setdefault(name, " ".join(failure.split())[:_MOST_WHY_CHARACTERS])
        elif "skipped" in why:
            skipped += 1
        else:
            passed += 1
        for each in case.iter("property"):
            if (value := each.get("value", "")).isdecimal():
                recorded[each.get("name", "")] += int(value)
    told = [f"{name}: {why}" for name, why in failures.items()]
    return TestCount(passed, len(failures), skipped, tuple(told), dict(recorded))
