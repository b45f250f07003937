"""Traces and logs of real requests: complete, linked, with the ids that the callers see, and without their texts."""

import asyncio
import itertools
import json
import signal
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_status import rpc_status

from ml_inference_server.metrics import tracing
from ml_inference_server.metrics.tracing import Tracer
from ml_inference_server.proto import inference_pb2 as pb
from ml_inference_server.proto import inference_pb2_grpc as rpc
from ml_inference_server.utils.errors import ConfigError
from ml_inference_server.utils.stages import STAGE_NAMES
from tests.conftest import fake_server, refusal, until
from tests.integration.otlp_receiver import Receiver, attributes, otlp_receiver
from tests.integration.server_process import server_process

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
WORD = "xylophone"


def assert_stages(receiver: Receiver, request: Any) -> None:
    stages = receiver.children(request)
    assert set(stages) == set(STAGE_NAMES)
    in_order = [stages[name] for name in STAGE_NAMES]
    assert in_order[0].start_time_unix_nano == pytest.approx(request.start_time_unix_nano, abs=50_000)
    assert in_order[-1].end_time_unix_nano == pytest.approx(request.end_time_unix_nano, abs=50_000)
    for before, after in itertools.pairwise(in_order):
        assert before.end_time_unix_nano == pytest.approx(after.start_time_unix_nano, abs=50_000)


async def test_a_batch_is_linked_to_its_requests_and_they_to_it() -> None:
    async with otlp_receiver() as receiver, fake_server(model={"streams": 1}) as server:
        server.metrics.tracer = Tracer(receiver.endpoint)
        server.backend.hold()
        first = asyncio.ensure_future(server.stub.Embed(pb.EmbedRequest(texts=["one"])))
        await until(lambda: server.metrics.snapshot()["queue"]["batches_in_flight"] == 1)
        metadata = (("x-request-id", "mine-1"), ("traceparent", f"00-{TRACE}-{PARENT}-01"))
        others = [
            asyncio.ensure_future(server.stub.Embed(pb.EmbedRequest(texts=[f"{WORD} two"]), metadata=metadata)),
            asyncio.ensure_future(server.stub.Score(pb.ScoreRequest(pairs=[pb.Pair(query="a b", passage="c d")]))),
        ]
        await until(lambda: server.metrics.snapshot()["queue"]["texts"] == 3)
        server.backend.release()
        await asyncio.gather(first, *others)
        await asyncio.to_thread(server.metrics.tracer.close)
    assert receiver.resource["service.name"] == "ml-inference-server"
    [mine] = [span for span in receiver.named("Embed") if attributes(span)["request.id"] == "mine-1"]
    [score] = receiver.named("Score")
    assert (mine.trace_id.hex(), mine.parent_span_id.hex()) == (TRACE, PARENT)
    for request in (*receiver.named("Embed"), score):
        assert_stages(receiver, request)
    batch = next(span for span in receiver.named("batch") if attributes(span)["texts"] == 3)
    assert {link.span_id for link in batch.links} == {mine.span_id, score.span_id}
    assert attributes(batch) == {"texts": 3, "tokens": 12, "padded_tokens": 12, "closed_by": "idle"}
    assert set(receiver.children(batch)) == {"engine"}
    assert batch.trace_id not in (mine.trace_id, score.trace_id)
    assert [link.span_id for link in receiver.children(mine)["engine"].links] == [batch.span_id]
    assert len(receiver.named("batch")) == 2
    assert WORD.encode() not in receiver.raw


async def test_a_refused_request_is_a_failed_span() -> None:
    async with otlp_receiver() as receiver, fake_server() as server:
        server.metrics.tracer = Tracer(receiver.endpoint)
        await refusal(server.stub.Embed(pb.EmbedRequest(texts=[""])))
        await asyncio.to_thread(server.metrics.tracer.close)
    [span] = receiver.spans
    assert span.status.code == span.status.STATUS_CODE_ERROR
    assert attributes(span)["rpc.grpc.status"] == "INVALID_ARGUMENT"


async def test_an_endpoint_that_does_not_answer_harms_nobody(
    unused_tcp_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracing, "CLOSE_TIMEOUT_S", 0.05)
    async with fake_server() as server:
        server.metrics.tracer = Tracer(f"http://127.0.0.1:{unused_tcp_port}")
        assert (await server.stub.Embed(pb.EmbedRequest(texts=["one"]))).count == 1
        await asyncio.to_thread(server.metrics.tracer.close)


def test_an_endpoint_that_is_no_url_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"metrics\.otlp_endpoint 'localhost:4317' is no URL"):
        Tracer("localhost:4317")


def test_a_missing_opentelemetry_is_named_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(ConfigError, match="pip install -r requirements-tracing.txt"):
        Tracer("http://localhost:4318")


async def test_log_lines_traces_and_errors_carry_the_same_request_id(tmp_path: Path) -> None:
    async with otlp_receiver() as receiver:
        flags = ["--otlp-endpoint", receiver.endpoint, "--log-format", "json", "--log-level", "DEBUG"]
        faults = ["--set", "server.enable_test_faults=true"]
        with server_process(tmp_path, *flags, *faults) as server:
            ports = await asyncio.to_thread(server.ready)
            async with grpc.aio.insecure_channel(f"127.0.0.1:{ports['grpc_port']}") as channel:
                stub = rpc.InferenceServiceStub(channel)
                await stub.Embed(pb.EmbedRequest(texts=[WORD]), metadata=(("x-request-id", "good"),))
                error = await refusal(stub.Embed(pb.EmbedRequest(texts=[f"!raise {WORD}"])))
            server.signal(signal.SIGTERM)
            code, stderr = await asyncio.to_thread(server.end)
    assert code == 0
    assert WORD not in stderr
    lines = [json.loads(line) for line in stderr.splitlines()]
    told = {line["request_id"]: line for line in lines if line["message"] == "request"}
    spans = {attributes(span)["request.id"]: span for span in receiver.named("Embed")}
    failed = dict(error.trailing_metadata() or ())["request-id"]
    assert set(told) == set(spans) == {"good", failed}
    for request_id, line in told.items():
        assert line["trace_id"] == spans[request_id].trace_id.hex()
    good, bad = told["good"], told[failed]
    assert (good["code"], good["texts"], bad["code"], bad["reason"]) == ("OK", 1, "INTERNAL", "BACKEND_ERROR")
    assert sum(good[f"{stage}_ms"] for stage in STAGE_NAMES) == pytest.approx(good["duration_ms"], abs=0.01)
    [cause] = [line for line in lines if line["level"] == "ERROR"]
    assert failed in cause["message"]
    assert "fault word !raise" in cause["exception"]
    status = rpc_status.from_call(error)
    assert status is not None
    assert failed in str(status.details)
