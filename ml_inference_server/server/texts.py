"""A request's texts on their way to the batcher: checked, all faults told at once, then turned into tokens."""

import re
from collections.abc import Sequence
from typing import NamedTuple, NoReturn

from ml_inference_server.backends.base import Encoded, NoSpans, TextTokenizer
from ml_inference_server.backends.text.windows import head, keep_end, windows
from ml_inference_server.server.options import Overflow
from ml_inference_server.utils.config import ServerSettings
from ml_inference_server.utils.errors import InvalidRequest

# Anything but blanks, zero-width spaces and byte-order marks.
_VISIBLE = re.compile(r"[^\s\u200b\ufeff]")
# So many tokens at the end of a window begin the next one.
OVERLAP_TOKENS = 32


class Key(NamedTuple):
    """What a row depends on. first: the prompt's name, or a cross-encoder's query.

    most_tokens: use no more tokens of the text than that; None: what the model takes.
    """

    first: str | None
    text: str
    most_tokens: int | None = None


class Job(NamedTuple):
    """One row to compute; equal keys are computed once. `field` names it in errors. texts: (field, text) to check."""

    field: str
    key: Key
    texts: tuple[tuple[str, str], ...]


def embedding_job(field: str, text: str, prompt_name: str | None, most_tokens: int | None = None) -> Job:
    return Job(field, Key(prompt_name, text, most_tokens), ((field, text),))


def pair_job(field: str, query: tuple[str, str], passage: tuple[str, str], most_tokens: int | None = None) -> Job:
    """query, passage: each with its own field in front. most_tokens: of the passage."""
    return Job(field, Key(query[1], passage[1], most_tokens), (query, passage))


class Tokens(NamedTuple):
    """One row's tokens: `parts` are its windows, one but for Overflow.CHUNK. total: before anything was cut."""

    parts: list[Encoded]
    total: int
    is_truncated: bool

    @property
    def used(self) -> int:
        return self.total if self.is_chunked else self.parts[0].length

    @property
    def is_chunked(self) -> bool:
        return len(self.parts) > 1


