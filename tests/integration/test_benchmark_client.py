"""The benchmark client against real servers that answer, refuse, lie, stall and die."""

import asyncio
import json
import signal
from pathlib import Path
from typing import Any

import pytest

from ml_inference_server import client
from ml_inference_server.benchmark.load import channel, records
from ml_inference_server.benchmark.load.channel import TimedReply
from ml_inference_server.benchmark.load.loops import ClosedLoop, FinishedRequest, ServerGone
from tests.integration.benchmark_kit import Scripted, python, scripted, write_pairs


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    return write_pairs(tmp_path / "pairs.tsv")


@pytest.fixture
def quick_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    """A dead server is given up sooner."""
    monkeypatch.setattr(channel, "PROBE_TIMEOUT_S", 0.3)


def run(server: Scripted, pairs: Path, *flags: str) -> tuple[int, dict[str, Any]]:
    """(exit code, JSON document) of one call of the client; the document is empty where none was written."""
    output = pairs.with_name("out.md")
    code = client.main(["--port", str(server.port), "--dataset", str(pairs), "--output", str(output), *flags])
    data = output.with_suffix(".json")
    if not data.exists():
        return code, {}
    document = json.loads(data.read_text())
    kept = records.read(output.with_suffix(".npz"))
    assert {row["raw"]: row["started"] for row in document["runs"]} == {name: len(kept[name]) for name in kept}
    return code, document


def balanced(row: dict[str, Any]) -> bool:
    return bool(row["started"] == row["ok"] + sum(row["errors"].values()) + row["unfinished"])


