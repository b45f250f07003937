"""F4: an exception in the batching, once at each of its lines, while calls wait, run, share a text, fail and leave.

The server runs in this process, as the exception has to come out of its own code.
"""

import asyncio
import contextlib
import random
from collections import Counter
from collections.abc import AsyncIterator, Awaitable
from pathlib import Path

import grpc

from ml_inference_server.proto import inference_pb2 as pb
from ml_inference_server.server import (
    batch_runner,
    batching,
    engine_rate,
    out_of_memory,
    patience,
    pending,
    scheduler,
    turns,
    workers,
)
from tests.conftest import FakeServer, fake_server
from tests.faults.planted import Line, Planter
from tests.scoreboard.faults.live import asked, ending, new_text, until, without_log
from tests.scoreboard.faults.outcome import NotProven
from tests.scoreboard.row import Figure, Row, Scope

FILES = frozenset(
    Path(str(module.__file__))
    for module in (scheduler, batching, batch_runner, pending, engine_rate, out_of_memory, patience, turns, workers)
)
# Each has its answer or one error long before; who waits for so long was forgotten.
_PATIENCE_S = 5.0
# A batch whose end was missed would be taken for one that hangs, so much later.
_HANG_TIMEOUT_MS = 2000
_QUICK = 25
_MOST_TOLD = 8
# An error of the server's own is told as INTERNAL; who was to leave has left.
_MAY_END = {"OK", "INTERNAL", "CANCELLED"}


@contextlib.asynccontextmanager
async def _server() -> AsyncIterator[FakeServer]:
    async with fake_server(
        model={"name": "fake:base_ms=1", "streams": 1},
        server={"enable_test_faults": True, "hang_timeout_ms": _HANG_TIMEOUT_MS},
        batching={"max_batch_size": 4},
    ) as server:
        yield server


async def _calls(server: FakeServer) -> Counter[str]:
    """How the calls ended that met every part of the batching."""
    backend, twice = server.backend, new_text()
    backend.hold()
    ran = len(backend.log)
    try:
        texts = [[new_text()], [twice], [twice], [new_text(), new_text(9)], [f"!raise-once {new_text(1)}"]]
        texts += [[f"!raise {new_text(1)}"], [f"!nan {new_text(1)}"], [f"!oom:1 {new_text(1)}"]]
        calls = []
        for each in texts:
            calls.append(asyncio.create_task(ending(asked(server.stub, each, _PATIENCE_S))))
            await asyncio.sleep(0.001)
        leaving = server.stub.Embed(pb.EmbedRequest(texts=[new_text()]), timeout=_PATIENCE_S)
        calls.append(asyncio.create_task(_left(leaving)))
        with contextlib.suppress(TimeoutError):
            await until(lambda: len(backend.log) > ran and server.model.admission.requests > len(texts), "", 0.2)
        leaving.cancel()
        await asyncio.sleep(0.005)
    finally:
        backend.release()
    return Counter(await asyncio.gather(*calls))


async def _left(call: Awaitable[object]) -> str:
    try:
        await call
    except asyncio.CancelledError:
        return "CANCELLED"
    return "OK"


async def _wrong_after(server: FakeServer, ends: Counter[str]) -> list[str]:
    """What is not as it must be, once the calls have ended."""
    wrong = [f"{count} calls ended with {end}" for end, count in ends.items() if end not in _MAY_END]
    for _ in range(2):
        try:
            await asked(server.stub, [new_text()], _PATIENCE_S)
        except grpc.aio.AioRpcError as error:
            wrong.append(f"a call after it ended with {error.code().name} ({error.details()})")
    admission = server.model.admission

    def at_rest() -> bool:
        queue = server.metrics.snapshot()["queue"]
        held = admission.requests + admission.reserved_tokens
        return not (held + queue["texts"] + queue["tokens"] + queue["batches_in_flight"])

    try:
        await until(at_rest, "rest", limit_s=1)
    except TimeoutError:
        wrong.append(f"{admission.requests} requests and {admission.reserved_tokens} tokens are held for ever")
    return wrong


async def _lines() -> list[Line]:
    """All that the calls pass when nothing is planted."""
    planter = Planter(FILES)
    async with _server() as server:
        with planter.at_work():
            for _ in range(3):
                await _calls(server)
    return list(planter.lines)


async def _run(scope: Scope) -> Figure:
    async with without_log():
        lines = await _lines()
        tried = random.Random(scope.seed).sample(lines, _QUICK) if scope.is_quick else lines
        failures: list[str] = []
        missed = 0
        left = iter(enumerate(tried))
        line: Line | None = None
        while True:
            # One server for as long as nothing is wrong with it.
            async with _server() as server:
                for done, line in left:
                    scope.tell(done, len(tried))
                    planter = Planter(FILES, line)
                    for _ in range(3):
                        with planter.at_work():
                            ends = await _calls(server)
                        if planter.has_raised:
                            break
                    missed += not planter.has_raised
                    if wrong := await _wrong_after(server, ends):
                        failures.append(f"{line}: {', '.join(wrong)}")
                        break
                else:
                    break
    count = len(tried) - missed
    if missed > len(tried) // 20:
        raise NotProven(f"{missed} of {len(tried)} lines were not met again")
    return Figure(
        text=f"{count - len(failures)} of {count} survived",
        passed=not failures,
        note="; ".join(failures[:_MOST_TOLD]) + (f"; {len(failures) - _MOST_TOLD} more" if len(failures) > 8 else ""),
        details={"lines_of_the_batching_met": len(lines), "lines_tried": len(tried), "lines_not_met_again": missed}
        | {f"failure_{number}": each for number, each in enumerate(failures)},
    )


ROW = Row(
    key="F4",
    title="An exception in the batching, once at each of its lines",
    pass_line="all survived: each call ends, no permit is lost, the next call is answered",
    run=_run,
)
