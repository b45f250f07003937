"""What Ray Serve's proxy costs: the same replicas behind it, and bare, over gRPC and over HTTP (OpenAI), in one run.

    python -m tests.ray.proxy_cost [--settings model.name=...] [--seconds 10] [--rounds 3] [--json FILE]

All run at the same time, and are measured in turn. The bare servers share the calls by gRPC's own round_robin, and over
HTTP the callers. It builds Ray's environment if it has to.
"""

import argparse
import asyncio
import contextlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import grpc

from ml_inference_server.proto import inference_pb2 as pb
from ml_inference_server.proto import inference_pb2_grpc as rpc
from tests.integration.server_process import server_process
from tests.ray.cluster import cluster, ray_python

REPLICAS = 2
RAY, BARE = "ray_proxy", "bare_round_robin"
RAY_HTTP, BARE_HTTP = "ray_proxy, HTTP", "bare, HTTP"
ROUND_ROBIN = json.dumps({"loadBalancingConfig": [{"round_robin": {}}]})
WARM_UP_S = 2.0
Row = dict[str, float]
Arm = str | list[str]
"""A target of gRPC, or URLs of HTTP."""


async def measure(arm: Arm, callers: int, texts: int, seconds: float) -> Row:
    """A closed loop of `callers`; every text of every call is another one."""
    latencies: list[float] = []
    async with _sender(arm) as send:
        begin = time.perf_counter() + WARM_UP_S
        end = begin + seconds

        async def calls(caller: int) -> None:
            number = 0
            while (sent_at := time.perf_counter()) < end:
                number += 1
                await send(caller, [f"passage {caller} {number} {place} of some length" for place in range(texts)])
                if sent_at >= begin:
                    latencies.append(time.perf_counter() - sent_at)

        await asyncio.gather(*(calls(caller) for caller in range(callers)))
    cuts = statistics.quantiles(latencies, n=100)
    return {
        "requests_per_s": len(latencies) / seconds,
        "p50_ms": 1e3 * cuts[49],
        "p99_ms": 1e3 * cuts[98],
        "requests": len(latencies),
    }


@contextlib.asynccontextmanager
async def _sender(arm: Arm) -> AsyncIterator[Callable[[int, list[str]], Awaitable[object]]]:
    """Sends the texts of a caller, and has their vectors when it returns."""
    if isinstance(arm, str):
        async with grpc.aio.insecure_channel(arm, options=[("grpc.service_config", ROUND_ROBIN)]) as channel:
            stub: Any = rpc.InferenceServiceStub(channel)
            yield lambda caller, texts: stub.Embed(pb.EmbedRequest(texts=texts), timeout=60)
        return
    async with aiohttp.ClientSession(raise_for_status=True, connector=aiohttp.TCPConnector(limit=0)) as session:

        async def post(caller: int, texts: list[str]) -> None:
            # A caller stays with its server, as its connection does.
            url = arm[caller % len(arm)] + "/v1/embeddings"
            body = {"model": "any", "input": texts, "encoding_format": "base64"}
            async with session.post(url, json=body, timeout=aiohttp.ClientTimeout(60)) as answer:
                await answer.read()

        yield post


@contextlib.contextmanager
def arms(settings: Sequence[str]) -> Iterator[dict[str, Arm]]:
    """Where each is reached."""
    settings = [*settings, "server.accept_any_model=true"]
    sets = [part for each in settings for part in ("--set", each)]
    with contextlib.ExitStack() as stack:
        ray = stack.enter_context(cluster(ray_python(), nodes=1, cpus=REPLICAS))
        if said := ray.deploy(*settings, replicas=REPLICAS, cpus=1):
            sys.exit(said)
        ray.pids(REPLICAS)
        ports, urls = [], []
        for _ in range(REPLICAS):
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            server = stack.enter_context(server_process(folder, *sets, "--set", "model.streams=1", *ONE_THREAD))
            ready = server.ready()
            ports.append(ready["grpc_port"])
            urls.append(f"http://127.0.0.1:{ready['http_port']}")
        bare = ",".join(f"127.0.0.1:{port}" for port in ports)
        yield {
            RAY: f"127.0.0.1:{ray.port}",
            BARE: f"ipv4:{bare}",
            RAY_HTTP: [f"http://127.0.0.1:{ray.http_port}"],
            BARE_HTTP: urls,
        }


# As `cpus: 1` gives a replica.
ONE_THREAD = ("--set", "model.threads=1")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", nargs="*", default=["model.name=fake:base_ms=2"], help="of each replica")
    parser.add_argument("--callers", nargs="*", type=int, default=[1, 8, 64])
    parser.add_argument("--texts", type=int, default=4, help="in a call")
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    found: dict[tuple[str, int], list[Row]] = {}
    with arms(args.settings) as addresses:
        for place in range(args.rounds):
            for callers in args.callers:
                for arm in list(addresses)[:: 1 if place % 2 else -1]:
                    row = asyncio.run(measure(addresses[arm], callers, args.texts, args.seconds))
                    found.setdefault((arm, callers), []).append(row)
                    print(f"round {place + 1} {arm:16} {callers:3} callers: {row}", file=sys.stderr, flush=True)
    print("| callers | through | requests/s | p50 | p99 |\n| ---: | --- | ---: | ---: | ---: |")
    for (arm, callers), rows in sorted(found.items(), key=lambda item: (item[0][1], item[0][0])):
        rate, p50, p99 = (statistics.median(row[key] for row in rows) for key in ("requests_per_s", "p50_ms", "p99_ms"))
        print(f"| {callers} | {arm} | {rate:.0f} | {p50:.1f} ms | {p99:.1f} ms |")
    if args.json is not None:
        measured = [{"arm": arm, "callers": callers, "rounds": rounds} for (arm, callers), rounds in found.items()]
        said = {"settings": args.settings, "texts": args.texts, "seconds": args.seconds, "measured": measured}
        args.json.write_text(json.dumps(said, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
