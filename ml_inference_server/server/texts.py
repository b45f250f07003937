"""A request's texts on their way to the batcher: checked, all faults told at once, then turned into tokens."""

from collections.abc import Sequence
from dataclasses import dataclass

from ml_inference_server.backends.base import Encoded, TextTokenizer
from ml_inference_server.server.options import Overflow
from ml_inference_server.utils.config import ServerSettings
from ml_inference_server.utils.errors import InvalidRequest

# Invisible characters that str.strip() leaves: zero-width space and byte-order mark.
_INVISIBLE = "\u200b\ufeff"
Key = tuple[str | None, str]
"""What a row depends on: (prompt name, text) for an embedding, (query, passage) for a cross-encoder."""


@dataclass(frozen=True, slots=True)
class Job:
    """One row to compute; equal keys are computed once. `field` names it in errors. texts: (field, text) to check."""

    field: str
    key: Key
    texts: tuple[tuple[str, str], ...]


def embedding_job(field: str, text: str, prompt_name: str | None) -> Job:
    return Job(field, (prompt_name, text), ((field, text),))


def pair_job(field: str, query: tuple[str, str], passage: tuple[str, str]) -> Job:
    """query, passage: each with its own field in front."""
    return Job(field, (query[1], passage[1]), (query, passage))


@dataclass(frozen=True, slots=True)
class Tokens:
    """One row's tokens: `parts` are its windows, one but for OVERFLOW chunk. total: before anything was cut."""

    parts: list[Encoded]
    total: int

    @property
    def used(self) -> int:
        return sum(part.length for part in self.parts) if not self.is_chunked else self.total

    @property
    def is_chunked(self) -> bool:
        return len(self.parts) > 1

    @property
    def is_truncated(self) -> bool:
        return any(part.truncated for part in self.parts)


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
        _raise_violations([(field, str(fault)) for field, fault in wrong.items()], {f.reason for f in wrong.values()})
        return sizes

    def estimate_tokens(self, sizes: Sequence[int], overflow: Overflow) -> int:
        """Before tokenising, for admission: a token for four bytes, two special ones.

        Never above the model's limit, unless long texts are computed as a whole.
        """
        if overflow is Overflow.CHUNK:
            return sum(size // 4 + 2 for size in sizes)
        limit = self._tokenizer.max_tokens
        return sum(min(limit, size // 4 + 2) for size in sizes)

    def encode(self, keys: Sequence[Key], overflow: Overflow) -> list[Tokens]:
        """Pairs at once, texts with one call for each prompt in use (at most two). Safe to call from any thread."""
        if self._is_cross_encoder:
            pairs = self._tokenizer.encode_pairs([(query or "", passage) for query, passage in keys])
            return [_whole(encoded) for encoded in pairs]
        out: dict[int, Tokens] = {}
        for prompt_name in {name for name, _ in keys}:
            places = [i for i, (name, _) in enumerate(keys) if name == prompt_name]
            encoded = self._tokenizer.encode([keys[i][1] for i in places], prompt_name)
            out.update((place, _whole(one)) for place, one in zip(places, encoded, strict=True))
        return [out[i] for i in range(len(keys))]

    def check_tokens(
        self, jobs: Sequence[Job], where: Sequence[int], tokens: Sequence[Tokens], overflow: Overflow
    ) -> None:
        """InvalidRequest for texts of no token, and for those that are too long where that is refused.

        where: the place of each job's row in `tokens`.
        """
        # Where a tokenizer adds no special tokens, a text of characters that it drops becomes nothing.
        empty = "text is empty for this model: its tokenizer leaves no token of it"
        wrong = [(job.field, empty) for job, place in zip(jobs, where, strict=True) if not tokens[place].used]
        _raise_violations(wrong, {"EMPTY_TEXT"})
        if overflow is Overflow.REFUSE:
            limit = self._tokenizer.max_tokens
            long = [(job.field, tokens[place]) for job, place in zip(jobs, where, strict=True)]
            wrong = [
                (field, f"{each.total} tokens, the model takes {limit}, and cutting is refused (truncate, overflow)")
                for field, each in long
                if each.is_truncated
            ]
            _raise_violations(wrong, {"TEXT_TOO_LONG"})

    def _text_bytes(self, text: str) -> int:
        """The UTF-8 size of a sound text."""
        limit = self._limits.max_text_bytes
        try:
            size = len(text.encode())
        except UnicodeEncodeError:
            raise _BadText("INVALID_FIELD", "not valid Unicode (a lone surrogate)") from None
        if not text.strip().strip(_INVISIBLE):
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
    return Tokens([encoded], encoded.length)


def _raise_violations(wrong: Sequence[tuple[str, str]], reasons: set[str]) -> None:
    if wrong:
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        reason = reasons.pop() if len(reasons) == 1 else "INVALID_FIELD"
        raise InvalidRequest(f"{wrong[0][0]}: {wrong[0][1]}{more}", reason=reason, violations=wrong)
