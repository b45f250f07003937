"""Text to token ids: the only tokenizer call of the project.

A long text is read from the end that is kept, no further than it takes to fill the limit; the rest is only counted.
Whatever the text, time and memory grow in proportion to it; and what is kept is what the library would keep.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from itertools import chain
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from ml_inference_server.backends.base import Encoded, Token
from ml_inference_server.backends.text.reading import count, decode, end_of, read, start_of
from ml_inference_server.backends.text.template import Template, longest_first
from ml_inference_server.backends.text.word_cache import WordCache

# A longer text is read in part first: so many characters for each token of the limit, then _GROWTH times as many.
_CHARACTERS_PER_TOKEN = 16
_GROWTH = 4
# Up to here it takes no longer to read all of a text than to read a part of it and to count the rest.
_MOST_CHARACTERS_AS_A_WHOLE = 1 << 15
# The words next to where a text was parted may be others in the whole text.
_MARGIN_WORDS = 8
# More text than this at once goes to the library, which lets the event loop run meanwhile: looking words up holds
# Python's lock, for some milliseconds by then.
_MOST_CHARACTERS_FROM_WORDS = 1 << 16
# The library gets so much text at once: what it answers takes 50 to 400 times the memory of the text.
_MOST_CHARACTERS_AT_ONCE = 1 << 17


class FastTokenizer:
    """Answers as a `tokenizers.Tokenizer` that truncates to max_tokens. Safe to share between threads."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        max_tokens: int,
        pad_id: int,
        side: str = "right",
        prompts: Mapping[str, str],
        takes_segments: bool = True,
    ) -> None:
        """`tokenizer` is taken over: its padding and its truncation are switched off.

        side: where texts are cut. takes_segments: whether the model has segments; without, those that the tokenizer
        gives are left out.
        """
        self._tokenizer = tokenizer
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self.max_tokens = max_tokens
        self.pad_id = pad_id
        self.prompts = prompts
        self.most_characters = max(max_tokens * _CHARACTERS_PER_TOKEN, _MOST_CHARACTERS_AS_A_WHOLE)
        self.takes_segments = takes_segments
        self._keeps_start = side == "right"
        self._words = WordCache(tokenizer) if WordCache.fits(tokenizer) else None
        self._text = Template(tokenizer, 1, has_segments=takes_segments)
        self._pair = Template(tokenizer, 2, has_segments=takes_segments)
        self._room, self._pair_room = self._text.room(max_tokens), self._pair.room(max_tokens)
        self.needs_prompt_name = False

    @property
    def side(self) -> Literal["left", "right"]:
        """Where texts are cut."""
        return "right" if self._keeps_start else "left"

    def to_json(self) -> str:
        """The library's tokenizer, as its own files have it; the limit and the prompts are not in it."""
        return str(self._tokenizer.to_str())

    def encode(self, texts: Sequence[str], prompt_name: str | None = None) -> list[Encoded]:
        """One Encoded for each text, cut at max_tokens. Prompt "" is the default; KeyError for an unknown one."""
        prompt = self.prompts[prompt_name] if prompt_name is not None else self.prompts.get("", "")
        full = [prompt + text for text in texts] if prompt else texts
        room, join = self._room, self._text.join
        if self._are_short(full):
            return [
                join([ids]) if len(ids) <= room else join([self._cut(ids, room)], len(ids))
                for ids in self._tokenize_short(full)
            ]
        unread: set[str] = set()
        return [
            join([ids]) if len(ids) <= room else join([self._cut(ids, room)], self._total(text, ids, unread))
            for text, ids in zip(full, self._tokenize_mixed(full, room, unread), strict=True)
        ]

    def encode_pairs(self, pairs: Sequence[tuple[str, str]]) -> list[Encoded]:
        """One Encoded for each pair, the longer part cut first until both fit into max_tokens."""
        if prompt := self._prompt(None):
            pairs = [(prompt + query, passage) for query, passage in pairs]
        room = self._pair_room
        texts = list(dict.fromkeys(chain.from_iterable(pairs)))  # a query has many documents
        unread: set[str] = set()
        known: dict[str, list[int]] = {}
        totals: dict[str, int] = {}
        for text, ids in zip(texts, self._tokenize_mixed(texts, room, unread), strict=True):
            known[text], totals[text] = self._cut(ids, room), self._total(text, ids, unread)
        out = []
        for pair in pairs:
            first, second = (totals[text] for text in pair)
            kept = longest_first(first, second, room)
            cut = [self._cut(known[text], length) for text, length in zip(pair, kept, strict=True)]
            out.append(self._pair.join(cut, first + second if first + second > room else 0))
        return out

    def spans(self, text: str) -> NDArray[np.int32]:
        """(tokens, 2): the characters [start, end) of each token of `text`, without prompt and special tokens."""
        return read(self._tokenizer, text).spans

    def tokens(self, text: str, prompt_name: str | None = None, special: bool = True) -> list[Token]:
        """All tokens of `text` behind its prompt, uncut. KeyError for an unknown prompt."""
        full = self._prompt(prompt_name) + text
        found = read(self._tokenizer, full)
        own = [
            Token(token, full[start:stop], False, start, stop)
            for token, (start, stop) in zip(found.ids.tolist(), found.spans.tolist(), strict=True)
        ]
        if not special:
            return own
        before, after = self._text.around
        names = self._tokenizer.id_to_token
        put = [[Token(token, names(token) or "", True, None, None) for token in ids] for ids in (before, after)]
        return [*put[0], *own, *put[1]]

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """The text of tokens. ValueError for an id that is none."""
        return decode(self._tokenizer, ids, skip_special)

    def _prompt(self, name: str | None) -> str:
        return self.prompts[name] if name is not None else self.prompts.get("", "")

    def _cut(self, ids: list[int], length: int) -> list[int]:
        if len(ids) <= length:
            return ids
        return ids[:length] if self._keeps_start else ids[len(ids) - length :]

    def _are_short(self, texts: Sequence[str]) -> bool:
        return max(map(len, texts), default=0) <= self.most_characters

    def _tokenize_mixed(self, texts: Sequence[str], room: int, unread: set[str]) -> Iterator[list[int]]:
        """All tokens of each text without special ones; or more than there is room for, from the end that is kept.

        unread: receives the texts of which that is not all.
        """
        if self._are_short(texts):
            yield from self._tokenize_short(texts)
            return
        short = iter(self._tokenize_short([text for text in texts if len(text) <= self.most_characters]))
        for text in texts:
            if len(text) <= self.most_characters:
                yield next(short)
            elif ids := self._settled(text, room):
                unread.add(text)
                yield ids
            else:
                yield from self._by_library([text])

    def _tokenize_short(self, texts: Sequence[str]) -> Iterable[list[int]]:
        if self._words is None or sum(map(len, texts)) > _MOST_CHARACTERS_FROM_WORDS:
            return self._by_library(texts)
        found = self._words.tokenize(texts)
        others = self._by_library([text for text, ids in zip(texts, found, strict=True) if ids is None])
        return [next(others) if ids is None else ids for ids in found]

    def _by_library(self, texts: Sequence[str]) -> Iterator[list[int]]:
        # The parts of a single pair are done one after the other: waking a second thread takes longer.
        groups = _groups(texts, _MOST_CHARACTERS_AT_ONCE) if len(texts) > 2 else ([text] for text in texts)
        for group in groups:
            for encoding in self._tokenizer.encode_batch_fast(group, add_special_tokens=False):
                yield encoding.ids

    def _settled(self, text: str, room: int) -> list[int] | None:
        """More tokens than there is room for, from the end that is kept; None if it takes all of the text."""
        size = min(self.most_characters, self.max_tokens * _CHARACTERS_PER_TOKEN)
        while size < len(text):
            part = start_of(text, size) if self._keeps_start else end_of(text, size)
            encoding = self._tokenizer.encode_batch([part], add_special_tokens=False)[0]
            ids: list[int] = encoding.ids
            words: Sequence[Any] = encoding.word_ids
            if words and self._keeps_start:
                ids = ids[: bisect_left(words, words[-1] - _MARGIN_WORDS)]
            elif words:
                ids = ids[bisect_right(words, words[0] + _MARGIN_WORDS) :]
            if len(ids) > room:
                return ids
            size *= _GROWTH
        return None

    def _total(self, text: str, ids: Sequence[int], unread: Set[str]) -> int:
        """The tokens of `text`, of which `ids` are all, or some if it is in `unread`."""
        if text not in unread:
            return len(ids)
        counted = self._words.count(text) if self._words is not None else None
        return count(self._tokenizer, text) if counted is None else counted


def _groups(texts: Sequence[str], most_characters: int) -> Iterator[list[str]]:
    """In order; each within `most_characters`, or one text."""
    group: list[str] = []
    size = 0
    for text in texts:
        if group and size + len(text) > most_characters:
            yield group
            group, size = [], 0
        group.append(text)
        size += len(text)
    if group:
        yield group
