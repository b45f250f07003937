"""Open loop, streams, several client processes, and the search for a rate: against a real gRPC server."""

import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ml_inference_server import client
from ml_inference_server.benchmark.load import records
from ml_inference_server.benchmark.load.schedule import arrivals_s
from ml_inference_server.benchmark.measure import rate_search
from tests.integration.benchmark_kit import Scripted, python, scripted, write_pairs

FREEZE_S = 2.0


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    return write_pairs(tmp_path / "pairs.tsv")


def run(server: Scripted, pairs: Path, *flags: str, name: str = "out") -> tuple[int, dict[str, Any], dict[str, Any]]:
    """(exit code, document, raw records)."""
    output = pairs.with_name(f"{name}.md")
    code = client.main(["--port", str(server.port), "--dataset", str(pairs), "--output", str(output), *flags])
    return code, json.loads(output.with_suffix(".json").read_text()), records.read(output.with_suffix(".npz"))


def test_the_open_loop_shows_a_freeze_and_the_closed_one_hides_it(pairs: Path) -> None:
    """Coordinated omission: a client that waits for answers asks little while the server stands still."""
    flags = ["--requests", "1000", "--warmup", "0", "--workload", "passages"]
    with scripted(freeze_at=300, freeze_s=FREEZE_S) as server:
        _, document, _ = run(server, pairs, *flags, "--rate", "200")
        (opened,) = document["runs"]
    with scripted(freeze_at=300, freeze_s=FREEZE_S) as server:
        _, document, _ = run(server, pairs, *flags, "--concurrency", "4")
        (closed,) = document["runs"]
    assert opened["ok"] == closed["ok"] == 1000
    assert opened["latency_ms"]["p99"] > 0.8 * FREEZE_S * 1e3
    assert opened["latency_ms"]["p99"] <= max(opened["latency_ms"]["p99"], FREEZE_S * 1e3)
    assert closed["latency_ms"]["p99"] < 0.25 * FREEZE_S * 1e3, "4 of 1000 requests saw the freeze"
    # The truth about the freeze is in both records: some requests did wait for it.
    assert closed["latency_ms"]["avg"] < opened["latency_ms"]["avg"]


def test_latency_counts_from_the_schedule(pairs: Path) -> None:
    with scripted() as server:
        code, document, raw = run(server, pairs, "--rate", "100", "--requests", "50", "--warmup", "0",
                                  "--seed", "7", "--set", "experiment.arrival.process=poisson")  # fmt: skip
    (row,) = document["runs"]
    due = arrivals_s("poisson", 100, requests=50, seed=7, repeat=1)
    found = raw[row["raw"]]
    np.testing.assert_allclose(found["due_s"], due, atol=1e-9)
    assert (row["rate_per_s"], row["concurrency"], row["process"]) == (100, None, "poisson")
    assert row["latency_ms"]["avg"] == pytest.approx(float((found["done_s"] - found["due_s"]).mean()) * 1e3)
    assert row["lag_ms"]["max"] == pytest.approx(float((found["sent_s"] - found["due_s"]).max()) * 1e3)
    assert code == (0 if row["status"] == "valid" else 5)


def test_a_sender_that_cannot_keep_up_voids_the_row(pairs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with scripted() as server:
        code, document, _ = run(server, pairs, "--rate", "100000", "--requests", "3000", "--warmup", "0",
                                "--set", "experiment.client_processes=1")  # fmt: skip
    (row,) = document["runs"]
    assert code == 5
    assert row["status"] == "invalid"
    assert row["cause"] == "client_late"
    assert row["reason"].startswith("the client itself was late: ")
    assert row["started"] == 3000 == row["ok"] + sum(row["errors"].values()), "late, but all were sent"
    assert "INVALID: the client itself was late" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "sent"), [(["--rate", "200"], 100), (["--concurrency", "5"], 100)], ids=["open", "closed"]
)
def test_several_processes_share_one_load(pairs: Path, flags: list[str], sent: int) -> None:
    with scripted(abort_every=10) as server:
        code, document, raw = run(server, pairs, *flags, "--requests", str(sent), "--warmup", "0",
                                  "--set", "experiment.client_processes=2")  # fmt: skip
    (row,) = document["runs"]
    assert code == 5
    assert (row["started"], row["ok"], row["errors"], row["unfinished"]) == (100, 90, {"INTERNAL": 10}, 0)
    assert row["client"]["processes"] == 2
    assert row["first_error"]["code"] == "INTERNAL"
    found = raw[row["raw"]]
    assert len(found) == 100
    if "--rate" in flags:
        np.testing.assert_allclose(
            found["due_s"], arrivals_s("poisson", 200, requests=100, seed=0, repeat=1), atol=1e-9
        )


