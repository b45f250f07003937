import pytest

from ml_inference_server.benchmark.studies import metrics_overhead


def test_one_server_is_compared_with_itself_in_turns(capsys: pytest.CaptureFixture[str]) -> None:
    assert metrics_overhead.main(["--blocks", "2", "--rounds", "2", "--seconds", "0.2", "--concurrency", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines[:2]] == ["block  1 of 2", "block  2 of 2"]
    assert lines[-3] == "metrics and page on against off, 4 pairs of turns, median [95 % interval]:"
    assert [line.split("  ")[1] for line in lines[-2:]] == ["throughput", "server CPU per request"]


def test_a_server_that_cannot_start_ends_the_program() -> None:
    with pytest.raises(SystemExit, match="did not start"):
        metrics_overhead.main(["--blocks", "1", "--set", "model.backend=onxx"])
