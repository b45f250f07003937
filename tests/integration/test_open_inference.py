"""inference.GRPCInferenceService over a real channel: what Triton's and KServe's clients send, and what they get."""

import struct
from collections.abc import Sequence
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from ml_inference_server.backends.fake import fake_embedding, fake_logit
from ml_inference_server.proto import inference_pb2 as own
from ml_inference_server.proto.foreign import grpc_service_pb2 as pb
from ml_inference_server.proto.foreign import model_config_pb2
from tests.conftest import FakeServer, fake_server, raw, refusal
from tests.integration.foreign_kit import foreign_stub, told

Code = grpc.StatusCode
SERVICE = pb.DESCRIPTOR.services_by_name["GRPCInferenceService"]
SERVED = "sentence-transformers/all-MiniLM-L6-v2"  # the name in the settings; the fake backend also goes by its own
FORMS = {"FP32": "<f4", "INT32": "<i4"}
UNSERVED = [
    "ModelStreamInfer", "RepositoryModelLoad", "RepositoryModelUnload", "SystemSharedMemoryStatus",
    "SystemSharedMemoryRegister", "SystemSharedMemoryUnregister", "CudaSharedMemoryStatus", "CudaSharedMemoryRegister",
    "CudaSharedMemoryUnregister", "TraceSetting", "LogSettings",
]  # fmt: skip


def stub(server: FakeServer) -> Any:
    return foreign_stub(server.channel, SERVICE)


def packed(texts: Sequence[str | bytes]) -> bytes:
    elements = [text.encode() if isinstance(text, str) else text for text in texts]
    return b"".join(struct.pack("<I", len(element)) + element for element in elements)


def inference(
    tensors: dict[str, Sequence[str | bytes]],
    *,
    column: bool = False,
    outputs: Sequence[str] = (),
    parameters: dict[str, Any] | None = None,
) -> pb.ModelInferRequest:
    """As tritonclient sends it: raw contents."""
    request = pb.ModelInferRequest(model_name="fake")
    for name, texts in tensors.items():
        shape = [len(texts), 1] if column else [len(texts)]
        request.inputs.add(name=name, datatype="BYTES", shape=shape)
        request.raw_input_contents.append(packed(texts))
    for name in outputs:
        request.outputs.add(name=name)
    for name, value in (parameters or {}).items():
        kind = {str: "string_param", bool: "bool_param", int: "int64_param", float: "double_param"}[type(value)]
        setattr(request.parameters[name], kind, value)
    return request


def arrays(answer: pb.ModelInferResponse) -> dict[str, NDArray[Any]]:
    assert len(answer.outputs) == len(answer.raw_output_contents)
    return {
        output.name: np.frombuffer(content, FORMS[output.datatype]).reshape(output.shape)
        for output, content in zip(answer.outputs, answer.raw_output_contents, strict=True)
    }


def parameters(answer: pb.ModelInferResponse) -> dict[str, Any]:
    return {name: getattr(each, each.WhichOneof("parameter_choice")) for name, each in answer.parameters.items()}


async def assert_still_serving(server: FakeServer) -> None:
    answer = await stub(server).ModelInfer(inference({"TEXT": ["are you well"]}))
    np.testing.assert_array_equal(arrays(answer)["EMBEDDING"][0], fake_embedding("are you well"))
    assert server.model.admission.requests == 0


@pytest.mark.parametrize("column", [False, True])
async def test_vectors_are_those_of_embed_in_both_shapes(server: FakeServer, column: bool) -> None:
    texts = ["b", "a", "b", "a longer text, ü 🙂", "abc\0def"]
    answer = await stub(server).ModelInfer(inference({"TEXT": texts}, column=column))
    reply = await server.stub.Embed(own.EmbedRequest(texts=texts))
    found = arrays(answer)
    assert list(found) == ["EMBEDDING", "TOTAL_TOKENS", "USED_TOKENS"]
    assert found["EMBEDDING"].tobytes() == reply.embeddings
    assert found["EMBEDDING"].shape == (5, 8)
    assert found["TOTAL_TOKENS"].tolist() == list(reply.token_counts)
    assert (answer.model_name, answer.model_version) == (SERVED, "1")
    assert parameters(answer)["space_id"] == reply.space_id
    assert parameters(answer)["truncated"] == 0
    assert parameters(answer)["tokens"] == sum(reply.used_token_counts)


