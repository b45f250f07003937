"""The server's own wire over a real channel: answers, errors with their status and hints, and a server that goes on."""

import asyncio
import dataclasses
import itertools
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf.message import Message
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_status import rpc_status

from ml_inference_server.backends.fake import fake_embedding
from ml_inference_server.proto import inference_pb2 as pb
from ml_inference_server.server.rpc.grpc_server import server_options
from ml_inference_server.server.rpc.native import SERVICE
from ml_inference_server.utils.config import ServerSettings
from tests.conftest import FakeServer, fake_server, raw, refusal, until

Code = grpc.StatusCode


def matrix(reply: pb.EmbedResponse) -> np.ndarray:
    return np.frombuffer(reply.embeddings, "<f4").reshape(reply.count, reply.dimension)


async def assert_still_serving(server: FakeServer) -> None:
    reply = await server.stub.Embed(pb.EmbedRequest(texts=["are you well"]))
    np.testing.assert_array_equal(matrix(reply)[0], fake_embedding("are you well"))
    assert server.model.admission.requests == 0


def details(error: grpc.aio.AioRpcError) -> tuple[str, list[str]]:
    """(reason, violated fields) from the rich status."""
    status = rpc_status.from_call(error)
    assert status is not None
    info, bad = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
    fields: list[str] = []
    for detail in status.details:
        if detail.Is(info.DESCRIPTOR):
            detail.Unpack(info)
        elif detail.Is(bad.DESCRIPTOR):
            detail.Unpack(bad)
            fields = [violation.field for violation in bad.field_violations]
    return info.reason, fields


async def test_embed_answers_in_order_and_computes_equal_texts_once(server: FakeServer) -> None:
    texts = ["b", "a", "b", "a longer text", "a"]
    reply = await server.stub.Embed(pb.EmbedRequest(texts=texts))
    np.testing.assert_array_equal(matrix(reply), np.stack([fake_embedding(text) for text in texts]))
    assert sum(len(batch.rows) for batch in server.backend.log) == 3
    assert reply.timing.total_us >= reply.timing.compute_us
    assert reply.truncated == 0


async def test_a_request_larger_than_any_batch_is_split_and_joined() -> None:
    async with fake_server(batching={"max_batch_size": 7}) as server:
        texts = [f"text number {i}" for i in range(100)]
        reply = await server.stub.Embed(pb.EmbedRequest(texts=texts))
        np.testing.assert_array_equal(matrix(reply), np.stack([fake_embedding(text) for text in texts]))
        assert max(len(batch.rows) for batch in server.backend.log) == 7


async def test_score_is_the_cosine(server: FakeServer) -> None:
    pairs = [("q", "p"), ("q", "q"), ("other", "p")]
    reply = await server.stub.Score(pb.ScoreRequest(pairs=[pb.Pair(query=q, passage=p) for q, p in pairs]))
    expected = [float(fake_embedding(q) @ fake_embedding(p)) for q, p in pairs]
    np.testing.assert_allclose(reply.scores, expected, atol=1e-6)


async def test_rerank_orders_and_keeps_the_order_of_equals(server: FakeServer) -> None:
    documents = ["x", "query", "y", "query", "z"]
    reply = await server.stub.Rerank(pb.RerankRequest(query="query", documents=documents))
    indexes = [rank.index for rank in reply.ranks]
    scores = [rank.score for rank in reply.ranks]
    assert indexes[:2] == [1, 3]
    assert sorted(indexes) == list(range(5))
    assert scores == sorted(scores, reverse=True)
    top = await server.stub.Rerank(pb.RerankRequest(query="query", documents=documents, top_k=2))
    assert [rank.index for rank in top.ranks] == [1, 3]


async def test_long_texts_are_cut_and_counted_or_refused(server: FakeServer) -> None:
    long = "word " * 300
    reply = await server.stub.Embed(pb.EmbedRequest(texts=[long, "short", long]))
    assert reply.truncated == 2
    error = await refusal(server.stub.Embed(pb.EmbedRequest(texts=["short", long], truncate=False)))
    assert error.code() is Code.INVALID_ARGUMENT
    assert details(error) == ("TEXT_TOO_LONG", ["texts[1]"])
    await assert_still_serving(server)


