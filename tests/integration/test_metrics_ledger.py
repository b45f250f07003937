"""The figures against a ledger: what a known load sent, what the backend executed, what the log says."""

import asyncio
import logging
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families

import ml_inference_server
from ml_inference_server.metrics.table import CLOSED_BY, REASONS
from ml_inference_server.metrics.window import RELATIVE_ERROR
from ml_inference_server.proto import inference_pb2 as pb
from ml_inference_server.server.batching import ClosedBy
from ml_inference_server.utils.stages import STAGE_NAMES, STAGES
from tests.conftest import FakeServer, fake_server, refusal

SIZES = (1, 2, 3, 5, 8)
OPENMETRICS = "application/openmetrics-text; version=1.0.0"


def texts_of(count: int, length: int) -> list[str]:
    return [" ".join([f"w{number}"] * (length + number)) for number in range(count)]


async def known_load(server: FakeServer) -> Counter[str]:
    """Requests of every kind at once; what was sent."""
    ledger: Counter[str] = Counter()
    calls: list[Any] = []
    for turn in range(12):
        for size in SIZES:
            texts = texts_of(size, 3 + turn)
            calls.append(server.stub.Embed(pb.EmbedRequest(texts=texts)))
            pairs = [pb.Pair(query=f"q {text}", passage=f"p {text}") for text in texts]
            calls.append(server.stub.Score(pb.ScoreRequest(pairs=pairs)))
            calls.append(server.stub.Rerank(pb.RerankRequest(query="a query", documents=texts)))
            ledger.update(Embed=1, Score=1, Rerank=1, texts=size, pairs=2 * size, rows=size + 2 * size + size + 1)
    calls.append(server.stub.Embed(pb.EmbedRequest(texts=["long " * 400])))
    ledger.update(Embed=1, texts=1, rows=1, truncated=1)
    await asyncio.gather(*calls)
    for wrong in ([], [""], ["\ud7ff", " "]):
        await refusal(server.stub.Embed(pb.EmbedRequest(texts=wrong)))
    await refusal(server.stub.Embed(pb.EmbedRequest(texts=["!raise"])))
    messages = [pb.EmbedStreamRequest(id=i, request=pb.EmbedRequest(texts=["a b"])) for i in range(4)]
    answers = [answer async for answer in server.stub.EmbedStream(iter(messages))]
    ledger.update(EmbedStream=len(answers), texts=len(answers), rows=len(answers))
    return ledger


