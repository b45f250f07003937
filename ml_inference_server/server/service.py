"""The use cases: embed, score, rerank. Validates, tokenises, submits, gathers; knows no protocol."""

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ml_inference_server.backends.base import DOCUMENT_PROMPTS, BackendInfo, Encoded, TextTokenizer
from ml_inference_server.metrics.registry import Metrics
from ml_inference_server.server.admission import Admission
from ml_inference_server.server.call import Call
from ml_inference_server.server.scheduler import DynamicBatcher
from ml_inference_server.server.similarity import similarity
from ml_inference_server.utils.config import ServerSettings
from ml_inference_server.utils.errors import InvalidRequest, WrongTask
from ml_inference_server.utils.stages import Stamps

# Up to so much text is tokenised at once, in some 10 to 100 us; handing it to a thread and back takes longer than that,
# and costs the event loop more. Longer requests go to a thread, so that no other has to wait for them.
_INLINE_BYTES = 2048
# Invisible characters that str.strip() leaves: zero-width space and byte-order mark.
_INVISIBLE = "\u200b\ufeff"


@dataclass(frozen=True, slots=True)
class Answer:
    """`values`: (texts, dimension) for embed, (pairs,) for score. `truncated`: texts that were cut."""

    values: NDArray[np.float32]
    truncated: int
    stamps: Stamps


@dataclass(frozen=True, slots=True)
class Ranking:
    """(index, score) of the best documents, best first."""

    ranks: list[tuple[int, float]]
    truncated: int
    stamps: Stamps


@dataclass(frozen=True, slots=True)
class _Job:
    """One row to compute. `key` is what it depends on, so equal keys are computed once; `field` names it in errors.

    key: (prompt name, text) for an embedding, (query, passage) for a cross-encoder. texts: (field, text) to validate.
    """

    field: str
    key: tuple[str | None, str]
    texts: tuple[tuple[str, str], ...]


