"""The dialects that a server speaks over gRPC: its own, the Open Inference Protocol, and that of TEI."""

import asyncio
from collections.abc import Sequence
from typing import Any

import grpc
import numpy as np

from ml_inference_server.benchmark.load.channel import CHANNEL_OPTIONS
from ml_inference_server.benchmark.studies.calls import (
    TIMEOUT_S,
    EmbedDialect,
    Floats,
    RerankDialect,
    embed_dialect,
    rerank_dialect,
    scores_of,
)
from ml_inference_server.benchmark.studies.calls_http import byte_elements
from ml_inference_server.proto import inference_pb2, inference_pb2_grpc
from ml_inference_server.proto.foreign import grpc_service_pb2, tei_pb2


class GrpcDialects:
    """Use as `async with`: one channel for all. model: a name that the server serves it under."""

    def __init__(self, host: str, port: int, model: str) -> None:
        self._model = model
        self._channel = grpc.aio.insecure_channel(f"{host}:{port}", options=CHANNEL_OPTIONS)
        self._own: Any = inference_pb2_grpc.InferenceServiceStub(self._channel)
        self._infer = self._unary("inference.GRPCInferenceService/ModelInfer", grpc_service_pb2.ModelInferResponse)
        self._tei_embed = self._unary("tei.v1.Embed/Embed", tei_pb2.EmbedResponse)
        self._tei_rerank = self._unary("tei.v1.Rerank/Rerank", tei_pb2.RerankResponse)
        self._tei_stream: Any = self._channel.stream_stream(
            "/tei.v1.Embed/EmbedStream",
            request_serializer=tei_pb2.EmbedRequest.SerializeToString,
            response_deserializer=tei_pb2.EmbedResponse.FromString,
        )

    async def __aenter__(self) -> "GrpcDialects":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._channel.close()

    def embeds(self) -> list[EmbedDialect]:
        """The server's own comes first."""
        return [
            embed_dialect("Embed", self._embed),
            embed_dialect("Open Inference gRPC", self._open_inference),
            embed_dialect("tei.v1 Embed, a call for each text", self._tei),
            embed_dialect("tei.v1 EmbedStream", self._tei_in_order),
        ]

    def reranks(self) -> list[RerankDialect]:
        """The server's own comes first."""
        return [
            rerank_dialect("Rerank", self._rerank),
            rerank_dialect("Open Inference gRPC, SCORE", self._open_inference_score),
            rerank_dialect("tei.v1 Rerank", self._tei_ranks),
        ]

    def _unary(self, method: str, answer: Any) -> Any:
        return self._channel.unary_unary(
            f"/{method}",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=answer.FromString,
        )

    async def _embed(self, texts: Sequence[str]) -> Floats:
        answer = await self._own.Embed(inference_pb2.EmbedRequest(texts=texts), timeout=TIMEOUT_S)
        return np.frombuffer(answer.embeddings, "<f4").reshape(answer.count, answer.dimension)

    async def _rerank(self, query: str, documents: Sequence[str]) -> Floats:
        request = inference_pb2.RerankRequest(query=query, documents=documents)
        answer = await self._own.Rerank(request, timeout=TIMEOUT_S)
        return scores_of(((rank.index, rank.score) for rank in answer.ranks), len(documents))

    async def _open_inference(self, texts: Sequence[str]) -> Floats:
        answer = await self._tensors({"TEXT": texts}, "EMBEDDING")
        return np.frombuffer(answer.raw_output_contents[0], "<f4").reshape(answer.outputs[0].shape)

    async def _open_inference_score(self, query: str, documents: Sequence[str]) -> Floats:
        answer = await self._tensors({"QUERY": [query], "TEXT": documents}, "SCORE")
        return np.frombuffer(answer.raw_output_contents[0], "<f4")

    async def _tensors(self, tensors: dict[str, Sequence[str]], output: str) -> Any:
        request = grpc_service_pb2.ModelInferRequest(
            model_name=self._model,
            inputs=[
                grpc_service_pb2.ModelInferRequest.InferInputTensor(name=name, datatype="BYTES", shape=[len(texts)])
                for name, texts in tensors.items()
            ],
            outputs=[grpc_service_pb2.ModelInferRequest.InferRequestedOutputTensor(name=output)],
            raw_input_contents=[byte_elements(texts) for texts in tensors.values()],
        )
        return await self._infer(request, timeout=TIMEOUT_S)

    async def _tei(self, texts: Sequence[str]) -> Floats:
        requests = (tei_pb2.EmbedRequest(inputs=text, truncate=True) for text in texts)
        answers = await asyncio.gather(*(self._tei_embed(request, timeout=TIMEOUT_S) for request in requests))
        return np.array([answer.embeddings for answer in answers], np.float32)

    async def _tei_in_order(self, texts: Sequence[str]) -> Floats:
        requests = [tei_pb2.EmbedRequest(inputs=text, truncate=True) for text in texts]
        answers = self._tei_stream(iter(requests), timeout=TIMEOUT_S)
        return np.array([answer.embeddings async for answer in answers], np.float32)

    async def _tei_ranks(self, query: str, documents: Sequence[str]) -> Floats:
        request = tei_pb2.RerankRequest(query=query, texts=documents, raw_scores=True, truncate=True)
        answer = await self._tei_rerank(request, timeout=TIMEOUT_S)
        return scores_of(((rank.index, rank.score) for rank in answer.ranks), len(documents))
