"""A share above 1 says that it is an error of the measurement, wherever it is printed."""

import pytest

from ml_inference_server.benchmark.result.document import InProcess
from ml_inference_server.benchmark.studies import speed
from ml_inference_server.engine_bench import ceiling, compare
from ml_inference_server.engine_bench.ceiling import Ceiling
from ml_inference_server.engine_bench.compare import EngineRow
from ml_inference_server.utils.share import MARK, NOTE, cell, is_impossible, of_limit


def test_noise_below_what_is_shown_is_not_marked() -> None:
    assert [is_impossible(share) for share in (0.5, 1.0, 1.004, 1.006, 2.0)] == [False, False, False, True, True]
    assert (of_limit(0.837), cell(0.837)) == ("84%", "0.84")
    assert (of_limit(1.86), cell(1.86)) == ("186% (more than all: an error of the measurement)", "1.86 (!)")


@pytest.mark.parametrize(("texts_per_s", "said"), [(80.0, "80%"), (186.0, of_limit(1.86))])
def test_a_ceiling_above_the_roofline(texts_per_s: float, said: str) -> None:
    found = Ceiling("t", texts_per_s, 79.0, 190.0, 8000.0, 0.05, 80.0, 20.0, 0.2, 2e9, 100.0, 3)
    text = ceiling.report(found)
    assert text.endswith(f"the ceiling is {said} of it")
    assert "5% of the computed tokens are padding" in text


@pytest.mark.parametrize(("rate", "marked"), [(90.0, False), (120.0, True)])
def test_a_backend_above_its_bare_engine(rate: float, marked: bool) -> None:
    row = EngineRow("pytorch fp32", rates={"random": [50.0], "grouped": [rate], "direct": [100.0]})
    text = compare.markdown([row])
    assert f"| {cell(rate / 100)} |" in text
    assert (NOTE in text) is (MARK in text) is marked


@pytest.mark.parametrize(("rate", "marked"), [(50.0, False), (99.0, True), (130.0, True)])
def test_a_server_above_its_ceiling_or_the_roofline(rate: float, marked: bool) -> None:
    load = speed.SpeedLoad("queries", 1, 32, texts_per_s=[rate], server_cpu_ms=[1.0], client_cpu_ms=[1.0])
    ceiling = InProcess(title="t", texts_per_s=100.0, lowest=99.0, highest=101.0, roofline_texts_per_s=90.0)
    text = speed.report("t", [load], {"queries": [ceiling], "passages": []}, {str(load): rate / 100}, {})
    assert f"| {cell(rate / 100)} | - | {cell(rate / 90)} |" in text
    assert (NOTE in text) is (MARK in text) is marked
