"""Whether every dialect of a server gives the numbers that its own wire gives, and what they are worth as a ranking."""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ml_inference_server.benchmark.load.channel import RequestFailed
from ml_inference_server.benchmark.measure.quality import (
    Answers,
    QualityUnknown,
    Slice,
    by_cosine,
    in_batches,
    judge,
)
from ml_inference_server.benchmark.studies.calls import EmbedCall, EmbedDialect, Floats, RerankCall, RerankDialect

# Of the cosine of two vectors of length 1, computed here and there.
_ROUNDING = 1e-6
_SAME_NDCG = 5e-5


@dataclass(frozen=True)
class DialectRow:
    """against: whose numbers and nDCG it must have, within `allowed`; "" where it is the yardstick itself.

    failed: what the server answered instead of numbers.
    """

    name: str
    ndcg10: float = float("nan")
    against: str = ""
    difference: float = 0.0
    allowed: float = 0.0
    same_ndcg: bool = True
    failed: str = ""

    @property
    def is_right(self) -> bool:
        return not self.failed and self.difference <= self.allowed and self.same_ndcg


@dataclass(frozen=True)
class _Numbers:
    name: str
    values: Floats
    ndcg10: float


class Equality:
    """info: what the server says of itself. on_done: called after each dialect."""

    def __init__(self, labelled: Slice, info: dict[str, Any], on_done: Callable[[], object]) -> None:
        self._labelled = labelled
        self._info = info
        self._on_done = on_done

    async def rows(self, embeds: Sequence[EmbedDialect], reranks: Sequence[RerankDialect]) -> list[DialectRow]:
        """The first of each kind, the server's own, is the yardstick of its kind."""
        rows: list[DialectRow] = []
        base: _Numbers | None = None
        for embed in embeds:
            row, found = await self._row(embed.name, self._embedded(embed.call), base)
            rows.append(row)
            base = base or found
        cosines = self._cosines(base)
        base = None
        for rerank in reranks:
            yardstick = base or cosines
            allowed = _ROUNDING if yardstick is cosines else 0.0
            row, found = await self._row(rerank.name, self._scored(rerank.call), yardstick, allowed)
            rows.append(row)
            base = base or found
        return rows

    async def _row(
        self, name: str, work: Awaitable[Answers], base: _Numbers | None, allowed: float = 0.0
    ) -> tuple[DialectRow, _Numbers | None]:
        try:
            answers = await work
        except (RequestFailed, QualityUnknown) as error:
            said = f"{error.code}: {error.message}" if isinstance(error, RequestFailed) else str(error)
            return DialectRow(name, failed=said), None
        finally:
            self._on_done()
        ndcg10 = judge(self._labelled, answers, None).ndcg10
        found = _Numbers(name, answers.scores if answers.vectors is None else answers.vectors, ndcg10)
        if base is None:
            return DialectRow(name, ndcg10), found
        same = abs(ndcg10 - base.ndcg10) < _SAME_NDCG
        return DialectRow(name, ndcg10, base.name, difference(found.values, base.values), allowed, same), found

    async def _embedded(self, call: EmbedCall) -> Answers:
        async def send(texts: Sequence[str]) -> Floats:
            try:
                return await call(texts)
            except RequestFailed as error:
                raise QualityUnknown(f"{error.code}: {error.message}") from None

        return by_cosine(self._labelled, await in_batches(self._labelled.texts, send, lambda _: None))

    async def _scored(self, call: RerankCall) -> Answers:
        """Each query's candidates in as few calls as the server allows."""
        places: dict[str, list[int]] = {}
        for place, row in enumerate(self._labelled.rows):
            places.setdefault(row.query, []).append(place)
        scores = np.empty(len(self._labelled.rows), np.float32)
        most = int(self._info["max_texts"])
        for query, all_of_it in places.items():
            for start in range(0, len(all_of_it), most):
                some = all_of_it[start : start + most]
                scores[some] = await call(query, [self._labelled.rows[place].passage for place in some])
        return Answers(scores, None)

    def _cosines(self, embedded: _Numbers | None) -> _Numbers | None:
        """What Rerank should give, where it is the cosine of what Embed gives: no prompt leads to another space."""
        has_prompts = len(set(self._info["space_ids"].values())) > 1
        if embedded is None or has_prompts or self._info["resolved"]["similarity"] != "cosine":
            return None
        answers = by_cosine(self._labelled, embedded.values)
        return _Numbers(f"cosines of {embedded.name}", answers.scores, embedded.ndcg10)


def difference(ours: Floats, theirs: Floats) -> float:
    """The largest of any number; infinite where there are more or fewer numbers."""
    if ours.shape != theirs.shape:
        return float("inf")
    return float(np.abs(ours.astype(np.float64) - theirs).max())


def equality_table(rows: Sequence[DialectRow], missing: Mapping[str, str]) -> str:
    """missing: by name what the server answers to a dialect that it does not speak."""
    lines = ["| dialect | nDCG@10 | largest difference | to | |", "| --- | --- | --- | --- | --- |"]
    for row in rows:
        if row.failed:
            lines.append(f"| {row.name} | - | - | - | FAILED: {row.failed} |")
            continue
        apart = f"{row.difference:.3g}" if row.against else "-"
        verdict = "the same" if row.is_right else "DIFFERS"
        lines.append(
            f"| {row.name} | {row.ndcg10:.4f} | {apart} | {row.against or '-'} | {verdict if row.against else ''} |"
        )
    lines += [f"| {name} | - | - | - | missing ({answered}) |" for name, answered in missing.items()]
    return "\n".join(lines)