class Texts:
    """Checks and tokenises for one model."""

    def __init__(self, tokenizer: TextTokenizer, limits: ServerSettings, *, is_cross_encoder: bool) -> None:
        self._tokenizer = tokenizer
        self._limits = limits
        self._is_cross_encoder = is_cross_encoder

    def check_count(self, field: str, count: int) -> None:
        """InvalidRequest for none, and for more than server.max_texts."""
        if count == 0:
            message = f"{field}: at least one is required"
            raise InvalidRequest(message, reason="EMPTY_REQUEST", violations=[(field, "at least one is required")])
        if count > self._limits.max_texts:
            message = f"{count} items, the limit is {self._limits.max_texts}: send several requests"
            raise InvalidRequest(f"{field}: {message}", reason="TOO_MANY_TEXTS", violations=[(field, message)])

    def sizes(self, jobs: Sequence[Job]) -> list[int]:
        """The UTF-8 size of each job. InvalidRequest names all texts that are wrong (the first 16)."""
        sizes: list[int] = []
        wrong: dict[str, _BadText] = {}
        for job in jobs:
            size = 0
            for field, text in job.texts:
                try:
                    size += self._text_bytes(text)
                except _BadText as fault:
                    wrong[field] = fault
            sizes.append(size)
        if wrong:
            _raise_violations(
                [(field, str(fault)) for field, fault in wrong.items()], {f.reason for f in wrong.values()}
            )
        return sizes

    def estimate_tokens(self, sizes: Sequence[int], overflow: Overflow) -> int:
        """Before tokenising, for admission: a token for four bytes, two special ones.

        Never above the model's limit, unless long texts are computed as a whole.
        """
        if overflow is Overflow.CHUNK:
            return sum(size // 4 + 2 for size in sizes)
        limit = self._tokenizer.max_tokens
        return sum([min(limit, size // 4 + 2) for size in sizes])

    def encode(self, keys: Sequence[Key], overflow: Overflow) -> list[Tokens]:
        """Pairs at once, texts with one call for each prompt in use (at most two). Safe to call from any thread.

        InvalidRequest where the model's tokenizer cannot do what is asked of a long text.
        """
        try:
            texts = [key.text if key.most_tokens is None else self._beginning(key) for key in keys]
            found = self._tokens([key.first for key in keys], texts, overflow)
            return [
                tokens if text == key.text else self._shortened(tokens, key.text, text)
                for tokens, key, text in zip(found, keys, texts, strict=True)
            ]
        except NoSpans as error:
            message = f"cannot be had from this model ({error}): cut the text yourself, or leave the model to cut it"
            raise InvalidRequest(f"overflow: {message}", violations=[("overflow", message)]) from None

    def _tokens(self, firsts: Sequence[str | None], texts: Sequence[str], overflow: Overflow) -> list[Tokens]:
        if self._is_cross_encoder:
            pairs = self._tokenizer.encode_pairs(
                [(query or "", text) for query, text in zip(firsts, texts, strict=True)]
            )
            return [_whole(encoded) for encoded in pairs]
        prompt_names = set(firsts)
        if len(prompt_names) == 1:
            return self._under(firsts[0], texts, overflow)
        out: dict[int, Tokens] = {}
        for prompt_name in prompt_names:
            places = [i for i, name in enumerate(firsts) if name == prompt_name]
            out.update(zip(places, self._under(prompt_name, [texts[i] for i in places], overflow), strict=True))
        return [out[i] for i in range(len(texts))]

    def _under(self, prompt_name: str | None, texts: Sequence[str], overflow: Overflow) -> list[Tokens]:
        """Of texts that all get that prompt."""
        encoded = self._tokenizer.encode(texts, prompt_name)
        if overflow in (Overflow.CUT, Overflow.REFUSE):
            return [_whole(one) for one in encoded]
        return [
            self._long(text, prompt_name, one, overflow) if one.truncated else _whole(one)
            for text, one in zip(texts, encoded, strict=True)
        ]

    def _long(self, text: str, prompt_name: str | None, cut: Encoded, overflow: Overflow) -> Tokens:
        """cut: the text as it is cut at the model's limit."""
        try:
            if overflow is Overflow.CHUNK:
                return Tokens(windows(self._tokenizer, text, prompt_name, OVERLAP_TOKENS), cut.total_tokens, False)
            return Tokens([keep_end(self._tokenizer, text, prompt_name)], cut.total_tokens, True)
        except NoSpans:
            raise
        except ValueError as error:  # the prompt leaves no room
            raise InvalidRequest(f"overflow: {error}", violations=[("overflow", str(error))]) from None

    def _beginning(self, key: Key) -> str:
        """As much of the text as its limit allows; a text of no such token stays, and is refused for that."""
        return head(self._tokenizer, key.text, key.most_tokens or 0) or key.text

    def _shortened(self, tokens: Tokens, text: str, beginning: str) -> Tokens:
        """Of a text of which only the beginning was tokenised."""
        left_out = len(self._tokenizer.spans(text)) - len(self._tokenizer.spans(beginning))
        return Tokens(tokens.parts, tokens.total + left_out, True)

    def check_tokens(
        self, jobs: Sequence[Job], where: Sequence[int], tokens: Sequence[Tokens], overflow: Overflow
    ) -> None:
        """InvalidRequest for texts of no token, and for those that are too long where that is refused.

        where: the place of each job's row in `tokens`.
        """
        # Where a tokenizer adds no special tokens, a text of characters that it drops becomes nothing.
        empty = "text is empty for this model: its tokenizer leaves no token of it"
        if not all(each.used for each in tokens):
            wrong = [(job.field, empty) for job, place in zip(jobs, where, strict=True) if not tokens[place].used]
            _raise_violations(wrong, {"EMPTY_TEXT"})
        if overflow is Overflow.REFUSE:
            limit = self._tokenizer.max_tokens
            long = [(job.field, tokens[place]) for job, place in zip(jobs, where, strict=True)]
            wrong = [
                (field, f"{each.total} tokens, the model takes {limit}, and cutting is refused (truncate, overflow)")
                for field, each in long
                if any(part.truncated for part in each.parts)  # not at a limit that the request itself set
            ]
            if wrong:
                _raise_violations(wrong, {"TEXT_TOO_LONG"})

    def _text_bytes(self, text: str) -> int:
        """The UTF-8 size of a sound text."""
        limit = self._limits.max_text_bytes
        try:
            size = len(text.encode())
        except UnicodeEncodeError:
            raise _BadText("INVALID_FIELD", "not valid Unicode (a lone surrogate)") from None
        if _VISIBLE.search(text) is None:
            raise _BadText("EMPTY_TEXT", "text is empty")
        if size > limit:
            raise _BadText("TEXT_TOO_LONG", f"{size} bytes, the limit is {limit}")
        return size


class _BadText(Exception):
    """One text of a request cannot be computed; the request is refused once all of its texts were looked at."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def _whole(encoded: Encoded) -> Tokens:
    return Tokens([encoded], encoded.total_tokens, encoded.truncated)


def _raise_violations(wrong: Sequence[tuple[str, str]], reasons: set[str]) -> NoReturn:
    more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
    reason = reasons.pop() if len(reasons) == 1 else "INVALID_FIELD"
    raise InvalidRequest(f"{wrong[0][0]}: {wrong[0][1]}{more}", reason=reason, violations=wrong)
