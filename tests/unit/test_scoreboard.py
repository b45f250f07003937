"""The frame of the scoreboard: which rows there are, what their results say, and how the command ends."""

import asyncio
import json
import os
import signal
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from tests.scoreboard.__main__ import all_lines, main
from tests.scoreboard.by_tests import TestCount, TestsNotRun, progress, read_report, tests_pass
from tests.scoreboard.markdown import markdown
from tests.scoreboard.registry import Line, UnknownRow, chosen, place, table
from tests.scoreboard.results import BrokenResults, Results, read
from tests.scoreboard.row import Figure, NotRun, Row, Scope

Run = Callable[[Scope], Awaitable[Figure]]


def gives(text: str, passed: bool | None, note: str = "") -> Run:
    async def run(scope: Scope) -> Figure:
        scope.tell(1, 2)
        return Figure(text=text, passed=passed, note=note, details={"seed": scope.seed})

    return run


def row(key: str, run: Run) -> Row:
    return Row(key=key, title=f"title of {key}", pass_line=f"line of {key}", run=run)


def lines(*rows: Row) -> list[Line]:
    return table(rows, {"K9": "planned"})


def board(folder: Path, *rows: Row, arguments: str = "") -> int:
    return main(["--out", str(folder), *arguments.split()], lines(*rows))


def test_the_whole_table_is_there_and_in_order() -> None:
    keys = [line.key for line in all_lines()]
    assert Counter(key[0] for key in keys) == {"G": 9, "F": 10, "X": 7, "Z": 5, "K": 3}
    assert keys[:9] == ["G1", "G2", "G3", "G4", "G5", "G6", "G7", "G8", "G9"]
    assert keys.index("F10") == keys.index("F9") + 1


def test_a_key_stands_once() -> None:
    good = gives("good", True)
    with pytest.raises(ValueError, match="two rows have the key G1"):
        table([row("G1", good), row("G1", good)], {})
    with pytest.raises(ValueError, match="planned as well"):
        table([row("G1", good)], {"G1": "planned"})
    for wrong in ("Q1", "G", "", "g1"):
        with pytest.raises(ValueError, match="is no key"):
            place(wrong)


def test_rows_are_chosen_by_key_and_by_group() -> None:
    good = gives("good", True)
    known = lines(row("F2", good), row("G1", good), row("F10", good))
    assert [each.key for each in chosen(known, "")] == ["G1", "F2", "F10"]
    assert [each.key for each in chosen(known, "f")] == ["F2", "F10"]
    assert [each.key for each in chosen(known, " f10, G1")] == ["G1", "F10"]
    for wrong in ("G7", "K9", "K", "F2,Q"):
        with pytest.raises(UnknownRow, match="there are G1, F2, F10"):
            chosen(known, wrong)


def test_some_rows_anew_leave_the_others_as_they_are(tmp_path: Path) -> None:
    assert board(tmp_path, row("G1", gives("old 1", True)), row("F2", gives("old 2", True))) == 0
    before = read(tmp_path).rows
    assert (
        board(
            tmp_path,
            row("G1", gives("new", None, "busy")),
            row("F2", gives("never", True)),
            arguments="--rows G1 --seed 7 --quick",
        )
        == 0
    )
    after = read(tmp_path).rows
    assert after["F2"] == before["F2"]
    new = after["G1"]
    assert (new.text, new.passed, new.note, new.details) == ("new", None, "busy", {"seed": 7})
    assert new.origin.is_quick
    assert new.origin.command == "python -m tests.scoreboard --quick --rows G1 --seed 7"
    assert not before["G1"].origin.is_quick


def test_the_exit_code_says_that_a_row_failed(tmp_path: Path) -> None:
    async def raises(scope: Scope) -> Figure:
        raise RuntimeError("the server\nis gone")

    assert board(tmp_path, row("G1", raises), row("G2", gives("good", True))) == 1
    rows = read(tmp_path).rows
    assert (rows["G1"].passed, rows["G1"].note) == (False, "RuntimeError: the server is gone")
    assert rows["G2"].passed
    assert board(tmp_path, row("G1", gives("bad", False))) == 1
    assert board(tmp_path, row("G1", gives("unclear", None))) == 0


def test_what_could_not_be_run_does_not_replace_a_figure(tmp_path: Path) -> None:
    async def lacks(scope: Scope) -> Figure:
        raise NotRun("a peer is needed")

    assert board(tmp_path, row("K3", lacks)) == 0
    assert not read(tmp_path).rows["K3"].was_run
    assert "a peer is needed | line of K3 | not run" in (tmp_path / "scoreboard.md").read_text()
    assert board(tmp_path, row("K3", gives("measured", True))) == 0
    assert board(tmp_path, row("K3", lacks)) == 0
    assert read(tmp_path).rows["K3"].text == "measured"


