"""Restarts under traffic that goes on. 200 of them, by hand: python -m tests.faults.restarts"""

from pathlib import Path

import pytest

from tests.faults.restarts import restarts


@pytest.mark.slow
async def test_restarts_of_two_servers_lose_no_call_of_clients_that_repeat(tmp_path: Path) -> None:
    ends, exit_codes = await restarts(tmp_path, count=4)
    assert set(ends) == {"OK"}
    assert ends["OK"] > 100
    assert exit_codes == {0: 6}


@pytest.mark.slow
async def test_a_stop_answers_with_what_is_safe_to_repeat_and_nothing_else(tmp_path: Path) -> None:
    """One server, and callers that repeat nothing: what a call got that arrived anywhere within the stop."""
    ends, exit_codes = await restarts(tmp_path, count=3, servers=1, retries=False)
    assert set(ends) == {"OK", "UNAVAILABLE"}
    assert exit_codes == {0: 4}