BAD: list[tuple[str, str, Message, str, list[str]]] = [
    ("empty list", "Embed", pb.EmbedRequest(), "EMPTY_REQUEST", ["texts"]),
    ("empty text", "Embed", pb.EmbedRequest(texts=["a", "", " \t\n", "\u200b\ufeff"]), "EMPTY_TEXT",
     ["texts[1]", "texts[2]", "texts[3]"]),
    ("10 MB text", "Embed", pb.EmbedRequest(texts=["x" * 10_000_000]), "TEXT_TOO_LONG", ["texts[0]"]),
    ("100,000 texts", "Embed", pb.EmbedRequest(texts=["x"] * 100_000), "TOO_MANY_TEXTS", ["texts"]),
    ("unknown prompt", "Embed", pb.EmbedRequest(texts=["x"], prompt_name="nope"), "INVALID_FIELD", ["prompt_name"]),
    ("no pairs", "Score", pb.ScoreRequest(), "EMPTY_REQUEST", ["pairs"]),
    ("half a pair", "Score", pb.ScoreRequest(pairs=[pb.Pair(query="q")]), "EMPTY_TEXT", ["pairs[0].passage"]),
    ("no documents", "Rerank", pb.RerankRequest(query="q"), "EMPTY_REQUEST", ["documents"]),
    ("no query", "Rerank", pb.RerankRequest(documents=["d"]), "EMPTY_TEXT", ["query"]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "method", "request_", "reason", "fields"), BAD, ids=[row[0] for row in BAD])
async def test_bad_input_is_refused_by_field_and_never_queued(
    server: FakeServer, name: str, method: str, request_: Message, reason: str, fields: list[str]
) -> None:
    error = await refusal(getattr(server.stub, method)(request_))
    assert error.code() is Code.INVALID_ARGUMENT
    assert details(error) == (reason, fields)
    assert "grpc-retry-pushback-ms" not in dict(error.trailing_metadata())
    assert server.backend.log == []
    await assert_still_serving(server)


async def test_nul_bytes_and_odd_characters_are_text(server: FakeServer) -> None:
    texts = ["abc\0def", "\x01\x1f", "🙂 emoji", "שלום right to left", "e\u0301" * 50, "\u202e"]
    reply = await server.stub.Embed(pb.EmbedRequest(texts=texts))
    np.testing.assert_array_equal(matrix(reply), np.stack([fake_embedding(text) for text in texts]))


@pytest.mark.parametrize(
    "noise",
    [b"\x0a\x02\xff\xfe", b"\x0a\x03\xed\xa0\x80", b"\x0a\xff", b"\xff" * 20],
    ids=["not UTF-8", "lone surrogate", "cut short", "noise"],
)
async def test_an_undecodable_message_is_an_invalid_argument(server: FakeServer, noise: bytes) -> None:
    call = raw(server.channel).unary_unary(f"/{SERVICE}/Embed", request_serializer=lambda b: b)
    error = await refusal(call(noise))
    assert error.code() is Code.INVALID_ARGUMENT
    assert details(error)[0] == "MALFORMED_REQUEST"
    await assert_still_serving(server)


async def test_a_message_above_the_limit_is_refused_and_the_next_one_served() -> None:
    async with fake_server(server={"max_message_bytes": 65_536, "max_text_bytes": 65_536}) as server:
        error = await refusal(server.stub.Embed(pb.EmbedRequest(texts=["x" * 70_000])))
        assert error.code() is Code.RESOURCE_EXHAUSTED
        await assert_still_serving(server)


SMALL = {"max_message_bytes": 65_536, "max_text_bytes": 65_536, "max_texts": 20_000}


def reply_errors(server: FakeServer, method: str) -> dict[str, int]:
    return {code: n for code, n in server.metrics.snapshot()["totals"]["by_method_and_code"][method].items() if n}


