"""The batching policy: budgets, grouping by length, turns, window. No loop, no clock, no model."""

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ml_inference_server.backends.fake import FakeBackend
from ml_inference_server.server.batching import COMPANY_WAIT_S, Batch, BatchQueue, ClosedBy, Limits, Running
from ml_inference_server.server.scheduler import batch_limits
from ml_inference_server.server.turns import Item
from ml_inference_server.utils.config import BatchingSettings, ModelSettings

LIMITS = Limits(max_batch_size=4, max_batch_tokens=100, overhead_tokens=8)


def request(*lengths: int, now: float = 0.0) -> list[Item]:
    owner = object()
    return [Item(owner, length, now) for length in lengths]


def take(queue: BatchQueue, now: float = 0.0) -> Batch:
    batch = queue.next_batch(now)
    assert isinstance(batch, Batch)
    return batch


def drain(queue: BatchQueue) -> list[Batch]:
    batches = []
    while queue.texts:
        batches.append(take(queue, 1e9))
    return batches


def lengths(batch: Batch) -> list[int]:
    return [item.length for item in batch.items]


def test_an_empty_queue_has_no_batch() -> None:
    assert BatchQueue(LIMITS).next_batch(0.0) is None


def test_one_waiting_text_is_served_at_once() -> None:
    queue = BatchQueue(LIMITS)
    queue.add(request(7))
    assert take(queue).closed_by is ClosedBy.IDLE
    assert (queue.texts, queue.tokens) == (0, 0)


COMPANY = replace(LIMITS, overhead_tokens=64, max_batch_tokens=2048, max_batch_size=32)


def test_little_work_waits_for_a_small_batch_that_runs_but_not_for_long() -> None:
    queue = BatchQueue(COMPANY)
    queue.add(request(10, 10, now=5.0))
    running = Running(60, ends_at=9.0)
    assert queue.next_batch(5.0, running) == 5.0 + COMPANY_WAIT_S
    assert isinstance(queue.next_batch(5.0 + COMPANY_WAIT_S, running), Batch)


def test_little_work_waits_no_longer_than_until_the_running_batch_should_have_ended() -> None:
    """A batch that takes longer than its like, or whose like is not known yet, keeps nobody from a free stream."""
    queue = BatchQueue(COMPANY)
    queue.add(request(10, now=5.0))
    assert queue.next_batch(5.0, Running(60, ends_at=5.001)) == 5.001
    assert isinstance(queue.next_batch(5.001, Running(60, ends_at=5.001)), Batch)


@pytest.mark.parametrize(
    ("waiting", "running", "why"),
    [
        ([10], None, "nothing runs"),
        ([10], 1500, "what runs will take long"),
        ([90, 90, 90], 60, "there is work enough for a stream of its own"),
        ([1] * 32, 60, "the batch is full"),
    ],
)
def test_a_free_stream_is_used_at_once_where(waiting: list[int], running: int | None, why: str) -> None:
    queue = BatchQueue(COMPANY)
    queue.add(request(*waiting))
    batch = queue.next_batch(0.0, None if running is None else Running(running, ends_at=1.0))
    assert isinstance(batch, Batch), why


def test_without_batching_nothing_waits_for_company() -> None:
    queue = BatchQueue(replace(COMPANY, enabled=False))
    queue.add(request(10))
    assert isinstance(queue.next_batch(0.0, Running(60, ends_at=1.0)), Batch)


def test_item_budget() -> None:
    queue = BatchQueue(LIMITS)
    queue.add(request(*[5] * 9))
    assert [len(batch.items) for batch in drain(queue)] == [4, 4, 1]


def test_token_budget_counts_padding() -> None:
    queue = BatchQueue(replace(LIMITS, overhead_tokens=1000))
    queue.add(request(40, 40, 40))
    batch = take(queue)
    assert lengths(batch) == [40, 40]
    assert batch.closed_by is ClosedBy.TOKENS
    assert (batch.longest, batch.tokens) == (40, 80)


def test_without_padding_any_mix_of_lengths_travels_in_turn_within_the_budget_of_real_tokens() -> None:
    queue = BatchQueue(replace(LIMITS, max_batch_tokens=112, padding_free=True))  # 100 tokens run as 112
    queue.add(request(5, 90, 5, 60, 40))
    assert [lengths(batch) for batch in drain(queue)] == [[5, 90, 5], [60, 40]]


