"""Texts that are longer than a model reads: as windows, by their end, or by their beginning.

What is cut are strings, at the places where tokens begin: at words where there are any, and not between a letter and
its accent. Each piece is then encoded as any other text, so this holds for every tokenizer that tells its spans. A
piece may have more tokens than the same characters have in the whole text; it is made smaller until it fits.
"""

import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ml_inference_server.backends.base import Encoded, TextTokenizer

_JOINER = "\u200d"
_SKIN_TONES = ("\U0001f3fb", "\U0001f3ff")
# `head` looks for its end in so many characters for each token, then in _GROWTH times as many, until there are so many
# more tokens: those next to where the text was parted may be others in the whole text.
_CHARACTERS_PER_TOKEN = 16
_GROWTH = 4
_MARGIN_TOKENS = 128
_MOST_IN_ONE_CHARACTER = 64  # tokens, for all that is read as one; to be looked through, not to be relied on


@dataclass(frozen=True, slots=True)
class Window:
    """text[start:stop], encoded behind the prompt."""

    start: int
    stop: int
    encoded: Encoded


def windows(tokenizer: TextTokenizer, text: str, prompt_name: str | None, overlap_tokens: int) -> list[Encoded]:
    """`text` as pieces that each fit the model's limit with prompt and special tokens; one piece if all of it fits.

    As `placed_windows`, without the places.
    """
    return [window.encoded for window in placed_windows(tokenizer, text, prompt_name, overlap_tokens)]