async def test_an_answer_that_would_not_fit_is_refused_before_it_is_computed() -> None:
    """gRPC refuses to send it, after all the work, and the caller is not told how many would fit."""
    async with fake_server(server=dict(SMALL), batching={"max_queue_tokens": 1_000_000}) as server:
        many = pb.EmbedRequest(texts=["x"] * 2050)  # of 8 numbers each
        error = await refusal(server.stub.Embed(many))
        assert error.code() is Code.INVALID_ARGUMENT
        assert details(error) == ("REPLY_TOO_LARGE", ["texts"])
        assert "send at most 1573 at once, or raise server.max_message_bytes" in (error.details() or "")
        replies = await stream(server, [pb.EmbedStreamRequest(id=1, request=many)])
        assert replies[1].error.reason == "REPLY_TOO_LARGE"
        documents = ["x"] * 6000
        error = await refusal(server.stub.Rerank(pb.RerankRequest(query="q", documents=documents)))
        assert details(error) == ("REPLY_TOO_LARGE", ["documents"])
        assert server.backend.log == []
        for method in ("Embed", "EmbedStream", "Rerank"):
            assert reply_errors(server, method) == {"INVALID_ARGUMENT": 1}, method
        assert server.metrics.snapshot()["totals"]["errors_by_reason"] == {"REPLY_TOO_LARGE": 3}
        await assert_still_serving(server)


async def test_the_largest_answers_that_fit_are_given() -> None:
    async with fake_server(server=dict(SMALL), batching={"max_queue_tokens": 1_000_000}) as server:
        largest = pb.EmbedRequest(texts=["x"] * 1573)
        assert (await server.stub.Embed(largest)).count == 1573
        message = pb.EmbedStreamRequest(id=2**64 - 1, request=largest)
        assert (await stream(server, [message]))[2**64 - 1].response.count == 1573
        documents = ["x"] * 3225
        reply = await server.stub.Rerank(pb.RerankRequest(query="q", documents=documents))
        assert len(reply.ranks) == 3225
        reply = await server.stub.Rerank(pb.RerankRequest(query="q", documents=["x"] * 7_000, top_k=10))
        assert len(reply.ranks) == 10
        pairs = [pb.Pair(query="q", passage="p")] * 8191
        assert len((await server.stub.Score(pb.ScoreRequest(pairs=pairs))).scores) == 8191


async def test_a_limit_below_a_single_embedding_names_the_setting() -> None:
    async with fake_server(server=dict(SMALL)) as server:
        described = server.model.described
        wide = dataclasses.replace(described, info=dataclasses.replace(described.info, dimension=20_000))
        server.state.model = dataclasses.replace(server.model, described=wide)
        error = await refusal(server.stub.Embed(pb.EmbedRequest(texts=["x"])))
        assert (error.details() or "").endswith("the limit is 65536: raise server.max_message_bytes")


async def test_an_unknown_method_is_unimplemented(server: FakeServer) -> None:
    error = await refusal(raw(server.channel).unary_unary(f"/{SERVICE}/Nothing")(b""))
    assert error.code() is Code.UNIMPLEMENTED


async def test_a_poisoned_text_fails_alone(server: FakeServer) -> None:
    server.backend.hold()
    texts = ["one", "two !raise", "three", "four !nan", "five"]
    calls = [asyncio.ensure_future(server.stub.Embed(pb.EmbedRequest(texts=[text]))) for text in ["first", *texts]]
    await until(lambda: server.model.admission.requests == 6)
    server.backend.release()
    outcomes = await asyncio.gather(*calls, return_exceptions=True)
    for text, outcome in zip(["first", *texts], outcomes, strict=True):
        if "!" in text:
            assert isinstance(outcome, grpc.aio.AioRpcError)
            assert outcome.code() is Code.INTERNAL
            assert details(outcome)[0] == ("BACKEND_ERROR" if "!raise" in text else "NON_FINITE_OUTPUT")
            assert "fault word" not in (outcome.details() or "")
        else:
            assert isinstance(outcome, pb.EmbedResponse)
            np.testing.assert_array_equal(matrix(outcome)[0], fake_embedding(text))
    await assert_still_serving(server)


