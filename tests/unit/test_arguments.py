"""A wrong number on a command line ends in one line that names the argument, and never in a traceback."""

import argparse
from collections.abc import Callable

import pytest

from ml_inference_server.benchmark.studies import door_cost, priorities, workers
from ml_inference_server.utils.arguments import positive_float, positive_int


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "", "one", "nan"])
def test_a_count_is_a_whole_number_from_one_on(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="not"):
        positive_int(text)
    assert positive_int("7") == 7


@pytest.mark.parametrize("text", ["0", "-1", "", "one", "nan", "inf"])
def test_a_time_is_finite_and_above_zero(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="not"):
        positive_float(text)
    assert positive_float("0.5") == 0.5


@pytest.mark.parametrize("study", [door_cost.main, priorities.main, workers.main])
@pytest.mark.parametrize("wrong", [["--rounds", "0"], ["--seconds", "nan"], ["--rounds", "many"]])
def test_a_study_refuses_a_number_that_measures_nothing(
    study: Callable[[list[str]], int], wrong: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        study(wrong)
    assert ended.value.code == 2
    assert f"argument {wrong[0]}: " in capsys.readouterr().err.splitlines()[-1]
