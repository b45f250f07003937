"""The row without a server: what the timing program is given, and what becomes of its answers."""

import json
import sys
from pathlib import Path

import pytest

from ml_inference_server.benchmark.load.dataset import Workload
from ml_inference_server.benchmark.result.document import InProcess, InProcessFailed
from ml_inference_server.benchmark.target import in_process
from ml_inference_server.benchmark.target.in_process import requests_of, time_in_process

PAIRS = Workload("pairs", (("one", "first\tpassage\n"), ("one", "second"), ("two", "ünd")))
FIGURES = {
    "title": "t", "texts_per_s": 100.0, "lowest": 90, "highest": 110, "tokens_per_text": 7.5,
    "roofline_texts_per_s": None,
}  # fmt: skip


async def timed(
    folder: Path, monkeypatch: pytest.MonkeyPatch, program: str, timeout_s: float = 30
) -> InProcess | InProcessFailed:
    (folder / "stand_in.py").write_text(program)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    monkeypatch.setattr(in_process, "_MODULE", "stand_in")
    return await time_in_process(
        sys.executable, ["--experiment", "x.yaml"], requests_of(PAIRS, 2, None), 1.5, timeout_s
    )


async def test_it_is_given_the_settings_and_the_requests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = (
        "import json, sys\nargs = sys.argv[1:]\nvalue = dict(zip(args[::2], args[1::2]))\n"
        f"open({str(tmp_path / 'seen')!r}, 'w').write(json.dumps([value, open(value['--requests']).read()]))\n"
        f"json.dump({FIGURES!r}, open(value['--json'], 'w'))\n"
    )
    assert await timed(tmp_path, monkeypatch, program) == InProcess.model_validate(FIGURES)
    arguments, lines = json.loads((tmp_path / "seen").read_text())
    assert (arguments["--experiment"], arguments["--seconds"]) == ("x.yaml", "1.5")
    assert [json.loads(line) for line in lines.splitlines()] == [
        [["one", "first\tpassage\n"], ["one", "second"]],
        [["two", "ünd"], ["one", "first\tpassage\n"]],
    ]


@pytest.mark.parametrize(("size", "most", "count"), [(1, None, 5), (2, None, 3), (2, 1, 1), (2, 99, 3), (8, None, 1)])
def test_the_requests_are_those_of_a_row_until_the_texts_start_over(size: int, most: int | None, count: int) -> None:
    workload = Workload("passages", tuple("abcde"))
    assert list(requests_of(workload, size, most)) == [workload.batch(index, size) for index in range(count)]


@pytest.mark.parametrize(
    ("program", "told"),
    [
        ("import sys; print('error: no memory', file=sys.stderr); sys.exit(3)", "no memory"),
        ("import sys; sys.exit(4)", "exit code 4"),
        ("pass", "gave no figures: FileNotFoundError"),
        ("import sys; open(sys.argv[-1], 'w').write('{}')", "gave no figures: KeyError"),
    ],
)
async def test_what_goes_wrong_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str, told: str
) -> None:
    found = await timed(tmp_path, monkeypatch, program)
    assert isinstance(found, InProcessFailed)
    assert told in found.error


async def test_a_program_that_does_not_end_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = await timed(tmp_path, monkeypatch, "import time; time.sleep(999)", timeout_s=0.5)
    assert found == InProcessFailed(error="it took longer than 0.5 s")
