"""Reports built again from their records, and two results compared."""

import json
from pathlib import Path

import pytest

from ml_inference_server import client
from ml_inference_server.benchmark import __main__ as benchmark
from tests.integration.benchmark_kit import scripted, write_pairs


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """fast.json and slow.json with their files: the same load on a server, and on one that takes 10 ms more."""
    folder = tmp_path_factory.mktemp("results")
    pairs = write_pairs(folder / "pairs.tsv")
    for name, work_s in (("fast", 0.0), ("slow", 0.01)):
        with scripted(work_s=work_s) as server:
            code = client.main(
                ["--port", str(server.port), "--dataset", str(pairs), "--requests", "60", "--concurrency", "2",
                 "--warmup", "2", "--repeats", "3", "--output", str(folder / f"{name}.md")]
            )  # fmt: skip
        assert code == 0
    return folder


def test_a_report_is_built_again_from_its_records(results: Path, tmp_path: Path) -> None:
    again = tmp_path / "again.md"
    assert benchmark.main(["report", str(results / "fast.json"), "--output", str(again)]) == 0
    assert again.read_text() == (results / "fast.md").read_text().replace("fast.svg", "again.svg")
    assert again.with_suffix(".svg").read_bytes() == (results / "fast.svg").read_bytes()


def test_figures_come_from_the_records_not_from_the_json(results: Path, tmp_path: Path) -> None:
    """A latency that was edited in the JSON does not survive; counts that differ are told."""
    document = json.loads((results / "fast.json").read_text())
    (tmp_path / "r.npz").write_bytes((results / "fast.npz").read_bytes())
    edited = tmp_path / "r.json"
    document["runs"][0]["latency_ms"]["p50"] = 0.001
    edited.write_text(json.dumps(document))
    loaded, _ = benchmark.load(edited)
    (latency_ms, *_) = (run.latency_ms for run in loaded.runs)
    assert latency_ms is not None
    assert latency_ms.p50 > 0.01
    document["runs"][0]["ok"] += 1
    edited.write_text(json.dumps(document))
    assert benchmark.main(["report", str(edited)]) == 2


def test_a_report_without_records_says_so(results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "r.json").write_bytes((results / "fast.json").read_bytes())
    assert benchmark.main(["report", str(tmp_path / "r.json")]) == 0
    assert "r.npz is missing" in capsys.readouterr().err
    assert (tmp_path / "r.md").exists()


def test_damaged_files_are_named(results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "none.json").write_text("{}")
    (tmp_path / "torn.json").write_text('{"schema": 2, "kind"')
    (tmp_path / "old.json").write_text('{"schema": 1, "kind": "suite", "runs": []}')
    (tmp_path / "new.json").write_text('{"schema": 99, "kind": "suite", "runs": []}')
    document = json.loads((results / "fast.json").read_text())
    document["runs"][1]["latency_ms"]["p99"] = "much"
    document["added_later"] = 1
    (tmp_path / "typed.json").write_text(json.dumps(document))
    del document["machine"]["cpu"]
    (tmp_path / "part.json").write_text(json.dumps(document))
    (tmp_path / "bad.json").write_bytes((results / "fast.json").read_bytes())
    (tmp_path / "bad.npz").write_bytes((results / "fast.npz").read_bytes()[:500])
    for name, told in (
        ("absent.json", "no such file"),
        ("none.json", "not the JSON of a result"),
        ("torn.json", "not the JSON of a result"),
        ("old.json", "has schema 1, and this version reads from 2 on: measure again"),
        ("new.json", "has schema 99, and this version reads up to 3: use the version that wrote it"),
        ("typed.json", "typed.json: runs[1].latency_ms.p99: input should be a valid number"),
        ("part.json", "part.json: machine.cpu: field required (and 1 more)"),
        ("bad.json", "the raw records cannot be read"),
    ):
        assert benchmark.main(["report", str(tmp_path / name)]) == 2, name
        error = capsys.readouterr().err
        assert error.startswith("Error: ")
        assert told in error
        assert error.count("\n") == 1 or name == "bad.json"


def test_a_regression_is_told_with_its_interval(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fast, slow = str(results / "fast.json"), str(results / "slow.json")
    assert benchmark.main(["compare", fast, slow, "--max-regression", "20%"]) == 1
    out = capsys.readouterr().out
    assert "REGRESSION beyond 20.0%" in out
    assert "batch size 1, concurrency 2: throughput 0." in out
    assert "slower" in out


def test_no_regression_against_itself_or_something_faster(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fast, slow = str(results / "fast.json"), str(results / "slow.json")
    assert benchmark.main(["compare", fast, fast]) == 0
    assert "no significant difference" in capsys.readouterr().out
    assert benchmark.main(["compare", slow, fast]) == 0
    assert "faster" in capsys.readouterr().out


def test_results_without_a_common_row_cannot_be_compared(results: Path, tmp_path: Path) -> None:
    document = json.loads((results / "fast.json").read_text())
    for run in document["runs"]:
        run["batch_size"] = 64
    other = tmp_path / "other.json"
    other.write_text(json.dumps(document))
    assert benchmark.main(["compare", str(results / "fast.json"), str(other)]) == 2
    with pytest.raises(SystemExit) as refused:
        benchmark.main(["compare", str(other), str(other), "--max-regression", "500%"])
    assert refused.value.code == 2
