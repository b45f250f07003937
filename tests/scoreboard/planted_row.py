"""Row K1: bugs are planted one after the other, and for each the test that should see it is run."""

from collections.abc import Callable, Sequence
from pathlib import Path

from tests.scoreboard.by_tests import TestCount, TestsNotRun, run_pytest
from tests.scoreboard.planted_bugs import BUGS, QUICK
from tests.scoreboard.planting import Bug, NotPlanted, copied_project, planted
from tests.scoreboard.row import Figure, Scope

# Each takes less than 5 s on a quiet machine. One that runs into the limit has seen nothing.
_ARGUMENTS = ("--timeout=120", "--tb=native")
_TIMED_OUT = "from pytest-timeout"


async def run(scope: Scope) -> Figure:
    bugs = QUICK if scope.is_quick else BUGS
    with copied_project() as root:
        await _all_pass(root, bugs)
        return await plant_each(root, bugs, scope.tell)


async def _all_pass(root: Path, bugs: Sequence[Bug]) -> None:
    """Without a bug every one of the tests passes; else that they fail would show nothing."""
    tests = sorted({bug.seen_by for bug in bugs})
    count = await run_pytest(tests, root=root, extra=_ARGUMENTS)
    if count.passed != len(tests):
        raise AssertionError(f"without a bug {count.passed} of {len(tests)} tests passed: {'; '.join(count.failures)}")


async def plant_each(root: Path, bugs: Sequence[Bug], tell: Callable[[int, int], None]) -> Figure:
    seen: dict[str, str] = {}
    missed: list[str] = []
    for number, bug in enumerate(bugs):
        tell(number, len(bugs))
        try:
            with planted(root, bug.edits):
                said = _seen(await run_pytest([bug.seen_by], root=root, extra=_ARGUMENTS))
        except (NotPlanted, TestsNotRun) as error:
            missed.append(f"{bug.name} ({error})")
            continue
        if said:
            seen[bug.name] = f"{bug.seen_by}: {said}"
        else:
            missed.append(bug.name)
    return Figure(
        text=f"{len(seen)} / {len(bugs)}",
        passed=not missed,
        note=f"not caught: {'; '.join(missed)}" if missed else "",
        details={"planted": len(bugs), "caught": len(seen), **seen},
    )


def _seen(count: TestCount) -> str:
    """How the one test failed; empty where it did not."""
    if not count.failed or _TIMED_OUT in count.failures[0]:
        return ""
    return count.failures[0].partition(": ")[2] or "failed"