def test_without_padding_a_batch_that_leaves_texts_behind_was_closed_by_tokens() -> None:
    queue = BatchQueue(replace(LIMITS, max_batch_tokens=128, padding_free=True))
    queue.add(request(5, 90, 40))
    assert [batch.closed_by for batch in drain(queue)] == [ClosedBy.TOKENS, ClosedBy.IDLE]


def test_a_text_above_the_budget_still_travels_alone() -> None:
    queue = BatchQueue(LIMITS)
    queue.add(request(500, 5))
    assert sorted(lengths(batch) for batch in drain(queue)) == [[5], [500]]


def test_texts_of_like_length_travel_together() -> None:
    queue = BatchQueue(replace(LIMITS, max_batch_tokens=10_000))
    queue.add(request(10, 200, 11, 210, 10, 205, 11, 208))
    assert [lengths(batch) for batch in drain(queue)] == [[10, 10, 11, 11], [200, 205, 208, 210]]


def test_a_short_text_is_not_padded_to_a_long_one_unless_that_is_cheaper_than_another_batch() -> None:
    cheap_start, dear_start = replace(LIMITS, overhead_tokens=1), replace(LIMITS, overhead_tokens=1000)
    for limits, expected in ((cheap_start, [[20], [50]]), (dear_start, [[20, 50]])):
        queue = BatchQueue(limits)
        queue.add(request(20, 50))
        assert [lengths(batch) for batch in drain(queue)] == expected


def test_without_grouping_the_next_in_turn_fill_the_batch() -> None:
    queue = BatchQueue(replace(LIMITS, length_grouping=False, max_batch_tokens=10_000))
    for length in (10, 200, 11, 210, 10):
        queue.add(request(length))
    assert lengths(take(queue)) == [10, 200, 11, 210]


def test_batching_off_serves_each_request_by_itself_in_arrival_order() -> None:
    queue = BatchQueue(replace(LIMITS, enabled=False))
    for each in (request(5, 6), request(5), request(7, 8, 9)):
        queue.add(each)
    batches = drain(queue)
    assert [lengths(batch) for batch in batches] == [[5, 6], [5], [7, 8, 9]]
    assert {batch.closed_by for batch in batches} == {ClosedBy.SINGLE}


def test_the_window_waits_for_company_but_not_beyond_the_timeout() -> None:
    queue = BatchQueue(replace(LIMITS, timeout_s=2.0))
    queue.add(request(5, now=10.0))
    assert queue.next_batch(10.0) == 12.0
    queue.add(request(5, now=11.0))
    assert queue.next_batch(11.5) == 12.0
    batch = take(queue, 12.0)
    assert (lengths(batch), batch.closed_by) == ([5, 5], ClosedBy.TIMER)


def test_a_full_batch_does_not_wait_for_the_window() -> None:
    queue = BatchQueue(replace(LIMITS, timeout_s=2.0))
    queue.add(request(5, 5, 5, 5, now=10.0))
    assert take(queue, 10.0).closed_by is ClosedBy.FULL


def test_a_text_whose_caller_left_is_never_in_a_batch() -> None:
    queue = BatchQueue(LIMITS)
    leaving, staying = request(5, 5), request(5)
    queue.add(leaving)
    queue.add(staying)
    queue.remove(leaving)
    queue.remove(leaving)
    assert (queue.texts, queue.tokens) == (1, 5)
    assert take(queue).items == staying
    assert queue.next_batch(0.0) is None


def test_a_single_text_does_not_wait_for_the_end_of_a_request_of_a_thousand() -> None:
    queue = BatchQueue(LIMITS)
    queue.add(request(*[20] * 1000))
    take(queue)
    single = request(90)  # too long to travel with the others
    queue.add(single)
    served_after = next(i for i, batch in enumerate(drain(queue)) if single[0] in batch.items)
    assert served_after <= 1


