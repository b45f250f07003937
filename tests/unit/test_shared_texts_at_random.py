"""Few distinct texts, many requests, callers that leave or are late, texts that fail: whatever the order, nobody gets
another's row, nobody waits for ever, and nothing is computed twice at a time."""

import asyncio
import math
import random
from collections import Counter

import numpy as np
import pytest

from ml_inference_server.backends.base import TokenBatch
from ml_inference_server.server.workers import Output
from ml_inference_server.utils.errors import BackendFailure, DeadlinePassed, NonFiniteOutput, Overloaded
from tests.conftest import virtual_time
from tests.unit.scheduler_kit import POISON, Rig, StubWorker, text

NOT_A_NUMBER = 555
FLAKY = 444  # fails where it has company, and now and then on its own
TEXTS = (1, 2, 3, 4, 5, POISON, NOT_A_NUMBER, FLAKY)
CALLERS = 200


class RandomWorker(StubWorker):
    """Takes its time, and keeps the books on what runs at the same time. `asked`: keys that somebody may wait for."""

    def __init__(self, rng: random.Random, slots: int) -> None:
        super().__init__(slots)
        self.rng = rng
        self.running: Counter[int] = Counter()
        self.most_at_a_time = 0
        self.most_slots = 0
        self.transform = lambda rows: np.where(rows == NOT_A_NUMBER, np.nan, rows)
        self.raises = lambda ids: POISON in ids or (FLAKY in ids and (len(ids) > 1 or rng.random() < 0.2))

    async def run(self, batch: TokenBatch, limit_s: float = math.inf, *, is_bulk: bool = False) -> Output:
        ids = batch.ids[batch.starts[:-1]].tolist()
        self.running.update(ids)
        self.most_at_a_time = max(self.most_at_a_time, *self.running.values())
        self.takes_s = self.rng.choice([0.0, 0.1, 1.0, 3.0])
        self.ready_s = self.rng.choice([0.0, 0.0, 0.2])
        try:
            return await super().run(batch)
        finally:
            self.running.subtract(ids)


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("seed", range(12))
def test_whatever_comes_and_goes(seed: int, share: bool, cached: bool) -> None:
    rng = random.Random(seed)
    reached: Counter[str] = Counter()

    @virtual_time
    async def check() -> None:
        rig = Rig(
            slots=rng.choice([1, 2, 3]),
            timeout_s=rng.choice([0.0, 0.0, 0.5]),
            max_batch_size=rng.choice([1, 2, 4]),
            cache_bytes=rng.choice([500, 2_000, 10**6]) if cached else 0,
            share_equal_texts=share,
            worker=lambda slots: RandomWorker(rng, slots),
        )
        loop = asyncio.get_running_loop()

        async def caller() -> None:
            await asyncio.sleep(rng.choice([0.0, rng.random() * 30]))
            ids = [rng.choice(TEXTS[:5] if rng.random() < 0.7 else TEXTS) for _ in range(rng.choice([1, 1, 2, 5]))]
            began, patience_s = loop.time(), rng.choice([0.3, 2.0, 1e6, 1e6])
            ended_at: list[float] = []
            answer = rig.compute(*(text(i) for i in ids), timeout_s=patience_s, fresh=rng.random() < 0.1)
            answer.add_done_callback(lambda _: ended_at.append(loop.time()))
            if rng.random() < 0.2:
                await asyncio.sleep(rng.choice([0.0, 0.05, 1.0]))
                answer.cancel()
            try:
                found = await answer
            except asyncio.CancelledError:
                reached["left"] += 1
            except DeadlinePassed:
                assert ended_at == [pytest.approx(began + patience_s, abs=1e-6)]
                reached["late"] += 1
            except NonFiniteOutput:
                assert NOT_A_NUMBER in ids
                reached["not finite"] += 1
            except BackendFailure:
                assert {POISON, FLAKY} & set(ids)
                reached["failed"] += 1
            except Overloaded:
                assert patience_s < 10
                reached["refused"] += 1
            else:
                assert found.rows[:, 0].tolist() == ids
                assert not {POISON, NOT_A_NUMBER} & set(ids)
                assert began <= found.tokenized_at <= found.engine_started_at <= found.engine_ended_at <= loop.time()
                assert 0 <= found.shared + found.cached <= len(ids)
                found.rows[:] = -1
                reached["answered"] += 1
                reached["shared"] += found.shared
                reached["cached"] += found.cached

        async def auditor() -> None:
            """The tokens that are held are those of the texts that wait, at every moment between two turns."""
            while True:
                texts, tokens, _ = rig.queue()
                assert (tokens, rig.admission.reserved_tokens) == (3 * texts, tokens)
                await asyncio.sleep(0.25)

        audit = asyncio.create_task(auditor())
        await asyncio.gather(*(caller() for _ in range(CALLERS)))
        await asyncio.sleep(30)  # what all have left still runs to its end
        assert not audit.done()
        audit.cancel()
        worker = rig.worker
        assert isinstance(worker, RandomWorker)
        if share:
            assert worker.most_at_a_time == 1
        rig.assert_at_rest()
        assert await rig.call(*TEXTS[:5]) == [float(i) for i in TEXTS[:5]]

    check()
    assert sum(reached[end] for end in ("left", "late", "failed", "not finite", "refused", "answered")) == CALLERS
    assert min(reached[end] for end in ("left", "late", "failed", "answered")) > 0
    assert bool(reached["shared"]) == share
    assert bool(reached["cached"]) == cached
