"""How much load workers take whose connections the kernel spreads: what must hold whatever is drawn."""

from pathlib import Path

import pytest

from ml_inference_server.benchmark.studies import workers


@pytest.mark.parametrize("connections", workers.CONNECTIONS)
def test_the_load_is_between_one_worker_and_all_and_grows_with_the_connections(connections: int) -> None:
    assert workers.carried(1, connections) == (1.0, 1.0, 1.0)
    for count in workers.WORKERS[1:]:
        middle, low, high = workers.carried(count, connections)
        assert 1 <= low <= middle <= high <= min(count, connections)
        assert workers.carried(count, 4 * connections)[0] >= middle


def test_two_connections_on_two_workers_share_one_half_of_the_time() -> None:
    _, low, high = workers.carried(2, 2)
    assert (low, high) == (1.0, 2.0)


def test_the_table_and_the_figure_are_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figure = tmp_path / "spread.svg"
    assert workers.main(["--spread", "--figure", str(figure)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if line.startswith("| ")]) == 2 + len(workers.CONNECTIONS)
    assert "<svg" in figure.read_text(encoding="utf-8")
