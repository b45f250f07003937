"""Right requests of foreign gRPC services, with bytes changed: each is answered or refused, and the server goes on."""

import asyncio
import contextlib
import itertools
from collections import Counter
from collections.abc import Iterator
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf.message import Message
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ml_inference_server.backends.fake import fake_embedding, fake_logit
from ml_inference_server.proto.foreign import grpc_service_pb2 as triton
from ml_inference_server.proto.foreign import tei_pb2 as tei
from tests.conftest import FakeServer, fake_server, raw
from tests.integration.foreign_kit import foreign_stub

Code = grpc.StatusCode
# What a client may be told about its own request. Never UNKNOWN, INTERNAL, CANCELLED or DEADLINE_EXCEEDED.
FINE = {Code.OK, Code.INVALID_ARGUMENT, Code.NOT_FOUND, Code.FAILED_PRECONDITION, Code.UNIMPLEMENTED}
EXAMPLES = 400
AT_ONCE = 32


def infer(*names: str, raw_contents: bool) -> triton.ModelInferRequest:
    request = triton.ModelInferRequest(model_name="fake", id="an id")
    request.parameters["overflow"].string_param = "cut"
    request.outputs.add(name="TOTAL_TOKENS").parameters["classification"].int64_param = 0
    for name in names:
        tensor = request.inputs.add(name=name, datatype="BYTES", shape=[2, 1])
        if raw_contents:
            request.raw_input_contents.append(b"\x03\0\0\0one\x03\0\0\0two")
        else:
            tensor.contents.bytes_contents.extend([b"one", b"two"])
    return request


TRITON, TEI = "inference.GRPCInferenceService", "tei.v1"
RIGHT: list[tuple[str, Message]] = [
    (f"/{TRITON}/ModelInfer", infer("TEXT", raw_contents=True)),
    (f"/{TRITON}/ModelInfer", infer("QUERY", "TEXT", raw_contents=True)),
    (f"/{TRITON}/ModelInfer", infer("TEXT", "QUERY", raw_contents=False)),
    (f"/{TRITON}/ModelMetadata", triton.ModelMetadataRequest(name="fake", version="1")),
    (f"/{TRITON}/ModelConfig", triton.ModelConfigRequest(name="fake", version="1")),
    (f"/{TRITON}/ModelStatistics", triton.ModelStatisticsRequest(name="fake", version="1")),
    (f"/{TRITON}/ModelReady", triton.ModelReadyRequest(name="fake", version="1")),
    (f"/{TRITON}/RepositoryIndex", triton.RepositoryIndexRequest(ready=True)),
    (f"/{TRITON}/LogSettings", triton.LogSettingsRequest()),
    (f"/{TEI}.Embed/Embed", tei.EmbedRequest(inputs="a text", truncate=True, normalize=True, dimensions=4)),
    (f"/{TEI}.Embed/EmbedAll", tei.EmbedAllRequest(inputs="a text")),
    (f"/{TEI}.Rerank/Rerank", tei.RerankRequest(query="q", texts=["one", "two"], raw_scores=True, return_text=True)),
    (f"/{TEI}.Predict/PredictPair", tei.PredictPairRequest(inputs=["one", "two"], truncate=True)),
    (f"/{TEI}.Predict/Predict", tei.PredictRequest(inputs="one")),
    (f"/{TEI}.Info/Info", tei.InfoRequest()),
    (f"/{TEI}.Tokenize/Tokenize", tei.EncodeRequest(inputs="one two", add_special_tokens=True)),
    (f"/{TEI}.Tokenize/Decode", tei.DecodeRequest(ids=[1, 2, 300, 70_000], skip_special_tokens=True)),
]
RIGHT_IN_STREAMS: list[tuple[str, Message]] = [
    (f"/{TEI}.Embed/EmbedStream", tei.EmbedRequest(inputs="a text", truncate=True)),
    (f"/{TEI}.Tokenize/TokenizeStream", tei.EncodeRequest(inputs="one two")),
    (f"/{TEI}.Predict/PredictPairStream", tei.PredictPairRequest(inputs=["one", "two"])),
    (f"/{TEI}.Rerank/RerankStream", tei.RerankStreamRequest(query="q", text="one", raw_scores=True)),
]
EDITS = st.lists(
    st.tuples(
        st.sampled_from(["set", "insert", "delete", "repeat"]),
        st.floats(0, 1),  # where, as a part of the length
        st.one_of(st.binary(min_size=1, max_size=1), st.sampled_from([b"\0", b"\x7f", b"\xff", b"\x80\x80\x01"])),
    ),
    min_size=1,
    max_size=4,
)


