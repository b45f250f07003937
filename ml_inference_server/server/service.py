"""The use cases: embed, score, rerank. Validates, tokenises, submits, gathers; knows no protocol."""

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ml_inference_server.backends.base import Encoded, TextTokenizer
from ml_inference_server.metrics.registry import Metrics
from ml_inference_server.server.scheduler import DynamicBatcher, Ticket
from ml_inference_server.utils.config import ServerSettings
from ml_inference_server.utils.errors import InvalidRequest

# Names under which models keep the prompt of a document, in the order in which sentence-transformers looks for them.
_DOCUMENT_PROMPTS = ("document", "passage", "corpus")
# Invisible characters that str.strip() leaves: zero-width space and byte-order mark.
_INVISIBLE = "\u200b\ufeff"


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds; see the message of the same name in inference.proto."""

    tokenize_s: float
    queue_s: float
    compute_s: float
    total_s: float


@dataclass(frozen=True, slots=True)
class Answer:
    """`values`: (texts, dimension) for embed, (pairs,) for score. `truncated`: texts that were cut."""

    values: NDArray[np.float32]
    truncated: int
    timing: Timing


@dataclass(frozen=True, slots=True)
class Ranking:
    """(index, score) of the best documents, best first."""

    ranks: list[tuple[int, float]]
    truncated: int
    timing: Timing


@dataclass(frozen=True, slots=True)
class _Input:
    field: str
    text: str
    prompt_name: str | None


class InferenceService:
    """Every protocol calls these three methods. `deadline` is on the event loop's clock."""

    def __init__(
        self, tokenizer: TextTokenizer, batcher: DynamicBatcher, limits: ServerSettings, metrics: Metrics
    ) -> None:
        self._tokenizer = tokenizer
        self._batcher = batcher
        self._limits = limits
        self._metrics = metrics
        self._pool = ThreadPoolExecutor(2, thread_name_prefix="tokenize")
        self._query_prompt = "query" if "query" in tokenizer.prompts else None
        self._document_prompt = next((name for name in _DOCUMENT_PROMPTS if name in tokenizer.prompts), None)

    async def embed(
        self, texts: Sequence[str], deadline: float, *, prompt_name: str | None = None, truncate: bool = True
    ) -> Answer:
        """One row for each text, in order. Raises any ServiceError."""
        if prompt_name is not None and prompt_name not in self._tokenizer.prompts:
            known = ", ".join(name for name in self._tokenizer.prompts if name) or "none"
            message = f"this model has no such prompt; it has: {known}"
            raise InvalidRequest(f"prompt_name: {message}", violations=[("prompt_name", message)])
        self._check_count("texts", len(texts))
        inputs = [_Input(f"texts[{i}]", text, prompt_name) for i, text in enumerate(texts)]
        return await self._rows(inputs, deadline, truncate)

    async def score(self, pairs: Sequence[tuple[str, str]], deadline: float, *, truncate: bool = True) -> Answer:
        """The cosine of each (query, passage) pair, in order: (pairs,) within -1..1."""
        self._check_count("pairs", len(pairs))
        inputs = [_Input(f"pairs[{i}].query", query, self._query_prompt) for i, (query, _) in enumerate(pairs)]
        inputs += [_Input(f"pairs[{i}].passage", text, self._document_prompt) for i, (_, text) in enumerate(pairs)]
        answer = await self._rows(inputs, deadline, truncate)
        queries, passages = np.split(answer.values, 2)
        return Answer(_cosine(queries, passages), answer.truncated, answer.timing)

    async def rerank(
        self, query: str, documents: Sequence[str], top_k: int, deadline: float, *, truncate: bool = True
    ) -> Ranking:
        """The `top_k` best documents (0: all); equal scores keep the given order."""
        self._check_count("documents", len(documents))
        inputs = [_Input("query", query, self._query_prompt)]
        inputs += [_Input(f"documents[{i}]", text, self._document_prompt) for i, text in enumerate(documents)]
        answer = await self._rows(inputs, deadline, truncate)
        scores = _cosine(answer.values[:1], answer.values[1:])
        order = np.argsort(-scores, kind="stable")[: top_k or None]
        ranks = [(int(index), float(scores[index])) for index in order]
        return Ranking(ranks, answer.truncated, answer.timing)

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def _rows(self, inputs: Sequence[_Input], deadline: float, truncate: bool) -> Answer:
        started_at = time.monotonic()
        sizes = self._check_texts(inputs)
        # Equal texts of one request are computed once.
        places: dict[tuple[str | None, str], int] = {}
        where = [places.setdefault((each.prompt_name, each.text), len(places)) for each in inputs]
        ticket = self._batcher.admit(self._estimate_tokens(sizes), deadline)
        try:
            encoded = await self._tokenize(list(places))
            tokenized_at = time.monotonic()
            self._metrics.tokenized(len(encoded), sum(e.length for e in encoded), tokenized_at - started_at)
            self._check_truncation(inputs, where, encoded, truncate)
            rows = await self._batcher.compute(ticket, encoded)
        finally:
            self._batcher.release(ticket)
        truncated = sum(encoded[place].truncated for place in where)
        values = rows if len(places) == len(inputs) else rows[where]
        return Answer(values, truncated, _timing(ticket, started_at, tokenized_at))

    async def _tokenize(self, texts: Sequence[tuple[str | None, str]]) -> list[Encoded]:
        return await asyncio.get_running_loop().run_in_executor(self._pool, self._encode, texts)

    def _encode(self, texts: Sequence[tuple[str | None, str]]) -> list[Encoded]:
        """In the tokenizer's thread: one call for each prompt in use (one, or two for pairs)."""
        out: list[Encoded | None] = [None] * len(texts)
        for prompt_name in {name for name, _ in texts}:
            places = [i for i, (name, _) in enumerate(texts) if name == prompt_name]
            encoded = self._tokenizer.encode([texts[i][1] for i in places], prompt_name)
            for place, one in zip(places, encoded, strict=True):
                out[place] = one
        return [one for one in out if one is not None]

    def _estimate_tokens(self, sizes: Sequence[int]) -> int:
        """Before tokenising, for admission: a token for four bytes, two special ones, never above the model's limit."""
        limit = self._tokenizer.max_tokens
        return sum(min(limit, size // 4 + 2) for size in sizes)

    def _check_count(self, field: str, count: int) -> None:
        if count == 0:
            message = f"{field}: at least one is required"
            raise InvalidRequest(message, reason="EMPTY_REQUEST", violations=[(field, "at least one is required")])
        if count > self._limits.max_texts:
            message = f"{count} items, the limit is {self._limits.max_texts}: send several requests"
            raise InvalidRequest(f"{field}: {message}", reason="TOO_MANY_TEXTS", violations=[(field, message)])

    def _check_texts(self, inputs: Sequence[_Input]) -> list[int]:
        """The UTF-8 size of each text. InvalidRequest names all that are wrong (the first 16)."""
        sizes, wrong, reasons = [], [], set()
        limit = self._limits.max_text_bytes
        for each in inputs:
            try:
                size = len(each.text.encode())
            except UnicodeEncodeError:
                wrong.append((each.field, "not valid Unicode (a lone surrogate)"))
                reasons.add("INVALID_FIELD")
                continue
            sizes.append(size)
            if not each.text.strip().strip(_INVISIBLE):
                wrong.append((each.field, "text is empty"))
                reasons.add("EMPTY_TEXT")
            elif size > limit:
                wrong.append((each.field, f"{size} bytes, the limit is {limit}"))
                reasons.add("TEXT_TOO_LONG")
        _raise_violations(wrong, reasons)
        return sizes

    def _check_truncation(
        self, inputs: Sequence[_Input], where: Sequence[int], encoded: Sequence[Encoded], truncate: bool
    ) -> None:
        if truncate:
            return
        message = f"more than {self._tokenizer.max_tokens} tokens, and truncate is false"
        wrong = [(each.field, message) for each, place in zip(inputs, where, strict=True) if encoded[place].truncated]
        _raise_violations(wrong, {"TEXT_TOO_LONG"})


def _raise_violations(wrong: Sequence[tuple[str, str]], reasons: set[str]) -> None:
    if wrong:
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        reason = reasons.pop() if len(reasons) == 1 else "INVALID_FIELD"
        raise InvalidRequest(f"{wrong[0][0]}: {wrong[0][1]}{more}", reason=reason, violations=wrong)


def _timing(ticket: Ticket, started_at: float, tokenized_at: float) -> Timing:
    return Timing(
        tokenize_s=tokenized_at - started_at,
        queue_s=ticket.started_at - ticket.enqueued_at,
        compute_s=ticket.ended_at - ticket.started_at,
        total_s=time.monotonic() - started_at,
    )


def _cosine(a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.float32]:
    """Row by row; a single row of `a` stands against all of `b`."""
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    cosine: NDArray[np.float32] = np.einsum("ij,ij->i", np.broadcast_to(a, b.shape), b) / np.maximum(norms, 1e-12)
    return cosine.clip(-1.0, 1.0)