async def test_contents_in_the_message_are_the_same_texts(server: FakeServer) -> None:
    request = pb.ModelInferRequest(model_name="fake", id="seven")
    request.inputs.add(name="TEXT", datatype="BYTES", shape=[2]).contents.bytes_contents.extend([b"one", b"two"])
    answer = await stub(server).ModelInfer(request)
    assert answer.id == "seven"
    np.testing.assert_array_equal(arrays(answer)["EMBEDDING"], [fake_embedding("one"), fake_embedding("two")])


async def test_outputs_are_those_asked_for_in_that_order(server: FakeServer) -> None:
    answer = await stub(server).ModelInfer(inference({"TEXT": ["a"]}, outputs=["USED_TOKENS", "EMBEDDING"]))
    assert list(arrays(answer)) == ["USED_TOKENS", "EMBEDDING"]
    answer = await stub(server).ModelInfer(inference({"TEXT": ["a"]}, outputs=["EMBEDDING"]))
    assert list(arrays(answer)) == ["EMBEDDING"]


async def test_a_query_with_texts_is_scored_as_score_does(server: FakeServer) -> None:
    documents = ["x", "query", "y"]
    pairs = [own.Pair(query="query", passage=document) for document in documents]
    reply = await server.stub.Score(own.ScoreRequest(pairs=pairs))
    for queries in (["query"], ["query"] * 3):
        answer = await stub(server).ModelInfer(inference({"QUERY": queries, "TEXT": documents}))
        found = arrays(answer)
        assert list(found) == ["SCORE", "TOTAL_TOKENS", "USED_TOKENS"]
        assert found["SCORE"].tolist() == list(reply.scores)
        assert "space_id" not in parameters(answer)
    ranked = await server.stub.Rerank(own.RerankRequest(query="query", documents=documents))
    order = np.argsort(-found["SCORE"], kind="stable")
    assert [rank.index for rank in ranked.ranks] == order.tolist()


async def test_a_cross_encoder_scores_pairs_and_nothing_else() -> None:
    async with fake_server(model={"name": "fake", "task": "cross_encoder"}) as server:
        answer = await stub(server).ModelInfer(inference({"QUERY": ["q"], "TEXT": ["a", "b"]}, column=True))
        np.testing.assert_array_equal(
            arrays(answer)["SCORE"], np.array([fake_logit("q", "a"), fake_logit("q", "b")], np.float32)
        )
        metadata = await stub(server).ModelMetadata(pb.ModelMetadataRequest(name="fake"))
        assert [tensor.name for tensor in metadata.inputs] == ["QUERY", "TEXT"]
        assert [tensor.name for tensor in metadata.outputs] == ["SCORE", "TOTAL_TOKENS", "USED_TOKENS"]
        error = await refusal(stub(server).ModelInfer(inference({"TEXT": ["a"]})))
        assert error.code() is Code.INVALID_ARGUMENT
        assert "QUERY is missing" in (error.details() or "")


async def test_parameters_are_those_of_embed(server: FakeServer) -> None:
    call = stub(server).ModelInfer
    answer = await call(inference({"TEXT": ["a"]}, parameters={"dimensions": 4, "normalize": True}))
    reply = await server.stub.Embed(own.EmbedRequest(texts=["a"], dimensions=4))
    assert arrays(answer)["EMBEDDING"].tobytes() == reply.embeddings
    assert "4 of 8 dimensions" in parameters(answer)["warnings"]
    answer = await call(inference({"TEXT": ["word " * 300, "b"]}))
    assert parameters(answer)["truncated"] == 1
    assert arrays(answer)["USED_TOKENS"].tolist() == [256, 3]
    reply = await server.stub.Embed(own.EmbedRequest(texts=["word " * 300, "b"]))
    assert arrays(answer)["TOTAL_TOKENS"].tolist() == list(reply.token_counts)
    ignored = {"binary_data_output": True, "triton_enable_empty_final_response": True, "timeout": 0}
    await call(inference({"TEXT": ["a"]}, parameters=ignored))
    space = parameters(answer)["space_id"]
    await call(inference({"TEXT": ["a"]}, parameters={"expect_space_id": space}))
    error = await refusal(call(inference({"TEXT": ["a"]}, parameters={"expect_space_id": "0" * 16})))
    assert (error.code(), told(error)[0]) == (Code.FAILED_PRECONDITION, "SPACE_MISMATCH")
    error = await refusal(call(inference({"TEXT": ["word " * 300]}, parameters={"overflow": "refuse"})))
    assert told(error) == ("TEXT_TOO_LONG", ["TEXT[0]"])


