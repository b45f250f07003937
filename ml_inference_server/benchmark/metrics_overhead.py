"""What metrics and an open page cost: two servers, one with them and one without, loaded in turn.

    python -m ml_inference_server.benchmark.metrics_overhead

Short turns, in an order that alternates, so that whatever else the machine does meets both alike. Two processes of one
program differ by some percent, too: so the pair is started anew for each block, and the interval is over the blocks.
With --control both servers are without metrics: what it then shows is the noise. Whatever follows --set goes to both.
"""

import argparse
import asyncio
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import grpc
import psutil

from ml_inference_server.proto import inference_pb2 as pb
from ml_inference_server.proto import inference_pb2_grpc as rpc

START_TIMEOUT_S = 300.0
WORDS = ("what", "is", "a", "cell", "and", "why", "does", "it", "have", "a", "membrane", "that", "lets", "water")


@dataclass
class Server:
    """A server process."""

    process: subprocess.Popen[bytes]
    grpc_port: int
    http_port: int


@dataclass(frozen=True)
class Turn:
    """Requests answered per second, and seconds of the server's CPU per request."""

    requests_per_s: float
    cpu_s: float


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="metrics_overhead", description=__doc__.split("\n\n")[0])
    parser.add_argument("--blocks", type=int, default=12, help="pairs of servers, one after the other (default 12)")
    parser.add_argument("--rounds", type=int, default=16, help="pairs of turns in a block (default 16)")
    parser.add_argument("--seconds", type=float, default=0.5, help="length of a turn (default 0.5)")
    parser.add_argument("--concurrency", type=int, default=16, help="requests in flight (default 16)")
    parser.add_argument("--texts", type=int, default=1, help="texts in a request (default 1)")
    parser.add_argument("--control", action="store_true", help="both servers without metrics: shows the noise")
    parser.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a setting of both servers; unset: model.backend=fake, a model that costs nothing: the worst case",
    )
    return parser.parse_args(argv)


def start(folder: Path, name: str, overrides: Sequence[str], *, enabled: bool) -> Server:
    ready_file = folder / f"{name}.json"
    settings = [*(overrides or ["model.backend=fake"]), f"metrics.enabled={str(enabled).lower()}"]
    flags = [flag for setting in settings for flag in ("--set", setting)]
    ports = ["--port", "0", "--http-port", "0", "--ready-file", str(ready_file)]
    command = [sys.executable, "-m", "ml_inference_server.main", *ports, "--exit-with-parent", "--log-level", "ERROR"]
    process = subprocess.Popen([*command, *flags])
    give_up_at = time.monotonic() + START_TIMEOUT_S
    while not ready_file.exists():
        if process.poll() is not None or time.monotonic() > give_up_at:
            process.kill()
            raise SystemExit(f"the server did not start (exit code {process.wait()})")
        time.sleep(0.05)
    told = json.loads(ready_file.read_text(encoding="utf-8"))
    return Server(process, told["grpc_port"], told["http_port"])


async def watch(server: Server) -> None:
    """What an open page and a Prometheus that scrapes each second do, until it is cancelled."""
    async with aiohttp.ClientSession(f"http://127.0.0.1:{server.http_port}") as session:

        async def scrape() -> None:
            while True:
                async with session.get("/metrics/prometheus") as answer:
                    await answer.read()
                await asyncio.sleep(1)

        async with asyncio.TaskGroup() as group, session.get("/api/v1/stream") as stream:
            group.create_task(scrape())
            async for _ in stream.content:
                pass


async def turn(server: Server, seconds: float, concurrency: int, texts: int) -> Turn:
    """Closed loop: as soon as a request is answered, the next one is sent."""
    request = pb.EmbedRequest(texts=[" ".join(WORDS[: 4 + i % 10]) for i in range(texts)])
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
        stub = rpc.InferenceServiceStub(channel)
        await stub.Embed(request)
        process = psutil.Process(server.process.pid)
        cpu, began = process.cpu_times(), time.monotonic()
        answered = 0

        async def call() -> None:
            nonlocal answered
            while time.monotonic() < began + seconds:
                await stub.Embed(request)
                answered += 1

        await asyncio.gather(*(call() for _ in range(concurrency)))
        took_s, after = time.monotonic() - began, process.cpu_times()
    return Turn(answered / took_s, (after.user + after.system - cpu.user - cpu.system) / answered)


async def measure(first: Server, second: Server, arguments: argparse.Namespace) -> list[tuple[Turn, Turn]]:
    """(turn of `first`, turn of `second`) for each round; a first round warms up and is left out."""
    watching = None if arguments.control else asyncio.create_task(watch(first))
    rounds = []
    for number in range(arguments.rounds + 1):
        turns = {}
        for server in (first, second) if number % 2 else (second, first):
            turns[id(server)] = await turn(server, arguments.seconds, arguments.concurrency, arguments.texts)
        if number:
            rounds.append((turns[id(first)], turns[id(second)]))
    if watching is not None:
        watching.cancel()
    return rounds


def block(number: int, arguments: argparse.Namespace) -> list[tuple[Turn, Turn]]:
    """The rounds of one pair of servers, (with metrics, without) each; which of them is started first alternates."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        servers = {}
        for measured in (True, False) if number % 2 else (False, True):
            enabled = measured and not arguments.control
            server = start(Path(folder), f"server-{measured}", arguments.overrides, enabled=enabled)
            stack.callback(server.process.wait)
            stack.callback(server.process.terminate)
            servers[measured] = server
        return asyncio.run(measure(servers[True], servers[False], arguments))


def interval(ratios: Sequence[float]) -> tuple[float, float, float]:
    """Median and its 95 % interval (percentile bootstrap, 2000 resamples)."""
    draw = random.Random(0)  # noqa: S311 - a statistic, not a secret
    medians = sorted(statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(2000))
    return statistics.median(ratios), medians[50], medians[1949]


def report(blocks: Sequence[Sequence[tuple[Turn, Turn]]], names: tuple[str, str]) -> None:
    cpu_us = 1e6 * statistics.median(b.cpu_s for rounds in blocks for _, b in rounds)
    print(f"\na request costs the server {cpu_us:.0f} us of CPU without metrics")
    print(f"{names[0]} against {names[1]}, {len(blocks)} pairs of servers, median [95 % interval]:")
    for title, ratios in (
        ("throughput", [statistics.median(a.requests_per_s / b.requests_per_s for a, b in each) for each in blocks]),
        ("server CPU per request", [statistics.median(a.cpu_s / b.cpu_s for a, b in each) for each in blocks]),
    ):
        middle, low, high = interval(ratios)
        print(f"  {title:24} {100 * (middle - 1):+.2f} % [{100 * (low - 1):+.2f}, {100 * (high - 1):+.2f}]")


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    names = ("off", "off (control)") if arguments.control else ("metrics and page on", "off")
    blocks = []
    for number in range(arguments.blocks):
        blocks.append(block(number, arguments))
        ratio = statistics.median(a.requests_per_s / b.requests_per_s for a, b in blocks[-1])
        print(f"block {number + 1:2} of {arguments.blocks}: throughput {100 * (ratio - 1):+.1f} %", flush=True)
    report(blocks, names)
    return 0


if __name__ == "__main__":
    sys.exit(main())
