"""How a request names its priority, over gRPC and over HTTP, and what a wrong one gets."""

from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import grpc
import pytest

from ml_inference_server.proto import inference_pb2 as pb
from tests.conftest import FakeServer, fake_server, refusal, until


@pytest.fixture
async def one_stream() -> AsyncIterator[FakeServer]:
    async with fake_server(model={"streams": 1}, server={"enable_test_faults": True}) as fake:
        yield fake


ONE = pb.EmbedRequest(texts=["a cell"])


@pytest.mark.parametrize(
    ("rpc", "message"),
    [
        ("Embed", pb.EmbedRequest(texts=["a"], priority=pb.PRIORITY_INTERACTIVE)),
        ("Embed", pb.EmbedRequest(texts=["a"], priority=pb.PRIORITY_BULK)),
        ("Score", pb.ScoreRequest(pairs=[pb.Pair(query="a", passage="b")], priority=pb.PRIORITY_BULK)),
        ("Rerank", pb.RerankRequest(query="a", documents=["b"], priority=pb.PRIORITY_BULK)),
    ],
)
async def test_each_request_takes_a_priority_and_answers_as_without(server: FakeServer, rpc: str, message: Any) -> None:
    plain = type(message)()
    plain.CopyFrom(message)
    plain.ClearField("priority")
    answers = [await getattr(server.stub, rpc)(each) for each in (message, plain)]
    for answer in answers:
        answer.ClearField("timing")
    assert answers[0] == answers[1]


@pytest.mark.parametrize("rpc", ["Embed", "Score", "Rerank"])
async def test_a_number_that_is_no_priority_is_refused(server: FakeServer, rpc: str) -> None:
    message = {
        "Embed": pb.EmbedRequest(texts=["a"], priority=7),  # type: ignore[arg-type]
        "Score": pb.ScoreRequest(pairs=[pb.Pair(query="a", passage="b")], priority=7),  # type: ignore[arg-type]
        "Rerank": pb.RerankRequest(query="a", documents=["b"], priority=7),  # type: ignore[arg-type]
    }[rpc]
    error = await refusal(getattr(server.stub, rpc)(message))
    assert (error.code(), error.details()) == (grpc.StatusCode.INVALID_ARGUMENT, "priority: expected 0 to 2")


async def test_metadata_that_is_no_priority_is_refused(server: FakeServer) -> None:
    for good in ("bulk", "INTERACTIVE"):
        await server.stub.Embed(ONE, metadata=(("x-priority", good),))
    error = await refusal(server.stub.Embed(ONE, metadata=(("x-priority", "urgent"),)))
    said = "x-priority: expected interactive or bulk"
    assert (error.code(), error.details()) == (grpc.StatusCode.INVALID_ARGUMENT, said)


async def test_a_header_that_is_no_priority_is_refused(server: FakeServer) -> None:
    body = {"model": "fake", "input": ["a cell"]}
    async with aiohttp.ClientSession(server.url) as session:
        for value, status in (("bulk", 200), ("interactive", 200), ("1", 400)):
            async with session.post("/v1/embeddings", json=body, headers={"x-priority": value}) as answer:
                assert answer.status == status, value
                text = await answer.text()
    assert "x-priority: expected interactive or bulk" in text


@pytest.mark.parametrize("by", ["field", "metadata"])
async def test_what_is_named_decides_what_goes_first(one_stream: FakeServer, by: str) -> None:
    """One stream, held: a bulk request waits first, an interactive one second, and is computed first."""
    one_stream.backend.hold()
    held = one_stream.stub.Embed(ONE)
    await until(lambda: len(one_stream.backend.log) == 1)
    priority = pb.PRIORITY_BULK if by == "field" else pb.PRIORITY_UNSPECIFIED
    metadata = (("x-priority", "bulk"),) if by == "metadata" else ()
    bulk = one_stream.stub.Embed(pb.EmbedRequest(texts=["b b"], priority=priority), metadata=metadata)
    await until(lambda: one_stream.metrics.snapshot()["queue"]["texts"] == 1)
    query = one_stream.stub.Embed(pb.EmbedRequest(texts=["c c c"]))
    await until(lambda: one_stream.metrics.snapshot()["queue"]["texts"] == 2)
    one_stream.backend.release()
    for call in (held, bulk, query):
        await call
    assert [len(batch.rows[0]) for batch in one_stream.backend.log] == [4, 5, 4]  # words and the two round them


async def test_a_query_is_answered_beside_a_bulk_batch_that_holds_the_stream(one_stream: FakeServer) -> None:
    slow = pb.EmbedRequest(texts=["!slow:3000 bulk"], priority=pb.PRIORITY_BULK)
    job = one_stream.stub.Embed(slow)
    await until(lambda: len(one_stream.backend.log) == 1)
    await one_stream.stub.Embed(ONE)
    assert not job.done()
    job.cancel()