def test_a_request_of_a_thousand_goes_on_under_an_endless_stream_of_single_texts() -> None:
    queue = BatchQueue(replace(LIMITS, length_grouping=False))
    large = request(*[20] * 1000)
    queue.add(large)
    for _ in range(100):
        queue.add(request(25))
        queue.add(request(25))
        queue.add(request(25))
        queue.add(request(25))
        take(queue)
    assert sum(not item.waiting for item in large) >= 50 * 4  # half of the batches


def test_requests_that_fit_into_a_batch_are_served_one_after_the_other() -> None:
    queue = BatchQueue(replace(LIMITS, length_grouping=False))
    requests = [request(25, 25, 25, 25) for _ in range(3)]
    for each in requests:
        queue.add(each)
    assert [batch.items for batch in drain(queue)] == requests


@pytest.mark.parametrize("rare", [1, 30, 100])
def test_no_length_starves_under_an_endless_stream_of_another(rare: int) -> None:
    queue = BatchQueue(LIMITS)
    queue.add(request(*[10] * 4))
    waiting = request(rare)
    queue.add(waiting)
    for _ in range(20):
        if waiting[0] in take(queue).items:
            return
        queue.add(request(*[10] * 4))
    pytest.fail("the rare length was passed over 20 times")


@pytest.mark.parametrize("grouping", [True, False])
@pytest.mark.parametrize("padding_free", [True, False])
def test_a_text_of_a_late_portion_moves_forward_for_one_who_needs_it_now(grouping: bool, padding_free: bool) -> None:
    queue = BatchQueue(replace(LIMITS, length_grouping=grouping, padding_free=padding_free))
    bulk = request(*[20] * 40)
    queue.add(bulk)
    take(queue)
    wanted = bulk[-1]
    queue.add([wanted])
    assert (queue.texts, queue.tokens) == (36, 36 * 20)
    batches = drain(queue)
    assert next(place for place, batch in enumerate(batches) if wanted in batch.items) == 0
    served = [id(item) for batch in batches for item in batch.items]
    assert len(served) == len(set(served)) == 36
    assert (queue.texts, queue.tokens) == (0, 0)


def test_a_text_that_has_moved_forward_is_not_served_a_second_time_at_its_old_turn() -> None:
    queue = BatchQueue(replace(LIMITS, length_grouping=False))
    bulk = request(*[20] * 5)
    queue.add(bulk)
    queue.add(bulk[4:])
    queue.remove(bulk[:3])
    assert take(queue).items == bulk[3:]
    assert queue.next_batch(0.0) is None


def test_a_text_never_moves_backward() -> None:
    queue = BatchQueue(LIMITS)
    single, bulk = request(20), request(*[20] * 40)
    queue.add(single)
    before = (single[0].tag, single[0].seq)
    queue.add([*bulk, *single])
    queue.add(single)
    assert (single[0].tag, single[0].seq) == before
    assert single[0] in take(queue).items


def test_texts_that_wait_where_they_are_put_nothing_of_a_request_back() -> None:
    """A request is what it puts in line: here one text, which is of its first portion."""
    queue = BatchQueue(LIMITS)
    waiting, own = request(*[20] * 4), request(20)
    queue.add(waiting)
    queue.add([*waiting, *own])
    other = request(20)
    queue.add(other)
    assert own[0].tag < other[0].tag


def test_who_moves_texts_forward_does_not_pass_over_those_who_come_next_for_ever() -> None:
    """Each portion that moves counts as one that came now, so that a bulk request cannot be made a single one."""
    queue = BatchQueue(replace(LIMITS, length_grouping=False))
    bulk = request(*[25] * 40)
    queue.add(bulk)
    take(queue)
    queue.add(bulk[20:])  # five portions
    single = request(25)
    queue.add(single)
    served_after = next(place for place, batch in enumerate(drain(queue)) if single[0] in batch.items)
    assert served_after <= 2