def test_the_document_has_every_row_in_its_group(tmp_path: Path) -> None:
    good, unclear = row("F1", gives("12 / 12", True)), row("F2", gives("40 | 3 ms", None, "The machine was busy."))
    board(
        tmp_path,
        good,
        unclear,
        row("G1", gives("bad", False)),
        row("Z1", gives("unused", True)),
        arguments="--rows F,G1",
    )
    text = (tmp_path / "scoreboard.md").read_text()
    headings = [line for line in text.splitlines() if line.startswith("## ")]
    assert headings == ["## Load held", "## Faults survived", "## Nothing lost", "## Tests of the tests"]
    assert "Of 5 rows: 1 passed, 1 failed, 1 cannot tell, 2 not run." in text
    assert "| F1 | title of F1 | 12 / 12 | line of F1 | pass | " in text
    assert "| F2 | title of F2 | 40 \\| 3 ms. The machine was busy | line of F2 | cannot tell | " in text
    assert "| G1 | title of G1 | bad | line of G1 | **fail** | " in text
    assert "| Z1 | title of Z1 |  | line of Z1 | not run |  |" in text
    assert "| K9 | planned |  |  | not run |  |" in text


def test_a_document_without_results_says_so() -> None:
    assert "No row was run yet." in markdown(lines(), Results())


def test_figures_of_two_machines_are_told_apart(tmp_path: Path) -> None:
    board(tmp_path, row("G1", gives("a", True)), row("G2", gives("b", True)))
    results = read(tmp_path)
    other = results.rows["G2"].model_copy(
        update={"origin": results.rows["G2"].origin.model_copy(update={"machine": "Z80"})}
    )
    text = markdown(lines(row("G1", gives("a", True)), row("G2", gives("b", True))), results.with_row("G2", other))
    assert "- G2: Z80\n" in text
    assert f"- G1: {results.rows['G1'].origin.machine}\n" in text


@pytest.mark.parametrize("stopped_by", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_keeps_what_was_done_and_ends_the_row(tmp_path: Path, stopped_by: signal.Signals) -> None:
    ended: list[str] = []

    async def interrupted(scope: Scope) -> Figure:
        try:
            os.kill(os.getpid(), stopped_by)
            await asyncio.Event().wait()
        finally:
            ended.append("its processes")
        raise AssertionError

    assert (
        board(tmp_path, row("G1", gives("done", True)), row("G2", interrupted), row("G3", gives("never", True))) == 130
    )
    assert list(read(tmp_path).rows) == ["G1"]
    assert "| done |" in (tmp_path / "scoreboard.md").read_text()
    assert ended == ["its processes"]


@pytest.mark.parametrize("content", ["", "[]", '{"rows": {"G1": {"text": 1}}}', '{"rows": {}, "more": 1}'])
def test_a_file_that_is_no_scoreboard_is_not_overwritten(
    tmp_path: Path, content: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "scoreboard.json").write_text(content)
    assert board(tmp_path, row("G1", gives("good", True))) == 2
    assert "move it away" in capsys.readouterr().err
    assert (tmp_path / "scoreboard.json").read_text() == content
    with pytest.raises(BrokenResults):
        read(tmp_path)


def test_what_cannot_be_begun_is_said_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert board(tmp_path, row("G1", gives("good", True)), arguments="--rows G9") == 2
    assert capsys.readouterr().err == "--rows G9: no row can be run as G9; there are G1\n"
    (tmp_path / "file").touch()
    assert board(tmp_path / "file", row("G1", gives("good", True))) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_the_list_runs_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert board(tmp_path, row("G1", gives("good", True)), arguments="--list") == 0
    assert capsys.readouterr().out.splitlines() == ["G1  title of G1", "K9  planned   (nothing tries it yet)"]
    assert list(tmp_path.iterdir()) == []


def test_the_json_is_plain(tmp_path: Path) -> None:
    board(tmp_path, row("G1", gives("good", True)))
    found = json.loads((tmp_path / "scoreboard.json").read_text())["rows"]["G1"]
    assert found["details"] == {"seed": 1}
    assert set(found["origin"]) >= {"commit", "machine", "seed", "command", "is_quick"}


# Rows that tests hold


def test_progress_is_read_from_what_pytest_prints() -> None:
    assert progress("collected\n...  [ 3/12]\n..") == (3, 12)
    assert progress(". [1/2]. [2/2]") == (2, 2)
    for nothing in ("", "[", "[a/b]", "tests[x]", "[3/"):
        assert progress(nothing) is None


def test_an_error_in_a_fixture_is_a_failure_and_a_skip_is_no_pass() -> None:
    cases = "".join(
        f'<testcase classname="c" name="{name}">{child}</testcase>'
        for name, child in [
            ("a", ""),
            ("b", "<failure message='a&#10;b'/>"),
            ("c", "<skipped/>"),
            ("d", "<error/>"),
            ("d", "<error/>"),
        ]
    )
    count = read_report(f"<testsuites><testsuite>{cases}</testsuite></testsuites>")
    assert count == TestCount(1, 2, 1, ("c::b: a b", "c::d: "))
    assert count.tried == 3


async def test_tests_of_ours_are_run_and_counted() -> None:
    told: list[tuple[int, int]] = []
    count = await tests_pass("tests/unit/test_names.py", tell=lambda done, of: told.append((done, of)))
    assert count == TestCount(1, 0, 0)
    assert told[-1] == (1, 1)


@pytest.mark.parametrize("selector", ["tests/unit/test_names.py::test_that_is_not_there", "tests/no_such_folder"])
async def test_what_leads_to_no_test_is_an_error(selector: str) -> None:
    with pytest.raises(TestsNotRun, match="pytest ended with code"):
        await tests_pass(selector)
