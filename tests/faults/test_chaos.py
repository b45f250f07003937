"""Ten thousand calls that misbehave in every way at once, with a ledger of what each was owed."""

import asyncio
import random
from collections import Counter
from dataclasses import dataclass

import grpc
import numpy as np
import pytest

from ml_inference_server.backends.fake import fake_embedding
from ml_inference_server.proto import inference_pb2 as pb
from tests.conftest import FakeServer, fake_server, thread_names, until

CALLS = 10_000
IN_FLIGHT = 200
Code = grpc.StatusCode

# What each plan may end with besides its own right answer; None: nothing else.
ALLOWED = {
    "plain": {Code.RESOURCE_EXHAUSTED},
    "cancel": {Code.RESOURCE_EXHAUSTED, Code.CANCELLED},
    "deadline": {Code.RESOURCE_EXHAUSTED, Code.DEADLINE_EXCEEDED},
    "raise": {Code.RESOURCE_EXHAUSTED, Code.INTERNAL},
    "nan": {Code.RESOURCE_EXHAUSTED, Code.INTERNAL},
    "invalid": {Code.INVALID_ARGUMENT},
}
NEVER_OK = {"raise", "nan", "invalid"}
FAULT_TEXT = {"raise": "!raise", "nan": "!nan", "invalid": " "}


@dataclass(frozen=True)
class Plan:
    kind: str
    texts: list[str]
    after_s: float


def plan(rng: random.Random, number: int) -> Plan:
    kind = rng.choices(list(ALLOWED), [70, 8, 8, 5, 4, 5])[0]
    texts = [f"call {number} text {i} " + "w " * rng.randint(0, 30) for i in range(rng.choice([1, 1, 1, 2, 5, 40]))]
    if kind in FAULT_TEXT:
        texts[rng.randrange(len(texts))] = FAULT_TEXT[kind] + (f" {number}" if kind != "invalid" else "")
    return Plan(kind, texts, rng.uniform(0.0, 0.02))


async def carry_out(server: FakeServer, each: Plan) -> str:
    """How the call ended; asserts that this is something that the plan allows."""
    timeout = max(each.after_s, 0.001) if each.kind == "deadline" else 60
    call = server.stub.Embed(pb.EmbedRequest(texts=each.texts), timeout=timeout)
    if each.kind == "cancel":
        asyncio.get_running_loop().call_later(each.after_s, call.cancel)
    try:
        reply = await call
    except asyncio.CancelledError:
        assert each.kind == "cancel"
        return Code.CANCELLED.name
    except grpc.aio.AioRpcError as error:
        code = error.code()
    else:
        assert each.kind not in NEVER_OK
        rows = np.frombuffer(reply.embeddings, "<f4").reshape(reply.count, reply.dimension)
        np.testing.assert_array_equal(rows, np.stack([fake_embedding(text) for text in each.texts]))
        return Code.OK.name
    assert code in ALLOWED[each.kind], (each.kind, code)
    return str(code.name)


@pytest.mark.parametrize("seed", [20261122])
async def test_every_caller_gets_its_own_answer_or_one_clear_error(seed: int) -> None:
    rng = random.Random(seed)
    async with fake_server(
        model={"name": "fake:base_ms=1"},
        server={"enable_test_faults": True},
        batching={"max_queue_requests": 60, "max_queue_tokens": 60_000},
    ) as server:
        admission = server.model.admission
        await server.stub.Embed(pb.EmbedRequest(texts=["start the threads"] * 2))
        # Long enough to be tokenised in a thread.
        await asyncio.gather(*(server.stub.Embed(pb.EmbedRequest(texts=[f"{i} " * 800])) for i in range(50)))
        tasks_before, threads_before = len(asyncio.all_tasks()), thread_names()
        plans = iter([plan(rng, number) for number in range(CALLS)])
        ends: Counter[tuple[str, str]] = Counter()

        async def caller() -> None:
            for each in plans:
                ends[each.kind, await carry_out(server, each)] += 1

        await asyncio.gather(*(caller() for _ in range(IN_FLIGHT)))

        assert sum(ends.values()) == CALLS
        by_code = Counter(code for (_, code), count in ends.items() for _ in range(count))
        # The faults did happen, or this test protects nothing.
        for code in ("OK", "CANCELLED", "DEADLINE_EXCEEDED", "INTERNAL", "INVALID_ARGUMENT", "RESOURCE_EXHAUSTED"):
            assert by_code[code] > 20, f"seed {seed}: {by_code}"

        await until(lambda: admission.requests == 0)
        await until(lambda: server.metrics.snapshot()["queue"]["batches_in_flight"] == 0)
        figures = server.metrics.snapshot()
        assert (figures["queue"]["texts"], figures["queue"]["tokens"]) == (0, 0)
        assert not any(figures["in_flight"].values())
        # All of the budget is there again.
        with admission.admit(60_000, asyncio.get_running_loop().time() + 60):
            pass
        await until(lambda: len(asyncio.all_tasks()) <= tasks_before)
        assert thread_names() == threads_before
        counted = figures["totals"]["by_method_and_code"]["Embed"]
        assert "UNKNOWN" not in counted
        # The server cannot have answered less than the clients received; a client that left may differ by its own call.
        assert 0 <= counted["OK"] - 51 - by_code["OK"] <= by_code["CANCELLED"] + by_code["DEADLINE_EXCEEDED"]
