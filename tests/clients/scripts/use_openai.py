"""The Python package `openai`."""

import asyncio
from typing import Any

import openai
from dialogue import Task, refusal, task, tell


def vectors(answer: Any) -> list[list[float]]:
    assert [each.index for each in answer.data] == list(range(len(answer.data)))
    return [each.embedding for each in answer.data]


def ask(client: openai.OpenAI, given: Task) -> dict[str, Any]:
    create = client.embeddings.create
    default = create(model=given.model, input=given.texts)
    raw = client.embeddings.with_raw_response.create(model=given.model, input=given.texts)
    return {
        "default": vectors(default),
        "usage": default.usage.model_dump(),
        "model": default.model,
        "alone": vectors(create(model=given.model, input=given.texts[0], user="someone")),
        "floats": vectors(create(model=given.model, input=given.texts, encoding_format="float")),
        "short": vectors(create(model=given.model, input=given.texts, dimensions=64)),
        "long": create(model=given.model, input=given.long).usage.model_dump(),
        "models": [model.id for model in client.models.list()],
        "one_model": client.models.retrieve(given.model).id,
        "space_id": raw.headers["x-space-id"],
        "beside_the_contract": default.model_extra,
        "unknown_model": refusal(lambda: create(model="no-such-model", input="a")),
        "unknown_model_card": refusal(lambda: client.models.retrieve("no-such-model")),
        "token_ids": refusal(lambda: create(model=given.model, input=[1, 2, 3])),
        "nothing": refusal(lambda: create(model=given.model, input=[])),
        "too_wide": refusal(lambda: create(model=given.model, input="a", dimensions=100_000)),
    }


async def ask_at_once(given: Task) -> list[list[float]]:
    async with openai.AsyncOpenAI(base_url=f"{given.http}/v1", api_key="none", max_retries=0) as client:
        calls = [client.embeddings.create(model=given.model, input=text) for text in given.texts]
        return [vectors(answer)[0] for answer in await asyncio.gather(*calls)]


given = task()
with openai.OpenAI(base_url=f"{given.http}/v1", api_key="none", max_retries=0) as client:
    answers = ask(client, given)
tell(**answers, at_once=asyncio.run(ask_at_once(given)))