async def test_tritons_timeout_is_a_deadline(server: FakeServer) -> None:
    server.backend.hold()
    error = await refusal(stub(server).ModelInfer(inference({"TEXT": ["a"]}, parameters={"timeout": 20_000})))
    assert error.code() is Code.DEADLINE_EXCEEDED
    server.backend.release()


def with_changes(request: pb.ModelInferRequest, **changes: Any) -> pb.ModelInferRequest:
    for name, value in changes.items():
        setattr(request, name, value)
    return request


def shaped(*shape: int, datatype: str = "BYTES", content: bytes = b"") -> pb.ModelInferRequest:
    request = pb.ModelInferRequest(model_name="fake", raw_input_contents=[content])
    request.inputs.add(name="TEXT", datatype=datatype, shape=shape)
    return request


def shared_memory() -> pb.ModelInferRequest:
    request = pb.ModelInferRequest(model_name="fake")
    tensor = request.inputs.add(name="TEXT", datatype="BYTES", shape=[1])
    tensor.parameters["shared_memory_region"].string_param = "region"
    return request


def both_contents() -> pb.ModelInferRequest:
    request = inference({"TEXT": ["a"]})
    request.inputs[0].contents.bytes_contents.append(b"a")
    return request


def two_inputs_one_content() -> pb.ModelInferRequest:
    request = inference({"TEXT": ["a"], "QUERY": ["q"]})
    del request.raw_input_contents[1]
    return request


BAD: list[tuple[str, pb.ModelInferRequest, str, list[str]]] = [
    ("no inputs", pb.ModelInferRequest(model_name="fake"), "INVALID_FIELD", ["inputs"]),
    ("no texts", inference({"TEXT": []}), "EMPTY_REQUEST", ["TEXT"]),
    ("empty text", inference({"TEXT": ["a", " "]}), "EMPTY_TEXT", ["TEXT[1]"]),
    ("not UTF-8", inference({"TEXT": ["a", b"\xff\xfe"]}), "INVALID_FIELD", ["inputs[0].data[1]"]),
    ("too many texts", inference({"TEXT": ["x"] * 1025}), "TOO_MANY_TEXTS", ["inputs[0].shape"]),
    ("10 MB text", inference({"TEXT": ["x" * 10_000_000]}), "TEXT_TOO_LONG", ["TEXT[0]"]),
    ("shape above the bytes", shaped(2, content=packed(["a"])), "INVALID_FIELD", ["inputs[0].data"]),
    ("bytes above the shape", shaped(1, content=packed(["a", "b"])), "INVALID_FIELD", ["inputs[0].data"]),
    ("a huge shape", shaped(2**62, content=packed(["a"])), "TOO_MANY_TEXTS", ["inputs[0].shape"]),
    ("a shape below zero", shaped(-1), "INVALID_FIELD", ["inputs[0].shape"]),
    ("no shape", shaped(), "INVALID_FIELD", ["inputs[0].shape"]),
    ("a matrix", shaped(1, 2, content=packed(["a", "b"])), "INVALID_FIELD", ["inputs[0].shape"]),
    ("wrong datatype", shaped(1, datatype="FP32", content=b"abcd"), "INVALID_FIELD", ["inputs[0].datatype"]),
    ("unknown input", inference({"IMAGE": ["a"]}), "INVALID_FIELD", ["inputs[0].name"]),
    ("unknown output", inference({"TEXT": ["a"]}, outputs=["SCORE"]), "INVALID_FIELD", ["outputs[0].name"]),
    ("query without texts", inference({"QUERY": ["q"]}), "INVALID_FIELD", ["inputs"]),
    ("two queries", inference({"QUERY": ["q", "r"], "TEXT": ["a"]}), "INVALID_FIELD", ["inputs"]),
    ("shared memory", shared_memory(), "INVALID_FIELD", ["inputs[0].parameters"]),
    ("both contents", both_contents(), "INVALID_FIELD", ["raw_input_contents"]),
    ("too few contents", two_inputs_one_content(), "INVALID_FIELD", ["raw_input_contents"]),
    ("unknown overflow", inference({"TEXT": ["a"]}, parameters={"overflow": "fold"}), "INVALID_FIELD", ["overflow"]),
    ("no integer", inference({"TEXT": ["a"]}, parameters={"dimensions": True}), "INVALID_FIELD", ["dimensions"]),
    ("NaN", inference({"TEXT": ["a"]}, parameters={"dimensions": float("nan")}), "INVALID_FIELD", ["dimensions"]),
    ("too many dimensions", inference({"TEXT": ["a"]}, parameters={"dimensions": 9}), "INVALID_FIELD", ["dimensions"]),
    ("timeout", inference({"TEXT": ["a"]}, parameters={"timeout": -1}), "INVALID_FIELD", ["timeout"]),
    ("misspelt", inference({"TEXT": ["a"]}, parameters={"prompt": "query"}), "INVALID_FIELD", ["parameters"]),
    ("a sequence", inference({"TEXT": ["a"]}, parameters={"sequence_id": 5}), "INVALID_FIELD", ["parameters"]),
    ("unknown prompt", inference({"TEXT": ["a"]}, parameters={"prompt_name": "x"}), "INVALID_FIELD", ["prompt_name"]),
    ("prompt of a pair", inference({"QUERY": ["q"], "TEXT": ["a"]}, parameters={"prompt_name": "x"}), "INVALID_FIELD",
     ["parameters"]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "request_", "reason", "fields"), BAD, ids=[row[0] for row in BAD])
