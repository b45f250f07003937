"""A bounded slice of the rows K: each bug can still be planted, and what the rows make of what they see."""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.scoreboard.leak_row import leak_figure
from tests.scoreboard.peer.contender import PEER, Contender, ours, peer
from tests.scoreboard.peer.row import compared
from tests.scoreboard.peer.trials import Score, noisy_inputs, openai_inputs
from tests.scoreboard.planted_bugs import BUGS, QUICK, SWAPPED
from tests.scoreboard.planted_row import plant_each
from tests.scoreboard.planting import Bug, Edit, NotPlanted, copied_project, planted
from tests.scoreboard.real_server import Held
from tests.scoreboard.row import NotRun, Scope
from tests.scoreboard.rows_of_tests import ROWS
from tests.scoreboard.soak import CANCELLED, Sample, Soaked

BY_KEY = {row.key: row for row in ROWS}


def nobody(done: int, of: int) -> None:
    """Is told how far it is."""


# K1


@pytest.fixture(scope="module")
def copy() -> Iterator[Path]:
    with copied_project() as root:
        yield root


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_every_bug_can_be_planted_as_code_and_is_gone_afterwards(copy: Path, bug: Bug) -> None:
    paths = {copy / edit.path for edit in bug.edits}
    before = {path: path.read_text() for path in paths}
    with planted(copy, bug.edits):
        for path in paths:
            assert path.read_text() != before[path]
            compile(path.read_text(), path.name, "exec")
    assert {path: path.read_text() for path in paths} == before


def test_every_bug_is_another_and_names_a_test_that_there_is() -> None:
    assert len({bug.name for bug in BUGS}) == len(BUGS)
    assert set(QUICK) <= set(BUGS)
    root = Path(__file__).resolve().parents[2]
    for bug in BUGS:
        path, _, name = bug.seen_by.partition("::")
        assert f"def {name.partition('[')[0]}(" in (root / path).read_text()


@pytest.mark.parametrize("old", ["text that is not there", "self"])
def test_a_text_that_is_not_there_exactly_once_is_no_place_for_a_bug(copy: Path, old: str) -> None:
    edit = Edit(path="ml_inference_server/server/batch_runner.py", old=old, new="")
    with pytest.raises(NotPlanted, match=r"has this \d+ times"), planted(copy, [edit]):
        raise AssertionError("planted")


@pytest.mark.slow
async def test_a_bug_is_caught_and_what_is_none_is_not(copy: Path) -> None:
    harmless = Edit(path=SWAPPED.edits[0].path, old=SWAPPED.edits[0].old, new=f"{SWAPPED.edits[0].old}  # as it was")
    none = Bug(name="none", edits=(harmless,), seen_by=SWAPPED.seen_by)
    figure = await plant_each(copy, [SWAPPED, none], nobody)
    assert (figure.text, figure.passed) == ("1 / 2", False)
    assert figure.note == "not caught: none"
    assert SWAPPED.name in figure.details


# K2


def soaked(mb_per_100k: float, calls: int = 100_000, cancelled: int = 20_000) -> Soaked:
    held = Held(descriptors=9, threads=9, tasks=9, children=0, pool_threads=0)
    samples = [Sample(done, int(1e8 + 10 * mb_per_100k * done)) for done in range(0, calls + 1, calls // 100)]
    return Soaked(
        mix=CANCELLED,
        calls=calls,
        ends=Counter({"cancel CANCELLED": 3 * calls // 10, "ok OK": 7 * calls // 10}),
        wrong=[],
        samples=samples,
        before=held,
        after=held,
        fault_lines=[],
        exit_code=0,
        cancelled_in_handler=cancelled,
        duration_s=1.0,
        server_cpu_s=1.0,
    )


@pytest.mark.parametrize(
    ("sound", "leaky", "passed", "note"),
    [
        (soaked(0.1), soaked(20.0), True, ""),
        (soaked(0.1), soaked(0.1), False, ""),
        (soaked(20.0), soaked(20.0), False, "without the leak: memory grows by 20.00 MB"),
        (soaked(0.1), soaked(20.0, cancelled=100), False, "only 0.1 MB per 100,000 calls were leaked"),
    ],
)
def test_a_leak_counts_as_seen_only_where_nothing_else_is(
    sound: Soaked, leaky: Soaked, passed: bool, note: str
) -> None:
    figure = leak_figure([sound, leaky], 1024)
    assert figure.passed is passed
    assert note in figure.note


# K3


async def test_without_a_peer_the_row_says_how_to_give_it_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(PEER, raising=False)
    with pytest.raises(NotRun, match=f"set {PEER}"):
        await BY_KEY["K3"].run(Scope(is_quick=True, seed=1, tell=nobody))


def test_a_command_is_shown_without_the_folders_of_its_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PEER, "/opt/some/where/peer --port {port} --model '{model}'")
    assert peer().shown == "peer --port '{port}' --model '{model}'"
    assert "/" not in ours().shown.split()[0]


def test_ours_alone_decides_whether_the_comparison_passes() -> None:
    both = (Contender(name="ours 1", command=("a",)), Contender(name="peer 2", command=("b", "{port}")))
    clean, faulty = Score(counts={"5xx": 0, "hang": 0}), Score(counts={"5xx": 3, "hang": 1}, examples=["5xx: a"])
    good = compared(both, [clean, faulty])
    assert good.passed
    assert good.text == "ours 1 / peer 2: 5xx 0 / 3; hang 0 / 1"
    assert good.details["peer 2: example 0"] == "5xx: a"
    bad = compared(both, [faulty, clean])
    assert not bad.passed
    assert bad.note == "ours: 5xx; hang"


def test_the_inputs_are_many_and_the_same_for_the_same_seed() -> None:
    assert len(openai_inputs()) >= 150
    assert noisy_inputs(50, seed=3) == noisy_inputs(50, seed=3) != noisy_inputs(50, seed=4)
    broken = 0
    for _, request in noisy_inputs(50, seed=3):
        try:
            json.loads(request.partition(b"\r\n\r\n")[2])
        except ValueError:
            broken += 1
    assert 10 < broken < 50
