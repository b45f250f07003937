"""Batches as they travel from the tokenizer to the engines: ragged, and padded only where an engine asks for it."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ml_inference_server.backends.base import Company, Encoded, TokenBatch, run_in_company
from ml_inference_server.server.engine_frames import (
    BrokenFrame,
    FrameKind,
    frame_head,
    pack_batch,
    pack_frame,
    unpack_batch,
    unpack_rows,
)


def text(*ids: int, types: list[int] | None = None, variant: int = 0) -> Encoded:
    return Encoded(np.array(ids, np.int32), None if types is None else np.array(types, np.int32), variant=variant)


def test_texts_stand_one_behind_the_other() -> None:
    batch = TokenBatch.of([text(5, 6, 7), text(8), text(9, 9)])
    assert (batch.ids.tolist(), batch.starts.tolist()) == ([5, 6, 7, 8, 9, 9], [0, 3, 4, 6])
    assert (len(batch), batch.lengths.tolist(), batch.tokens, batch.padded_tokens) == (3, [3, 1, 2], 6, 9)
    assert batch.type_ids is None
    assert batch.variants is None


def test_segments_of_some_texts_are_zero_for_the_others() -> None:
    batch = TokenBatch.of([text(5, 6), text(8, 9, 7, types=[0, 1, 1])])
    assert batch.type_ids is not None
    assert batch.type_ids.tolist() == [0, 0, 0, 1, 1]
    padded = batch.padded(0)
    assert padded.token_type_ids is not None
    assert padded.token_type_ids.tolist() == [[0, 0, 0], [0, 1, 1]]


def test_padding_is_told_from_a_token_that_has_its_id() -> None:
    padded = TokenBatch.of([text(1, 0, 1), text(0)]).padded(1)
    assert padded.input_ids.tolist() == [[1, 0, 1], [0, 1, 1]]
    assert padded.attention_mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert padded.token_type_ids is None


def test_numbers_of_another_width_become_those_that_a_frame_carries() -> None:
    """The process of an engine reads a frame as int32: wider numbers would be other tokens there, without an error."""
    ids: Any = np.array([5, 6], np.int64)
    wide = Encoded(ids, ids - 5)
    for batch in (TokenBatch.of([wide]), TokenBatch.of([wide, text(7)])):
        got = unpack_batch(pack_batch(batch))
        assert got.ids[:2].tolist() == [5, 6]
        assert got.type_ids is not None
        assert got.type_ids[:2].tolist() == [0, 1]


def test_what_is_no_frame_is_a_value_error() -> None:
    """Not a wait for 2^60 bytes, and not half a batch."""
    head = pack_frame(FrameKind.PING, 7, b"")[:9]
    assert frame_head(head + (2**36).to_bytes(8, "little")) == (FrameKind.PING, 7, 2**36)
    no_kinds = [pack_frame(kind, 7, b"") for kind in (0, max(FrameKind) + 1, 255)]
    for wrong in (*no_kinds, head + (2**60).to_bytes(8, "little"), bytes(17)):
        with pytest.raises(BrokenFrame, match="no frame"):
            frame_head(wrong)
    whole = pack_batch(TokenBatch.of([text(5, 6), text(8, 9, 7, types=[0, 1, 1], variant=1)]))
    for end in range(len(whole)):
        with pytest.raises(ValueError, match=r"batch|buffer|offset"):
            unpack_batch(whole[:end])
    with pytest.raises(ValueError, match="batch of 5 tokens"):
        unpack_batch(whole + bytes(4))
    rows = (2).to_bytes(4, "little") + (3).to_bytes(4, "little") + bytes(16) + np.ones(6, np.float32).tobytes()
    assert unpack_rows(rows).rows.tolist() == [[1, 1, 1], [1, 1, 1]]
    for wrong in (b"", rows[:20], rows[:-4], rows[:-1], rows + bytes(4)):
        with pytest.raises(ValueError, match=r"rows|buffer|reshape"):
            unpack_rows(wrong)


@given(st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=6), min_size=1, max_size=6))
def test_some_of_the_texts_are_the_batch_of_these(rows: list[list[int]]) -> None:
    texts = [text(*ids, types=ids[::-1], variant=len(ids) % 3) for ids in rows]
    places = list(range(len(rows)))[::-1][: 1 + len(rows) // 2]
    got, expected = TokenBatch.of(texts).texts(places), TokenBatch.of([texts[i] for i in places])
    assert (got.ids.tolist(), got.starts.tolist()) == (expected.ids.tolist(), expected.starts.tolist())
    assert got.type_ids is not None
    assert expected.type_ids is not None
    assert got.type_ids.tolist() == expected.type_ids.tolist()
    variants = [texts[i].variant for i in places]
    assert (got.variants.tolist() if got.variants is not None else [0] * len(places)) == variants


@pytest.mark.parametrize(
    ("company", "groups"),
    [
        (Company.ANY, [[[1, 2], [5, 6], [7, 8]], [[3], [4]]]),
        (Company.EQUAL_LENGTHS, [[[1, 2], [5, 6], [7, 8]], [[3], [4]]]),
        (Company.NONE, [[[1, 2]], [[3]], [[4]], [[5, 6]], [[7, 8]]]),
    ],
)
def test_texts_run_in_the_company_that_they_bear_and_come_back_in_order(
    company: Company, groups: list[list[list[int]]]
) -> None:
    """The texts of one token take another way through the model than those of two."""
    ran: list[list[list[int]]] = []

    def run(batch: TokenBatch) -> np.ndarray:
        parts = [part.tolist() for part in np.split(batch.ids, batch.starts[1:-1])]
        ran.append(parts)
        return np.array([[sum(part)] for part in parts], np.float32)

    rows = [(1, 2), (3,), (4,), (5, 6), (7, 8)]
    batch = TokenBatch.of([text(*ids, variant=len(ids) % 2) for ids in rows])
    assert run_in_company(batch, company, run)[:, 0].tolist() == [sum(ids) for ids in rows]
    assert ran == groups
