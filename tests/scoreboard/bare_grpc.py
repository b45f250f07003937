"""How much grpc.aio itself keeps of calls that are cancelled: a server of a few lines, with nothing of ours in it.

By hand: python -m tests.scoreboard.bare_grpc --calls 200000 --cancelled 1 --cancelled-after-ms 0.5
"""

import argparse
import asyncio
import random
import sys
from dataclasses import dataclass
from typing import Any

import grpc
import psutil

from tests.scoreboard.real_server import ROOT, environment
from tests.scoreboard.soak import Sample, slope_mb_per_100k

_METHOD = "/bare.Bare/Call"
_WORK_S, CANCELLED_AFTER_S = 0.02, 0.05
_IN_FLIGHT, _SAMPLE_EVERY = 48, 500


async def _serve() -> None:
    async def handle(request: bytes, context: Any) -> bytes:
        await asyncio.sleep(_WORK_S)
        return request

    server = grpc.aio.server()
    method: Any = grpc.unary_unary_rpc_method_handler(handle)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bare.Bare", {"Call": method}),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(port, flush=True)
    await server.wait_for_termination()


async def _call(port: int, pid: int, calls: int, cancelled: float, after_s: float) -> tuple[list[Sample], int]:
    """Samples of the server's memory, and how many calls were cancelled."""
    rng, samples, numbers = random.Random(1), list[Sample](), iter(range(calls))
    ends = {"done": 0, "cancelled": 0}
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        method: Any = channel.unary_unary(_METHOD)

        async def call_until_over() -> None:
            for _ in numbers:
                call = method(b"a", timeout=60)
                if rng.random() < cancelled:
                    asyncio.get_running_loop().call_later(rng.uniform(0, after_s), call.cancel)
                try:
                    await call
                except asyncio.CancelledError:
                    ends["cancelled"] += 1
                except grpc.aio.AioRpcError as error:  # the server was the first to say so
                    if error.code() is not grpc.StatusCode.CANCELLED:
                        raise
                    ends["cancelled"] += 1
                ends["done"] += 1
                if ends["done"] % _SAMPLE_EVERY == 0:
                    samples.append(Sample(ends["done"], psutil.Process(pid).memory_info().rss))

        await asyncio.gather(*(call_until_over() for _ in range(_IN_FLIGHT)))
    return samples, ends["cancelled"]


@dataclass(frozen=True)
class BareGrpc:
    """mb_per_100k: by which the server's memory grows."""

    calls: int
    cancelled: int
    mb_per_100k: float


async def bare_grpc(calls: int, cancelled: float, after_s: float = CANCELLED_AFTER_S) -> BareGrpc:
    """`calls` calls to such a server, of which the share `cancelled` is cancelled, unless it is answered before.

    after_s: until then at the latest, at random.
    """
    server = await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", "-m", "tests.scoreboard.bare_grpc", "--serve"),
        cwd=ROOT,
        env=environment(),
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        assert server.stdout is not None
        port = int(await server.stdout.readline())
        samples, count = await _call(port, server.pid, calls, cancelled, after_s)
    finally:
        server.kill()
        await server.wait()
    return BareGrpc(calls, count, slope_mb_per_100k(samples))


def main() -> int:
    parser = argparse.ArgumentParser(description="Memory of a bare grpc.aio server whose calls are cancelled.")
    parser.add_argument("--calls", type=int, default=60_000)
    parser.add_argument("--cancelled", type=float, default=0.3)
    parser.add_argument("--cancelled-after-ms", type=float, default=1000 * CANCELLED_AFTER_S, help="at the latest")
    parser.add_argument("--serve", action="store_true", help="be the server")
    given = parser.parse_args()
    if given.serve:
        asyncio.run(_serve())
        return 0
    found = asyncio.run(bare_grpc(given.calls, given.cancelled, given.cancelled_after_ms / 1000))
    print(
        f"grpc {grpc.__version__}: {found.calls} calls, {found.cancelled} cancelled: "
        f"{found.mb_per_100k:+.2f} MB per 100,000 calls"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
