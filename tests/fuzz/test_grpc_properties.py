"""However a right message is changed, of any method that reflection lists: it is answered, or refused with a status of
the contract, and the server goes on."""

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import AsyncIterator, Callable

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ml_inference_server.proto import inference_pb2 as pb
from tests.fuzz.budget import BATCH, FACTOR, GRPC_REQUESTS, fuzzing
from tests.fuzz.grpc_wire import GrpcWire, Method, Outcome, grpc_wire, listed_methods
from tests.fuzz.message_mutations import messages
from tests.fuzz.on_loop import entered
from tests.integration.foreign_kit import told

Code = grpc.StatusCode
# With the details that programs read. A deadline can pass: an Open Inference request may ask for a microsecond.
DETAILED = {Code.INVALID_ARGUMENT, Code.FAILED_PRECONDITION, Code.RESOURCE_EXHAUSTED, Code.DEADLINE_EXCEEDED}
ALLOWED = {Code.OK, Code.NOT_FOUND, Code.UNIMPLEMENTED, *DETAILED}
NUMBERS = {code.value[0] for code in ALLOWED}


@contextlib.asynccontextmanager
async def quiet_wire(caplog: pytest.LogCaptureFixture, task: str) -> AsyncIterator[GrpcWire]:
    """To one that is well at the end, and has written nothing into its log that an operator must look at."""
    async with grpc_wire(model={"task": task}, server={"accept_any_model": True}) as wire:
        yield wire
        reply = await wire.server.stub.Rerank(pb.RerankRequest(query="are you well", documents=["yes"]))
        assert len(reply.ranks) == 1
    assert warnings(caplog) == []


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def check(method: Method, outcome: Outcome) -> None:
    assert outcome.code in ALLOWED, (method.path, outcome)
    if method.path.endswith("InferenceService/EmbedStream"):
        errors = [pb.EmbedStreamResponse.FromString(answer).error for answer in outcome.answers]
        assert {error.code for error in errors} <= NUMBERS, (method.path, errors)
    if outcome.error is None:
        return
    details = outcome.error.details() or ""
    assert "Traceback" not in details
    assert "Error" not in details, (method.path, details)
    if outcome.code in DETAILED:
        reason, _ = told(outcome.error)
        assert reason, (method.path, outcome)


@pytest.mark.parametrize("task", ["embedding", "cross_encoder"])
async def test_each_method_answers_a_right_message(caplog: pytest.LogCaptureFixture, task: str) -> None:
    """Otherwise the changes below would try nothing."""
    async with quiet_wire(caplog, task) as wire:
        methods = await listed_methods(wire.server)
        services = {method.path.partition("/")[0] for method in methods}
        assert {"ml_inference_server.v1.InferenceService", "inference.GRPCInferenceService", "tei.v1.Embed"} <= services
        answered = Counter[Code]()
        for method in methods:
            outcomes = [await wire.call(method, [each.SerializeToString()] * 2) for each in method.right]
            for outcome in outcomes:
                check(method, outcome)
            answered[outcomes[0].code] += 1
            if task == "embedding" and "Predict" not in method.path:
                assert outcomes[0].code in (Code.OK, Code.UNIMPLEMENTED), (method.path, outcomes[0])
        assert answered[Code.OK] >= 20


@pytest.mark.parametrize(
    ("task", "requests"), [("embedding", GRPC_REQUESTS * 3 // 4), ("cross_encoder", GRPC_REQUESTS // 4)]
)
def test_changed_messages(
    caplog: pytest.LogCaptureFixture, record_property: Callable[[str, object], None], task: str, requests: int
) -> None:
    codes = Counter[Code]()
    with asyncio.Runner() as runner, entered(runner, quiet_wire(caplog, task)) as wire:
        listed = runner.run(listed_methods(wire.server))
        # More often those that have something to say.
        methods = [method for method in listed for _ in range(5 if len(method.right) > 1 else 1)]

        async def all_at_once(batch: list[tuple[Method, list[bytes]]]) -> list[Outcome]:
            return list(await asyncio.gather(*(wire.call(*each) for each in batch)))

        @fuzzing(requests)
        @given(st.lists(messages(methods), min_size=BATCH, max_size=BATCH))
        def property_(batch: list[tuple[Method, list[bytes]]]) -> None:
            for (method, _), outcome in zip(batch, runner.run(all_at_once(batch)), strict=True):
                check(method, outcome)
                codes[outcome.code] += 1
            assert warnings(caplog) == []
            assert wire.server.model.admission.requests == 0
            wire.server.backend.log.clear()

        property_()
    record_property("requests", codes.total())
    assert codes.total() >= requests * FACTOR
    assert {Code.OK, Code.INVALID_ARGUMENT, Code.FAILED_PRECONDITION, Code.UNIMPLEMENTED, Code.NOT_FOUND} <= set(codes)


async def test_tensors_without_end_are_refused_before_anything_is_made_of_them(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A message has room for millions of empty ones."""
    async with quiet_wire(caplog, "embedding") as wire:
        methods = {method.path: method for method in await listed_methods(wire.server)}
        infer = methods["inference.GRPCInferenceService/ModelInfer"]
        for name in ("inputs", "outputs", "parameters"):
            request = type(infer.right[0])(model_name="fake")
            for place in range(1025):
                getattr(request, name).get_or_create(str(place)) if name == "parameters" else getattr(
                    request, name
                ).add()
            outcome = await wire.call(infer, [request.SerializeToString()])
            assert outcome.error is not None
            assert outcome.error.details() == f"{name}: 1025 of them, the limit is 1024"