def changed(message: bytes, edits: list[tuple[str, float, bytes]]) -> bytes:
    for kind, where, value in edits:
        place = int(where * len(message))
        if kind == "set":
            message = message[:place] + value + message[place + 1 :]
        elif kind == "insert":
            message = message[:place] + value + message[place:]
        elif kind == "delete":
            message = message[:place] + message[place + 1 + value[0] % 4 :]
        else:
            message = message[:place] + message[max(0, place - 8) :]
    return message


def requests(right: list[tuple[str, Message]]) -> list[tuple[str, bytes]]:
    """EXAMPLES for each of `right`."""
    edits: list[list[tuple[str, float, bytes]]] = []

    @settings(max_examples=EXAMPLES * len(right), database=None, deadline=None, suppress_health_check=list(HealthCheck))
    @given(EDITS)
    def generated(example: list[tuple[str, float, bytes]]) -> None:
        edits.append(example)

    generated()
    made = itertools.cycle([(path, message.SerializeToString()) for path, message in right])
    return [(path, changed(whole, each)) for each, (path, whole) in zip(edits, made, strict=False)]


async def code_of(server: FakeServer, path: str, message: bytes) -> grpc.StatusCode:
    """How one request, or a stream of a right message and of this one, ends."""
    channel = raw(server.channel)
    right = dict(RIGHT_IN_STREAMS)
    if path not in right:
        call = channel.unary_unary(path)(message, timeout=20)
    elif path.endswith("RerankStream"):
        call = channel.stream_unary(path)(iter([right[path].SerializeToString(), message]), timeout=20)
    else:
        call = channel.stream_stream(path)(iter([right[path].SerializeToString(), message]), timeout=20)
        with contextlib.suppress(grpc.aio.AioRpcError):
            _ = [answer async for answer in call]
    code: grpc.StatusCode = await call.code()
    return code


async def codes_of(server: FakeServer, made: list[tuple[str, bytes]]) -> Counter[grpc.StatusCode]:
    codes: Counter[grpc.StatusCode] = Counter()
    waiting: Iterator[tuple[str, bytes]] = iter(made)

    async def worker() -> None:
        for path, message in waiting:
            code = await code_of(server, path, message)
            assert code in FINE, (path, message, code)
            codes[code] += 1

    await asyncio.gather(*(worker() for _ in range(AT_ONCE)))
    return codes


async def assert_still_serving(server: FakeServer, task: str) -> None:
    if task == "embedding":
        stub: Any = foreign_stub(server.channel, tei.DESCRIPTOR.services_by_name["Embed"])
        answer = await stub.Embed(tei.EmbedRequest(inputs="are you well"))
        np.testing.assert_array_equal(np.float32(answer.embeddings), fake_embedding("are you well"))
    else:
        stub = foreign_stub(server.channel, tei.DESCRIPTOR.services_by_name["Predict"])
        answer = await stub.PredictPair(tei.PredictPairRequest(inputs=["are you", "well"], raw_scores=True))
        assert answer.predictions[0].score == np.float32(fake_logit("are you", "well"))
    assert server.model.admission.requests == 0


@pytest.mark.slow
@pytest.mark.parametrize("task", ["embedding", "cross_encoder"])
async def test_changed_requests_are_answered_or_refused(task: str, caplog: pytest.LogCaptureFixture) -> None:
    async with fake_server(model={"name": "fake", "task": task}) as server:
        made = requests(RIGHT + RIGHT_IN_STREAMS)
        codes = await codes_of(server, made)
        await assert_still_serving(server, task)
    assert sum(codes.values()) == len(made) >= EXAMPLES * len(RIGHT + RIGHT_IN_STREAMS)
    assert codes[Code.OK] > EXAMPLES
    assert codes[Code.INVALID_ARGUMENT] > EXAMPLES
    assert not [record for record in caplog.records if record.exc_info]
