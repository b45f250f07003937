"""A bounded slice of the rows Z of the scoreboard, and what must trip them."""

from pathlib import Path

import pytest

from tests.scoreboard.leaky_server import LEAK_BYTES
from tests.scoreboard.row import Scope
from tests.scoreboard.rows_nothing_lost import ROWS
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


@pytest.mark.slow
async def test_a_soak_ends_where_it_began() -> None:
    figure = await BY_KEY["Z2"].run(SCOPE)
    assert figure.passed, figure.note


@pytest.mark.slow
async def test_a_leak_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LEAK_BYTES, "65536")
    soaked = await soak(tmp_path, CANCELLED, 6000, seed=1, module="tests.scoreboard.leaky_server")
    assert [breach.split(" by ")[0] for breach in soaked.breaches()] == ["memory grows"]
