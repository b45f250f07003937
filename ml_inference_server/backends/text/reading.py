"""How many tokens a text has, where they stand in it, and tokens as text again.

A long text is read by parts: what the library answers takes 50 to 700 times the memory of the text. Two parts share a
seam. What stands in the middle of it is far from where either was cut, so both have to have the same tokens there;
where they do not, the library reads the text as a whole. One thing depends on more than that: where a Unigram model has
two orders of the same tokens for a run of one character, rounding decides, and may decide otherwise in a part. Counts
do not depend on it.
"""

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

_PARTS_AT_ONCE = 4  # when tokens are only counted
_MOST_ID = 2**32 - 1

_blank = re.compile(r"\s")


@dataclass(frozen=True, slots=True)
class Sizes:
    """How a long text is parted. In characters; agreed_tokens: so many in a row must be the same in a seam."""

    part: int = 1 << 15
    seam: int = 1 << 11
    agreed_tokens: int = 32


@dataclass(frozen=True, slots=True)
class Reading:
    """ids: (tokens,) int32; spans: (tokens, 2) int32, the characters [start, end) of each token. No special tokens."""

    ids: NDArray[np.int32]
    spans: NDArray[np.int32]


def count(tokenizer: Tokenizer, text: str, sizes: Sizes = Sizes()) -> int:
    """The tokens of all of `text`. tokenizer: one that neither truncates nor pads."""
    if len(text) > sizes.part:
        total = _count_parts(tokenizer, text, sizes)
        if total is not None:
            return total
    return len(tokenizer.encode_batch_fast([text], add_special_tokens=False)[0])


def read(tokenizer: Tokenizer, text: str, sizes: Sizes = Sizes()) -> Reading:
    """All of `text`. tokenizer: one that neither truncates nor pads."""
    if len(text) > sizes.part:
        parts = _read_parts(tokenizer, text, sizes)
        if parts is not None:
            return Reading(np.concatenate([part.ids for part in parts]), np.concatenate([part.spans for part in parts]))
    return _read_part(tokenizer, text, 0, len(text))


def decode(tokenizer: Tokenizer, ids: Sequence[int], skip_special: bool) -> str:
    """The text of tokens. ValueError for an id that is none."""
    for token in ids:
        if not 0 <= token <= _MOST_ID or tokenizer.id_to_token(token) is None:
            raise ValueError(unknown_token(token))
    return str(tokenizer.decode(list(ids), skip_special_tokens=skip_special))


def unknown_token(token: int) -> str:
    """What is said of an id that is no token."""
    return f"token id {token} is not in the model's vocabulary: send ids that its own tokenizer gave"


def start_of(text: str, size: int) -> str:
    """The first `size` characters or fewer: not parted inside a number, as digits may be grouped from their end."""
    return text[: _before_number(text, size, 0)]


def end_of(text: str, size: int) -> str:
    """The last `size` characters, from the first blank in them on; "" where there is none."""
    blank = _blank.search(text, len(text) - size)
    return text[blank.start() :] if blank else ""


def _before_number(text: str, end: int, least: int) -> int:
    while end > least and text[end - 1].isnumeric():
        end -= 1
    return end


def _seams(text: str, sizes: Sizes) -> list[tuple[int, int]] | None:
    """[start, end) of each; None where one would have to end inside a long number, as that may be grouped otherwise."""
    starts = range(sizes.part, len(text) - sizes.seam, sizes.part)
    least = 3 * sizes.seam // 4
    seams = [(start, _before_number(text, start + sizes.seam, start + least)) for start in starts]
    return seams if all(end > start + least for start, end in seams) else None


def _parts(text: str, seams: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Each from the start of a seam to the end of the next."""
    return zip([0, *(start for start, _ in seams)], [*(end for _, end in seams), len(text)], strict=True)


def _count_parts(tokenizer: Tokenizer, text: str, sizes: Sizes) -> int | None:
    """The tokens of all parts, less those of the seams read alone: what is cut off there is cut off from a part, too.

    None where the tokens of a seam are not those of its two parts, or there is no seam.
    """
    seams = _seams(text, sizes)
    if seams is None:
        return None
    total = 0
    seam, ends_with = np.zeros(0, np.int32), 0
    pieces = zip(_parts(text, seams), [*seams, None], strict=True)
    while group := list(itertools.islice(pieces, _PARTS_AT_ONCE)):
        cut = [text[place[0] : place[1]] for each in group for place in each if place is not None]
        found = iter(tokenizer.encode_batch_fast(cut, add_special_tokens=False))
        for _, following in group:
            ids = np.array(next(found).ids, np.int32)
            if len(seam) and _same(seam, ids) + ends_with < len(seam) + sizes.agreed_tokens:
                return None
            total += len(ids) - len(seam)
            if following is not None:
                seam = np.array(next(found).ids, np.int32)
                ends_with = _same(seam[::-1], ids[::-1])
                if ends_with < sizes.agreed_tokens:
                    return None
    return total


def _same(first: NDArray[np.int32], second: NDArray[np.int32]) -> int:
    """With how many equal tokens both begin."""
    length = min(len(first), len(second))
    other = np.flatnonzero(first[:length] != second[:length])
    return int(other[0]) if len(other) else length


def _read_parts(tokenizer: Tokenizer, text: str, sizes: Sizes) -> list[Reading] | None:
    """None where the tokens in the middle of a seam are not the same in its two parts, or there is no seam."""
    seams = _seams(text, sizes)
    if seams is None:
        return None
    done: list[Reading] = []
    before: Reading | None = None
    for start, end in _parts(text, seams):
        part = _read_part(tokenizer, text, start, end)
        if before is not None:
            agreed = _agreed(before, part, start, sizes)
            if agreed is None:
                return None
            done[-1], part = _cut(before, 0, agreed[0]), _cut(part, agreed[1], len(part.ids))
        done.append(part)
        before = part
    return done


def _agreed(before: Reading, part: Reading, start: int, sizes: Sizes) -> tuple[int, int] | None:
    """Up to which token one part is to be used, and the other from which on."""
    places = start + sizes.seam // 4, start + sizes.seam // 2
    (first, last), (own_first, own_last) = (np.searchsorted(each.spans[:, 0], places) for each in (before, part))
    is_same = np.array_equal(before.ids[first:last], part.ids[own_first:own_last]) and np.array_equal(
        before.spans[first:last], part.spans[own_first:own_last]
    )
    return (int(first), int(own_first)) if is_same and last - first >= sizes.agreed_tokens else None


def _cut(reading: Reading, first: int, last: int) -> Reading:
    return Reading(reading.ids[first:last], reading.spans[first:last])


def _read_part(tokenizer: Tokenizer, text: str, start: int, end: int) -> Reading:
    encoding = tokenizer.encode_batch([text[start:end]], add_special_tokens=False)[0]
    spans = np.array(encoding.offsets, np.int32).reshape(-1, 2) + np.int32(start)
    # Characters that the tokenizer takes together may be shared by tokens whose starts go back.
    starts = np.maximum.accumulate(spans[:, 0])
    return Reading(np.array(encoding.ids, np.int32), np.stack([starts, np.maximum(spans[:, 1], starts)], axis=1))
