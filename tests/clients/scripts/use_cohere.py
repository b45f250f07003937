"""The Python package `cohere`: both generations of its client, and the asynchronous one."""

import asyncio
from typing import Any

import cohere
from dialogue import Task, refusal, task, tell

TYPES = ["float", "int8", "binary", "ubinary"]
KEY = "none"


def by_type(embeddings: Any) -> dict[str, Any]:
    return {name: getattr(embeddings, "float_" if name == "float" else name) for name in TYPES}


def ranks(answer: Any) -> list[dict[str, Any]]:
    def text(result: Any) -> str | None:
        document = getattr(result, "document", None)
        return document and document.text

    return [
        {"index": result.index, "score": result.relevance_score, "document": text(result)} for result in answer.results
    ]


def first_generation(given: Task) -> dict[str, Any]:
    client = cohere.Client(KEY, base_url=given.http, max_retries=0)
    question: dict[str, Any] = {"query": given.query, "documents": given.documents, "model": given.model}
    plain = client.embed(texts=given.texts, model=given.model, input_type="search_document")
    typed = client.embed(texts=given.texts, model=given.model, input_type="search_query", embedding_types=TYPES)
    many = [f"text number {number}" for number in range(100)]  # more than it sends in one call
    return {
        "plain": plain.embeddings,
        "texts": plain.texts,
        "input_tokens": plain.meta and plain.meta.billed_units and plain.meta.billed_units.input_tokens,
        "typed": by_type(typed.embeddings),
        "many": client.embed(texts=many, model=given.model, input_type="search_document").embeddings,
        "ranks": ranks(client.rerank(**question)),
        "top": ranks(client.rerank(**question, top_n=2, return_documents=True)),
        "unknown_model": refusal(lambda: client.embed(texts=["a"], model="no-such-model", input_type="search_query")),
        "unknown_model_rerank": refusal(lambda: client.rerank(**question | {"model": "no-such-model"})),
    }


def second_generation(given: Task) -> dict[str, Any]:
    client = cohere.ClientV2(KEY, base_url=given.http, max_retries=0)
    question: dict[str, Any] = {"query": given.query, "documents": given.documents, "model": given.model}

    def embed(texts: list[str], types: list[str], **options: Any) -> Any:
        return client.embed(
            texts=texts, model=given.model, input_type="search_document", embedding_types=types, **options
        )

    answer = embed(given.texts, TYPES)
    return {
        "typed": by_type(answer.embeddings),
        "texts": answer.texts,
        "short": embed(given.texts, ["float"], output_dimension=64).embeddings.float_,
        "ranks": ranks(client.rerank(**question)),
        "top": ranks(client.rerank(**question, top_n=2)),
        "unknown_model": refusal(lambda: client.rerank(**question | {"model": "no-such-model"})),
        "too_long": refusal(lambda: embed([given.long], ["float"], truncate="NONE")),
        "nothing": refusal(lambda: client.rerank(**question | {"documents": []})),
    }


async def at_once(given: Task) -> list[list[float]]:
    client = cohere.AsyncClientV2(KEY, base_url=given.http, max_retries=0)
    calls = [
        client.embed(texts=[text], model=given.model, input_type="search_document", embedding_types=["float"])
        for text in given.texts
    ]
    return [(answer.embeddings.float_ or [])[0] for answer in await asyncio.gather(*calls)]


given = task()
tell(first=first_generation(given), second=second_generation(given), at_once=asyncio.run(at_once(given)))
