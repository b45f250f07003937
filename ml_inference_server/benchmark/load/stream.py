"""EmbedStream as a request: many in flight on one stream, each awaited by itself."""

import asyncio
import contextlib
from collections.abc import Sequence
from typing import Any

import grpc

from ml_inference_server.benchmark.load.channel import RequestFailed, Target
from ml_inference_server.proto import inference_pb2

_STATUS_NAMES = {code.value[0]: code.name for code in grpc.StatusCode}


class EmbedStream:
    """Opens its stream with the first request, and a new one after it broke."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._call: Any = None
        self._reader: asyncio.Task[None] | None = None
        self._waiting: dict[int, asyncio.Future[Any]] = {}
        self._next_id = 0
        self._writing = asyncio.Lock()

    async def embed(self, texts: Sequence[str], timeout_s: float) -> Any:
        """The EmbedResponse. RequestFailed with the status of the message, or of the stream that broke."""
        self._next_id += 1
        request_id = self._next_id
        future = self._waiting[request_id] = asyncio.get_running_loop().create_future()
        message = inference_pb2.EmbedStreamRequest(id=request_id, request=inference_pb2.EmbedRequest(texts=texts))
        try:
            async with asyncio.timeout(timeout_s):
                async with self._writing:  # grpc takes one write at a time
                    if self._call is None:
                        self._call = self._target.embed_stream()
                        self._reader = asyncio.create_task(self._read(self._call))
                    await self._call.write(message)
                return await future
        except TimeoutError:
            raise RequestFailed("DEADLINE_EXCEEDED", "no answer on the stream within the deadline") from None
        except asyncio.InvalidStateError:  # the stream ended under the write; its reader says why
            return await future
        finally:
            self._waiting.pop(request_id, None)

    async def _read(self, call: Any) -> None:
        code, message = "UNAVAILABLE", "the stream ended before the answer came"
        try:
            async for answer in call:
                future = self._waiting.get(answer.id)
                if future is None or future.done():
                    continue
                if answer.WhichOneof("outcome") == "error":
                    name = _STATUS_NAMES.get(answer.error.code, "UNKNOWN")
                    future.set_exception(RequestFailed(name, f"{answer.error.reason}: {answer.error.message}"))
                else:
                    future.set_result(answer.response)
        except grpc.aio.AioRpcError as error:
            code, message = error.code().name, str(error.details() or "")
        finally:
            self._call = None
            for future in self._waiting.values():
                if not future.done():
                    future.set_exception(RequestFailed(code, message))

    async def close(self) -> None:
        if self._reader is not None:
            if self._call is not None:
                self._call.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._reader
