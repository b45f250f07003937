"""The dialects that a server speaks over HTTP, as their clients use them: keep-alive, JSON both ways."""

import base64
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import aiohttp
import numpy as np
import orjson

from ml_inference_server.benchmark.load.channel import RequestFailed
from ml_inference_server.benchmark.studies.calls import (
    TIMEOUT_S,
    DialectMissing,
    EmbedDialect,
    Floats,
    RerankDialect,
    embed_dialect,
    rerank_dialect,
    scores_of,
)

_JSON = {"Content-Type": "application/json"}
_JSON_BYTES = "Inference-Header-Content-Length"


class HttpDialects:
    """Use as `async with`. model: a name that the server serves it under."""

    def __init__(self, host: str, port: int, model: str) -> None:
        self._url = f"http://{host}:{port}"
        self._model = model
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> "HttpDialects":
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=TIMEOUT_S),
            trust_env=False,
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._session is not None:
            await self._session.close()

    def embeds(self) -> list[EmbedDialect]:
        return [
            embed_dialect("OpenAI /v1/embeddings, float", self._openai_float),
            embed_dialect("OpenAI /v1/embeddings, base64", self._openai_base64),
            embed_dialect("Cohere /v2/embed", self._cohere),
            embed_dialect("TEI /embed", self._tei),
            embed_dialect("Open Inference REST, JSON", self._open_inference),
            embed_dialect("Open Inference REST, binary", self._open_inference_binary),
        ]

    def reranks(self) -> list[RerankDialect]:
        return [
            rerank_dialect("Cohere /v2/rerank", self._cohere_rerank),
            rerank_dialect("TEI /rerank", self._tei_rerank),
            rerank_dialect("Open Inference REST, SCORE", self._open_inference_score),
        ]

    async def _openai(self, texts: Sequence[str], encoding_format: str) -> list[Any]:
        body = {"model": self._model, "input": texts, "encoding_format": encoding_format}
        answer = await self._json("/v1/embeddings", body)
        return [each["embedding"] for each in answer["data"]]

    async def _openai_float(self, texts: Sequence[str]) -> Floats:
        return np.array(await self._openai(texts, "float"), np.float32)

    async def _openai_base64(self, texts: Sequence[str]) -> Floats:
        rows = await self._openai(texts, "base64")
        return np.frombuffer(b"".join(map(base64.b64decode, rows)), "<f4").reshape(len(rows), -1)

    async def _cohere(self, texts: Sequence[str]) -> Floats:
        answer = await self._json("/v2/embed", {"model": self._model, "texts": texts, "embedding_types": ["float"]})
        return np.array(answer["embeddings"]["float"], np.float32)

    async def _tei(self, texts: Sequence[str]) -> Floats:
        return np.array(await self._json("/embed", {"inputs": texts, "truncate": True}), np.float32)

    async def _open_inference(self, texts: Sequence[str]) -> Floats:
        tensors = [{"name": "TEXT", "shape": [len(texts)], "datatype": "BYTES", "data": texts}]
        output = await self._infer(tensors, "EMBEDDING")
        return np.array(output["data"], np.float32).reshape(output["shape"])

    async def _open_inference_score(self, query: str, documents: Sequence[str]) -> Floats:
        tensors = [
            {"name": "QUERY", "shape": [1], "datatype": "BYTES", "data": [query]},
            {"name": "TEXT", "shape": [len(documents)], "datatype": "BYTES", "data": documents},
        ]
        return np.array((await self._infer(tensors, "SCORE"))["data"], np.float32)

    async def _open_inference_binary(self, texts: Sequence[str]) -> Floats:
        """Tensors as bytes behind the JSON, in both directions: what tritonclient does unless it is told otherwise."""
        raw = byte_elements(texts)
        size = {"binary_data_size": len(raw)}
        tensor = {"name": "TEXT", "shape": [len(texts)], "datatype": "BYTES", "parameters": size}
        output = {"name": "EMBEDDING", "parameters": {"binary_data": True}}
        head = orjson.dumps({"inputs": [tensor], "outputs": [output]})
        headers = {"Content-Type": "application/octet-stream", _JSON_BYTES: str(len(head))}
        answer, told = await self._post(self._infer_path, head + raw, headers)
        json_bytes = int(told[_JSON_BYTES])
        shape = orjson.loads(answer[:json_bytes])["outputs"][0]["shape"]
        return np.frombuffer(answer, "<f4", offset=json_bytes).reshape(shape)

    async def _infer(self, tensors: Sequence[Any], output: str) -> Any:
        answer = await self._json(self._infer_path, {"inputs": tensors, "outputs": [{"name": output}]})
        return answer["outputs"][0]

    @property
    def _infer_path(self) -> str:
        return f"/v2/models/{self._model}/infer"

    async def _cohere_rerank(self, query: str, documents: Sequence[str]) -> Floats:
        """`raw_score` is what stands before the score that is brought to 0..1."""
        answer = await self._json("/v2/rerank", {"model": self._model, "query": query, "documents": documents})
        results = answer["results"]
        scores_of(((each["index"], each["relevance_score"]) for each in results), len(documents))
        return scores_of(((each["index"], each["raw_score"]) for each in results), len(documents))

    async def _tei_rerank(self, query: str, documents: Sequence[str]) -> Floats:
        body = {"query": query, "texts": documents, "raw_scores": True, "truncate": True}
        ranks = await self._json("/rerank", body)
        return scores_of(((each["index"], each["score"]) for each in ranks), len(documents))

    async def _json(self, path: str, body: Any) -> Any:
        answer, _ = await self._post(path, orjson.dumps(body), _JSON)
        return orjson.loads(answer)

    async def _post(self, path: str, body: bytes, headers: Mapping[str, str]) -> tuple[bytes, Mapping[str, str]]:
        assert self._session is not None  # noqa: S101 - inside `async with`
        async with self._session.post(self._url + path, data=body, headers=headers) as answer:
            content = await answer.read()
            if answer.status == 200:
                return content, answer.headers
            # Names of the model are the server's own, so a 404 is that of the route.
            kind = DialectMissing if answer.status in (404, 405) else RequestFailed
            raise kind(f"HTTP {answer.status}", content[:300].decode(errors="replace"))


def byte_elements(texts: Sequence[str]) -> bytes:
    """A raw BYTES tensor of the Open Inference Protocol: each element behind its length in four bytes."""
    encoded = [text.encode() for text in texts]
    return b"".join(part for each in encoded for part in (struct.pack("<I", len(each)), each))