def test_a_single_run_takes_from_the_environment_what_no_flag_says(
    pairs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One row of one text at a time is what it does where nobody asks for more."""
    monkeypatch.setenv("MLIS_EXPERIMENT__BATCH_SIZES", "[1, 2]")
    monkeypatch.setenv("MLIS_EXPERIMENT__CONCURRENCY_LEVELS", "[3]")
    with scripted() as server:
        code, document = run(server, pairs, "--concurrency", "2", "--requests", "4", "--warmup", "1",
                             "--set", "server.port=8080")  # fmt: skip
    assert code == 0
    assert [(row["batch_size"], row["concurrency"]) for row in document["runs"]] == [(1, 2), (2, 2)]


@pytest.mark.parametrize("workload", ["queries", "passages", "pairs"])
def test_a_single_run(pairs: Path, workload: str, capsys: pytest.CaptureFixture[str]) -> None:
    with scripted() as server:
        code, document = run(server, pairs, "--batch-size", "4", "--concurrency", "3", "--requests", "20",
                             "--warmup", "2", "--workload", workload)  # fmt: skip
    assert code == 0
    (row,) = document["runs"]
    assert (row["batch_size"], row["concurrency"], row["workload"]) == (4, 3, workload)
    assert (row["requests"], row["started"], row["ok"], row["errors"], row["unfinished"]) == (20, 20, 20, {}, 0)
    scored = workload == "pairs"
    assert (row["pairs"], row["texts"]) == ((80, 160) if scored else (0, 80))
    assert (row["pairs_per_s"] is not None) == scored
    assert row["requests_per_s"] == pytest.approx(20 / row["seconds"], rel=1e-3)
    assert row["texts_per_s"] == pytest.approx(row["texts"] / row["seconds"], rel=1e-3)
    assert set(row["latency_ms"]) == {"avg", "p50", "p95", "p99"}
    warmup = row["warmup"]
    assert warmup["requests"] == warmup["ok"] == 3 * warmup["rounds"], "a round keeps every worker busy"
    assert 2 <= warmup["rounds"] <= 5
    # 10 queries; 60 passages in as many pairs: all of them were sent, and some more than once.
    assert row["distinct_texts"] == {"queries": 10, "passages": 60, "pairs": 70}[workload]
    assert balanced(row)
    assert document["servers"][0]["info"]["settings"] == {"batching": {"enabled": True}}
    assert document["servers"][0]["info"]["resolved"]["parameters"] == 12
    assert document["dataset"]["sha256"]
    assert document["command"].startswith("python -m ml_inference_server.client --port")
    shown = capsys.readouterr()
    assert "scripted model, fp32 on nothing" in shown.out
    assert "row 1/1: batch 4, concurrency 3: 20 ok, 0 errors" in shown.err


def test_a_suite_runs_every_combination(pairs: Path, tmp_path: Path) -> None:
    experiment = tmp_path / "scripted.yaml"
    experiment.write_text(
        "name: scripted\nexperiment: {batch_sizes: [1, 2], concurrency_levels: [1, 3], benchmark_requests: 6,"
        " repeats: 2}\n"
    )
    with scripted() as server:
        code, document = run(server, pairs, "--experiment", "--config", str(experiment), "--warmup", "0",
                             "--set", "experiment.benchmark_requests=5")  # fmt: skip
    assert code == 0
    rows = [(row["batch_size"], row["concurrency"], row["ok"]) for row in document["runs"]]
    assert rows == 2 * [(1, 1, 5), (1, 3, 5), (2, 1, 5), (2, 3, 5)], "all rows in turn, then all of them again"
    text = (tmp_path / "out.md").read_text()
    assert text.startswith("# scripted: scripted model, fp32 on nothing\n")
    assert "Best throughput" in text


def test_failures_are_counted_by_code_and_no_worker_dies(pairs: Path) -> None:
    with scripted(abort_every=5, abort_code="RESOURCE_EXHAUSTED") as server:
        code, document = run(server, pairs, "--concurrency", "4", "--requests", "40", "--warmup", "0")
    (row,) = document["runs"]
    assert code == 5
    assert (row["ok"], row["errors"], row["unfinished"]) == (32, {"RESOURCE_EXHAUSTED": 8}, 0)
    assert (row["status"], row["cause"]) == ("failures", "requests_failed")
    assert row["reason"] == "8 of 40 requests failed"
    assert row["first_error"]["code"] == "RESOURCE_EXHAUSTED"
    assert row["first_error"]["message"].endswith("is refused")
    assert balanced(row)


def test_a_refusal_is_not_retried_into_a_success(pairs: Path) -> None:
    with scripted(abort_every=2, abort_code="UNAVAILABLE") as server:
        code, document = run(server, pairs, "--requests", "10", "--warmup", "0")
    (row,) = document["runs"]
    assert code == 5
    assert (row["started"], row["ok"], row["errors"]) == (10, 5, {"UNAVAILABLE": 5})


def test_nothing_but_failures_has_no_latency(pairs: Path) -> None:
    with scripted(abort_every=1) as server:
        code, document = run(server, pairs, "--requests", "6", "--concurrency", "2", "--warmup", "1")
    (row,) = document["runs"]
    assert code == 5
    assert (row["ok"], row["errors"], row["latency_ms"]) == (0, {"INTERNAL": 6}, None)
    assert row["warmup"]["errors"] == {"INTERNAL": 2 * row["warmup"]["rounds"]}


@pytest.mark.parametrize(
    ("workload", "wrong", "told"),
    [
        ("passages", "rows", "1 rows for 2 texts"),
        ("passages", "bytes", "31 bytes where 32 were expected"),
        ("passages", "nan", "not finite"),
        ("pairs", "rows", "1 scores for 2 pairs"),
        ("pairs", "inf", "not finite"),
    ],
)
def test_a_wrong_answer_is_an_error(pairs: Path, workload: str, wrong: str, told: str) -> None:
    with scripted(wrong_every=3, wrong=wrong) as server:
        code, document = run(server, pairs, "--workload", workload, "--batch-size", "2", "--requests", "9",
                             "--warmup", "0")  # fmt: skip
    (row,) = document["runs"]
    assert code == 5
    assert (row["ok"], row["errors"]) == (6, {"INVALID_RESPONSE": 3})
    assert told in row["first_error"]["message"]


@pytest.mark.usefixtures("quick_probe")
def test_a_server_killed_in_the_middle(pairs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The deadline is an hour: a client that waited for one request after another would never come back."""
    with scripted(die_at=50) as server:
        code, document = run(server, pairs, "--concurrency", "4", "--requests", "100000", "--timeout-ms", "3600000",
                             "--warmup", "0")  # fmt: skip
        assert server.process.wait() == -signal.SIGKILL
    (row,) = document["runs"]
    assert code == 5
    assert balanced(row)
    assert (row["status"], row["cause"]) == ("invalid", "server_gone")
    assert row["reason"] == "the server no longer answers"
    assert 50 <= row["started"] <= 53
    assert row["ok"] >= 46
    assert row["errors"]["UNAVAILABLE"] >= 1
    assert row["first_error"]["code"] == "UNAVAILABLE"
    assert 0 < row["first_error"]["after_s"] <= row["seconds"]
    assert "INVALID: the server no longer answers" in capsys.readouterr().out


@pytest.mark.usefixtures("quick_probe")
def test_rows_after_the_death_are_not_run_and_counted(pairs: Path, tmp_path: Path) -> None:
    experiment = tmp_path / "s.yaml"
    experiment.write_text(
        "experiment: {batch_sizes: [1, 2, 3], concurrency_levels: [1], warmup_iterations: 0, repeats: 1}\n"
    )
    with scripted(die_at=15) as server:  # in the second row: 10 requests belong to the first
        code, document = run(server, pairs, "--experiment", "--config", str(experiment), "--requests", "10")
    assert code == 5
    assert [row["status"] for row in document["runs"]] == ["valid", "invalid"]
    assert document["planned_rows"] == 3
    assert (document["runs"][1]["ok"], document["runs"][1]["errors"]) == (4, {"UNAVAILABLE": 1})
    assert balanced(document["runs"][1])
    assert "1 of 3 rows were not run" in (tmp_path / "out.md").read_text()


def test_a_restart_in_the_middle_voids_the_row(pairs: Path) -> None:
    with scripted(restart_at=5) as server:
        code, document = run(server, pairs, "--requests", "10", "--warmup", "0")
    (row,) = document["runs"]
    assert code == 5
    assert (row["status"], row["ok"]) == ("invalid", 10)
    assert "restarted" in row["reason"]


def test_a_stalled_server_costs_one_deadline(pairs: Path) -> None:
    """Its health still answers, so the run goes on: the held request alone is lost."""
    with scripted(hold_at=3) as server:
        code, document = run(server, pairs, "--requests", "6", "--warmup", "0", "--timeout-ms", "300")
    (row,) = document["runs"]
    assert code == 5
    assert (row["ok"], row["errors"]) == (5, {"DEADLINE_EXCEEDED": 1})


@pytest.mark.parametrize(("number", "expected"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_an_interruption_keeps_what_was_measured(pairs: Path, tmp_path: Path, number: int, expected: int) -> None:
    with scripted(hold_at=8) as server:
        process = python("-m", "ml_inference_server.client", "--port", str(server.port), "--dataset", str(pairs),
                         "--requests", "50", "--warmup", "0", "--output", "out.md", cwd=tmp_path)  # fmt: skip
        assert server.line() == "held"
        process.send_signal(number)
        out, err = process.communicate()
    assert process.returncode == expected, err
    document = json.loads((tmp_path / "out.json").read_text())
    (row,) = document["runs"]
    assert document["interrupted"] is True
    assert (row["started"], row["ok"], row["errors"], row["unfinished"]) == (8, 7, {}, 1)
    assert row["status"] == row["cause"] == "interrupted"
    assert "interrupted after 7 of 50 requests" in out
    assert "Traceback" not in err


def test_no_server(pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with scripted() as server:
        pass  # its port is free again
    code, document = run(server, pairs, "--connect-timeout-s", "0.5")
    assert (code, document) == (5, {})
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"Error: no server answers at 127.0.0.1:{server.port} (waited 0.5 s): start one with")


def test_a_server_that_is_not_ready(pairs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with scripted(serving=False) as server:
        code, _ = run(server, pairs, "--connect-timeout-s", "0.5")
    assert code == 5
    assert "did not become ready within 0.5 s (health says NOT_SERVING)" in capsys.readouterr().err


def test_bad_input_is_refused_before_any_load(pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    malformed = tmp_path / "bad.tsv"
    malformed.write_text("1\t2\tquery\n")
    queries = tmp_path / "queries.tsv"
    queries.write_text("1\tonly a query\n")
    qrels = tmp_path / "qrels"
    qrels.write_text("999 0 1 1\n")
    with scripted(max_texts=16) as server:
        for flags, told in (
            (["--dataset", str(tmp_path / "none.tsv")], "none.tsv: no such file"),
            (["--dataset", str(malformed)], "bad.tsv:1: 3 tab-separated column(s), expected"),
            (["--dataset", str(queries)], "queries.tsv holds queries only"),
            (["--batch-size", "17"], "batch size 17 is more than this server takes in one request (16)"),
            (["--experiment"], "--experiment needs --config FILE"),
            (["--experiment", "--config", "x.yaml", "--batch-size", "2"], "--batch-size and --concurrency are for"),
            (["--config", str(tmp_path / "none.yaml")], "none.yaml: no such file"),
            (["--set", "model.device=cpu"], "the client obeys experiment.* only"),
            (["--set", "experiment.seeds=1"], "did you mean experiment.seed?"),
            (["--warmup", "-1"], "warmup_iterations"),
            (["--rate", "5", "--concurrency", "2"], "--rate sends whether or not answers come"),
            (["--set", "experiment.concurrency_levels=[]"], "nothing to measure"),
            (["--streaming"], "experiment.streaming is for embeddings"),
            (["--set", "experiment.quality.enabled=true", "--set", "experiment.quality.pairs=a"], "belong together"),
            (
                [
                    "--set",
                    "experiment.quality.enabled=true",
                    "--set",
                    f"experiment.quality.pairs={pairs}",
                    "--set",
                    f"experiment.quality.qrels={qrels}",
                ],
                "have no query in common",
            ),
            (["--output", str(tmp_path)], "an ordinary file is needed"),
        ):
            code, document = run(server, pairs, *flags)
            assert (code, document) == (2, {}), flags
            error = capsys.readouterr().err
            assert error.startswith("Error: "), flags
            assert told in error, flags
    for flags in (["--batch-size", "0"], ["--requests", "many"], ["--workload", "images"], ["--unknown"]):
        with pytest.raises(SystemExit) as refused:
            client.main(flags)
        assert refused.value.code == 2


def test_what_the_server_says_of_itself_reaches_the_title(pairs: Path, tmp_path: Path) -> None:
    with scripted(
        title="M: requested mps fp16 -> ran cpu bf16", fallbacks=["no mps here"], random_weights=True
    ) as server:
        run(server, pairs, "--requests", "2", "--warmup", "0")
    text = (tmp_path / "out.md").read_text()
    assert text.startswith("# M: requested mps fp16 -> ran cpu bf16\n")
    assert "not as requested: no mps here" in text
    assert "weights are random" in text


async def test_every_worker_keeps_sending_while_some_requests_fail() -> None:
    in_flight = most = 0

    async def send(index: int, due_s: float | None) -> FinishedRequest:
        nonlocal in_flight, most
        in_flight += 1
        most = max(most, in_flight)
        await asyncio.sleep(0)
        in_flight -= 1
        return FinishedRequest(0.0, 0.0, 0.0, TimedReply("INTERNAL" if index % 10 == 0 else "OK", ""))

    async def alive() -> bool:
        raise AssertionError("INTERNAL is an answer: nobody needs to ask whether the server lives")

    loop = ClosedLoop(send, alive, lambda call: None)
    await loop.run(requests=1000, concurrency=7)
    assert (loop.ledger.started, loop.ledger.ok, loop.ledger.errors) == (1000, 900, {"INTERNAL": 100})
    assert most == 7


async def test_workers_that_fail_together_ask_once_and_go_on() -> None:
    probes = 0
    together = asyncio.Barrier(4)

    async def send(index: int, due_s: float | None) -> FinishedRequest:
        await together.wait()
        return FinishedRequest(0.0, 0.0, 0.0, TimedReply("UNAVAILABLE" if index < 4 else "OK", ""))

    async def alive() -> bool:
        nonlocal probes
        probes += 1
        await asyncio.sleep(0)
        return True

    loop = ClosedLoop(send, alive, lambda call: None)
    await loop.run(requests=8, concurrency=4)
    assert (loop.ledger.errors, loop.ledger.ok) == ({"UNAVAILABLE": 4}, 4)
    assert probes < 4  # the last to fail may need a second one; each its own would be four


async def test_a_dead_server_ends_the_loop_with_balanced_books() -> None:
    async def send(index: int, due_s: float | None) -> FinishedRequest:
        if index:
            await asyncio.Event().wait()
        return FinishedRequest(0.0, 0.0, 0.0, TimedReply("DEADLINE_EXCEEDED", ""))

    async def dead() -> bool:
        return False

    loop = ClosedLoop(send, dead, lambda call: None)
    with pytest.raises(ServerGone):
        await loop.run(requests=100, concurrency=5)
    assert (loop.ledger.started, len(loop.ledger.calls), loop.ledger.unfinished) == (5, 1, 4)


# Spelt as in grpc's channel_arg_names.h; a key that it does not know is ignored without a word.
KNOWN_OPTIONS = {
    "grpc.max_receive_message_length",
    "grpc.max_send_message_length",
    "grpc.keepalive_time_ms",
    "grpc.keepalive_timeout_ms",
    "grpc.http2.ping_timeout_ms",
    "grpc.initial_reconnect_backoff_ms",
    "grpc.min_reconnect_backoff_ms",
    "grpc.max_reconnect_backoff_ms",
    "grpc.enable_retries",
    "grpc.enable_http_proxy",
    "grpc.use_local_subchannel_pool",
}


def test_channel_options_are_ones_that_grpc_knows() -> None:
    assert {key for key, _ in channel.CHANNEL_OPTIONS} <= KNOWN_OPTIONS
    assert all(type(value) is int for _, value in channel.CHANNEL_OPTIONS)
