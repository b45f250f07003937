"""What is refused is not computed, and what waits does not mind the clock on the wall."""

import asyncio
import time
from collections.abc import Sequence

import grpc
import numpy as np
import pytest

from ml_inference_server.backends.fake import fake_embedding
from ml_inference_server.proto import inference_pb2 as pb
from tests.conftest import FakeServer, fake_server, refusal, until

Code = grpc.StatusCode
HOUR_S = 3600.0


def computed(server: FakeServer) -> int:
    return sum(len(batch.rows) for batch in server.backend.log)


async def answers(server: FakeServer, texts: Sequence[str]) -> None:
    reply = await server.stub.Embed(pb.EmbedRequest(texts=texts))
    rows = np.frombuffer(reply.embeddings, "<f4").reshape(reply.count, reply.dimension)
    np.testing.assert_array_equal(rows, np.stack([fake_embedding(text) for text in texts]))


async def test_a_text_that_is_too_long_is_refused_before_any_of_its_request_is_computed(server: FakeServer) -> None:
    request = pb.EmbedRequest(texts=["short", "long " * 1000], overflow=pb.OVERFLOW_REFUSE)
    assert (await refusal(server.stub.Embed(request))).code() is Code.INVALID_ARGUMENT
    await answers(server, ["after"])
    assert computed(server) == 1


async def test_what_a_full_queue_refuses_is_never_computed() -> None:
    async with fake_server(batching={"max_queue_requests": 1}) as server:
        server.backend.hold()
        texts = [f"held {number} " * 10 for number in range(8)]
        held = asyncio.ensure_future(answers(server, texts))
        await until(lambda: server.model.admission.requests == 1)
        refused = [await refusal(server.stub.Embed(pb.EmbedRequest(texts=[f"refused {n}"]))) for n in range(5)]
        server.backend.release()
        await held
        await answers(server, ["after"])
        assert {error.code() for error in refused} == {Code.RESOURCE_EXHAUSTED}
        assert computed(server) == len(texts) + 1


@pytest.mark.parametrize("step_s", [HOUR_S, -HOUR_S])
async def test_the_wall_clock_may_be_set_while_requests_wait(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch, step_s: float
) -> None:
    server.backend.hold()
    slots = server.backend.info.concurrency
    calls = [asyncio.ensure_future(answers(server, [f"call {number}"])) for number in range(slots + 8)]
    late = asyncio.ensure_future(refusal(server.stub.Embed(pb.EmbedRequest(texts=["late"]), timeout=0.2)))
    await until(lambda: server.model.admission.requests == len(calls) + 1)
    at_start = time.time()
    monkeypatch.setattr(time, "time", lambda: at_start + step_s)
    assert (await late).code() is Code.DEADLINE_EXCEEDED
    await until(lambda: server.model.admission.requests == len(calls))
    server.backend.release()
    await asyncio.gather(*calls)
