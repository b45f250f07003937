"""Turns of callers and of priorities: who is served when, in work and not in seconds."""

import random
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ml_inference_server.server.batching import Batch, BatchQueue, Limits
from ml_inference_server.server.turns import Item

LIMITS = Limits(max_batch_size=4, max_batch_tokens=100, overhead_tokens=8)
KINDS = [
    pytest.param(replace(LIMITS, length_grouping=True), id="grouped"),
    pytest.param(replace(LIMITS, length_grouping=False), id="in turn"),
    pytest.param(replace(LIMITS, padding_free=True, max_batch_tokens=112), id="padding free"),  # 100 run as 112
]


def request(*lengths: int) -> list[Item]:
    owner = object()
    return [Item(owner, length, 0.0) for length in lengths]


def take(queue: BatchQueue) -> Batch:
    batch = queue.next_batch(0.0)
    assert isinstance(batch, Batch)
    return batch


def batches_until(queue: BatchQueue, items: list[Item], between: Callable[[], None] = lambda: None) -> int:
    """How many batches it takes until all of `items` are in one."""
    for number in range(1, 1000):
        take(queue)
        if not any(item.waiting for item in items):
            return number
        between()
    pytest.fail("1000 batches were not enough")


@pytest.mark.parametrize("limits", KINDS)
def test_one_who_comes_now_and_then_does_not_wait_for_one_who_floods(limits: Limits) -> None:
    queue = BatchQueue(limits)
    for _ in range(100):
        queue.add(request(25, 25, 25, 25), "flood")
    for _ in range(20):
        take(queue)
        mine = request(30, 31)
        queue.add(mine, "now and then")
        assert batches_until(queue, mine) <= 2  # 30 and 31 need not share a batch


@pytest.mark.parametrize("limits", KINDS)
@pytest.mark.parametrize("sizes", [(1, 1), (4, 1), (2, 4), (40, 1)])
def test_callers_who_always_wait_get_equal_parts_of_the_work(limits: Limits, sizes: tuple[int, int]) -> None:
    """However many requests each sends, and however large they are."""
    queue = BatchQueue(limits)
    names = {f"caller {size} {place}": size for place, size in enumerate(sizes)}
    served: Counter[str] = Counter()
    waiting: Counter[str] = Counter()
    for _ in range(400):
        for name, size in names.items():
            while waiting[name] < 60:
                queue.add(request(*[25] * size), name)
                waiting[name] += size
        for item in take(queue).items:
            served[item.caller] += item.length
            waiting[item.caller] -= 1
    first, second = served.values()
    assert abs(first - second) <= 2 * limits.max_batch_tokens


@pytest.mark.parametrize("limits", KINDS)
def test_many_callers_with_a_request_each_are_served_one_after_the_other(limits: Limits) -> None:
    queue = BatchQueue(limits)
    requests = [request(30, 30, 30) for _ in range(40)]
    for name, items in enumerate(requests):
        queue.add(items, str(name))
    ends = [0] * len(requests)
    for number in range(1, 41):
        take(queue)
        for place, items in enumerate(requests):
            if not ends[place] and not any(item.waiting for item in items):
                ends[place] = number
    assert ends == sorted(ends)
    assert [end - place for place, end in enumerate(ends)] == [1] * 40


def test_one_who_was_alone_does_not_pay_for_what_he_got_then() -> None:
    queue = BatchQueue(LIMITS)
    queue.add(request(*[25] * 400), "alone")
    for _ in range(50):
        take(queue)
    other = request(*[25] * 400)
    queue.add(other, "later")
    served: Counter[str] = Counter()
    for _ in range(10):
        served.update(item.caller for item in take(queue).items)
    assert served == {"alone": 20, "later": 20}


def test_one_who_was_away_has_not_saved_up_turns() -> None:
    queue = BatchQueue(LIMITS)
    queue.add(request(25), "away")
    queue.add(request(*[25] * 400), "here")
    for _ in range(50):
        take(queue)
    queue.add(request(*[25] * 400), "away")
    served: Counter[str] = Counter()
    for _ in range(10):
        served.update(item.caller for item in take(queue).items)
    assert served == {"away": 20, "here": 20}


def test_newcomers_do_not_keep_one_from_his_turn() -> None:
    """Each of them is further behind than who was served already; but as they are served, the line moves on."""
    queue = BatchQueue(LIMITS)
    waiting = request(*[25] * 40)
    queue.add(waiting, "first")
    names = iter(range(10_000))

    def one_more() -> None:
        queue.add(request(25, 25, 25, 25), f"newcomer {next(names)}")

    one_more()
    assert batches_until(queue, waiting, one_more) <= 80  # in each of his ten turns there are more of them


def test_callers_who_come_and_go_leave_nothing_behind() -> None:
    queue = BatchQueue(LIMITS)
    for name in range(3000):
        queue.add(request(10), f"caller {name}")
        queue.add(request(20), "always")
        if name % 10 == 9:
            while queue.texts > 1:
                take(queue)

    def size(thing: object, seen: set[int]) -> int:
        if id(thing) in seen:
            return 0
        seen.add(id(thing))
        inner = thing.values() if isinstance(thing, dict) else thing if isinstance(thing, list) else ()
        return sys.getsizeof(thing) + sum(size(each, seen) for each in inner)

    lines = [line for line in vars(queue).values() if hasattr(line, "by_length")]
    assert len(lines) == 2
    assert sum(size(vars(line), set()) for line in lines) < 20_000


