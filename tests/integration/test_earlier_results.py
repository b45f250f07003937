"""Results that an earlier version wrote: today's reports and comparisons of them say what its own said."""

import shutil
from pathlib import Path

import pytest

from ml_inference_server.benchmark import __main__ as benchmark

# Written by the version before the results had types, each with its report and `compare before.json after.json`.
EARLIER = Path(__file__).resolve().parents[1] / "data" / "results_v2"
NAMES = ("single", "variants", "search", "before", "after", "summary")


@pytest.mark.parametrize("name", NAMES)
def test_the_report_of_an_earlier_result_is_what_it_was(name: str, tmp_path: Path) -> None:
    for file in EARLIER.glob(f"{name}.*"):
        if file.suffix != ".md":
            shutil.copy(file, tmp_path)
    assert benchmark.main(["report", str(tmp_path / f"{name}.json")]) == 0
    assert (tmp_path / f"{name}.md").read_text() == (EARLIER / f"{name}.md").read_text()


def test_the_comparison_of_earlier_results_is_what_it_was(capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark.main(["compare", str(EARLIER / "before.json"), str(EARLIER / "after.json")]) == 1
    assert capsys.readouterr().out == (EARLIER / "before_after.txt").read_text()
