"""A bounded slice of the rows Z of the scoreboard, and what must trip them."""

from collections import Counter
from pathlib import Path

import pytest

from tests.scoreboard.chaos import Chaos, Extent
from tests.scoreboard.chaos_ledger import Breach
from tests.scoreboard.honesty import CHECKS
from tests.scoreboard.leaky_server import LEAK_BYTES
from tests.scoreboard.metrics_truth import Ledger
from tests.scoreboard.real_server import ROOT
from tests.scoreboard.row import Scope
from tests.scoreboard.rows_nothing_lost import ROWS, chaos_figure, truth_figure
from tests.scoreboard.soak import CANCELLED, Sample, limit_mb_per_100k, slope_mb_per_100k, soak

SCOPE = Scope(is_quick=True, seed=20261126, tell=lambda done, of: None)
BY_KEY = {row.key: row for row in ROWS}


def samples(mb_per_100k: float, calls: int = 1_000_000) -> list[Sample]:
    """Of a run that takes 30 MB more in its first half, whatever comes then."""
    return [
        Sample(done, int(1e6 * (100 + min(done, calls / 2) / calls * 60 + mb_per_100k * done / 100_000)))
        for done in range(0, calls + 1, calls // 200)
    ]


@pytest.mark.parametrize("leak", [0.0, 0.3, 30.0, -2.0])
def test_the_slope_is_that_of_the_second_half(leak: float) -> None:
    assert slope_mb_per_100k(samples(leak)) == pytest.approx(leak, abs=1e-3)


def test_too_few_samples_are_no_slope() -> None:
    with pytest.raises(ValueError, match="cannot show a slope"):
        slope_mb_per_100k(samples(0.0)[:1])
    with pytest.raises(ValueError, match="0 samples"):
        slope_mb_per_100k([])


def test_a_short_run_is_not_held_to_what_it_cannot_tell() -> None:
    assert limit_mb_per_100k(1_000_000) == 1
    assert limit_mb_per_100k(8_000) == 100


def test_a_breach_fails_the_row_and_says_how_to_try_it_again(capsys: pytest.CaptureFixture[str]) -> None:
    extent = Extent(calls=10, faults=1, segment_calls=5, most_s=1)
    found = Chaos("7", calls=Counter({("plain", "OK"): 10}), faults=Counter(kill=1))
    assert chaos_figure(found, extent).passed
    found.breaches.append(Breach("V3", "plain call 0c1 ended with OK with an answer that is not its own"))
    figure = chaos_figure(found, extent)
    assert (figure.passed, figure.text) == (False, "10 calls, 1 faults, 1 breaches")
    again = "again: python -m tests.scoreboard.chaos --seed 7 --calls 10 --faults 1 --segment-calls 5"
    assert figure.note.endswith(again)
    assert capsys.readouterr().err.endswith(f"{again}\n")


def test_chaos_that_did_not_happen_is_no_pass() -> None:
    extent = Extent(calls=10, faults=1, segment_calls=5, most_s=1)
    found = Chaos("7", calls=Counter({("plain", "OK"): 9}))
    figure = chaos_figure(found, extent)
    assert (figure.passed, figure.note) == (False, "only 9 of 10 calls and 0 of 1 faults in time")
    found.faults["kill"] = 1
    assert chaos_figure(found, extent).passed is None


def test_a_figure_that_differs_from_the_ledger_fails_the_row() -> None:
    ledger = Ledger(requests=Counter({(f"method {number}", "OK"): 1 for number in range(30)}))
    assert truth_figure(ledger, []).passed
    figure = truth_figure(ledger, [("mlis_texts_total{'method': 'Embed'}", -2)])
    assert (figure.passed, figure.text) == (False, "2 (30 requests of 30 methods and codes)")


@pytest.mark.slow
async def test_chaos_breaks_no_invariant() -> None:
    figure = await BY_KEY["Z1"].run(SCOPE)
    assert figure.passed is not False, figure.note
    assert int(figure.details["faults"]) > 0
    assert int(figure.details["calls that ended with OK"]) > 0
    assert int(figure.details["rests at which the ledgers were compared"]) > 0


@pytest.mark.slow
async def test_metrics_and_their_callers_count_the_same() -> None:
    figure = await BY_KEY["Z3"].run(SCOPE)
    assert figure.passed, figure.note


def test_what_keeps_a_benchmark_honest_is_held_by_tests_that_exist() -> None:
    assert list(CHECKS) == [f"E{number}" for number in range(1, 11)]
    for _, tests in CHECKS.values():
        for test in tests:
            path, _, name = test.partition("::")
            assert f"def {name}(" in (ROOT / path).read_text(encoding="utf-8")


@pytest.mark.slow
async def test_a_soak_ends_where_it_began() -> None:
    figure = await BY_KEY["Z2"].run(SCOPE)
    assert figure.passed, figure.note


@pytest.mark.slow
async def test_a_leak_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LEAK_BYTES, "65536")
    soaked = await soak(tmp_path, CANCELLED, 6000, seed=1, module="tests.scoreboard.leaky_server")
    assert [breach.split(" by ")[0] for breach in soaked.breaches()] == ["memory grows"]
