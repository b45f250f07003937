"""Haystack's embedders and ranker for TEI, over `http`, or over `grpc`, where they read our schema by reflection."""

import asyncio
import sys
from typing import Any

from dialogue import Task, refusal, task, tell
from haystack import Document
from haystack_integrations.components.embedders.huggingface_api import (
    HuggingFaceAPIDocumentEmbedder,
    HuggingFaceAPITextEmbedder,
)
from haystack_integrations.components.rankers.huggingface_api import HuggingFaceTEIRanker


def ask(given: Task, url: str, use_grpc: bool) -> dict[str, Any]:
    where: dict[str, Any] = {"api_type": "text_embeddings_inference", "api_params": {"url": url}, "use_grpc": use_grpc}
    text = HuggingFaceAPITextEmbedder(normalize=True, **where)
    default = HuggingFaceAPITextEmbedder(**where)
    many = HuggingFaceAPIDocumentEmbedder(normalize=True, progress_bar=False, **where)
    ranker = HuggingFaceTEIRanker(url=url, use_grpc=use_grpc)
    raw_ranker = HuggingFaceTEIRanker(url=url, use_grpc=use_grpc, raw_scores=True)
    documents = [Document(content=content) for content in given.documents]

    def ranks(one: HuggingFaceTEIRanker) -> list[tuple[str | None, float | None]]:
        return [(each.content, each.score) for each in one.run(query=given.query, documents=documents)["documents"]]

    async def at_once() -> list[Any]:
        embedder = HuggingFaceAPIDocumentEmbedder(normalize=True, progress_bar=False, **where)
        answer = await embedder.run_async([Document(content=content) for content in given.texts])
        await embedder.close_async()
        return [each.embedding for each in answer["documents"]]

    answers = {
        "alone": [text.run(given.texts[0])["embedding"]],
        "default": [default.run(given.texts[0])["embedding"]],
        "many": [each.embedding for each in many.run([Document(content=one) for one in given.texts])["documents"]],
        "ranks": ranks(ranker),
        "raw": ranks(raw_ranker),
        "at_once": asyncio.run(at_once()),
        "nothing": refusal(lambda: text.run("")),
    }
    for component in (text, default, many, ranker, raw_ranker):
        component.close()
    return answers


given = task()
over_grpc = sys.argv[1] == "grpc"
tell(**ask(given, given.grpc if over_grpc else given.http, over_grpc))
