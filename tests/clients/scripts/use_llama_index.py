"""llama-index: its TEI embedding and its TEI rerank."""

import asyncio
from typing import Any

from dialogue import Task, task, tell
from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode
from llama_index.embeddings.text_embeddings_inference import TextEmbeddingsInference
from llama_index.postprocessor.tei_rerank import TextEmbeddingInference


def ask(given: Task) -> dict[str, Any]:
    embedding = TextEmbeddingsInference(model_name=given.model, base_url=given.http)
    rerank = TextEmbeddingInference(base_url=given.http, top_n=len(given.documents))
    nodes = [NodeWithScore(node=TextNode(text=text)) for text in given.documents]
    ranked = rerank.postprocess_nodes(nodes, QueryBundle(given.query))
    return {
        "many": embedding.get_text_embedding_batch(given.texts),
        "query": [embedding.get_query_embedding(given.texts[0])],
        "at_once": asyncio.run(embedding.aget_text_embedding_batch(given.texts)),
        "ranks": [(each.node.get_content(), each.score) for each in ranked],
    }


tell(**ask(task()))