async def test_a_wrong_row_count_gives_nobody_a_wrong_answer(server: FakeServer) -> None:
    texts = ["one", "two !short", "three"]
    outcomes = await asyncio.gather(
        *(server.stub.Embed(pb.EmbedRequest(texts=[text])) for text in texts), return_exceptions=True
    )
    assert isinstance(outcomes[1], grpc.aio.AioRpcError)
    for text, outcome in zip(texts[::2], outcomes[::2], strict=True):
        assert isinstance(outcome, pb.EmbedResponse)
        np.testing.assert_array_equal(matrix(outcome)[0], fake_embedding(text))


async def test_a_full_queue_refuses_at_once_with_both_hints() -> None:
    async with fake_server(batching={"max_queue_requests": 2}) as server:
        server.backend.hold()
        held = [asyncio.ensure_future(server.stub.Embed(pb.EmbedRequest(texts=[t]))) for t in ("a", "b")]
        await until(lambda: server.model.admission.requests == 2)
        error = await refusal(server.stub.Embed(pb.EmbedRequest(texts=["c"])))
        assert error.code() is Code.RESOURCE_EXHAUSTED
        assert int(dict(error.trailing_metadata())["grpc-retry-pushback-ms"]) >= 20
        assert details(error)[0] == "QUEUE_FULL"
        server.backend.release()
        await asyncio.gather(*held)
        await assert_still_serving(server)


async def test_a_stock_client_with_a_retry_policy_comes_back_and_succeeds() -> None:
    """Only a refusal without message and initial metadata is retried: protects the use of abort."""
    policy = (
        '{"methodConfig":[{"name":[{}],"retryPolicy":{"maxAttempts":5,"initialBackoff":"0.01s","maxBackoff":"0.01s",'
        '"backoffMultiplier":1,"retryableStatusCodes":["RESOURCE_EXHAUSTED"]}}]}'
    )
    async with fake_server(batching={"max_queue_requests": 1}) as server:
        server.backend.hold()
        held = asyncio.ensure_future(server.stub.Embed(pb.EmbedRequest(texts=["a"])))
        await until(lambda: server.model.admission.requests == 1)
        async with grpc.aio.insecure_channel(server.address, options=[("grpc.service_config", policy)]) as channel:
            call = channel.unary_unary(
                f"/{SERVICE}/Embed", pb.EmbedRequest.SerializeToString, pb.EmbedResponse.FromString
            )
            retried = asyncio.ensure_future(call(pb.EmbedRequest(texts=["b"])))

            def refused() -> int:
                codes: dict[str, int] = server.metrics.snapshot()["totals"]["by_method_and_code"]["Embed"]
                return codes.get("RESOURCE_EXHAUSTED", 0)

            await until(lambda: refused() >= 1)
            server.backend.release()
            np.testing.assert_array_equal(matrix(await retried)[0], fake_embedding("b"))
        await held


async def test_deadline_and_cancel_take_the_text_out_of_the_queue(server: FakeServer) -> None:
    server.backend.hold()
    slots = server.backend.info.concurrency
    running = []
    for slot in range(1, slots + 1):  # one after another: sent together, they may share a batch
        running.append(asyncio.ensure_future(server.stub.Embed(pb.EmbedRequest(texts=[f"r {slot}"]))))
        await until(lambda: len(server.backend.log) == slot)  # noqa: B023 - awaited before the next turn
    admission = server.model.admission
    leaving = server.stub.Embed(pb.EmbedRequest(texts=["leaving"]))
    await until(lambda: admission.requests == slots + 1)
    leaving.cancel()
    await until(lambda: admission.requests == slots)
    late = await refusal(server.stub.Embed(pb.EmbedRequest(texts=["late"]), timeout=0.05))
    assert late.code() is Code.DEADLINE_EXCEEDED
    await until(lambda: admission.requests == slots)
    server.backend.release()
    await asyncio.gather(*running)
    assert sum(len(batch.rows) for batch in server.backend.log) == slots


