"""Servers that are restarted under traffic that goes on: how each call ends. By hand, 200 restarts of two servers:

python -m tests.faults.restarts --restarts 200
"""

import argparse
import asyncio
import contextlib
import json
import signal
import socket
import sys
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from ml_inference_server.backends.fake import fake_embedding
from ml_inference_server.proto import inference_pb2 as pb
from ml_inference_server.proto import inference_pb2_grpc as rpc
from ml_inference_server.utils.arguments import positive_int
from tests.conftest import until
from tests.integration.server_process import ServerProcess, server_process

CALLERS = 16
# Of a caller whose call failed.
_PAUSE_S = 0.01
# gRFC A6 with the values of its own example; the server's pushback is honoured by gRPC itself.
RETRY_POLICY = {
    "maxAttempts": 5,
    "initialBackoff": "0.1s",
    "maxBackoff": "1s",
    "backoffMultiplier": 2,
    "retryableStatusCodes": ["UNAVAILABLE"],
}


def service_config(retries: bool) -> str:
    method = {"name": [{}], **({"retryPolicy": RETRY_POLICY} if retries else {})}
    return json.dumps({"loadBalancingConfig": [{"round_robin": {}}], "methodConfig": [method]})


@dataclass
class Traffic:
    """Callers that call again as soon as they are answered.

    instances: the servers whose answers they have got. ends: how calls ended, by code.
    """

    channel: grpc.aio.Channel
    stub: Any
    ends: Counter[str] = field(default_factory=Counter)
    instances: set[str] = field(default_factory=set)
    is_over: bool = False

    async def call_until_over(self, number: int) -> None:
        while not self.is_over:
            text = f"{number} {self.ends.total()}"
            call = self.stub.Embed(pb.EmbedRequest(texts=[text]), timeout=60)
            try:
                reply = await call
            except grpc.aio.AioRpcError as error:
                self.ends[error.code().name] += 1
                await asyncio.sleep(_PAUSE_S)
            else:
                assert reply.embeddings == fake_embedding(text).tobytes()
                self.ends["OK"] += 1
                trailers = dict(await call.trailing_metadata())
                self.instances.add(trailers["request-id"].partition("-")[0])


@contextlib.asynccontextmanager
async def traffic(ports: Sequence[int], *, retries: bool, callers: int = CALLERS) -> AsyncIterator[Traffic]:
    """Calls go round the servers until the block ends; then the last ones are answered."""
    options = [
        ("grpc.service_config", service_config(retries)),
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 1000),
    ]
    target = "ipv4:" + ",".join(f"127.0.0.1:{port}" for port in ports)
    async with grpc.aio.insecure_channel(target, options=options) as channel:
        going_on = Traffic(channel, rpc.InferenceServiceStub(channel))
        tasks = [asyncio.create_task(going_on.call_until_over(number)) for number in range(callers)]
        try:
            yield going_on
        finally:
            going_on.is_over = True
            await asyncio.gather(*tasks)


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [int(each.getsockname()[1]) for each in sockets]


@dataclass
class Fleet:
    """Servers on ports that stay theirs. exit_codes: of those that were stopped."""

    folder: Path
    ports: list[int]
    settings: Sequence[str] = ()
    running: dict[int, tuple[contextlib.ExitStack, ServerProcess]] = field(default_factory=dict)
    exit_codes: Counter[int] = field(default_factory=Counter)

    def start(self, port: int) -> None:
        """Until it is ready."""
        folder = self.folder / str(port)
        folder.mkdir(exist_ok=True)
        with contextlib.ExitStack() as stack:
            server = stack.enter_context(server_process(folder, "--port", str(port), *self.settings))
            server.ready()
            self.running[port] = stack.pop_all(), server

    def stop(self, port: int) -> None:
        """With SIGTERM, until its process has ended."""
        stack, server = self.running.pop(port)
        with stack:
            server.signal(signal.SIGTERM)
            self.exit_codes[server.end()[0]] += 1

    def kill_all(self) -> None:
        for stack, _ in self.running.values():
            stack.close()


async def restarts(
    folder: Path,
    *,
    count: int,
    servers: int = 2,
    retries: bool = True,
    callers: int = CALLERS,
    settings: Sequence[str] = (),
    restarted: Callable[[], None] = lambda: None,
) -> tuple[Counter[str], Counter[int]]:
    """`count` restarts in turn under traffic: how the calls ended by code, and how the servers did by exit code.

    The next one is stopped once the callers have got an answer of the one that was started again. restarted: called
    then. An answer that is not that of its own text is an AssertionError.
    """
    fleet = Fleet(folder, free_ports(servers), settings)
    try:
        for port in fleet.ports:
            await asyncio.to_thread(fleet.start, port)
        async with traffic(fleet.ports, retries=retries, callers=callers) as going_on:
            await until(lambda: len(going_on.instances) == servers)
            for number in range(count):
                known, port = len(going_on.instances), fleet.ports[number % servers]
                await asyncio.to_thread(fleet.stop, port)
                await asyncio.to_thread(fleet.start, port)
                await until(lambda known=known: len(going_on.instances) > known)
                restarted()
        for port in fleet.ports:
            await asyncio.to_thread(fleet.stop, port)
    finally:
        fleet.kill_all()
    return going_on.ends, fleet.exit_codes


def main() -> int:
    parser = argparse.ArgumentParser(description="How calls end while servers are restarted under them.")
    parser.add_argument("--restarts", type=positive_int, default=200)
    parser.add_argument("--servers", type=positive_int, default=2)
    parser.add_argument("--callers", type=positive_int, default=CALLERS)
    parser.add_argument("--no-retries", action="store_true", help="callers without a retry policy")
    parser.add_argument("--set", dest="settings", action="append", default=[], metavar="KEY=VALUE")
    given = parser.parse_args()
    settings = [part for setting in given.settings for part in ("--set", setting)]
    with tempfile.TemporaryDirectory() as folder:
        asked = restarts(
            Path(folder),
            count=given.restarts,
            servers=given.servers,
            retries=not given.no_retries,
            callers=given.callers,
            settings=settings,
        )
        ends, exit_codes = asyncio.run(asked)
    lost = ends.total() - ends["OK"]
    print(f"{given.restarts} restarts, {ends.total()} calls, {lost} lost: {dict(ends)}; exit codes {dict(exit_codes)}")
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