class _BadText(Exception):
    """One text of a request cannot be computed; the request is refused once all of its texts were looked at."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class InferenceService:
    """Every protocol calls these three methods. They raise any ServiceError."""

    def __init__(
        self,
        tokenizer: TextTokenizer,
        info: BackendInfo,
        admission: Admission,
        batcher: DynamicBatcher,
        limits: ServerSettings,
        metrics: Metrics,
    ) -> None:
        self._tokenizer = tokenizer
        self._is_cross_encoder = info.task == "cross_encoder"
        self._similarity = info.similarity
        self._admission = admission
        self._batcher = batcher
        self._limits = limits
        self._metrics = metrics
        self._pool = ThreadPoolExecutor(2, thread_name_prefix="tokenize")
        self._query_prompt = "query" if "query" in tokenizer.prompts else None
        self._document_prompt = next((name for name in DOCUMENT_PROMPTS if name in tokenizer.prompts), None)

    async def embed(
        self, texts: Sequence[str], call: Call, *, prompt_name: str | None = None, truncate: bool = True
    ) -> Answer:
        """One row for each text, in order."""
        if self._is_cross_encoder:
            raise WrongTask("this model is a cross-encoder: it scores pairs (Score, Rerank) and has no embeddings")
        if prompt_name is not None and prompt_name not in self._tokenizer.prompts:
            known = ", ".join(name for name in self._tokenizer.prompts if name) or "none"
            message = f"this model has no such prompt; it has: {known}"
            raise InvalidRequest(f"prompt_name: {message}", violations=[("prompt_name", message)])
        if prompt_name is None and self._tokenizer.needs_prompt_name:
            message = f"this model needs one: it treats {' and '.join(self._tokenizer.prompts)} differently"
            raise InvalidRequest(f"prompt_name: {message}", violations=[("prompt_name", message)])
        self._check_count("texts", len(texts))
        jobs = [_embedding_job(f"texts[{i}]", text, prompt_name) for i, text in enumerate(texts)]
        return await self._rows(jobs, call, truncate)

    async def score(self, pairs: Sequence[tuple[str, str]], call: Call, *, truncate: bool = True) -> Answer:
        """One score for each (query, passage) pair, in order: raw logits, or what `BackendInfo.similarity` names."""
        self._check_count("pairs", len(pairs))
        queries = [(f"pairs[{i}].query", query) for i, (query, _) in enumerate(pairs)]
        passages = [(f"pairs[{i}].passage", passage) for i, (_, passage) in enumerate(pairs)]
        if self._is_cross_encoder:
            jobs = [_pair_job(f"pairs[{i}]", *both) for i, both in enumerate(zip(queries, passages, strict=True))]
            return await self._logits(jobs, call, truncate)
        jobs = [_embedding_job(*query, self._query_prompt) for query in queries]
        jobs += [_embedding_job(*passage, self._document_prompt) for passage in passages]
        answer = await self._rows(jobs, call, truncate)
        scores = similarity(self._similarity, *np.split(answer.values, 2))
        return Answer(scores, answer.truncated, answer.stamps)

    async def rerank(
        self, query: str, documents: Sequence[str], top_k: int, call: Call, *, truncate: bool = True
    ) -> Ranking:
        """The `top_k` best documents (0: all); equal scores keep the given order."""
        self._check_count("documents", len(documents))
        named = [(f"documents[{i}]", document) for i, document in enumerate(documents)]
        if self._is_cross_encoder:
            jobs = [_pair_job(document[0], ("query", query), document) for document in named]
            answer = await self._logits(jobs, call, truncate)
            scores = answer.values
        else:
            jobs = [_embedding_job("query", query, self._query_prompt)]
            jobs += [_embedding_job(*document, self._document_prompt) for document in named]
            answer = await self._rows(jobs, call, truncate)
            scores = similarity(self._similarity, answer.values[:1], answer.values[1:])
        order = np.argsort(-scores, kind="stable")[: top_k or None]
        ranks = [(int(index), float(scores[index])) for index in order]
        return Ranking(ranks, answer.truncated, answer.stamps)

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def _logits(self, jobs: Sequence[_Job], call: Call, truncate: bool) -> Answer:
        answer = await self._rows(jobs, call, truncate)
        return Answer(answer.values[:, 0], answer.truncated, answer.stamps)

    async def _rows(self, jobs: Sequence[_Job], call: Call, truncate: bool) -> Answer:
        loop = asyncio.get_running_loop()
        sizes = self._sizes(jobs)
        # Equal texts of one request are computed once.
        places: dict[tuple[str | None, str], int] = {}
        where = [places.setdefault(job.key, len(places)) for job in jobs]
        with self._admission.admit(self._estimate_tokens(sizes), call.deadline) as reservation:
            admitted_at = loop.time()
            if sum(sizes) <= _INLINE_BYTES:
                encoded = self._encode(list(places))
            else:
                encoded = await loop.run_in_executor(self._pool, self._encode, list(places))
            self._metrics.tokenized(len(encoded), sum(e.length for e in encoded), loop.time() - admitted_at)
            self._refuse_without_tokens(jobs, where, encoded)
            if not truncate:
                self._refuse_truncated(jobs, where, encoded)
            computed = await self._batcher.compute(encoded, call, reservation)
        truncated = sum(encoded[place].truncated for place in where)
        values = computed.rows if len(places) == len(jobs) else computed.rows[where]
        stamps = Stamps(
            received_at=call.received_at,
            admitted_at=admitted_at,
            tokenized_at=computed.tokenized_at,
            engine_started_at=computed.engine_started_at,
            engine_ended_at=computed.engine_ended_at,
            gathered_at=loop.time(),
        )
        return Answer(values, truncated, stamps)

    def _encode(self, keys: Sequence[tuple[str | None, str]]) -> list[Encoded]:
        """Pairs at once, texts with one call for each prompt in use (at most two)."""
        if self._is_cross_encoder:
            return self._tokenizer.encode_pairs([(query or "", passage) for query, passage in keys])
        out: list[Encoded | None] = [None] * len(keys)
        for prompt_name in {name for name, _ in keys}:
            places = [i for i, (name, _) in enumerate(keys) if name == prompt_name]
            encoded = self._tokenizer.encode([keys[i][1] for i in places], prompt_name)
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

    def _sizes(self, jobs: Sequence[_Job]) -> list[int]:
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

    def _refuse_without_tokens(self, jobs: Sequence[_Job], where: Sequence[int], encoded: Sequence[Encoded]) -> None:
        """Where a tokenizer adds no special tokens, a text of characters that it drops becomes nothing."""
        message = "text is empty for this model: its tokenizer leaves no token of it"
        wrong = [(job.field, message) for job, place in zip(jobs, where, strict=True) if not encoded[place].length]
        _raise_violations(wrong, {"EMPTY_TEXT"})

    def _refuse_truncated(self, jobs: Sequence[_Job], where: Sequence[int], encoded: Sequence[Encoded]) -> None:
        message = f"more than {self._tokenizer.max_tokens} tokens, and truncate is false"
        wrong = [(job.field, message) for job, place in zip(jobs, where, strict=True) if encoded[place].truncated]
        _raise_violations(wrong, {"TEXT_TOO_LONG"})


def _embedding_job(field: str, text: str, prompt_name: str | None) -> _Job:
    return _Job(field, (prompt_name, text), ((field, text),))


def _pair_job(field: str, query: tuple[str, str], passage: tuple[str, str]) -> _Job:
    """query, passage: each with its own field in front."""
    return _Job(field, (query[1], passage[1]), (query, passage))


def _raise_violations(wrong: Sequence[tuple[str, str]], reasons: set[str]) -> None:
    if wrong:
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        reason = reasons.pop() if len(reasons) == 1 else "INVALID_FIELD"
        raise InvalidRequest(f"{wrong[0][0]}: {wrong[0][1]}{more}", reason=reason, violations=wrong)
