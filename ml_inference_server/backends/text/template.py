"""What a tokenizer puts round the tokens of one text or of a pair, and how much of each part it keeps.

The library itself can join and cut. But it also builds every piece that the cut leaves over, and for a pair every
combination of these pieces: two long texts then take minutes and gigabytes.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from tokenizers import Tokenizer

from ml_inference_server.backends.base import Encoded
from ml_inference_server.utils.errors import ModelError


class Template:
    """Joins token ids as the tokenizer's own post-processor does, special tokens and segments included."""

    def __init__(self, tokenizer: Tokenizer, sequences: int, *, has_segments: bool) -> None:
        """Read off an example. sequences: 1 for a text, 2 for a pair. `tokenizer` must not truncate."""
        samples = _samples(tokenizer, sequences)
        bare = [tokenizer.encode(text, add_special_tokens=False).ids for text in samples]
        example = tokenizer.encode(samples[0], samples[1] if sequences == 2 else None)
        parts: list[int | list[int]] = []  # the place of a sequence, or special tokens
        types: list[int] = []
        at = 0
        while at < len(example.ids):
            types.append(example.type_ids[at])
            if example.special_tokens_mask[at]:
                parts.append([example.ids[at]])
                at += 1
            else:
                place = next(i for i, ids in enumerate(bare) if example.ids[at : at + len(ids)] == ids)
                parts.append(place)
                at += len(bare[place])
        self._parts = tuple(parts)
        self._types = np.array(types, np.int32) if has_segments and any(types) else None
        self._special_tokens = sum(isinstance(part, list) for part in parts)

    def room(self, max_tokens: int) -> int:
        """How many of max_tokens are left for the sequences."""
        return max(0, max_tokens - self._special_tokens)

    @property
    def around(self) -> tuple[list[int], list[int]]:
        """The special tokens before the first sequence and behind the last one."""
        places = [i for i, part in enumerate(self._parts) if isinstance(part, int)]
        before, after = self._parts[: places[0]], self._parts[places[-1] + 1 :]
        return _special(before), _special(after)

    def join(self, sequences: Sequence[list[int]], uncut_tokens: int = 0) -> Encoded:
        """The sequences, already cut, as one. uncut_tokens: of all of them before they were cut; 0: nothing was cut."""
        ids: list[int] = []
        for part in self._parts:
            ids += sequences[part] if isinstance(part, int) else part
        if uncut_tokens:
            uncut_tokens += self._special_tokens
        if self._types is None:
            return Encoded(np.array(ids, np.int32), None, uncut_tokens > 0, 0, uncut_tokens)
        lengths = [len(sequences[part] if isinstance(part, int) else part) for part in self._parts]
        types = np.repeat(self._types, lengths)
        return Encoded(np.array(ids, np.int32), types if types.any() else None, uncut_tokens > 0, 0, uncut_tokens)


def _special(parts: Sequence[int | list[int]]) -> list[int]:
    return [token for part in parts if isinstance(part, list) for token in part]


def longest_first(first: int, second: int, room: int) -> tuple[int, int]:
    """How many tokens of each part `tokenizers` keeps in a room for both, when it cuts the longest first.

    Where both have to be cut, each keeps half. The odd token is the second part's, or the first's if that is longer.
    """
    if first + second <= room:
        return first, second
    shorter = min(first, second)
    if 2 * shorter <= room:
        return (first, room - first) if first <= second else (room - second, second)
    small, large = room // 2, room - room // 2
    return (large, small) if first > second else (small, large)


def _samples(tokenizer: Tokenizer, count: int) -> list[str]:
    """Texts that have tokens, each its own."""
    found: dict[tuple[int, ...], str] = {}
    for text in _candidates(tokenizer):
        ids = tuple(tokenizer.encode(text, add_special_tokens=False).ids)
        if ids and all(ids[0] != other[0] for other in found):
            found[ids] = text
        if len(found) == count:
            return list(found.values())
    # A vocabulary of one token, or none: there is nothing to tell apart.
    raise ModelError("the tokenizer gives every text the same token, or none: its vocabulary is not that of a model")


def _candidates(tokenizer: Tokenizer) -> Iterator[str]:
    yield from "abc"
    vocabulary: Sequence[str] = sorted(tokenizer.get_vocab(with_added_tokens=False))
    yield from vocabulary
