"""The use cases: embed, score, rerank. Validates, tokenises, submits, gathers; knows no protocol."""

import asyncio
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ml_inference_server.backends.base import DOCUMENT_PROMPTS, BackendInfo, TextTokenizer
from ml_inference_server.metrics.registry import Metrics
from ml_inference_server.server.admission import Admission
from ml_inference_server.server.call import Call
from ml_inference_server.server.names import ModelNames
from ml_inference_server.server.options import EmbedOptions, Overflow, Priority, RerankOptions, ScoreOptions
from ml_inference_server.server.roles import check_prompt, is_role, prompt_for
from ml_inference_server.server.scheduler import DynamicBatcher
from ml_inference_server.server.similarity import similarity
from ml_inference_server.server.space import spaces_of
from ml_inference_server.server.texts import Job, Key, Texts, Tokens, embedding_job, pair_job
from ml_inference_server.utils.config import ServerSettings
from ml_inference_server.utils.errors import InvalidRequest, SpaceMismatch, WrongTask
from ml_inference_server.utils.stages import Stamps

# Up to so much text is tokenised at once, in some 10 to 100 us; handing it to a thread and back takes longer than that,
# and costs the event loop more. Longer requests go to a thread, so that no other has to wait for them.
_INLINE_BYTES = 2048
TOKENIZE_THREADS = 2


class TextLengths(NamedTuple):
    """Of each text, or pair: tokens that it had, and how many of them the model got; special ones and prompt included.

    truncated_rows: which texts were cut.
    """

    total: list[int]
    used: list[int]
    truncated_rows: list[int]

    @property
    def truncated(self) -> int:
        """How many texts were cut."""
        return len(self.truncated_rows)


@dataclass(slots=True, kw_only=True)
class Answered:
    """What every answer tells. tokens: that the model got, of all texts. shared: texts that were computed for another
    request; cached: texts whose row was known. warnings: sentences for people."""

    stamps: Stamps
    lengths: TextLengths
    tokens: int
    shared: int = 0
    cached: int = 0
    warnings: tuple[str, ...] = ()

    @property
    def truncated(self) -> int:
        return self.lengths.truncated


@dataclass(slots=True, kw_only=True)
class Answer(Answered):
    """`values`: (texts, dimension) for embed, (pairs,) for score. prompt_name: that was applied; "" is the default."""

    values: NDArray[np.float32]
    space_id: str = ""
    prompt_name: str = ""


