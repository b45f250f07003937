"""tei.v1 over a real channel: Text Embeddings Inference's gRPC interface, with its own defaults, order and codes."""

import math
from collections.abc import Sequence
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from ml_inference_server import __version__
from ml_inference_server.backends.fake import fake_embedding, fake_logit
from ml_inference_server.proto import inference_pb2 as own
from ml_inference_server.proto.foreign import tei_pb2 as pb
from tests.conftest import FakeServer, fake_server, raw, refusal, until
from tests.integration.foreign_kit import foreign_stub, told

Code = grpc.StatusCode
SERVICES = pb.DESCRIPTOR.services_by_name
LONG = "word " * 300
CROSS_ENCODER = {"name": "fake", "task": "cross_encoder"}


def stub(server: FakeServer, service: str) -> Any:
    return foreign_stub(server.channel, SERVICES[service])


def embed(text: str, **options: Any) -> pb.EmbedRequest:
    return pb.EmbedRequest(inputs=text, **options)


def encode(text: str, **options: Any) -> pb.EncodeRequest:
    return pb.EncodeRequest(inputs=text, **options)


def sigmoid(logits: Sequence[float]) -> list[float]:
    return [1 / (1 + math.exp(-logit)) for logit in logits]


async def assert_still_serving(server: FakeServer) -> None:
    answer = await stub(server, "Embed").Embed(embed("are you well"))
    np.testing.assert_array_equal(np.float32(answer.embeddings), fake_embedding("are you well"))
    assert server.model.admission.requests == 0


async def test_embed_gives_the_vector_of_the_own_wire_and_its_figures(server: FakeServer) -> None:
    text = "a longer text, ü"
    call = stub(server, "Embed").Embed(embed(text))
    answer, metadata = await call, dict(await call.initial_metadata())
    reply = await server.stub.Embed(own.EmbedRequest(texts=[text]))
    assert np.float32(answer.embeddings).tobytes() == reply.embeddings
    told_ = answer.metadata
    assert (told_.compute_chars, told_.compute_tokens) == (len(text), reply.used_token_counts[0])
    assert told_.total_time_ns >= told_.inference_time_ns > 0
    assert metadata["x-compute-characters"] == str(len(text))
    assert metadata["x-compute-type"] == "cpu"
    assert metadata["x-space-id"] == reply.space_id
    assert metadata["x-truncated-texts"] == "0"
    for name in ("x-compute-time", "x-total-time", "x-tokenization-time", "x-queue-time", "x-inference-time"):
        assert metadata[name].isdigit()


async def test_a_long_text_is_refused_unless_truncate_says_otherwise(server: FakeServer) -> None:
    error = await refusal(stub(server, "Embed").Embed(embed(LONG)))
    assert error.code() is Code.INVALID_ARGUMENT
    assert told(error) == ("TEXT_TOO_LONG", ["inputs[0]"])
    assert (error.details() or "").startswith("Input validation error: inputs[0]: ")
    call = stub(server, "Embed").Embed(embed(LONG, truncate=True))
    np.testing.assert_array_equal(np.float32((await call).embeddings), fake_embedding(LONG))
    assert dict(await call.initial_metadata())["x-truncated-texts"] == "1"
    await assert_still_serving(server)


async def test_dimensions_and_normalize(server: FakeServer) -> None:
    small = await stub(server, "Embed").Embed(embed("a", dimensions=4))
    reply = await server.stub.Embed(own.EmbedRequest(texts=["a"], dimensions=4))
    assert np.float32(small.embeddings).tobytes() == reply.embeddings
    for normalize in (True, False):  # the fake model's vectors have length 1 whatever is asked
        call = stub(server, "Embed").Embed(embed("a", normalize=normalize))
        np.testing.assert_array_equal(np.float32((await call).embeddings), fake_embedding("a"))
        assert ("x-warnings" in dict(await call.initial_metadata())) is not normalize


EMBED_FAULTS: list[tuple[str, pb.EmbedRequest, str, list[str]]] = [
    ("nothing", pb.EmbedRequest(), "EMPTY_TEXT", ["inputs[0]"]),
    ("blanks", embed(" \t\n"), "EMPTY_TEXT", ["inputs[0]"]),
    ("10 MB", embed("x" * 10_000_000, truncate=True), "TEXT_TOO_LONG", ["inputs[0]"]),
    ("unknown prompt", embed("x", prompt_name="nope"), "INVALID_FIELD", ["prompt_name"]),
    ("unknown direction", embed("x", truncation_direction=7), "INVALID_FIELD", ["truncation_direction"]),
    ("no dimensions", embed("x", dimensions=0), "INVALID_FIELD", ["dimensions"]),
    ("too many dimensions", embed("x", dimensions=9), "INVALID_FIELD", ["dimensions"]),
]


