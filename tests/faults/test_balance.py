"""Our client over several servers. By hand, with 20,000 calls: python -m tests.faults.balance"""

from pathlib import Path

import pytest

from tests.faults.balance import MOST_OFF, newcomer, spread_and_restarts


@pytest.mark.slow
async def test_calls_are_spread_evenly_and_a_rolling_restart_loses_none(tmp_path: Path) -> None:
    found = await spread_and_restarts(tmp_path, calls=600)
    assert len(found.by_server) == 3
    assert found.off <= MOST_OFF
    assert (found.lost, found.restarts >= 3, found.calls >= 600) == ([], True, True)
    assert found.exit_codes == {0: 3 + found.restarts}


@pytest.mark.slow
async def test_a_new_server_behind_a_name_gets_its_share(tmp_path: Path) -> None:
    """Its name is asked for again when a connection has reached its age."""
    found = await newcomer(tmp_path, max_connection_age_s=1.0)
    assert found.lost == []
