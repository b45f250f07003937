"""The scaling benchmark: every sweep against a real server round the fake backend, and what the report says of it."""

from collections import Counter
from pathlib import Path

import pytest

from ml_inference_server.benchmark.load.dataset import Workload
from ml_inference_server.benchmark.studies import scaling
from ml_inference_server.benchmark.studies.scaling import Sweep, SweepPoint, report, texts_of


def test_all_sweeps_are_measured_and_plotted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    points = {"_IN_FLIGHT": (1, 4), "_PER_CALL": (1, 128), "_TOKENS": (8, 32), "_LOADS": (0.5, 2.0)}
    for name, values in points.items():
        monkeypatch.setattr(scaling, name, values)
    experiment = tmp_path / "fake.yaml"
    experiment.write_text("name: trial\nmodel: {backend: fake, name: 'fake:base_ms=2,per_token_us=20', streams: 1}\n")
    plots = tmp_path / "scaling.svg"
    code = scaling.main(
        ["--experiment", str(experiment), "--dataset", "sample", "--seconds", "0.2", "--repeats", "1",
         "--output", str(plots)]
    )  # fmt: skip
    shown = capsys.readouterr()
    assert code == 0, shown.err
    assert plots.read_bytes().startswith(b"<?xml")
    rows = [line for line in shown.out.splitlines() if line.startswith("| ") and "---" not in line]
    assert len(rows) == 4 + 4 * 2  # a head and two points for each sweep
    assert "| 1 | " in shown.out
    assert "Memory of the server: " in shown.out


def test_texts_are_cut_to_about_the_length_that_was_asked() -> None:
    words = [f"w{i}" for i in range(1000)]
    workload = texts_of(Workload("passages", (" ".join(words[:600]), " ".join(words[600:]))), tokens=28)
    assert {len(text.split()) for text in workload.items} == {20}
    assert " ".join(workload.items).split() == words


def test_the_report_tells_how_far_answers_in_time_fall_beyond_the_capacity() -> None:
    def sweep(*rates: tuple[float, float], **failed: int) -> Sweep:
        return Sweep("a", "b", [SweepPoint(x, [rate], [2.0], [4.0], [x], Counter(failed)) for x, rate in rates])

    flat = sweep((1, 100.0), (2, 100.0))
    beyond = sweep((0.5, 50.0), (1.0, 100.0), (2.0, 80.0), DEADLINE_EXCEEDED=2, RESOURCE_EXHAUSTED=7, unfinished=0)
    text = report("title", [flat, flat, flat, beyond], 2.0, [1, 2, 4])
    assert "answers in time stay at 80 % of the peak" in text
    assert "| 2 | 0.80 (0.80-0.80) | 1.0 | 2.0 | 7 RESOURCE_EXHAUSTED, 2 DEADLINE_EXCEEDED |" in text
    assert "| 2 | 1.00 (1.00-1.00) | 1.0 | 2.0 | 0 |" in text
    assert "Tokens per second by length, of the best: 0.50, 1.00." in text
    assert "2.00 times what it was half-way" in text