@pytest.mark.parametrize(("name", "request_", "reason", "fields"), EMBED_FAULTS, ids=[row[0] for row in EMBED_FAULTS])
async def test_bad_input_is_refused_by_field(
    server: FakeServer, name: str, request_: pb.EmbedRequest, reason: str, fields: list[str]
) -> None:
    error = await refusal(stub(server, "Embed").Embed(request_))
    assert error.code() is Code.INVALID_ARGUMENT
    assert told(error) == (reason, fields)
    assert server.backend.log == []
    await assert_still_serving(server)


async def test_its_own_codes_stand_in_place_of_ours(server: FakeServer) -> None:
    error = await refusal(stub(server, "Embed").Embed(embed("!raise")))
    assert (error.code(), told(error)[0]) == (Code.FAILED_PRECONDITION, "BACKEND_ERROR")
    server.state.model, model = None, server.state.model
    error = await refusal(stub(server, "Embed").Embed(embed("a")))
    assert (error.code(), told(error)[0]) == (Code.UNAVAILABLE, "MODEL_LOADING")
    server.state.model = model
    await assert_still_serving(server)


async def test_overload_is_refused_at_once_with_a_hint() -> None:
    async with fake_server(batching={"max_queue_requests": 1}) as server:
        server.backend.hold()
        held = stub(server, "Embed").Embed(embed("a"))
        await until(lambda: server.model.admission.requests == 1)
        error = await refusal(stub(server, "Embed").Embed(embed("b")))
        assert (error.code(), told(error)[0]) == (Code.RESOURCE_EXHAUSTED, "QUEUE_FULL")
        assert (error.details() or "").startswith("Model is overloaded")
        assert int(dict(error.trailing_metadata())["grpc-retry-pushback-ms"]) > 0
        server.backend.release()
        await held


async def test_a_broken_message_is_an_invalid_argument(server: FakeServer) -> None:
    for service, method in (("Embed", "Embed"), ("Rerank", "Rerank"), ("Embed", "EmbedStream")):
        path = f"/{SERVICES[service].full_name}/{method}"
        if method.endswith("Stream"):
            stream = raw(server.channel).stream_stream(path, request_serializer=lambda b: b)(iter([b"\x0a\xff"]))
            error = await refusal(stream.read())
        else:
            error = await refusal(raw(server.channel).unary_unary(path, request_serializer=lambda b: b)(b"\x0a\xff"))
        assert (error.code(), told(error)[0]) == (Code.INVALID_ARGUMENT, "MALFORMED_REQUEST")
    await assert_still_serving(server)


async def test_rerank_is_that_of_the_own_wire_between_0_and_1(server: FakeServer) -> None:
    documents = ["x", "query", "y", "query", "z"]
    reply = await server.stub.Rerank(own.RerankRequest(query="query", documents=documents))
    answer = await stub(server, "Rerank").Rerank(pb.RerankRequest(query="query", texts=documents))
    assert [rank.index for rank in answer.ranks] == [rank.index for rank in reply.ranks]
    cosines = np.array([rank.score for rank in reply.ranks])
    np.testing.assert_allclose([rank.score for rank in answer.ranks], (1 + cosines) / 2, atol=1e-6)
    assert not any(rank.HasField("text") for rank in answer.ranks)
    call = stub(server, "Rerank").Rerank(
        pb.RerankRequest(query="query", texts=documents, raw_scores=True, return_text=True)
    )
    answer = await call
    assert [rank.score for rank in answer.ranks] == [rank.score for rank in reply.ranks]
    assert [rank.text for rank in answer.ranks] == [documents[rank.index] for rank in answer.ranks]
    assert answer.metadata.compute_chars == len("query") * 5 + sum(map(len, documents))
    assert dict(await call.initial_metadata())["x-token-counts"] == ",".join(map(str, reply.token_counts))


async def test_a_rerank_stream_is_one_rerank(server: FakeServer) -> None:
    documents = ["x", "query", "y"]
    whole = await stub(server, "Rerank").Rerank(
        pb.RerankRequest(query="query", texts=documents, raw_scores=True, return_text=True)
    )
    messages = [pb.RerankStreamRequest(query="query", text=text) for text in documents]
    messages[0].raw_scores = messages[0].return_text = True  # those of the first message hold
    answer = await stub(server, "Rerank").RerankStream(iter(messages))
    assert answer.ranks == whole.ranks
    counted = server.metrics.snapshot()["totals"]
    assert counted["by_method_and_code"]["tei.rerank"] == {"OK": 2}
    assert counted["pairs"] == 6


