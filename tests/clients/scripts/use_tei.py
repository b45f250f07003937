"""The Python package `tei-client` over `http` or `grpc`: both of its clients have the same methods."""

import asyncio
import sys
from typing import Any, TypeAlias

from dialogue import Task, refusal, task, tell
from tei_client import GrpcClient, HttpClient

Client: TypeAlias = GrpcClient | HttpClient


def connected(given: Task) -> Client:
    return GrpcClient(given.grpc) if sys.argv[1] == "grpc" else HttpClient(given.http)


def plain(vectors: Any) -> list[list[float]]:
    return [list(vector) for vector in vectors]


async def at_once(given: Task) -> list[list[float]]:
    """With a client of its own: the one over gRPC belongs to the event loop in which it was made."""
    client, texts = connected(given), given.texts
    answers = await asyncio.gather(*(client.async_embed(text) for text in texts))
    return [plain(answer)[0] for answer in answers]


def too_long(client: Client, text: str) -> str:
    """The text of the error, which over HTTP the client returns as if it were vectors."""
    if isinstance(client, HttpClient):
        return str(client.embed(text))
    refused: dict[str, str] = refusal(lambda: client.embed(text))
    return refused["text"]


def embedder(client: Client, given: Task) -> dict[str, Any]:
    tokens = client.tokenize(given.texts)
    return {
        "healthy": client.health(),
        "info": client.info().model_dump(mode="json"),
        "alone": plain(client.embed(given.texts[0])),
        "many": plain(client.embed(given.texts)),
        "not_normalized": plain(client.embed(given.texts, normalize=False)),
        "tokens": [each.model_dump()["tokens"] for each in tokens],
        "bare_token_counts": [len(each.tokens) for each in client.tokenize(given.texts, add_special_tokens=False)],
        "decoded": client.decode([each.get_ids() for each in tokens]),
        "prompt_names": client.prompt_names(),
        "at_once": asyncio.run(at_once(given)),
        "too_long": too_long(client, given.long),
        "rerank": refusal(lambda: client.rerank(given.query, given.documents)),
    }


def reranker(client: Client, given: Task) -> dict[str, Any]:
    def ranks(**options: bool) -> list[dict[str, Any]]:
        return [rank.model_dump() for rank in client.rerank(given.query, given.documents, **options).ranks]

    return {
        "info": client.info().model_dump(mode="json"),
        "ranks": ranks(),
        "raw": ranks(raw_scores=True, return_text=True),
        "embed": refusal(lambda: client.embed("a")),
    }


def ask(client: Client, given: Task) -> dict[str, Any]:
    if client.model_type.value == "reranker":
        return reranker(client, given)
    return embedder(client, given)


given = task()
tell(**ask(connected(given), given))