@dataclass(slots=True, kw_only=True)
class Ranking(Answered):
    """(index, score) of the best documents, best first."""

    ranks: list[tuple[int, float]]


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
        names: ModelNames,
    ) -> None:
        self._tokenizer = tokenizer
        self._info = info
        self._is_cross_encoder = info.task == "cross_encoder"
        self._texts = Texts(tokenizer, limits, is_cross_encoder=self._is_cross_encoder)
        self._admission = admission
        self._batcher = batcher
        self._metrics = metrics
        self._pool = ThreadPoolExecutor(TOKENIZE_THREADS, thread_name_prefix="tokenize")
        self._query_prompt = "query" if "query" in tokenizer.prompts else None
        self._document_prompt = next((name for name in DOCUMENT_PROMPTS if name in tokenizer.prompts), None)
        self._spaces = None if self._is_cross_encoder else spaces_of(info, tokenizer)
        self.names = names

    @property
    def space_ids(self) -> Mapping[str, str]:
        """Of full-length vectors, by the name of the prompt, "" being the default; empty for a cross-encoder."""
        return {} if self._spaces is None else self._spaces.all(self._info.dimension)

    async def embed(self, texts: Sequence[str], call: Call, options: EmbedOptions | None = None) -> Answer:
        """One row for each text, in order."""
        options = options or EmbedOptions()
        role = self.check_model(options.model)
        if self._spaces is None:
            raise WrongTask("this model is a cross-encoder: it scores pairs (Score, Rerank) and has no embeddings")
        prompt_name, warnings = self._prompt(options, role)
        dimension = self._dimension(options, warnings)
        space_id = self._spaces.id(prompt_name, dimension)
        _check_space(space_id, options.expect_space_id, call.expect_space_id)
        self._texts.check_count("texts", len(texts))
        jobs = [embedding_job(f"texts[{i}]", text, prompt_name) for i, text in enumerate(texts)]
        answer = await self._rows(jobs, call, options.overflow, options.priority)
        values = answer.values
        if dimension < values.shape[1]:
            values = values[:, :dimension]
            if self._info.normalized:
                values = _normalized(values)
        if options.normalize and not self._info.normalized:
            values = _normalized(values)
        answer.values, answer.space_id, answer.prompt_name = values, space_id, prompt_name or ""
        answer.warnings = tuple(warnings)
        return answer

    async def score(self, pairs: Sequence[tuple[str, str]], call: Call, options: ScoreOptions | None = None) -> Answer:
        """One score for each (query, passage) pair, in order: raw logits, or what `BackendInfo.similarity` names."""
        options = options or ScoreOptions()
        self.check_model(options.model)
        self._texts.check_count("pairs", len(pairs))
        self._check_pair_overflow(options.overflow)
        queries = [(f"pairs[{i}].query", query) for i, (query, _) in enumerate(pairs)]
        passages = [(f"pairs[{i}].passage", passage) for i, (_, passage) in enumerate(pairs)]
        if self._is_cross_encoder:
            jobs = [pair_job(f"pairs[{i}]", *both) for i, both in enumerate(zip(queries, passages, strict=True))]
            answer = await self._rows(jobs, call, options.overflow, options.priority)
            answer.values = answer.values[:, 0]
            return answer
        jobs = [embedding_job(*query, self._query_prompt) for query in queries]
        jobs += [embedding_job(*passage, self._document_prompt) for passage in passages]
        answer = await self._rows(jobs, call, options.overflow, options.priority)
        answer.values = similarity(self._info.similarity, *np.split(answer.values, 2))
        answer.lengths = _of_pairs(answer.lengths, len(pairs))
        return answer

    async def rerank(
        self, query: str, documents: Sequence[str], top_k: int, call: Call, options: RerankOptions | None = None
    ) -> Ranking:
        """The `top_k` best documents (0: all); equal scores keep the given order."""
        options = options or RerankOptions()
        self.check_model(options.model)
        self._texts.check_count("documents", len(documents))
        self._check_pair_overflow(options.overflow)
        named = [(f"documents[{i}]", document) for i, document in enumerate(documents)]
        warnings: tuple[str, ...] = ()
        most_tokens = options.max_document_tokens
        if most_tokens is not None and most_tokens < 1:
            message = "expected 1 or more"
            raise InvalidRequest(f"max_document_tokens: {message}", violations=[("max_document_tokens", message)])
        if self._is_cross_encoder:
            jobs = [pair_job(document[0], ("query", query), document, most_tokens) for document in named]
            rows = await self._rows(jobs, call, options.overflow, options.priority)
            scores, lengths = rows.values[:, 0], rows.lengths
        else:
            jobs = [embedding_job("query", query, self._query_prompt)]
            jobs += [embedding_job(*document, self._document_prompt, most_tokens) for document in named]
            rows = await self._rows(jobs, call, options.overflow, options.priority)
            scores = similarity(self._info.similarity, rows.values[:1], rows.values[1:])
            lengths = _without_first(rows.lengths)
            if 0 in rows.lengths.truncated_rows:
                warnings = ("the query is longer than the model's limit and was cut",)
        order = np.argsort(-scores, kind="stable")[: top_k or None]
        return Ranking(
            ranks=[(int(index), float(scores[index])) for index in order],
            stamps=rows.stamps,
            lengths=lengths,
            tokens=rows.tokens,
            shared=rows.shared,
            cached=rows.cached,
            warnings=warnings,
        )

    def check_model(self, name: str) -> str:
        """The role that a model's name carries (name:query), or empty. ModelNotFound where it is none of this model."""
        return self.names.check(name, lambda role: is_role(role, self._tokenizer.prompts))

    def check_count(self, field: str, count: int) -> None:
        """InvalidRequest as the methods above raise it: for callers who make something of each item first."""
        self._texts.check_count(field, count)

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _prompt(self, options: EmbedOptions, role_of_name: str) -> tuple[str | None, list[str]]:
        """The prompt to apply, and what the caller should know of it."""
        prompts, name = self._tokenizer.prompts, options.prompt_name
        if name is not None and options.role:
            message = "prompt_name and input_type both choose a prompt: send one of them"
            raise InvalidRequest(message, violations=[("prompt_name", message)])
        warnings: list[str] = []
        if name is None and (role := options.role or role_of_name):
            name, warning = prompt_for(role, prompts)
            warnings += [warning] if warning else []
        check_prompt(name, self._tokenizer)
        return name, warnings

    def _dimension(self, options: EmbedOptions, warnings: list[str]) -> int:
        """How many numbers of each vector are kept. InvalidRequest for options that the model cannot fulfil."""
        own = self._info.dimension
        if options.normalize is False and self._info.normalized:
            warnings.append("normalize: false changes nothing: scaling vectors to length 1 is a part of this model")
        if options.dimensions is None:
            return own
        if not 1 <= options.dimensions <= own:
            message = f"expected 1 to {own}, which is what the model has"
            raise InvalidRequest(f"dimensions: {message}", violations=[("dimensions", message)])
        if options.dimensions < own:
            warnings.append(
                f"{options.dimensions} of {own} dimensions: good only if the model was trained for it (Matryoshka)"
            )
        return options.dimensions

    def _check_pair_overflow(self, overflow: Overflow) -> None:
        if self._is_cross_encoder and overflow not in (Overflow.CUT, Overflow.REFUSE):
            message = "a cross-encoder reads a pair as one text: use cut or refuse"
            raise InvalidRequest(f"overflow: {message}", violations=[("overflow", message)])

    async def _rows(
        self, jobs: Sequence[Job], call: Call, overflow: Overflow, priority: Priority | None = None
    ) -> Answer:
        loop = asyncio.get_running_loop()
        priority = priority or _priority(call.priority)
        sizes = self._texts.sizes(jobs)
        # Equal texts of one request are computed once.
        places: dict[Key, int] = {}
        where = [places.setdefault(job.key, len(places)) for job in jobs]
        tokens = self._texts.estimate_tokens(sizes, overflow)
        with await self._admission.enter(
            tokens, call.deadline, texts=len(jobs), caller=call.caller, asked=priority
        ) as reservation:
            admitted_at = loop.time()
            if sum(sizes) <= _INLINE_BYTES:
                texts = self._texts.encode(list(places), overflow)
            else:
                texts = await loop.run_in_executor(self._pool, self._texts.encode, list(places), overflow)
            parts = [part for text in texts for part in text.parts]
            sent = sum([part.length for part in parts])
            self._metrics.tokenized(len(texts), sent, loop.time() - admitted_at, call.caller)
            self._texts.check_tokens(jobs, where, texts, overflow)
            computed = await self._batcher.compute(parts, call, reservation)
        rows = computed.rows if len(parts) == len(texts) else self._mean_of_windows(computed.rows, texts)
        stamps = Stamps(
            received_at=call.received_at,
            admitted_at=admitted_at,
            tokenized_at=computed.tokenized_at,
            engine_started_at=computed.engine_started_at,
            engine_ended_at=computed.engine_ended_at,
            gathered_at=loop.time(),
        )
        lengths = TextLengths(
            [texts[place].total for place in where],
            [texts[place].used for place in where],
            [row for row, place in enumerate(where) if texts[place].is_truncated],
        )
        return Answer(
            values=rows if len(places) == len(jobs) else rows[where],
            stamps=stamps,
            lengths=lengths,
            tokens=sum(lengths.used),
            shared=computed.shared,
            cached=computed.cached,
        )

    def _mean_of_windows(self, rows: NDArray[np.float32], texts: Sequence[Tokens]) -> NDArray[np.float32]:
        """One row for each text: its own, or the mean of its windows' rows, weighted by their tokens."""
        lengths = np.array([part.length for text in texts for part in text.parts], np.float64)
        starts = np.cumsum([0, *(len(text.parts) for text in texts[:-1])])
        sums = np.add.reduceat(rows * lengths[:, None], starts, axis=0)
        means = (sums / np.add.reduceat(lengths, starts)[:, None]).astype(np.float32)
        chunked = np.array([text.is_chunked for text in texts])
        if self._info.normalized:
            means = _normalized(means)
        means[~chunked] = rows[starts][~chunked]
        return means