async def test_a_rerank_stream_that_is_none_is_refused(server: FakeServer) -> None:
    async def refused(messages: list[pb.RerankStreamRequest]) -> tuple[str, list[str]]:
        error = await refusal(stub(server, "Rerank").RerankStream(iter(messages)))
        assert error.code() is Code.INVALID_ARGUMENT
        return told(error)

    one = pb.RerankStreamRequest(query="q", text="a")
    assert await refused([]) == ("EMPTY_REQUEST", ["texts"])
    assert await refused([one, pb.RerankStreamRequest(query="other", text="b")]) == ("INVALID_FIELD", ["query"])
    assert await refused([one, pb.RerankStreamRequest(query="q", text="b", truncate=True)]) == (
        "INVALID_FIELD", ["truncate"],
    )  # fmt: skip
    assert (await refused([one] * 1025))[0] == "TOO_MANY_TEXTS"
    assert (await refused([pb.RerankStreamRequest(query="q", text="x" * 1_000_000)] * 17))[0] == "TOO_MANY_TEXTS"
    await assert_still_serving(server)


async def test_an_idle_rerank_stream_ends_at_the_servers_own_deadline() -> None:
    async with fake_server(server={"default_timeout_ms": 50}) as server:
        call = stub(server, "Rerank").RerankStream()
        await call.write(pb.RerankStreamRequest(query="q", text="a"))
        assert (await refusal(call)).code() is Code.DEADLINE_EXCEEDED


async def test_rerank_refuses_by_its_own_fields(server: FakeServer) -> None:
    wrong = "Input validation error: "
    for request, reason, field, said in (
        (pb.RerankRequest(query="q"), "EMPTY_REQUEST", "texts", "`texts` cannot be empty"),
        (pb.RerankRequest(texts=["a"]), "EMPTY_TEXT", "query", f"{wrong}query: text is empty"),
        (pb.RerankRequest(query="q", texts=["a", ""]), "EMPTY_TEXT", "texts[1]", f"{wrong}texts[1]: text is empty"),
        (pb.RerankRequest(query="q", texts=["a", LONG]), "TEXT_TOO_LONG", "texts[1]", f"{wrong}texts[1]: "),
        (pb.RerankRequest(query="q", texts=["a"] * 1025), "TOO_MANY_TEXTS", "texts",
         "batch size 1025 > maximum allowed batch size 1024"),
    ):  # fmt: skip
        error = await refusal(stub(server, "Rerank").Rerank(request))
        assert error.code() is Code.INVALID_ARGUMENT
        assert told(error) == (reason, [field])
        assert (error.details() or "").startswith(said)


async def test_an_embedding_model_predicts_nothing(server: FakeServer) -> None:
    predict = stub(server, "Predict")
    calls = [predict.Predict(pb.PredictRequest(inputs="a")), predict.PredictPair(pb.PredictPairRequest(inputs="ab"))]
    for call in calls:
        error = await refusal(call)
        assert (error.code(), told(error)[0]) == (Code.FAILED_PRECONDITION, "WRONG_TASK")
        assert (error.details() or "").startswith("model is not a classifier model")
    await assert_still_serving(server)


async def test_a_cross_encoder_predicts_pairs_and_reranks() -> None:
    async with fake_server(model=CROSS_ENCODER) as server:
        predict = stub(server, "Predict")
        logits = [fake_logit("q", text) for text in ("a", "b")]
        answer = await predict.PredictPair(pb.PredictPairRequest(inputs=["q", "a"], raw_scores=True))
        assert [(p.score, p.label) for p in answer.predictions] == [(np.float32(logits[0]), "LABEL_0")]
        answer = await predict.PredictPair(pb.PredictPairRequest(inputs=["q", "a"]))
        np.testing.assert_allclose([p.score for p in answer.predictions], sigmoid(logits[:1]), atol=1e-6)
        assert answer.metadata.compute_chars == 2
        pairs = [pb.PredictPairRequest(inputs=["q", text], raw_scores=True) for text in ("a", "b")]
        streamed = [answer.predictions[0].score async for answer in predict.PredictPairStream(iter(pairs))]
        np.testing.assert_allclose(streamed, logits, atol=1e-6)
        ranked = await stub(server, "Rerank").Rerank(pb.RerankRequest(query="q", texts=["a", "b"]))
        np.testing.assert_allclose(
            [rank.score for rank in ranked.ranks], sorted(sigmoid(logits), reverse=True), atol=1e-6
        )
        error = await refusal(predict.Predict(pb.PredictRequest(inputs="a")))
        assert (error.code(), told(error)[0]) == (Code.FAILED_PRECONDITION, "WRONG_TASK")
        for inputs in ([], ["a", "b", "c"]):
            error = await refusal(predict.PredictPair(pb.PredictPairRequest(inputs=inputs)))
            assert (error.code(), told(error)) == (Code.INVALID_ARGUMENT, ("INVALID_FIELD", ["inputs"]))
        error = await refusal(stub(server, "Embed").Embed(embed("a")))
        assert (error.code(), told(error)[0]) == (Code.FAILED_PRECONDITION, "WRONG_TASK")