async def test_bad_input_is_refused_by_field_and_never_computed(
    server: FakeServer, name: str, request_: pb.ModelInferRequest, reason: str, fields: list[str]
) -> None:
    error = await refusal(stub(server).ModelInfer(request_))
    assert error.code() is Code.INVALID_ARGUMENT
    assert told(error) == (reason, fields)
    assert server.backend.log == []
    counted = server.metrics.snapshot()["totals"]["by_method_and_code"]["kserve.infer"]
    assert counted == {"INVALID_ARGUMENT": 1}
    await assert_still_serving(server)


async def test_a_broken_message_is_an_invalid_argument(server: FakeServer) -> None:
    for noise in (b"\x0a\x02\xff\xfe", b"\x0a\xff", b"\xff" * 20):
        call = raw(server.channel).unary_unary(f"/{SERVICE.full_name}/ModelInfer", request_serializer=lambda b: b)
        error = await refusal(call(noise))
        assert (error.code(), told(error)[0]) == (Code.INVALID_ARGUMENT, "MALFORMED_REQUEST")
    await assert_still_serving(server)


async def test_an_answer_that_would_not_fit_is_refused_before_it_is_computed() -> None:
    limits = {"max_message_bytes": 65_536, "max_text_bytes": 65_536, "max_texts": 20_000}
    async with fake_server(server=limits, batching={"max_queue_tokens": 1_000_000}) as server:
        most = (65_536 - 4096) // (4 * 10)
        error = await refusal(stub(server).ModelInfer(inference({"TEXT": ["x"] * (most + 1)})))
        assert told(error) == ("REPLY_TOO_LARGE", ["TEXT"])
        assert f"send at most {most} at once" in (error.details() or "")
        assert server.backend.log == []
        answer = await stub(server).ModelInfer(inference({"TEXT": ["x"] * most}))
        assert arrays(answer)["EMBEDDING"].shape == (most, 8)


@pytest.mark.parametrize("method", ["ModelReady", "ModelMetadata", "ModelConfig", "ModelStatistics", "ModelInfer"])
async def test_another_model_or_version_is_not_found(server: FakeServer, method: str) -> None:
    def asking(name: str, version: str) -> Any:
        if method == "ModelInfer":
            return with_changes(inference({"TEXT": ["a"]}), model_name=name, model_version=version)
        return getattr(pb, f"{method}Request")(name=name, version=version)

    await getattr(stub(server), method)(asking("fake", "1"))
    for name, version in (("other", ""), ("fake", "2"), ("x" * 10_000, ""), ("../fake\n", "")):
        error = await refusal(getattr(stub(server), method)(asking(name, version)))
        assert (error.code(), told(error)[0]) == (Code.NOT_FOUND, "MODEL_NOT_FOUND")
        assert "other" not in (error.details() or "")
    await assert_still_serving(server)