def test_several_processes_are_stopped_with_their_records(pairs: Path, tmp_path: Path) -> None:
    with scripted(hold_at=8) as server:
        process = python("-m", "ml_inference_server.client", "--port", str(server.port), "--dataset", str(pairs),
                         "--requests", "1000000", "--concurrency", "2", "--warmup", "0", "--output", "out.md",
                         "--timeout-ms", "3600000", "--set", "experiment.client_processes=2", cwd=tmp_path)  # fmt: skip
        assert server.line() == "held"
        process.send_signal(signal.SIGINT)
        _, err = process.communicate()
    assert process.returncode == 130, err
    (row,) = json.loads((tmp_path / "out.json").read_text())["runs"]
    assert row["status"] == "interrupted"
    assert row["unfinished"] >= 1
    assert row["started"] == row["ok"] + sum(row["errors"].values()) + row["unfinished"]
    assert "Traceback" not in err


def test_a_stream_carries_many_requests_and_their_errors(pairs: Path) -> None:
    with scripted(abort_every=4, abort_code="RESOURCE_EXHAUSTED") as server:
        code, document, _ = run(server, pairs, "--streaming", "--workload", "queries", "--concurrency", "3",
                                "--requests", "20", "--warmup", "0")  # fmt: skip
    (row,) = document["runs"]
    assert code == 5
    assert row["streaming"] is True
    assert (row["ok"], row["errors"]) == (15, {"RESOURCE_EXHAUSTED": 5})
    assert row["first_error"]["message"] == "R: no"


def test_a_row_can_be_measured_for_a_time(pairs: Path) -> None:
    with scripted(work_s=0.01) as server:
        code, document, _ = run(server, pairs, "--duration-s", "0.5", "--concurrency", "2", "--warmup", "0")
    (row,) = document["runs"]
    assert code == 0
    assert row["by_time"] is True
    assert 2 <= row["ok"] == row["requests"] <= 52
    assert row["seconds"] > 0.4


def test_a_change_of_what_the_server_says_of_itself_voids_the_row(pairs: Path) -> None:
    with scripted(change_at=5) as server:
        code, document, _ = run(server, pairs, "--requests", "10", "--warmup", "0")
    (row,) = document["runs"]
    assert code == 5
    assert row["status"] == "invalid"
    assert row["cause"] == "server_changed"
    assert row["reason"] == "the server no longer says the same of itself: fallbacks changed meanwhile"


def test_the_highest_rate_within_a_bound(pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server of at most 500 requests/s; so few requests that the search is quick, and the answer rough."""
    monkeypatch.setattr(rate_search, "requests_of", lambda bench: 60)
    experiment = tmp_path / "s.yaml"
    experiment.write_text(
        "name: scripted\nexperiment: {batch_sizes: [1], concurrency_levels: [], repeats: 1, warmup_iterations: 1,"
        " slo: {p99_ms: 40}, arrival: {process: constant}}\n"
    )
    with scripted(work_s=0.002) as server:
        code, document, _ = run(server, pairs, "--experiment", "--config", str(experiment))
    (found,) = document["slo"]
    assert found["rate_per_s"] is None or 1 < found["rate_per_s"] < 1000
    assert any(not probe["met"] for probe in found["probes"]), "it was driven beyond what the server bears"
    rows = [run for run in document["runs"] if run["slo"] == "confirmation"]
    assert [run["rate_per_s"] for run in rows] == ([] if found["rate_per_s"] is None else [found["rate_per_s"]])
    assert code == 0
    text = (tmp_path / "out.md").read_text()
    assert "## The highest rate within the bound" in text
