"""F3: a text on which the model raises, at every place of every batch of 1 to 32 texts.

The server runs in this process, so that its engine can be held until the batch is as it must be, and its log be read.
"""

import asyncio
from collections import Counter

from ml_inference_server.backends.fake import FAULTS, FakeBackend
from tests.conftest import FakeServer, fake_server
from tests.scoreboard.faults.live import asked, ending, loop_lag, new_text, until, without_log
from tests.scoreboard.faults.outcome import NotProven
from tests.scoreboard.row import Figure, Row, Scope

LARGEST = 32
_QUICK_SIZES = (1, 2, 3, 8, 32)
_AHEAD = "ahead of all"


async def _one_batch(server: FakeServer, size: int, place: int) -> tuple[int, str]:
    """(neighbours harmed, how the guilty call ended)."""
    backend = server.backend
    backend.hold()
    before = len(backend.log)
    try:
        # The engine has one stream, and this text holds it while the others wait.
        ahead = asyncio.create_task(ending(asked(server.stub, [_AHEAD])))
        await until(lambda: len(backend.log) > before, "the engine is held")
        texts = [f"!raise {new_text(1)}" if number == place else new_text(2) for number in range(size)]
        calls = []
        for number, text in enumerate(texts):
            calls.append(asyncio.create_task(ending(asked(server.stub, [text]))))
            # Each behind the one before it.
            wanted = number + 1
            await until(lambda w=wanted: server.model.admission.requests > w, "it waits")  # type: ignore[misc]
    finally:
        backend.release()
    ends = await asyncio.gather(*calls)
    if await ahead != "OK":
        raise NotProven("the text that held the engine failed")
    _check_batch(backend, before + 1, size, place)
    harmed = sum(end != "OK" for number, end in enumerate(ends) if number != place)
    return harmed, ends[place]


def _check_batch(backend: FakeBackend, index: int, size: int, place: int) -> None:
    """All of them ran together, and the guilty one stood where it should."""
    rows = backend.log[index].rows
    guilty = [number for number, row in enumerate(rows) if FAULTS["!raise"] in row]
    if (len(rows), guilty) != (size, [place]):
        raise NotProven(
            f"a batch of {len(rows)} texts ran, with the poison at {guilty}, not of {size} with it at {place}"
        )


async def _run(scope: Scope) -> Figure:
    sizes = _QUICK_SIZES if scope.is_quick else range(1, LARGEST + 1)
    batches = sum(sizes)
    done = neighbours = harmed = runs = 0
    ends: Counter[str] = Counter()
    model = {"name": "fake", "streams": 1}
    async with (
        loop_lag() as lag,
        without_log(),
        fake_server(model=model, server={"enable_test_faults": True}, batching={"max_batch_size": LARGEST}) as server,
    ):
        for size in sizes:
            for place in range(size):
                harmed_here, end = await _one_batch(server, size, place)
                harmed += harmed_here
                neighbours += size - 1
                ends[end] += 1
                scope.tell(done := done + 1, batches)
        runs = len(server.backend.log)
        await until(lambda: server.model.admission.requests == 0, "all permits are back")
    guilty_wrong = batches - ends["INTERNAL"]
    return Figure(
        text=f"{harmed} of {neighbours:,} neighbours harmed".replace(",", " "),
        passed=harmed == 0 and guilty_wrong == 0,
        note=f"the poison ended with {dict(ends)}" if guilty_wrong else "",
        details={"batches": batches, "runs_of_the_engine": runs, "loop_lag_worst_ms": round(lag.worst_ms, 1)},
    )


ROW = Row(
    key="F3",
    title="A text on which the model raises, at every place of batches of 1 to 32 texts",
    pass_line="0 of 10 912 neighbours harmed",
    run=_run,
)
