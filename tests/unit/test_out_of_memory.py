"""An engine that runs out of memory: recognised by what it says, named, and given smaller batches."""

import asyncio

import numpy as np
import pytest

from ml_inference_server.backends.fake import fake_embedding
from ml_inference_server.server.call import Call
from ml_inference_server.server.engine_process import EngineDied
from ml_inference_server.server.out_of_memory import BatchRoom, may_have_run_out, ran_out_of_memory
from ml_inference_server.utils.errors import OutOfMemory
from tests.conftest import fake_server, virtual_time
from tests.unit.scheduler_kit import Rig

# As the libraries say it.
SAID = [
    MemoryError(),
    RuntimeError("MemoryError: 3 texts"),  # of an engine in a process of its own
    RuntimeError(
        "OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 8 GiB"
    ),
    RuntimeError("MPS backend out of memory (MPS allocated: 8.00 GB, max allowed: 9.07 GB)"),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:118] . DefaultCPUAllocator: can't allocate memory: you tried to allocate"
    ),
    RuntimeError("[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : bad_alloc: std::bad_alloc"),
    RuntimeError("onnxruntime::BFCArena::AllocateRawInternal Failed to allocate memory for requested buffer of size 9"),
    RuntimeError("Available memory of 1048576 is smaller than requested bytes of 4194304"),
    RuntimeError("Exception from src/inference/src/cpp/infer_request.cpp:223: std::bad_alloc"),
    RuntimeError("[GPU] CL_OUT_OF_RESOURCES: out of memory"),
]


@pytest.mark.parametrize("error", SAID, ids=lambda error: str(error)[:30])
def test_it_is_recognised(error: Exception) -> None:
    assert ran_out_of_memory(error)


def test_other_failures_are_not_taken_for_it() -> None:
    for error in (RuntimeError("fault word !raise"), ValueError("memory format"), EngineDied("exit code 1")):
        assert not may_have_run_out(error)
    killed = EngineDied("the process of the engine ended", is_killed=True)
    assert may_have_run_out(killed)
    assert not ran_out_of_memory(killed)


def test_room_shrinks_to_what_suffices_and_grows_again() -> None:
    room = BatchRoom(4096)
    room.ran_out(4000)
    assert room.tokens == 2000
    room.ran_out(3000)  # another batch, which had begun before
    assert room.tokens == 1500
    for _ in range(499):
        room.succeeded()
    assert room.tokens == 1500
    room.succeeded()
    assert room.tokens == 3000
    for _ in range(500):
        room.succeeded()
    assert room.tokens == 4096
    for _ in range(20):
        room.ran_out(1)
    assert room.tokens == 64


@virtual_time
async def test_batches_after_it_are_small_enough_from_the_start() -> None:
    """Memory suffices for 30 texts of 3 tokens. Without the lesson, each batch of 64 would fail first."""
    rig = Rig(max_batch_size=64)
    failed: list[int] = []

    def too_large(ids: list[int]) -> bool:
        if len(ids) > 30:
            failed.append(len(ids))
            raise MemoryError
        return False

    rig.worker.raises = too_large
    first = await asyncio.gather(*(rig.call(i) for i in range(64)))
    assert [row for (row,) in first] == list(range(64))
    assert failed == [64, 32, 32]  # both halves
    for turn in range(1, 5):
        await asyncio.gather(*(rig.call(1000 * turn + i) for i in range(64)))
    assert failed == [64, 32, 32]  # both halves


async def test_neighbours_are_answered_and_the_input_that_is_too_large_is_named(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with fake_server(server={"enable_test_faults": True}) as server:
        now = asyncio.get_running_loop().time()
        call = Call("test", received_at=now, deadline=now + 60)
        texts = ["a", "b", "!oom:1 c", "d", "!oom:0 e"]
        calls = (server.model.service.embed([text], call) for text in texts)
        *outcomes, alone = await asyncio.gather(*calls, return_exceptions=True)
    for text, outcome in zip(texts, outcomes, strict=False):
        assert not isinstance(outcome, BaseException)
        np.testing.assert_array_equal(outcome.values[0], fake_embedding(text))
    assert isinstance(alone, OutOfMemory)
    assert "shorten it" in str(alone)
    assert any(
        "out of memory (MemoryError('5 texts')) in a batch of 5 texts" in record.getMessage()
        for record in caplog.records
    )