async def test_counts_equal_the_ledger_and_percentiles_keep_their_error(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "ml_inference_server.server.observation")
    async with fake_server(server={"enable_test_faults": True}, model={"name": "fake:base_ms=1"}) as server:
        ledger = await known_load(server)
        figures = server.metrics.snapshot()
        body, _ = server.metrics.prometheus(OPENMETRICS)
        executed = server.backend.log
    lines = [vars(record)["fields"] for record in caplog.records if record.message == "request"]
    totals = figures["totals"]

    answered = {method: codes["OK"] for method, codes in totals["by_method_and_code"].items() if codes}
    assert answered == {method: ledger[method] for method in ("Embed", "EmbedStream", "Score", "Rerank")}
    assert (totals["texts"], totals["pairs"], totals["truncated_texts"]) == (
        ledger["texts"], ledger["pairs"], ledger["truncated"],
    )  # fmt: skip
    assert totals["errors_by_reason"] == {"EMPTY_REQUEST": 1, "EMPTY_TEXT": 2, "BACKEND_ERROR": 1}
    assert totals["errors"] == 4
    assert totals["requests"] == len(lines) == sum(answered.values()) + 4

    # The backend's own log; the batches that raised are in it as well.
    sound = [batch for batch in executed if not any(10 in row for row in batch.rows)]
    computed = sum(len(batch.rows) for batch in sound)
    assert totals["shared_texts"] > 0
    assert computed + totals["shared_texts"] == ledger["rows"]
    tokens = sum(len(row) for batch in sound for row in batch.rows)
    assert totals["tokens"] == tokens
    assert totals["padding_tokens"] == sum(batch.padded_tokens for batch in sound) - tokens
    assert (totals["batches"] - totals["failed_batches"], totals["failed_batches"]) == (len(sound), 2)
    assert sum(figures["batch"]["closed_by"].values()) == len(sound)
    for name, expected in (("batch_texts", len(sound)), ("text_tokens", computed)):
        assert sum(figures["distributions"][name]["counts"]) == expected
    assert figures["queue"]["texts"] == figures["queue"]["tokens"] == 0
    assert not any(figures["in_flight"].values())

    durations_ms = sorted(line["duration_ms"] for line in lines if line["code"] == "OK")
    for name, share in (("p50", 50), ("p95", 95), ("p99", 99)):
        exact_ms = durations_ms[-(-share * len(durations_ms) // 100) - 1]
        assert figures["latency_ms"][name] == pytest.approx(exact_ms, rel=RELATIVE_ERROR * 1.001, abs=0.001)
    mean_ms = sum(durations_ms) / len(durations_ms)
    assert figures["latency_ms"]["avg"] == pytest.approx(mean_ms, abs=0.001)

    stages = figures["stages_ms"]
    assert min(stages.values()) >= 0
    assert sum(stages[name] for name in STAGE_NAMES) == pytest.approx(mean_ms, abs=0.001)
    assert stages["other"] < 0.001
    assert stages["engine"] >= 1  # what the fake model takes

    families = {family.name: family for family in text_string_to_metric_families(body.decode())}
    counted = {s.labels["stage"]: s.value for s in families["mlis_request_stage_seconds"].samples if "_count" in s.name}
    assert counted == dict.fromkeys(STAGE_NAMES, len(durations_ms))
    exemplars = [s.exemplar for s in families["mlis_request_duration_seconds"].samples if s.exemplar]
    by_id = {line["request_id"]: line["duration_ms"] for line in lines if line["method"] != "EmbedStream"}
    assert exemplars
    for exemplar in exemplars:
        request_id = exemplar.labels["request_id"]
        assert request_id in {line["request_id"] for line in lines}
        assert by_id.get(request_id, exemplar.value * 1e3) == pytest.approx(exemplar.value * 1e3, abs=0.001)


async def test_wire_and_metrics_agree_on_a_request_that_travels_in_several_batches() -> None:
    """The queue ends with the first of its batches, and the engine's time holds all of them."""
    async with fake_server(batching={"max_batch_size": 2}, model={"name": "fake:base_ms=2", "streams": 1}) as server:
        timing = (await server.stub.Embed(pb.EmbedRequest(texts=texts_of(8, 3)))).timing
        figures = server.metrics.snapshot()
        text = server.metrics.prometheus("")[0].decode()
    stages = figures["stages_ms"]
    assert figures["totals"]["batches"] == 4
    assert sum(stages[name] for name in STAGE_NAMES) == pytest.approx(stages["total"], abs=0.001)
    (in_batches_s,) = re.findall(r"^mlis_batch_compute_seconds_sum (.+)$", text, re.M)
    assert stages["engine"] >= 1e3 * float(in_batches_s) - 0.001 >= 4 * 2
    for stage in STAGES:
        if stage.wire:
            assert getattr(timing, stage.wire) == pytest.approx(1e3 * stages[stage.name], abs=1)
    assert timing.total_us == pytest.approx(1e3 * (stages["total"] - stages["reply"]), abs=1)


async def test_switched_off_nothing_is_recorded_and_requests_are_answered() -> None:
    async with fake_server() as server:
        server.metrics.enabled = False
        assert (await server.stub.Embed(pb.EmbedRequest(texts=["a"]))).count == 1
        figures = server.metrics.snapshot()
    assert figures["recording"] is False
    assert (figures["totals"]["requests"], figures["totals"]["batches"], figures["latency_ms"]) == (0, 0, None)
    assert not any(figures["in_flight"].values())


def test_every_reason_in_the_documents_is_one_of_the_table() -> None:
    document = Path(ml_inference_server.__file__).parent / "docs" / "rpcs.md"
    text = document.read_text(encoding="utf-8")
    table = text[text.index("| status | reason |") :].split("\n\n")[0]
    named = {word for row in table.splitlines()[2:] for word in re.findall(r"`([A-Z_]+)`", row.split("|")[2])}
    assert len(named) > 10
    assert named <= set(REASONS)


def test_every_way_to_close_a_batch_is_one_of_the_table() -> None:
    assert [reason.value for reason in ClosedBy] == list(CLOSED_BY)
