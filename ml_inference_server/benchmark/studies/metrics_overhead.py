"""What metrics and an open page cost: one server, loaded in turns with them and without.

    python -m ml_inference_server.benchmark.studies.metrics_overhead

Two processes of one program differ by some percent, so one process does both: a signal switches its recording on and
off. Short turns in an order that alternates, so that whatever else the machine does meets both alike; the server is
started again for each block. With --control nothing is ever recorded: what it then shows is the noise.
"""

import argparse
import asyncio
import itertools
import json
import signal
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

from ml_inference_server.benchmark.result.stats import median_interval
from ml_inference_server.proto import inference_pb2 as pb
from ml_inference_server.proto import inference_pb2_grpc as rpc
from ml_inference_server.utils.arguments import positive_float, positive_int

START_TIMEOUT_S = 300.0
# The server as it is, but for a signal that switches the recording: no request is in flight when it comes.
SERVER = """
import signal, sys
from ml_inference_server import main
def started(server):
    def switch(*_):
        server.metrics.enabled = not server.metrics.enabled
    signal.signal(signal.SIGUSR1, switch)
sys.exit(main.main(sys.argv[1:], started))
"""
WORDS = ("what", "is", "a", "cell", "and", "why", "does", "it", "have", "a", "membrane", "that", "lets", "water")


@dataclass
class StudyServer:
    """A server process."""

    process: subprocess.Popen[bytes]
    grpc_port: int
    http_port: int
    recording: bool = False


@dataclass(frozen=True)
class Turn:
    """Requests answered per second, and seconds of the server's CPU per request."""

    requests_per_s: float
    cpu_s: float


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="metrics_overhead", description=__doc__.split("\n\n")[0])
    parser.add_argument("--blocks", type=positive_int, default=4, help="servers, one after the other (default 4)")
    parser.add_argument("--rounds", type=positive_int, default=40, help="pairs of turns in a block (default 40)")
    parser.add_argument("--seconds", type=positive_float, default=1.0, help="length of a turn (default 1)")
    parser.add_argument("--concurrency", type=positive_int, default=64, help="requests in flight (default 64)")
    parser.add_argument("--texts", type=positive_int, default=1, help="texts in a request (default 1)")
    parser.add_argument("--control", action="store_true", help="both turns without metrics: shows the noise")
    parser.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a setting of the server; unset: model.backend=fake, a model that costs nothing: the worst case",
    )
    return parser.parse_args(argv)


def start(folder: Path, overrides: Sequence[str]) -> StudyServer:
    ready_file = folder / "ready.json"
    settings = [*(overrides or ["model.backend=fake"]), "metrics.enabled=false"]
    flags = [flag for setting in settings for flag in ("--set", setting)]
    ports = ["--port", "0", "--http-port", "0", "--ready-file", str(ready_file)]
    command = [sys.executable, "-c", SERVER, *ports, "--exit-with-parent", "--log-level", "ERROR"]
    process = subprocess.Popen([*command, *flags])
    give_up_at = time.monotonic() + START_TIMEOUT_S
    while not ready_file.exists():
        if process.poll() is not None or time.monotonic() > give_up_at:
            process.kill()
            raise SystemExit(f"the server did not start (exit code {process.wait()})")
        time.sleep(0.05)
    told = json.loads(ready_file.read_text(encoding="utf-8"))
    return StudyServer(process, told["grpc_port"], told["http_port"])


async def switch(server: StudyServer, recording: bool) -> None:
    """The server itself says whether it records."""
    if server.recording != recording:
        server.process.send_signal(signal.SIGUSR1)
    async with aiohttp.ClientSession(f"http://127.0.0.1:{server.http_port}") as session:
        while server.recording != recording:
            async with session.get("/metrics") as answer:
                server.recording = (await answer.json())["recording"]


async def watch(server: StudyServer, opened: asyncio.Event) -> None:
    """What an open page and a Prometheus that scrapes each second do, until it is cancelled.

    `opened` is set once the page is there, with its hour of history, and the first scrape is done.
    """
    async with aiohttp.ClientSession(f"http://127.0.0.1:{server.http_port}") as session:

        async def scrape() -> None:
            for wait_s in itertools.chain([0.5], itertools.repeat(1.0)):  # a turn of a second holds one
                async with session.get("/metrics/prometheus") as answer:
                    await answer.read()
                opened.set()
                await asyncio.sleep(wait_s)

        async with asyncio.TaskGroup() as group, session.get("/api/v1/stream") as stream:
            await stream.content.readany()
            group.create_task(scrape())
            async for _ in stream.content:
                pass


async def turn(server: StudyServer, seconds: float, concurrency: int, texts: int) -> Turn:
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


async def measure(server: StudyServer, arguments: argparse.Namespace) -> list[tuple[Turn, Turn]]:
    """(turn with metrics and page, turn without) for each round; a first round warms up and is left out."""
    rounds = []
    for number in range(arguments.rounds + 1):
        turns = {}
        for on in (True, False) if number % 2 else (False, True):
            recording = on and not arguments.control
            await switch(server, recording)
            opened = asyncio.Event()
            watching = asyncio.create_task(watch(server, opened)) if recording else None
            if watching is not None:
                await opened.wait()
            turns[on] = await turn(server, arguments.seconds, arguments.concurrency, arguments.texts)
            if watching is not None:
                watching.cancel()
                await asyncio.wait([watching])
        if number:
            rounds.append((turns[True], turns[False]))
    return rounds


def block(arguments: argparse.Namespace) -> list[tuple[Turn, Turn]]:
    """The rounds of one server."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        server = start(Path(folder), arguments.overrides)
        stack.callback(server.process.wait)
        stack.callback(server.process.terminate)
        return asyncio.run(measure(server, arguments))


def report(blocks: Sequence[Sequence[tuple[Turn, Turn]]], names: tuple[str, str]) -> None:
    rounds = [each for block in blocks for each in block]
    cpu_us = 1e6 * statistics.median(b.cpu_s for _, b in rounds)
    print(f"\na request costs the server {cpu_us:.0f} us of CPU without metrics")
    print(f"{names[0]} against {names[1]}, {len(rounds)} pairs of turns, median [95 % interval]:")
    for title, ratios in (
        ("throughput", [a.requests_per_s / b.requests_per_s for a, b in rounds]),
        ("server CPU per request", [a.cpu_s / b.cpu_s for a, b in rounds]),
    ):
        middle, low, high = median_interval(ratios)
        print(f"  {title:24} {100 * (middle - 1):+.2f} % [{100 * (low - 1):+.2f}, {100 * (high - 1):+.2f}]")


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    names = ("off", "off (control)") if arguments.control else ("metrics and page on", "off")
    blocks = []
    for number in range(arguments.blocks):
        blocks.append(block(arguments))
        ratio = statistics.median(a.requests_per_s / b.requests_per_s for a, b in blocks[-1])
        print(f"block {number + 1:2} of {arguments.blocks}: throughput {100 * (ratio - 1):+.1f} %", flush=True)
    report(blocks, names)
    return 0


if __name__ == "__main__":
    sys.exit(main())
