"""The Python package `huggingface_hub`: InferenceClient, which posts to the address that it is given."""

import asyncio
from typing import Any

from dialogue import Task, refusal, task, tell
from huggingface_hub import AsyncInferenceClient, InferenceClient


def ask(given: Task) -> dict[str, Any]:
    # Only this provider has the questions about an endpoint.
    root = InferenceClient(given.http, provider="hf-inference")
    embed = InferenceClient(f"{given.http}/embed")
    similar = InferenceClient(f"{given.http}/similarity").sentence_similarity
    return {
        "at_root": root.feature_extraction(given.texts).tolist(),
        "alone": embed.feature_extraction(given.texts[0]).tolist(),
        "many": embed.feature_extraction(given.texts).tolist(),
        "not_normalized": embed.feature_extraction(given.texts, normalize=False).tolist(),
        "cut_left": embed.feature_extraction(given.long, truncate=True, truncation_direction="left").tolist(),
        "short": embed.feature_extraction(given.texts[0], dimensions=64).tolist(),
        "similarity": similar(given.query, given.documents),
        "healthy": root.health_check(),
        "info": root.get_endpoint_info(),
        "too_long": refusal(lambda: embed.feature_extraction(given.long, truncate=False)),
        "nothing": refusal(lambda: embed.feature_extraction([])),
    }


async def at_once(given: Task) -> list[list[float]]:
    async with AsyncInferenceClient(given.http) as client:
        answers = await asyncio.gather(*(client.feature_extraction(text) for text in given.texts))
        return [answer[0].tolist() for answer in answers]


given = task()
tell(**ask(given), at_once=asyncio.run(at_once(given)))
