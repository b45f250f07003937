"""A real gRPC server in a process of its own that misbehaves when told to: python scripted_server.py '{"die_at": 5}'.

Requests are counted from 1 over the whole life of the process; keys that end in _at name one of them, keys that end in
_every all its multiples. Prints one JSON line when it serves, and "held" when the request of `hold_at` has arrived.
"""

import asyncio
import json
import math
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health

from ml_inference_server.proto import inference_pb2 as pb
from ml_inference_server.proto import inference_pb2_grpc

DIMENSION = 4
DEFAULTS: dict[str, Any] = {
    "die_at": 0,
    "hold_at": 0,
    "restart_at": 0,
    "abort_every": 0,
    "abort_code": "INTERNAL",
    "wrong_every": 0,
    "wrong": "rows",
    "freeze_at": 0,
    "freeze_s": 0.0,
    "change_at": 0,
    "work_s": 0.0,
    "max_texts": 1024,
    "serving": True,
    "fallbacks": [],
    "random_weights": False,
    "title": "scripted model, fp32 on nothing",
    "experiment": "scripted",
}


class Scripted(inference_pb2_grpc.InferenceServiceServicer):  # type: ignore[misc] # the generated stubs have no types
    def __init__(self, script: dict[str, Any]) -> None:
        self.script = {**DEFAULTS, **script}
        assert set(script) <= set(DEFAULTS), script
        self.requests = 0
        self.working = asyncio.Lock()

    def _every(self, key: str) -> bool:
        return bool(self.script[key]) and self.requests % self.script[key] == 0

    async def _obey(self, context: grpc.aio.ServicerContext[Any, Any]) -> bool:
        """Whether the answer of this request shall be wrong."""
        self.requests += 1
        if self.requests == self.script["die_at"]:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.requests == self.script["hold_at"]:
            print("held", flush=True)
            await asyncio.Event().wait()
        if self.requests == self.script["freeze_at"]:
            time.sleep(self.script["freeze_s"])  # noqa: ASYNC251 - the whole server stands still, as under SIGSTOP
        if self.script["work_s"]:
            async with self.working:  # one request at a time: a known capacity
                await asyncio.sleep(self.script["work_s"])
        if self._every("abort_every"):
            await context.abort(grpc.StatusCode[self.script["abort_code"]], f"request {self.requests} is refused")
        return self._every("wrong_every")

    async def Embed(self, request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        wrong = await self._obey(context)
        rows = len(request.texts) - (wrong and self.script["wrong"] == "rows")
        values = np.ones((rows, DIMENSION), "<f4")
        if wrong and self.script["wrong"] == "nan":
            values[0, 0] = math.nan
        data = values.tobytes()
        if wrong and self.script["wrong"] == "bytes":
            data = data[:-1]
        return pb.EmbedResponse(embeddings=data, count=rows, dimension=DIMENSION)

    async def EmbedStream(self, requests: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        async for message in requests:
            self.requests += 1
            if self._every("abort_every"):
                code = grpc.StatusCode[self.script["abort_code"]].value[0]
                yield pb.EmbedStreamResponse(id=message.id, error=pb.StreamError(code=code, reason="R", message="no"))
            else:
                rows = len(message.request.texts)
                data = np.ones((rows, DIMENSION), "<f4").tobytes()
                response = pb.EmbedResponse(embeddings=data, count=rows, dimension=DIMENSION)
                yield pb.EmbedStreamResponse(id=message.id, response=response)

    async def Score(self, request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        wrong = await self._obey(context)
        scores = [0.5] * len(request.pairs)
        if wrong:
            scores = scores[1:] if self.script["wrong"] == "rows" else [math.inf, *scores[1:]]
        return pb.ScoreResponse(scores=scores)

    async def GetServerInfo(self, request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        restarted = 0 < self.script["restart_at"] <= self.requests
        return pb.GetServerInfoResponse(
            experiment=self.script["experiment"],
            title=self.script["title"],
            fallbacks=["something fell back"]
            if 0 < self.script["change_at"] <= self.requests
            else self.script["fallbacks"],
            requested=pb.Requested(model="m", backend="pytorch", device="mps", quantization="fp16"),
            resolved=pb.BackendInfo(
                backend="scripted",
                model="m",
                device="cpu",
                dtype="float32",
                parameters=12,
                random_weights=self.script["random_weights"],
            ),
            settings_json=json.dumps({"batching": {"enabled": True}}),
            max_texts=self.script["max_texts"],
            instance_id="second" if restarted else "first",
            pid=os.getpid(),
        )


async def main(script: dict[str, Any], ready_file: str | None) -> None:
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    servicer = Scripted(script)
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(servicer, server)
    checker = health.HealthServicer()
    status = health_pb2.HealthCheckResponse
    await checker.set("", status.SERVING if servicer.script["serving"] else status.NOT_SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(checker, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, lambda: os._exit(0))
    announce(json.dumps({"grpc_port": port, "http_port": 0, "pid": os.getpid()}), ready_file)
    await server.wait_for_termination()


def announce(ready: str, ready_file: str | None) -> None:
    if ready_file:
        Path(ready_file).write_text(ready)
    print(ready, flush=True)


if __name__ == "__main__":
    arguments = sys.argv[2:]
    given = arguments[arguments.index("--ready-file") + 1] if "--ready-file" in arguments else None
    asyncio.run(main(json.loads(sys.argv[1]), given))