async def test_the_servers_own_deadline_ends_a_call_that_brings_none() -> None:
    async with fake_server(server={"default_timeout_ms": 50}) as server:
        server.backend.hold()
        error = await refusal(server.stub.Embed(pb.EmbedRequest(texts=["a"])))
        assert error.code() is Code.DEADLINE_EXCEEDED


async def test_request_ids_are_echoed_if_sound_and_made_otherwise(server: FakeServer) -> None:
    for sent, echoed in (("my-id.7", True), ("x" * 65, False), ("a b", False)):
        call = server.stub.Embed(pb.EmbedRequest(texts=["a"]), metadata=(("x-request-id", sent),))
        await call
        got = dict(await call.trailing_metadata())["request-id"]
        assert (got == sent) is echoed


async def test_while_the_model_loads_calls_are_told_to_come_back(server: FakeServer) -> None:
    server.state.model = None
    error = await refusal(server.stub.Embed(pb.EmbedRequest(texts=["a"])))
    assert error.code() is Code.UNAVAILABLE
    assert details(error)[0] == "MODEL_LOADING"
    assert "grpc-retry-pushback-ms" in dict(error.trailing_metadata())
    server.state.model = server.model


async def test_an_unexpected_exception_stays_in_the_log(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*args: Any, **kwargs: Any) -> Any:
        raise KeyError("/secret/path")

    monkeypatch.setattr(server.model.service, "embed", broken)
    error = await refusal(server.stub.Embed(pb.EmbedRequest(texts=["a"])))
    assert error.code() is Code.INTERNAL
    assert "secret" not in (error.details() or "")
    assert "secret" in caplog.text


async def stream(server: FakeServer, requests: list[pb.EmbedStreamRequest]) -> dict[int, pb.EmbedStreamResponse]:
    call = server.stub.EmbedStream(iter(requests))
    return {reply.id: reply async for reply in call}


async def test_the_stream_answers_every_id_and_outlives_a_bad_request(server: FakeServer) -> None:
    requests = [pb.EmbedStreamRequest(id=i, request=pb.EmbedRequest(texts=[f"text {i}"])) for i in range(200)]
    requests[7].request.texts[0] = ""
    requests[9].request.texts[0] = "!raise"
    replies = await stream(server, requests)
    assert sorted(replies) == list(range(200))
    assert (replies[7].error.reason, replies[7].error.code) == ("EMPTY_TEXT", Code.INVALID_ARGUMENT.value[0])
    assert replies[9].error.reason == "BACKEND_ERROR"
    for i in set(range(200)) - {7, 9}:
        np.testing.assert_array_equal(matrix(replies[i].response)[0], fake_embedding(f"text {i}"))


async def test_the_stream_answers_in_the_order_of_completion(server: FakeServer) -> None:
    call = server.stub.EmbedStream()
    server.backend.hold()
    await call.write(pb.EmbedStreamRequest(id=1, request=pb.EmbedRequest(texts=["held"])))
    await until(lambda: len(server.backend.log) == 1)
    await call.write(pb.EmbedStreamRequest(id=2, request=pb.EmbedRequest()))
    assert (await call.read()).id == 2
    server.backend.release()
    assert (await call.read()).id == 1
    await call.done_writing()
    assert await call.read() is grpc.aio.EOF


async def test_a_stream_may_stay_open_longer_than_one_request_may_take() -> None:
    """Each message has a deadline of its own."""
    async with fake_server(server={"default_timeout_ms": 200}) as server:
        call = server.stub.EmbedStream()
        server.backend.hold()
        await call.write(pb.EmbedStreamRequest(id=1, request=pb.EmbedRequest(texts=["held"])))
        assert (await call.read()).error.reason == "DEADLINE_EXCEEDED"
        server.backend.release()
        await call.write(pb.EmbedStreamRequest(id=2, request=pb.EmbedRequest(texts=["later"])))
        assert (await call.read()).WhichOneof("outcome") == "response"


async def test_an_idle_stream_ends_when_the_server_drains(server: FakeServer) -> None:
    call = server.stub.EmbedStream()
    await call.write(pb.EmbedStreamRequest(id=1, request=pb.EmbedRequest(texts=["a"])))
    assert (await call.read()).id == 1
    server.state.draining.set()
    error = await refusal(call.read())
    assert error.code() is Code.UNAVAILABLE


