"""How long a batch may run, and what a worker in threads says of one that does not end."""

import asyncio
import math
from typing import cast

import pytest

from ml_inference_server.backends.base import TokenBatch
from ml_inference_server.backends.fake import FakeBackend
from ml_inference_server.server.admission import Admission
from ml_inference_server.server.engine_rate import EngineRate
from ml_inference_server.server.patience import Patience, hang_limit_s
from ml_inference_server.server.workers import ThreadWorker
from ml_inference_server.utils.config import BatchingSettings, ModelSettings
from ml_inference_server.utils.errors import Unavailable
from tests.conftest import JumpingLoop, until, virtual_time
from tests.unit.scheduler_kit import Rig


@pytest.mark.parametrize(
    ("expected_s", "batches", "most_s", "limit_s"),
    [
        (0.01, 0, 60, 60),  # nothing is known
        (0.01, 19, 60, 60),
        (0.01, 20, 60, 10),  # the least: the first of its kind may take its time
        (1.0, 20, 60, 20),
        (9.0, 20, 60, 60),
        (0.01, 20, 0.4, 0.4),
    ],
)
def test_the_limit_follows_the_measured_time(expected_s: float, batches: int, most_s: float, limit_s: float) -> None:
    assert hang_limit_s(expected_s, batches, most_s) == limit_s


@virtual_time
async def test_the_batcher_gives_each_batch_a_limit_of_its_own() -> None:
    rig = Rig(hang_timeout_s=600)
    rig.worker.takes_s = 2.0
    for _ in range(21):
        await rig.call(1)
    assert rig.worker.limits_s[:20] == [600] * 20
    assert rig.worker.limits_s[20] == pytest.approx(40)


@virtual_time
async def test_patience_ends_after_its_limit_and_not_before() -> None:
    late: list[float] = []
    loop = asyncio.get_running_loop()
    began_at = loop.time()
    Patience(60, lambda: late.append(loop.time() - began_at))
    ended = Patience(60, lambda: pytest.fail("it was over"))
    Patience(math.inf, lambda: pytest.fail("it has no limit"))
    await asyncio.sleep(59)
    ended.end()
    ended.end()
    assert not late
    await asyncio.sleep(10)
    assert late == [pytest.approx(60, abs=1)]


@virtual_time
async def test_time_in_which_the_whole_process_stood_still_does_not_count() -> None:
    late: list[None] = []
    jumping = cast(JumpingLoop, asyncio.get_running_loop()).jumping
    Patience(60, lambda: late.append(None))
    await asyncio.sleep(30)
    jumping.now += 3600  # SIGSTOP, and an hour later SIGCONT
    await asyncio.sleep(20)
    assert not late
    await asyncio.sleep(20)
    assert late


@virtual_time
async def test_a_batch_that_hangs_in_a_thread_is_told_then_refused_then_lost() -> None:
    backend = FakeBackend(ModelSettings(backend="fake", streams=2))
    backend.load_model()
    worker = ThreadWorker(backend)
    admission = Admission(BatchingSettings(), EngineRate(), stuck=lambda: worker.stuck, batch_tokens=2048)
    batch = TokenBatch.of(backend.tokenizer.encode(["a"]))
    deadline = asyncio.get_running_loop().time() + 3600
    try:
        backend.hold()
        first = asyncio.create_task(worker.run(batch, 60))
        await asyncio.sleep(59)
        assert (worker.trouble, worker.stuck, worker.lost) == ("", "", "")
        await asyncio.sleep(2)
        assert (worker.trouble, worker.stuck) == ("a batch has been running for more than 60 s", "")
        with admission.admit(1, deadline):  # the other slot moves
            pass
        second = asyncio.create_task(worker.run(batch, 30))
        await asyncio.sleep(31)
        with pytest.raises(Unavailable, match="the engine does not answer") as refused:
            admission.admit(1, deadline)
        assert refused.value.reason == "ENGINE_STUCK"
        assert worker.lost == ""
        await asyncio.sleep(30)
        assert "cannot be ended" in worker.lost
        backend.release()
        await until(lambda: first.done() and second.done())
        assert (worker.trouble, worker.stuck, worker.lost) == ("", "", "")
    finally:
        backend.release()
        worker.close()