@given(
    st.lists(st.lists(st.integers(1, 60), min_size=1, max_size=12), min_size=1, max_size=6),
    st.lists(st.tuples(st.booleans(), st.integers(0, 100)), min_size=1, max_size=20),
    st.integers(0, 4),
)
@settings(max_examples=300, deadline=None)
def test_nobody_gets_a_later_turn_for_a_text_than_he_would_get_alone(
    before: list[list[int]], wanted: list[tuple[bool, int]], served: int
) -> None:
    queues = [BatchQueue(LIMITS), BatchQueue(LIMITS)]
    waiting: list[list[Item]] = []
    for queue in queues:
        items = [request(*each) for each in before]
        for each in items:
            queue.add(each)
        for _ in range(served):
            if queue.texts:
                take(queue)
        waiting.append([item for each in items for item in each if item.waiting])
    sharing: list[Item] = []
    for is_known, number in wanted:
        known = waiting[0][number % len(waiting[0])] if is_known and waiting[0] else None
        sharing.append(known or request(number + 1)[0])
    alone = request(*(item.length for item in sharing))
    tags = {id(item): item.tag for item in waiting[0]}
    queues[0].add(sharing)
    queues[1].add(alone)
    for shared, fresh in zip(sharing, alone, strict=True):
        assert shared.tag <= fresh.tag
        assert shared.tag <= tags.get(id(shared), shared.tag)  # nor does who waited before
    texts = list({id(item): item for item in [*waiting[0], *sharing]}.values())
    assert (queues[0].texts, queues[0].tokens) == (len(texts), sum(item.length for item in texts))


@given(
    st.lists(st.lists(st.integers(1, 120), min_size=1, max_size=12), min_size=1, max_size=12),
    st.integers(1, 6),
    st.integers(20, 400),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.integers(0, 2**32),
)
@settings(max_examples=300, deadline=None)
def test_every_text_is_served_exactly_once_within_the_budgets(
    requests: list[list[int]], size: int, tokens: int, enabled: bool, grouping: bool, packed: bool, seed: int
) -> None:
    """Whatever arrives, is asked for again and leaves, in any order: nothing is lost, nothing twice, no budget broken,
    counters right."""
    rng = random.Random(seed)
    limits = Limits(size, tokens, enabled=enabled, length_grouping=grouping, overhead_tokens=16, padding_free=packed)
    queue = BatchQueue(limits)
    waiting: dict[int, Item] = {}
    served: set[int] = set()
    for each in requests:
        items = request(*each)
        also = rng.sample(list(waiting.values()), min(len(waiting), rng.randint(0, 3))) if enabled else []
        queue.add(rng.sample([*items, *also], len(items) + len(also)))
        waiting |= {id(item): item for item in items}
        if rng.random() < 0.3:
            left = rng.sample(items, rng.randint(1, len(items)))
            queue.remove(left)
            for item in left:
                del waiting[id(item)]
        if rng.random() < 0.5 and waiting:
            served |= _serve(queue, limits, waiting)
    while waiting:
        served |= _serve(queue, limits, waiting)
    assert queue.next_batch(0.0) is None
    assert (queue.texts, queue.tokens) == (0, 0)


def _serve(queue: BatchQueue, limits: Limits, waiting: dict[int, Item]) -> set[int]:
    assert (queue.texts, queue.tokens) == (len(waiting), sum(item.length for item in waiting.values()))
    batch = take(queue)
    assert 1 <= len(batch.items) <= limits.max_batch_size
    work = limits.work_tokens(len(batch.items), batch.longest, batch.tokens)
    assert len(batch.items) == 1 or work <= limits.max_batch_tokens
    if not limits.enabled:
        assert len({id(item.owner) for item in batch.items}) == 1
    for item in batch.items:
        del waiting[id(item)]  # KeyError: served twice, or served after its caller left
    return {id(item) for item in batch.items}


def test_every_setting_of_a_batch_reaches_the_policy() -> None:
    """None has its default here, so one that is lost on the way shows."""
    settings = BatchingSettings(
        enabled=False,
        max_batch_size=7,
        max_batch_tokens=3000,
        timeout_ms=4.0,
        length_grouping=False,
        batch_overhead_tokens=9,
        bulk_share=0.3,
    )
    backend = FakeBackend(ModelSettings(backend="fake"))
    backend.load_model()
    info = backend.info
    assert batch_limits(settings, info) == Limits(
        max_batch_size=7,
        max_batch_tokens=3000,
        timeout_s=0.004,
        enabled=False,
        length_grouping=False,
        overhead_tokens=9,
        padding_free=info.padding_free,
        bulk_share=0.3,
    )
