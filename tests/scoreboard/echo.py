"""What stands beside our server where calls are counted: `python -m tests.scoreboard.echo LOOP KIND`.

LOOP: asyncio or uvloop. KIND: echo answers every Embed with the bytes of the request; server is ours, with a fake
backend that costs nothing. It prints its ports and process id as one JSON line, and ends with its standard input.
"""

import asyncio
import json
import os
import sys
from typing import Any

import grpc
import uvloop

from ml_inference_server.server.lifecycle import serving
from ml_inference_server.server.rpc.native import SERVICE
from ml_inference_server.utils.config import Settings


async def _echo(request: bytes, _: object) -> bytes:
    return request


async def _until_told() -> None:
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline)


def _tell(grpc_port: int, http_port: int) -> None:
    print(json.dumps({"grpc_port": grpc_port, "http_port": http_port, "pid": os.getpid()}), flush=True)


async def main(kind: str) -> None:
    if kind == "echo":
        server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        methods: dict[str, Any] = {"Embed": grpc.unary_unary_rpc_method_handler(_echo)}
        server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(SERVICE, methods)])
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        _tell(port, 0)
        await _until_told()
        await server.stop(None)
        return
    sections = {"model": {"backend": "fake"}, "server": {"port": 0}, "metrics": {"port": 0}}
    async with serving(Settings.model_validate(sections), quiet_s=0) as ours:
        _tell(ours.grpc_port, ours.http_port)
        await _until_told()


if __name__ == "__main__":
    loops = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}
    with asyncio.Runner(loop_factory=loops[sys.argv[1]]) as runner:
        runner.run(main(sys.argv[2]))
