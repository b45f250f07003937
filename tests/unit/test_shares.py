"""Who still comes into the queue, as what, and how long he will wait: by what he and the others hold of it."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ml_inference_server.server.options import Priority
from ml_inference_server.server.shares import QueueShares

BULK, INTERACTIVE = Priority.BULK, Priority.INTERACTIVE


def shares(*, requests: int = 100, tokens: int = 4000, batch: int = 100, batch_texts: int = 100) -> QueueShares:
    return QueueShares(max_requests=requests, max_tokens=tokens, batch_tokens=batch, batch_texts=batch_texts)


def fill(
    shares: QueueShares,
    caller: str,
    *sizes: int,
    is_bulk: bool = False,
    is_overflow: bool = False,
    is_named: bool = False,
) -> None:
    for tokens in sizes:
        held = shares.enter(caller)
        shares.change(held, tokens, 1, is_bulk=is_bulk, is_overflow=is_overflow, is_named=is_named)


def test_one_caller_may_fill_the_queue() -> None:
    queue = shares(tokens=4000)
    assert queue.full("a", 4000) == ""
    fill(queue, "a", 3000)
    assert queue.full("a", 1000) == ""
    assert queue.full("a", 1001) == "4000 tokens"


@pytest.mark.parametrize("others", [1, 3, 9])
def test_one_who_fills_the_queue_keeps_nobody_out_who_holds_little(others: int) -> None:
    queue = shares(tokens=4000, requests=100)
    fill(queue, "flood", *[40] * 100)
    assert queue.full("flood", 1) == "100 requests"
    for number in range(others):
        fitting = 1000 // (number + 2)  # of a fourth of the queue, an equal part for each
        assert queue.full(f"other {number}", fitting) == ""
        assert queue.full(f"other {number}", fitting + 1) == "4000 tokens"
        fill(queue, f"other {number}", 60)
    assert queue.full("flood", 1) == "100 requests"


def test_the_reserve_has_an_end() -> None:
    queue = shares(tokens=4000, requests=100)
    fill(queue, "flood", *[40] * 100)
    for number in range(24):
        assert queue.full(f"other {number}", 1) == "", number
        fill(queue, f"other {number}", 1)
    assert queue.full("one more", 1) == "100 requests"


def test_a_long_call_that_is_named_interactive_makes_no_bulk_of_its_callers_single_texts() -> None:
    queue = shares(batch=100)
    fill(queue, "a", 1024, is_named=True)
    assert queue.priority("a", 1, 1, None) == (INTERACTIVE, False)
    fill(queue, "a", 100)
    assert queue.priority("a", 1, 1, None) == (BULK, True)


def test_many_short_texts_are_more_than_a_batch_though_their_tokens_would_fit() -> None:
    queue = shares(batch=100, batch_texts=8)
    assert queue.priority("a", 40, 8, None) == (INTERACTIVE, False)
    assert queue.priority("a", 40, 9, None) == (BULK, False)
    fill(queue, "a", *[5] * 8)
    assert queue.priority("a", 5, 1, None) == (BULK, True)
    assert queue.priority("b", 5, 1, None) == (INTERACTIVE, False)


def test_who_waits_beside_short_texts_waits_for_batches_of_short_texts() -> None:
    queue = shares(batch=100, batch_texts=8)
    fill(queue, "flood", *[5] * 50)
    assert queue.tokens_ahead("light", INTERACTIVE) == 40


def test_room_comes_back_with_those_who_leave() -> None:
    queue = shares(tokens=4000)
    held = queue.enter("a")
    queue.change(held, 4000, 1, is_bulk=True, is_overflow=True, is_named=False)
    assert queue.full("a", 1)
    queue.change(held, -4000, -1, is_bulk=True, is_overflow=True, is_named=False)
    queue.leave("a")
    assert queue.full("a", 4000) == ""
    assert (queue.tokens, queue.requests, queue.of("a").tokens) == (0, 0, 0)


def test_a_request_of_more_than_a_batch_is_bulk() -> None:
    queue = shares(batch=100)
    assert queue.priority("a", 100, 1, None) == (INTERACTIVE, False)
    assert queue.priority("a", 101, 1, None) == (BULK, False)


def test_what_a_request_asks_holds() -> None:
    queue = shares(batch=100)
    fill(queue, "a", 90)
    assert queue.priority("a", 5000, 1, INTERACTIVE) == (INTERACTIVE, False)
    assert queue.priority("a", 1, 1, BULK) == (BULK, False)


def test_who_has_a_batch_in_line_is_served_as_bulk_until_nothing_of_that_is_left() -> None:
    queue = shares(batch=100)
    fill(queue, "a", 60)
    assert queue.priority("a", 60, 1, None) == (BULK, True)
    held = queue.enter("a")
    queue.change(held, 60, 1, is_bulk=True, is_overflow=True, is_named=False)
    assert queue.priority("a", 1, 1, None) == (BULK, True)  # else it would come before the one that came before it
    assert queue.priority("b", 60, 1, None) == (INTERACTIVE, False)
    queue.change(held, -60, -1, is_bulk=True, is_overflow=True, is_named=False)
    assert queue.priority("a", 40, 1, None) == (INTERACTIVE, False)


def test_a_bulk_job_in_line_leaves_the_small_requests_of_its_caller_interactive() -> None:
    queue = shares(batch=100)
    fill(queue, "a", 3000, is_bulk=True)
    assert queue.priority("a", 60, 1, None) == (INTERACTIVE, False)


def test_alone_one_waits_for_all_that_one_has_in_line() -> None:
    queue = shares()
    fill(queue, "a", 300)
    fill(queue, "a", 500, is_bulk=True)
    assert queue.tokens_ahead("a", INTERACTIVE) == 300
    assert queue.tokens_ahead("a", BULK) == 800


def test_of_others_one_waits_for_a_turn_for_each_of_ones_own_and_one_more() -> None:
    queue = shares(batch=100)
    fill(queue, "flood", 3000)
    fill(queue, "light", 20)
    fill(queue, "flood", 500, is_bulk=True)
    assert queue.tokens_ahead("new", INTERACTIVE) == 100 + 20
    assert queue.tokens_ahead("light", INTERACTIVE) == 20 + 120
    assert queue.tokens_ahead("flood", INTERACTIVE) == 3000 + 20
    assert queue.tokens_ahead("new", BULK) == 3020 + 100


@given(
    st.lists(
        st.tuples(
            st.sampled_from("abc"), st.integers(1, 300), st.sampled_from([None, BULK, INTERACTIVE]), st.booleans()
        ),
        max_size=60,
    )
)
@settings(max_examples=200, deadline=None)
def test_the_sums_are_those_of_what_is_held_and_the_bounds_hold(
    steps: list[tuple[str, int, Priority | None, bool]],
) -> None:
    queue = shares(requests=8, tokens=1000, batch=100)
    inside: list[tuple[str, int, bool, bool]] = []
    for caller, tokens, asked, leaves in steps:
        if leaves and inside:
            name, size, is_bulk, is_overflow = inside.pop(0)
            queue.change(queue.of(name), -size, -1, is_bulk=is_bulk, is_overflow=is_overflow, is_named=False)
            queue.leave(name)
        if not queue.full(caller, tokens):
            priority, is_overflow = queue.priority(caller, tokens, 1, asked)
            queue.change(
                queue.enter(caller), tokens, 1, is_bulk=priority is BULK, is_overflow=is_overflow, is_named=False
            )
            inside.append((caller, tokens, priority is BULK, is_overflow))
        assert queue.requests == len(inside) <= 8 + 2
        assert queue.tokens == sum(size for _, size, _, _ in inside) <= 1000 + 250
        for name in "abc":
            assert queue.of(name).tokens == sum(size for own, size, _, _ in inside if own == name)
            for priority in Priority:
                assert 0 <= queue.tokens_ahead(name, priority) <= queue.tokens
