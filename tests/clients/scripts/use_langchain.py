"""langchain-openai: OpenAIEmbeddings, told not to turn texts into OpenAI's token ids."""

import asyncio

from dialogue import task, tell
from langchain_openai import OpenAIEmbeddings

given = task()
embeddings = OpenAIEmbeddings(
    model=given.model, base_url=f"{given.http}/v1", api_key="none", check_embedding_ctx_length=False
)
tell(
    many=embeddings.embed_documents(given.texts),
    query=[embeddings.embed_query(given.texts[0])],
    at_once=asyncio.run(embeddings.aembed_documents(given.texts)),
)