async def test_a_stream_answers_in_the_order_of_its_messages(server: FakeServer) -> None:
    texts = [f"{i % 7} " * (1 + i * 5 % 60) for i in range(200)]
    server.backend.hold()
    calls = stub(server, "Embed").EmbedStream(iter([embed(text) for text in texts]))
    await until(lambda: server.model.admission.requests >= 20)
    server.backend.release()
    answers = [np.float32(answer.embeddings) async for answer in calls]
    np.testing.assert_array_equal(np.stack(answers), np.stack([fake_embedding(text) for text in texts]))
    assert server.metrics.snapshot()["totals"]["by_method_and_code"]["tei.embed"] == {"OK": 200}
    assert max(len(batch.rows) for batch in server.backend.log) > 1


async def test_the_first_message_that_fails_ends_the_stream_after_the_answers_before_it(server: FakeServer) -> None:
    server.backend.hold()
    call = stub(server, "Embed").EmbedStream()
    for text in ("one", "two", "", "four"):
        await call.write(embed(text))
    await until(lambda: server.metrics.snapshot()["totals"]["by_method_and_code"]["tei.embed"] != {})
    server.backend.release()
    for text in ("one", "two"):
        np.testing.assert_array_equal(np.float32((await call.read()).embeddings), fake_embedding(text))
    error = await refusal(call.read())
    assert (error.code(), told(error)) == (Code.INVALID_ARGUMENT, ("EMPTY_TEXT", ["inputs[0]"]))
    await until(lambda: server.model.admission.requests == 0)
    await assert_still_serving(server)


async def test_a_client_that_leaves_a_stream_leaves_nothing_behind(server: FakeServer) -> None:
    server.backend.hold()
    call = stub(server, "Embed").EmbedStream()
    for i in range(20):
        await call.write(embed(f"text {i}"))
    await until(lambda: server.model.admission.requests == 20)
    call.cancel()
    server.backend.release()
    await until(lambda: server.model.admission.requests == 0)
    await assert_still_serving(server)


async def test_an_idle_stream_ends_when_the_server_drains(server: FakeServer) -> None:
    call = stub(server, "Embed").EmbedStream()
    await call.write(embed("a"))
    await call.read()
    server.state.draining.set()
    assert (await refusal(call.read())).code() is Code.UNAVAILABLE


async def test_a_stream_reads_no_more_than_it_may_work_on(server: FakeServer) -> None:
    server.backend.hold()
    call = stub(server, "Embed").EmbedStream(iter([embed(f"text {i}") for i in range(300)]))
    await until(lambda: server.model.admission.requests >= 64)
    for _ in range(20):
        await stub(server, "Info").Info(pb.InfoRequest())
    assert server.model.admission.requests <= 66
    server.backend.release()
    assert len([answer async for answer in call]) == 300


async def test_tokenize_tells_each_token_and_decode_makes_the_text_of_them(server: FakeServer) -> None:
    tokenize = stub(server, "Tokenize")
    (start, *own_tokens, end) = (await tokenize.Tokenize(encode("one two", add_special_tokens=True))).tokens
    assert [(t.text, t.special, t.start, t.stop) for t in own_tokens] == [("one", False, 0, 3), ("two", False, 4, 7)]
    assert [t.special for t in (start, end)] == [True, True]
    assert not any(t.HasField("start") or t.HasField("stop") for t in (start, end))
    bare = (await tokenize.Tokenize(encode("one two"))).tokens  # left out, it is false
    assert [t.id for t in bare] == [t.id for t in own_tokens]
    ids = [t.id for t in (start, *own_tokens, end)]
    assert (await tokenize.Decode(pb.DecodeRequest(ids=ids, skip_special_tokens=True))).text == "one two"
    shown = (await tokenize.Decode(pb.DecodeRequest(ids=ids))).text
    assert shown == f"{start.text} one two {end.text}"
    assert (await tokenize.Decode(pb.DecodeRequest())).text == ""
    counted = server.metrics.snapshot()["totals"]["by_method_and_code"]
    assert (counted["tei.tokenize"], counted["tei.decode"]) == ({"OK": 2}, {"OK": 3})
    assert server.backend.log == []


