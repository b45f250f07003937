"""What the tests of the clients share: one interface to both, the right answers, and an odd server."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Any

import grpc
import numpy as np

from ml_inference_server import AsyncClient, Client
from ml_inference_server.api import StreamAnswer
from ml_inference_server.backends.fake import fake_embedding
from ml_inference_server.proto import inference_pb2 as pb
from ml_inference_server.proto import inference_pb2_grpc as rpc


class Both:
    """One interface to both clients: every behaviour is asked of each."""

    def __init__(self, kind: str, target: str, **options: Any) -> None:
        self.client: Any = Client(target, **options) if kind == "sync" else AsyncClient(target, **options)
        self.is_sync = kind == "sync"

    async def call(self, method: str, *args: Any, **options: Any) -> Any:
        if self.is_sync:
            return await asyncio.to_thread(getattr(self.client, method), *args, **options)
        return await getattr(self.client, method)(*args, **options)

    async def stream(self, items: Any, **options: Any) -> AsyncGenerator[StreamAnswer, None]:
        answers = self.client.stream(items, **options)
        if not self.is_sync:
            async with contextlib.aclosing(answers):
                async for answer in answers:
                    yield answer
            return
        nothing = object()
        with contextlib.closing(answers):
            while (answer := await asyncio.to_thread(next, answers, nothing)) is not nothing:
                yield answer

    async def close(self) -> None:
        if self.is_sync:
            self.client.close()
        else:
            await self.client.close()


@contextlib.asynccontextmanager
async def client_of(kind: str, target: str, **options: Any) -> AsyncIterator[Both]:
    both = Both(kind, target, **options)
    try:
        yield both
    finally:
        await both.close()


def expected(texts: list[str]) -> np.ndarray:
    return np.stack([fake_embedding(text) for text in texts])


async def collected(
    answers: AsyncIterator[StreamAnswer], found: dict[Any, StreamAnswer] | None = None
) -> dict[Any, StreamAnswer]:
    found = {} if found is None else found
    async for answer in answers:
        assert answer.key not in found, "answered twice"
        found[answer.key] = answer
    return found


def ones(request: pb.EmbedRequest, *, missing: int = 0, dimension: int = 4) -> pb.EmbedResponse:
    """An answer to the request, as of a model that likes all texts equally."""
    rows = len(request.texts) - missing
    return pb.EmbedResponse(embeddings=np.ones((rows, dimension), "<f4").tobytes(), count=rows, dimension=dimension)


@contextlib.asynccontextmanager
async def odd_server(port: int = 0, **methods: Callable[..., Any]) -> AsyncIterator[str]:
    """The address of a real gRPC server that answers these methods like this, and no others."""
    servicer = type("Odd", (rpc.InferenceServiceServicer,), {name: staticmethod(run) for name, run in methods.items()})
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    rpc.add_InferenceServiceServicer_to_server(servicer(), server)
    port = server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(None)