async def test_metadata_and_config_agree_and_say_that_texts_can_be_batched(server: FakeServer) -> None:
    metadata = await stub(server).ModelMetadata(pb.ModelMetadataRequest(name="fake"))
    config = (await stub(server).ModelConfig(pb.ModelConfigRequest(name="fake"))).config
    assert (metadata.name, list(metadata.versions), metadata.platform) == (SERVED, ["1"], "fake")
    assert [(t.name, t.datatype, list(t.shape)) for t in metadata.inputs] == [("TEXT", "BYTES", [-1, 1])]
    assert [(t.name, t.datatype, list(t.shape)) for t in metadata.outputs] == [
        ("EMBEDDING", "FP32", [-1, 8]),
        ("TOTAL_TOKENS", "INT32", [-1]),
        ("USED_TOKENS", "INT32", [-1]),
    ]
    assert config.max_batch_size == 1024
    assert config.HasField("dynamic_batching")
    for described, configured in ((metadata.inputs, config.input), (metadata.outputs, config.output)):
        assert [t.name for t in described] == [t.name for t in configured]
        assert [list(t.shape) for t in described] == [[-1, *t.dims] for t in configured]
    assert config.input[0].data_type == model_config_pb2.TYPE_STRING
    assert config.output[0].data_type == model_config_pb2.TYPE_FP32


async def test_the_server_says_what_it_is_and_only_what_it_serves(server: FakeServer) -> None:
    assert (await stub(server).ServerLive(pb.ServerLiveRequest())).live
    assert (await stub(server).ServerReady(pb.ServerReadyRequest())).ready
    assert (await stub(server).ModelReady(pb.ModelReadyRequest(name="fake"))).ready
    metadata = await stub(server).ServerMetadata(pb.ServerMetadataRequest())
    assert metadata.name == "ml-inference-server"
    assert list(metadata.extensions) == ["statistics", "model_configuration"]
    (model,) = (await stub(server).RepositoryIndex(pb.RepositoryIndexRequest())).models
    assert (model.name, model.version, model.state) == (SERVED, "1", "READY")


async def test_while_the_model_loads_it_is_live_and_not_ready(server: FakeServer) -> None:
    model, server.state.model = server.state.model, None
    assert (await stub(server).ServerLive(pb.ServerLiveRequest())).live
    assert not (await stub(server).ServerReady(pb.ServerReadyRequest())).ready
    assert not (await stub(server).ModelReady(pb.ModelReadyRequest(name="fake"))).ready
    error = await refusal(stub(server).ModelMetadata(pb.ModelMetadataRequest(name="fake")))
    assert (error.code(), told(error)[0]) == (Code.UNAVAILABLE, "MODEL_LOADING")
    server.state.model = model


async def test_a_server_that_drains_says_why_it_is_not_ready(server: FakeServer) -> None:
    server.state.draining.set()
    (model,) = (await stub(server).RepositoryIndex(pb.RepositoryIndexRequest())).models
    assert (model.state, model.reason) == ("UNAVAILABLE", "draining")
    assert not (await stub(server).RepositoryIndex(pb.RepositoryIndexRequest(ready=True))).models


async def test_statistics_are_those_of_the_metrics(server: FakeServer) -> None:
    async def statistics() -> Any:
        (found,) = (await stub(server).ModelStatistics(pb.ModelStatisticsRequest(name="fake"))).model_stats
        return found

    before = await statistics()
    assert (before.inference_count, before.execution_count, before.last_inference) == (0, 0, 0)
    await stub(server).ModelInfer(inference({"TEXT": ["a", "b", "c"]}))
    await server.stub.Score(own.ScoreRequest(pairs=[own.Pair(query="q", passage="p")]))
    await refusal(stub(server).ModelInfer(inference({"TEXT": []})))
    await refusal(server.stub.Embed(own.EmbedRequest(texts=["!raise"])))
    after = await statistics()
    figures = server.metrics.snapshot()["totals"]
    stats = after.inference_stats
    assert after.inference_count == figures["texts"] + figures["pairs"] == 4
    assert after.execution_count == figures["batches"] - figures["failed_batches"] > 0
    assert (stats.success.count, stats.fail.count) == (2, 2)
    assert after.last_inference > 1_600_000_000_000
    parts = (stats.queue, stats.compute_input, stats.compute_infer, stats.compute_output)
    assert [part.count for part in parts] == [2] * 4
    assert sum(part.ns for part in parts) == pytest.approx(stats.success.ns, abs=10)
    assert min(stats.success.ns, stats.fail.ns, stats.compute_infer.ns) > 0