def placed_windows(tokenizer: TextTokenizer, text: str, prompt_name: str | None, overlap_tokens: int) -> list[Window]:
    """Windows over `text`, of which none is truncated and which leave no character out.

    overlap_tokens: about so many tokens at the end of a window begin the next one; never more than half of what the
    limit leaves for the text. ValueError where the prompt leaves no room for a text, NoSpans as the tokenizer.
    """
    if overlap_tokens < 0:
        raise ValueError(f"overlap_tokens is {overlap_tokens}: it has to be 0 or more")
    whole = tokenizer.encode([text], prompt_name)[0]
    if not whole.truncated:
        return [Window(0, len(text), whole)]
    long = _LongText(tokenizer, text, prompt_name, whole)
    overlap = min(overlap_tokens, long.room // 2)
    out: list[Window] = []
    start = reached = 0
    while reached < len(text):
        window = long.window(start, reached)
        if window.stop <= reached:  # it had to be made smaller than the overlap: begin behind that
            start = reached
            continue
        if window.encoded.length:
            out.append(window)
        reached = window.stop
        start = long.overlap_start(window, overlap)
    return out


def keep_end(tokenizer: TextTokenizer, text: str, prompt_name: str | None) -> Encoded:
    """`text` cut on the left: the prompt and the end of the text stay. ValueError and NoSpans as `placed_windows`."""
    whole = tokenizer.encode([text], prompt_name)[0]
    if not whole.truncated:
        return whole
    end = _LongText(tokenizer, text, prompt_name, whole).end()
    return replace(end, truncated=True, uncut_tokens=whole.total_tokens)


def head(tokenizer: TextTokenizer, text: str, tokens: int) -> str:
    """The beginning of `text` with at most so many tokens, prompt and special tokens not counted; NoSpans."""
    if tokens <= 0:
        return ""
    size = (tokens + _MARGIN_TOKENS) * _CHARACTERS_PER_TOKEN
    spans = tokenizer.spans(text[:size])
    while size < len(text) and len(spans) <= tokens + _MARGIN_TOKENS:
        size *= _GROWTH
        spans = tokenizer.spans(text[:size])
    if len(spans) <= tokens:
        return text
    places = _Places(text, spans)
    last = tokens
    while last > 0:
        stop = places.best(range(last, 0, -1), words=False)
        excess = len(tokenizer.spans(text[:stop])) - tokens
        if excess <= 0:
            return text[:stop]
        last = min(last, places.tokens_before(stop)) - excess
    return ""


class _Places:
    """Where the tokens of a text begin."""

    def __init__(self, text: str, spans: NDArray[np.int32]) -> None:
        self._text = text
        # Of its own, and of the kind of what is looked for: numpy would copy all of it at each search.
        self._starts = np.ascontiguousarray(spans[:, 0], np.int32)

    def __len__(self) -> int:
        return len(self._starts)

    def tokens_before(self, place: int) -> int:
        """How many tokens begin before `place`; it is the number of the first that does not."""
        return int(np.searchsorted(self._starts, np.int32(place)))

    def best(self, tokens: Iterable[int], *, words: bool = True, above: int = 0) -> int:
        """Where the first of `tokens` begins that is a good place to cut at; 0 if none begins behind `above`.

        words: a token with which a word begins is better than all others.
        """
        starts = [start for token in tokens if (start := int(self._starts[token])) > above]
        whole = (start for start in starts if not self._splits_character(start))
        word = next((start for start in starts if self._begins_word(start)), None) if words else None
        return next(whole, next(iter(starts), 0)) if word is None else word

    def _begins_word(self, place: int) -> bool:
        return place >= len(self._text) or self._text[place - 1].isspace() or self._text[place].isspace()

    def _splits_character(self, place: int) -> bool:
        """Whether what stands before and behind is read as one: a letter and its accents, an emoji of several."""
        if place >= len(self._text):
            return False
        before, behind = self._text[place - 1], self._text[place]
        is_mark = unicodedata.category(behind).startswith("M")
        return is_mark or _JOINER in (before, behind) or _SKIN_TONES[0] <= behind <= _SKIN_TONES[1]


class _LongText:
    """A text that does not fit. room: how many tokens of it do."""

    def __init__(self, tokenizer: TextTokenizer, text: str, prompt_name: str | None, whole: Encoded) -> None:
        """whole: what `tokenizer` gives for it, truncated."""
        self._tokenizer = tokenizer
        self._text = text
        self._prompt_name = prompt_name
        spans = tokenizer.spans(text)
        self._places = _Places(text, spans)
        limit = whole.length
        self.room = min(limit, limit - (whole.total_tokens - len(spans)))
        if self.room <= 0:
            raise ValueError(
                f"the prompt and the special tokens fill the model's limit of {limit} tokens, so there is no room for "
                f"the text: use a shorter prompt or none"
            )

    def window(self, start: int, reached: int) -> Window:
        """From `start` on; it ends behind `reached` if it can."""
        first = self._places.tokens_before(start)
        stop = self._stop(start, first + self.room, max(first + self.room // 2, self._places.tokens_before(reached)))
        while True:
            encoded = self._encode(start, stop)
            if not encoded.truncated:
                return Window(start, stop, encoded)
            self._check_divisible(stop - start)
            last = self._places.tokens_before(stop) - _excess(encoded)
            place = self._before(start, last, first + (last - first) // 2) if last > first else 0
            stop = place or start + (stop - start) // 2

    def _stop(self, start: int, last: int, least: int) -> int:
        if last >= len(self._places):
            return len(self._text)
        return self._before(start, last, least) or start + 1

    def _before(self, start: int, last: int, least: int) -> int:
        """Where token number `last` begins, or better one between that and `least`; 0 if that is not behind `start`."""
        return self._places.best(range(last, min(least, last - 1), -1), above=start)

    def overlap_start(self, window: Window, overlap: int) -> int:
        """Where the next window is to begin: about so many tokens before the end of this one."""
        end = self._places.tokens_before(window.stop)
        wanted = [end - overlap]
        for distance in range(1, overlap // 2 + 1):
            wanted += [end - overlap - distance, end - overlap + distance]
        place = self._places.best((token for token in wanted if 0 <= token < end), above=window.start)
        return place or window.stop

    def end(self) -> Encoded:
        """As much of the end as fits."""
        start = self._later(0, len(self._places) - self.room)
        while True:
            encoded = self._encode(start, len(self._text))
            if not encoded.truncated:
                return encoded
            self._check_divisible(len(self._text) - start)
            start = self._later(start, self._places.tokens_before(start) + _excess(encoded))

    def _later(self, start: int, token: int) -> int:
        """Where a token begins that is `token` or a little behind it; in any case behind `start`."""
        places, count = self._places, len(self._places)
        word = places.best(range(token, min(token + 1 + self.room // 8, count)), above=start)
        place = word or places.best(range(token, min(token + _MOST_IN_ONE_CHARACTER, count)), words=False, above=start)
        return place or start + (len(self._text) - start + 1) // 2

    def _encode(self, start: int, stop: int) -> Encoded:
        return self._tokenizer.encode([self._text[start:stop]], self._prompt_name)[0]

    def _check_divisible(self, characters: int) -> None:
        if characters <= 1:
            raise ValueError(
                f"one character of the text takes more than the {self.room} tokens that the prompt and the special "
                f"tokens leave: use a shorter prompt or none"
            )


def _excess(encoded: Encoded) -> int:
    return encoded.total_tokens - encoded.length