async def test_health_and_reflection(server: FakeServer) -> None:
    stub = health_pb2_grpc.HealthStub(server.channel)
    for name, serving in (("", True), (SERVICE, True)):
        reply = await stub.Check(health_pb2.HealthCheckRequest(service=name))
        assert (reply.status == health_pb2.HealthCheckResponse.SERVING) is serving
    assert (await refusal(stub.Check(health_pb2.HealthCheckRequest(service="x")))).code() is Code.NOT_FOUND
    reflection = reflection_pb2_grpc.ServerReflectionStub(server.channel)
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    async for reply in reflection.ServerReflectionInfo(iter([request])):
        assert SERVICE in [service.name for service in reply.list_services_response.service]


async def test_server_info_tells_requested_and_resolved(server: FakeServer) -> None:
    info = await server.stub.GetServerInfo(pb.GetServerInfoRequest())
    assert info.requested.backend == "fake"
    assert (info.resolved.device, info.resolved.dtype, info.resolved.dimension) == ("cpu", "float32", 8)
    assert info.title == "fake, fake fp32 on cpu (none)"
    assert info.max_texts == 1024


async def test_metrics_count_every_outcome(server: FakeServer) -> None:
    await server.stub.Embed(pb.EmbedRequest(texts=["a", "b"]))
    await server.stub.Score(pb.ScoreRequest(pairs=[pb.Pair(query="a", passage="b")]))
    await refusal(server.stub.Embed(pb.EmbedRequest()))
    await server.stub.GetServerInfo(pb.GetServerInfoRequest())  # a question about the server is no work
    reply = await server.stub.GetMetrics(pb.GetMetricsRequest())
    assert (reply.requests_by_code["OK"], reply.requests_by_code["INVALID_ARGUMENT"]) == (2, 1)
    assert (reply.requests_total, reply.errors_total) == (3, 1)
    assert reply.latency_ms.p50 > 0


def test_channel_options_are_names_that_grpc_knows() -> None:
    """gRPC ignores a misspelt option in silence. The list is of grpc/impl/channel_arg_names.h."""
    known = {
        "grpc.max_receive_message_length", "grpc.max_send_message_length", "grpc.so_reuseport",
        "grpc.max_concurrent_streams", "grpc.keepalive_time_ms", "grpc.keepalive_timeout_ms",
        "grpc.keepalive_permit_without_calls", "grpc.http2.min_ping_interval_without_data_ms",
        "grpc.http2.ping_timeout_ms",
        "grpc.max_connection_idle_ms", "grpc.server_handshake_timeout_ms", "grpc.max_allowed_incoming_connections",
        "grpc.max_metadata_size", "grpc.absolute_max_metadata_size", "grpc.http2.max_ping_strikes",
        "grpc.max_connection_age_ms", "grpc.max_connection_age_grace_ms",
    }  # fmt: skip
    options = server_options(ServerSettings(max_connection_age_s=1800))
    assert {name for name, _ in options} == known
    assert all(type(value) is int for _, value in options)


async def test_a_stream_always_ends_after_a_message_that_is_none(server: FakeServer) -> None:
    """What came before it is answered. Some of these streams never ended when that answer was cancelled instead."""
    good = pb.EmbedStreamRequest(id=1, request=pb.EmbedRequest(texts=["a", "word " * 300])).SerializeToString()

    async def ended() -> tuple[int, grpc.StatusCode]:
        """(answers, status)"""
        call = raw(server.channel).stream_stream(f"/{SERVICE}/EmbedStream")(iter([good, b"\x08", good]))
        for count in itertools.count():
            try:
                await call.read()
            except grpc.aio.AioRpcError as error:
                return count, error.code()
        raise AssertionError

    for _ in range(6):
        assert await asyncio.gather(*(ended() for _ in range(50))) == [(1, Code.INVALID_ARGUMENT)] * 50
    await assert_still_serving(server)