def _priority(header: str) -> Priority | None:
    if not header:
        return None
    try:
        return Priority(header.lower())
    except ValueError:
        message = f"expected {' or '.join(Priority)}"
        raise InvalidRequest(f"x-priority: {message}", violations=[("x-priority", message)]) from None


def _check_space(space_id: str, *expected: str) -> None:
    for each in filter(None, expected):
        if each.lower() != space_id:
            raise SpaceMismatch(
                f"this server would answer with vectors of space {space_id}, another than expected: compare the model, "
                f"the prompt, the limit of tokens and the dimension with those of the index (GetServerInfo, /info)"
            )


def _normalized(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    norms = np.linalg.norm(rows.astype(np.float64), axis=1, keepdims=True)
    found: NDArray[np.float32] = (rows / np.maximum(norms, 1e-12)).astype(np.float32)
    return found


def _of_pairs(lengths: TextLengths, pairs: int) -> TextLengths:
    """Of texts that stand as all queries, then all passages."""
    total, used = lengths.total, lengths.used
    return TextLengths(
        [a + b for a, b in zip(total[:pairs], total[pairs:], strict=True)],
        [a + b for a, b in zip(used[:pairs], used[pairs:], strict=True)],
        sorted({row % pairs for row in lengths.truncated_rows}),
    )


def _without_first(lengths: TextLengths) -> TextLengths:
    """Without the query's, which stands before the documents."""
    return TextLengths(lengths.total[1:], lengths.used[1:], [row - 1 for row in lengths.truncated_rows if row])
