"""What the cache keeps, for how long, and what it costs."""

import gc
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ml_inference_server.backends.base import Encoded
from ml_inference_server.server.answer_cache import ENTRY_OVERHEAD_BYTES, AnswerCache, key_of


def encoded(*ids: int, types: list[int] | None = None, variant: int = 0, truncated: bool = False) -> Encoded:
    type_ids = None if types is None else np.array(types, np.int32)
    return Encoded(np.array(ids, np.int32), type_ids, variant=variant, truncated=truncated)


def row(value: float, length: int = 4) -> np.ndarray:
    return np.full(length, value, np.float32)


def test_a_key_is_the_ids_the_segments_and_the_variant_and_nothing_else() -> None:
    texts = [
        encoded(1, 2, 3),
        encoded(1, 2),
        encoded(1, 3, 2),
        encoded(1, 2, 3, types=[0, 0, 1]),
        encoded(1, 2, 3, types=[0, 1, 1]),
        encoded(1, 2, 3, variant=1),
        encoded(1, 2, 3, variant=1, types=[0, 0, 1]),
    ]
    assert len({key_of(text) for text in texts}) == len(texts)
    assert key_of(encoded(1, 2, 3, truncated=True)) == key_of(texts[0])
    assert [key_of(text) for text in texts] == [key_of(text) for text in texts]


def test_the_key_does_not_change_with_the_array_that_it_came_from() -> None:
    text = encoded(1, 2, 3)
    before = key_of(text)
    text.ids[0] = 9
    assert (before, key_of(text)) == (key_of(encoded(1, 2, 3)), key_of(encoded(9, 2, 3)))


ENTRY = ENTRY_OVERHEAD_BYTES + 4 * 4 + 3 * 4  # a row of four numbers, three ids


def test_the_least_recently_used_goes_first() -> None:
    cache = AnswerCache(3 * ENTRY)
    keys = [key_of(encoded(n, 0, 0)) for n in range(4)]
    for n in range(3):
        cache.put(keys[n], row(n))
    assert cache.get(keys[0]) is not None
    cache.put(keys[3], row(3))
    assert [n for n, key in enumerate(keys) if cache.get(key) is not None] == [0, 2, 3]
    assert cache.held_bytes == 3 * ENTRY


def test_what_is_put_again_is_held_once_and_is_the_latest() -> None:
    cache = AnswerCache(2 * ENTRY)
    first, second, third = (key_of(encoded(n, 0, 0)) for n in range(3))
    cache.put(first, row(1))
    cache.put(second, row(2))
    cache.put(first, row(3))
    assert cache.held_bytes == 2 * ENTRY
    cache.put(third, row(4))
    found = cache.get(first)
    assert found is not None
    np.testing.assert_array_equal(found, row(3))
    assert cache.get(second) is None


def test_what_is_larger_than_the_whole_cache_drives_nothing_out() -> None:
    cache = AnswerCache(ENTRY)
    small, large = key_of(encoded(1, 0, 0)), key_of(encoded(2, 0, 0))
    cache.put(small, row(1))
    cache.put(large, row(2, length=5))
    assert (cache.get(small) is not None, cache.get(large), cache.held_bytes) == (True, None, ENTRY)


def test_nobody_can_write_into_the_cache() -> None:
    cache = AnswerCache(10 * ENTRY)
    key, mine = key_of(encoded(1, 0, 0)), row(1)
    cache.put(key, mine)
    mine[:] = 7
    found = cache.get(key)
    assert found is not None
    np.testing.assert_array_equal(found, row(1))
    with pytest.raises(ValueError, match="read-only"):
        found[0] = 7


@given(
    st.lists(st.tuples(st.booleans(), st.integers(0, 30), st.integers(1, 40), st.integers(1, 50)), max_size=200),
    st.integers(0, 20_000),
)
@settings(max_examples=200, deadline=None)
def test_it_never_holds_more_than_it_may_and_knows_what_it_holds(
    steps: list[tuple[bool, int, int, int]], max_bytes: int
) -> None:
    cache = AnswerCache(max_bytes)
    known: dict[object, np.ndarray] = {}
    for puts, first, length, numbers in steps:
        key = key_of(encoded(*[first] * length, types=[0] * length if first % 2 else None))
        if puts:
            known[key] = row(first + length, numbers)
            cache.put(key, known[key])
        elif (found := cache.get(key)) is not None:
            np.testing.assert_array_equal(found, known[key])
        assert 0 <= cache.held_bytes <= max_bytes
        assert bool(len(cache)) == bool(cache.held_bytes)
        assert cache.held_bytes >= len(cache) * ENTRY_OVERHEAD_BYTES


@pytest.mark.parametrize("entries", [1_000, 11_000, 22_000])
@pytest.mark.parametrize("with_segments", [False, True])
def test_its_memory_is_no_more_than_it_says(entries: int, with_segments: bool) -> None:
    types = [0, 0, 1] if with_segments else None
    one = row(1.0)
    gc.collect()
    tracemalloc.start()
    try:
        cache = AnswerCache(10**9)
        for n in range(entries):
            cache.put(key_of(encoded(n, 0, 0, types=types)), one)
        gc.collect()
        used_bytes, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(cache) == entries
    assert used_bytes <= cache.held_bytes
