"""Cohere's embed and rerank, versions 1 and 2; its rerank is also Jina's, Infinity's and vLLM's."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from ml_inference_server.server.call import Call
from ml_inference_server.server.http.answer import HttpAnswer, as_numbers, written
from ml_inference_server.server.http.cohere_answers import (
    answer_meta,
    document_texts,
    embed_body,
    embed_texts,
    priority_warnings,
    rerank_body,
    rerank_warnings,
    returned_documents,
    search_units,
)
from ml_inference_server.server.http.cohere_schemas import CohereEmbedRequest, CohereRerankRequest
from ml_inference_server.server.http.dialect import Dialect, Refusal
from ml_inference_server.server.http.endpoint import Endpoints, HttpWork
from ml_inference_server.server.observation import Reply
from ml_inference_server.server.options import EmbedOptions, Overflow, RerankOptions
from ml_inference_server.server.similarity import probability
from ml_inference_server.server.state import ServerState
from ml_inference_server.utils.errors import InvalidRequest

_OVERFLOWS = {None: Overflow.CUT, "END": Overflow.CUT, "START": Overflow.CUT_LEFT, "NONE": Overflow.REFUSE}


def _error(refusal: Refusal) -> Mapping[str, Any]:
    return {"message": refusal.message}


DIALECT = Dialect("Cohere", _error, fields={"dimensions": "output_dimension"})


class Cohere:
    """Its methods are given the API's version, whose answers differ in small things."""

    def __init__(self, state: ServerState) -> None:
        self._state = state

    def embed_work(self, version: str) -> HttpWork[CohereEmbedRequest]:
        async def embed(request: CohereEmbedRequest, call: Call) -> Reply[HttpAnswer]:
            return await self.embed(request, call, version)

        return HttpWork(DIALECT, "cohere.embed", CohereEmbedRequest, embed)

    def rerank_work(self, version: str) -> HttpWork[CohereRerankRequest]:
        async def rerank(request: CohereRerankRequest, call: Call) -> Reply[HttpAnswer]:
            return await self.rerank(request, call, version)

        return HttpWork(DIALECT, "cohere.rerank", CohereRerankRequest, rerank)

    async def embed(self, request: CohereEmbedRequest, call: Call, version: str) -> Reply[HttpAnswer]:
        model = self._state.require_model()
        texts = embed_texts(request)
        most = model.info.max_tokens
        if request.max_tokens is not None and request.max_tokens < most:
            message = f"below the model's own limit of {most}, which is the only one that it has: leave it out"
            raise InvalidRequest(f"max_tokens: {message}", violations=[("max_tokens", message)])
        options = EmbedOptions(
            role=request.input_type or "",
            overflow=_OVERFLOWS[request.truncate],
            dimensions=request.output_dimension,
            model=request.model or "",
        )
        answer = await model.service.embed(texts, call, options)
        warnings = [*answer.warnings, *priority_warnings(request.priority)]
        meta = answer_meta(version, {"input_tokens": answer.tokens}, answer.tokens, answer.lengths, warnings)
        meta |= {"space_id": answer.space_id, "prompt_name": answer.prompt_name}
        name, types = model.service.names.served, request.embedding_types
        body = await written(
            answer.values.size * len(types or "1") + as_numbers(texts),
            lambda: embed_body(call.request_id, version, name, texts, answer.values, types, meta),
        )
        return Reply(
            HttpAnswer(body, headers={"x-space-id": answer.space_id}),
            texts=len(texts),
            truncated=answer.truncated,
            stamps=answer.stamps,
        )

    async def rerank(self, request: CohereRerankRequest, call: Call, version: str) -> Reply[HttpAnswer]:
        model = self._state.require_model()
        if request.relevant_spans is not None and request.relevant_spans.mode != "disabled":
            message = "no spans are found here: leave it out, or set its mode to disabled"
            raise InvalidRequest(f"relevant_spans: {message}", violations=[("relevant_spans", message)])
        model.service.check_count("documents", len(request.documents))
        texts = document_texts(request.documents, request.rank_fields)
        documents = None
        if request.return_documents:
            documents = await written(as_numbers(texts), lambda: returned_documents(request.documents))
        options = RerankOptions(model=request.model or "", max_document_tokens=request.max_tokens_per_doc)
        ranking = await model.service.rerank(request.query, texts, request.top_n or 0, call, options)
        raw = np.array([score for _, score in ranking.ranks], np.float32)
        results: list[dict[str, Any]] = []
        scores = probability(model.info.similarity, raw)
        for (index, _), score, raw_score in zip(ranking.ranks, scores, raw, strict=True):
            result: dict[str, Any] = {"index": index, "relevance_score": score, "raw_score": raw_score}
            results.append(result | {"document": documents[index]} if documents is not None else result)
        warnings = [*ranking.warnings, *rerank_warnings(request)]
        billed = {"search_units": search_units(len(texts))}
        meta = answer_meta(version, billed, ranking.tokens, ranking.lengths, warnings)
        name = model.service.names.served
        body = await written(
            2 * len(results) + (as_numbers(texts) if documents is not None else 0),
            lambda: rerank_body(call.request_id, name, results, ranking.tokens, meta),
        )
        return Reply(HttpAnswer(body), pairs=len(texts), truncated=ranking.truncated, stamps=ranking.stamps)


def add_routes(endpoints: Endpoints, state: ServerState) -> HttpWork[CohereRerankRequest]:
    """All but /rerank, whose body may be of another dialect; returns what answers it where it is not."""
    cohere = Cohere(state)
    routes: list[tuple[str, HttpWork[Any], str]] = []
    for version in ("1", "2"):
        routes += [
            (f"/v{version}/embed", cohere.embed_work(version), "Embeddings of texts"),
            (f"/v{version}/rerank", cohere.rerank_work(version), "Documents by their relevance to a query"),
        ]
    for path, work, summary in routes:
        endpoints.work(path, work.dialect, work.metric, work.schema, work.run, summary)
    return cohere.rerank_work("1")