@pytest.mark.parametrize("method", UNSERVED)
async def test_what_is_not_served_says_so_in_a_sentence(server: FakeServer, method: str) -> None:
    call = getattr(stub(server), method)
    if method == "ModelStreamInfer":
        stream = call(iter([inference({"TEXT": ["a"]})]))
        error = await refusal(stream.read())
    else:
        error = await refusal(call(getattr(pb, f"{method}Request")()))
    assert error.code() is Code.UNIMPLEMENTED
    assert len((error.details() or "").split()) > 5
    await assert_still_serving(server)


async def test_reflection_and_health_know_the_service(server: FakeServer) -> None:
    stub_ = reflection_pb2_grpc.ServerReflectionStub(server.channel)
    asked = [
        reflection_pb2.ServerReflectionRequest(list_services=""),
        reflection_pb2.ServerReflectionRequest(file_containing_symbol="inference.ModelConfig"),
    ]
    answers = [answer async for answer in stub_.ServerReflectionInfo(iter(asked))]
    assert SERVICE.full_name in [service.name for service in answers[0].list_services_response.service]
    assert answers[1].file_descriptor_response.file_descriptor_proto
    health = health_pb2_grpc.HealthStub(server.channel)
    asked_health = health_pb2.HealthCheckRequest(service=SERVICE.full_name)
    assert (await health.Check(asked_health)).status == health_pb2.HealthCheckResponse.SERVING
    watch = health.Watch(asked_health)
    assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
    server.state.draining.set()
    assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING


NAMES = st.sampled_from(["TEXT", "QUERY", "EMBEDDING", "fake", ""])
DATA = st.one_of(st.binary(max_size=40), st.lists(st.text(max_size=5), max_size=4).map(packed))
TENSORS = st.builds(
    lambda name, datatype, shape, contents: pb.ModelInferRequest.InferInputTensor(
        name=name,
        datatype=datatype,
        shape=shape,
        contents=None if contents is None else pb.InferTensorContents(bytes_contents=contents),
    ),
    NAMES,
    st.sampled_from(["BYTES", "BYTES", "FP32", ""]),
    st.lists(st.one_of(st.integers(-1, 4), st.integers(-(2**63), 2**63 - 1)), max_size=3),
    st.none() | st.lists(st.binary(max_size=8), max_size=3),
)
REQUESTS = st.builds(
    pb.ModelInferRequest,
    model_name=st.just("fake") | NAMES,
    inputs=st.lists(TENSORS, max_size=3),
    outputs=st.lists(st.builds(pb.ModelInferRequest.InferRequestedOutputTensor, name=NAMES), max_size=2),
    raw_input_contents=st.lists(DATA, max_size=3),
)


async def test_any_request_is_answered_or_refused_by_name(server: FakeServer) -> None:
    """No UNKNOWN, no INTERNAL, and the server goes on."""
    call = stub(server).ModelInfer
    requests: list[pb.ModelInferRequest] = []

    @settings(max_examples=300, database=None, deadline=None, suppress_health_check=list(HealthCheck))
    @given(REQUESTS)
    def generated(request: pb.ModelInferRequest) -> None:
        requests.append(request)

    generated()
    for request in requests:
        try:
            answer = await call(request)
        except grpc.aio.AioRpcError as error:
            code = error.code()
        else:
            code = Code.OK
            assert len(arrays(answer)) == len(answer.outputs) > 0
        assert code in (Code.OK, Code.INVALID_ARGUMENT, Code.NOT_FOUND), request
    await assert_still_serving(server)