async def test_tokens_come_in_streams_too(server: FakeServer) -> None:
    tokenize = stub(server, "Tokenize")
    texts = [" ".join(["word"] * (1 + i * 7 % 11)) for i in range(100)]
    answers = [answer async for answer in tokenize.TokenizeStream(iter([encode(text) for text in texts]))]
    assert [len(answer.tokens) for answer in answers] == [len(text.split()) for text in texts]
    messages = [pb.DecodeRequest(ids=[token.id for token in answer.tokens]) for answer in answers]
    assert [answer.text async for answer in tokenize.DecodeStream(iter(messages))] == texts


async def test_what_is_no_text_and_no_token_is_refused(server: FakeServer) -> None:
    tokenize = stub(server, "Tokenize")
    for call, reason, field in (
        (tokenize.Tokenize(encode("")), "EMPTY_TEXT", "inputs[0]"),
        (tokenize.Tokenize(encode("x" * 2_000_000)), "TEXT_TOO_LONG", "inputs[0]"),
        (tokenize.Tokenize(encode("a", prompt_name="nope")), "INVALID_FIELD", "prompt_name"),
        (tokenize.Decode(pb.DecodeRequest(ids=[2**32 - 1])), "INVALID_FIELD", "ids[0]"),
    ):
        error = await refusal(call)
        assert (error.code(), told(error)) == (Code.INVALID_ARGUMENT, (reason, [field]))
    await assert_still_serving(server)


@pytest.mark.parametrize("method", ["EmbedSparse", "EmbedSparseStream", "EmbedAll", "EmbedAllStream"])
async def test_what_is_not_served_says_so(server: FakeServer, method: str) -> None:
    request: Message = getattr(pb, f"{method.removesuffix('Stream')}Request")(inputs="a")
    call = getattr(stub(server, "Embed"), method)
    error = await refusal(call(iter([request])).read() if method.endswith("Stream") else call(request))
    assert error.code() is Code.UNIMPLEMENTED
    assert "use Embed" in (error.details() or "")


async def test_info_says_what_is_served(server: FakeServer) -> None:
    info = await stub(server, "Info").Info(pb.InfoRequest())
    assert (info.version, info.model_dtype, info.model_type) == (__version__, "float32", pb.MODEL_TYPE_EMBEDDING)
    assert (info.max_input_length, info.max_client_batch_size, info.max_concurrent_requests) == (256, 1024, 1024)
    assert (info.max_batch_tokens, info.max_batch_requests) == (2048, 32)
    async with fake_server(model=CROSS_ENCODER) as other:
        info = await stub(other, "Info").Info(pb.InfoRequest())
        assert (info.model_id, info.model_type) == ("fake", pb.MODEL_TYPE_RERANKER)


async def serving(server: FakeServer) -> dict[str, bool]:
    health = health_pb2_grpc.HealthStub(server.channel)
    found = {}
    for name in SERVICES:
        reply = await health.Check(health_pb2.HealthCheckRequest(service=f"tei.v1.{name}"))
        found[name] = reply.status == health_pb2.HealthCheckResponse.SERVING
    return found


async def test_health_says_which_services_the_model_is_good_for(server: FakeServer) -> None:
    both = {"Info": True, "Rerank": True, "Tokenize": True}
    assert await serving(server) == both | {"Embed": True, "Predict": False}
    async with fake_server(model=CROSS_ENCODER) as other:
        assert await serving(other) == both | {"Embed": False, "Predict": True}


async def test_reflection_lists_and_describes_the_services(server: FakeServer) -> None:
    stub_ = reflection_pb2_grpc.ServerReflectionStub(server.channel)
    asked = [
        reflection_pb2.ServerReflectionRequest(list_services=""),
        reflection_pb2.ServerReflectionRequest(file_containing_symbol="tei.v1.Rerank"),
    ]
    answers = [answer async for answer in stub_.ServerReflectionInfo(iter(asked))]
    names = {service.name for service in answers[0].list_services_response.service}
    assert {f"tei.v1.{name}" for name in SERVICES} <= names
    assert answers[1].file_descriptor_response.file_descriptor_proto