@pytest.mark.parametrize("limits", KINDS)
def test_a_text_that_two_callers_want_is_served_at_the_turn_that_comes_first(limits: Limits) -> None:
    queue = BatchQueue(limits)
    job = request(*[25] * 400)
    queue.add(job, "job")
    take(queue)
    queue.add([job[-1]], "query")
    assert batches_until(queue, [job[-1]]) <= 2
    while queue.texts:
        take(queue)
    assert queue.tokens == 0


# Priorities


@pytest.mark.parametrize("limits", KINDS)
def test_an_interactive_text_goes_before_all_bulk_ones_and_shares_no_batch_with_them(limits: Limits) -> None:
    queue = BatchQueue(limits)
    queue.add(request(*[25] * 40), "a", is_bulk=True)
    queue.add(request(25), "a")
    first, second = take(queue), take(queue)
    assert (len(first.items), first.is_bulk) == (1, False)
    assert (len(second.items), second.is_bulk) == (4, True)


@pytest.mark.parametrize("share", [0.01, 0.1, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("limits", KINDS)
def test_bulk_gets_its_share_and_no_more_while_interactive_texts_always_wait(limits: Limits, share: float) -> None:
    limits = replace(limits, bulk_share=share)
    queue = BatchQueue(limits)
    work: Counter[bool] = Counter()
    for _ in range(1000):
        for is_bulk in (False, True):
            queue.add(request(25, 25, 25, 25), is_bulk=is_bulk)
        batch = take(queue)
        work[batch.is_bulk] += limits.cost_tokens(batch)
    largest = limits.max_batch_tokens + 2 * limits.overhead_tokens
    assert abs(work[True] - share * work.total()) <= 2 * largest


@given(
    st.lists(st.tuples(st.booleans(), st.lists(st.integers(1, 60), min_size=1, max_size=12)), min_size=1, max_size=60),
    st.sampled_from([0.01, 0.1, 0.4, 0.8]),
    st.booleans(),
    st.integers(0, 2**32),
)
@settings(max_examples=200, deadline=None)
def test_bulk_that_waits_never_gets_less_than_its_share(
    arrivals: list[tuple[bool, list[int]]], share: float, grouped: bool, seed: int
) -> None:
    """Over any time in which bulk texts wait, whatever comes, of whatever size: less than two batches short of it."""
    rng = random.Random(seed)
    limits = replace(LIMITS, bulk_share=share, length_grouping=grouped)
    queue = BatchQueue(limits)
    largest = 2 * (limits.max_batch_tokens + 2 * limits.overhead_tokens)
    bulk_waiting = all_work = bulk_work = 0

    def served() -> None:
        nonlocal bulk_waiting, all_work, bulk_work
        batch = take(queue)
        if not bulk_waiting:
            return
        all_work += limits.cost_tokens(batch)
        if batch.is_bulk:
            bulk_work += limits.cost_tokens(batch)
            bulk_waiting -= len(batch.items)
        assert bulk_work >= share * all_work - largest
        if not bulk_waiting:
            all_work = bulk_work = 0

    for is_bulk, lengths in arrivals:
        queue.add(request(*lengths), str(rng.randrange(3)), is_bulk=is_bulk)
        bulk_waiting += len(lengths) * is_bulk
        while queue.texts and rng.random() < 0.6:
            served()
    while queue.texts:
        served()


def test_a_text_of_a_bulk_request_that_an_interactive_one_wants_becomes_interactive() -> None:
    queue = BatchQueue(LIMITS)
    job = request(*[25] * 40)
    queue.add(job, "job", is_bulk=True)
    queue.add([job[-1]], "query")
    assert take(queue).items == [job[-1]]
    assert (queue.texts, queue.tokens) == (39, 39 * 25)
    queue.add([job[-2]], "query")
    queue.add([job[-2]], "job", is_bulk=True)  # never back
    assert take(queue).items == [job[-2]]
    served = [item for _ in range(10) for item in take(queue).items]
    assert len({id(item) for item in served}) == len(served) == 38
    assert (queue.texts, queue.tokens) == (0, 0)


def test_an_express_batch_is_interactive_or_none() -> None:
    queue = BatchQueue(LIMITS)
    queue.add(request(*[25] * 40), is_bulk=True)
    assert queue.express_batch() is None
    query = request(7, 7)
    queue.add(query)
    batch = queue.express_batch()
    assert batch is not None
    assert (batch.items, batch.is_bulk) == (query, False)
    assert queue.express_batch() is None
    assert queue.texts == 40


def test_the_window_does_not_keep_bulk_texts_from_an_idle_stream() -> None:
    queue = BatchQueue(replace(LIMITS, timeout_s=2.0))
    queue.add(request(5))
    queue.add(request(5), is_bulk=True)
    assert not take(queue).is_bulk
    assert queue.next_batch(0.0) == 2.0
