"""What a second worker gives where Python is the limit and not the engine; how far the kernel's spreading carries.

    python -m ml_inference_server.benchmark.studies.workers
    python -m ml_inference_server.benchmark.studies.workers --spread

The first starts a server of one process and one of two with a model that costs nothing, and loads them in turns of one
run, over many connections. The client needs its share of the same CPUs, which is told: with two CPUs it is what keeps
two workers from giving twice as much. The second needs no server. The kernel gives a connection to a worker by a hash,
and all its calls stay there; so the fullest worker decides how much load all of them take. It draws many such spreads.
"""

import argparse
import contextlib
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ml_inference_server.benchmark.load.channel import Target
from ml_inference_server.benchmark.report.plots import Panel, of_panels
from ml_inference_server.benchmark.result.stats import median_interval
from ml_inference_server.benchmark.studies.closed_turn import ClosedTurn, closed_turn
from ml_inference_server.benchmark.studies.own_server import own_server
from ml_inference_server.benchmark.target.interrupt import Stop, run_stoppable
from ml_inference_server.benchmark.target.server_process import LOOPBACK
from ml_inference_server.utils.arguments import positive_float, positive_int
from ml_inference_server.utils.errors import EXIT_OK

WORKERS = (1, 2, 4, 8, 16, 32, 64)
CONNECTIONS = (8, 32, 128, 512, 2048)


def carried(workers: int, connections: int, draws: int = 2000, seed: int = 0) -> tuple[float, float, float]:
    """How many workers' worth of load all take until the fullest one has its fill: median, 5th and 95th percentile.

    Equal connections, each on a worker that is as likely as any other.
    """
    rng = np.random.default_rng(seed)
    spread = rng.multinomial(connections, [1 / workers] * workers, size=draws)
    middle, low, high = np.quantile(connections / spread.max(axis=1), (0.5, 0.05, 0.95))
    return float(middle), float(low), float(high)


async def _measure(args: argparse.Namespace, stop: Stop) -> int:
    turns: dict[int, list[ClosedTurn]] = {1: [], 2: []}
    overrides = ["model.backend=fake", "server.pin_workers=false", *args.overrides]
    async with contextlib.AsyncExitStack() as stack:
        servers = {
            count: await stack.enter_async_context(own_server(None, [*overrides, f"server.workers={count}"], stop))
            for count in turns
        }
        targets = {
            count: [
                await stack.enter_async_context(Target(LOOPBACK, server.grpc_port)) for _ in range(args.connections)
            ]
            for count, server in servers.items()
        }
        for number in tqdm(range(args.rounds + 1), desc="rounds", disable=None):
            for count in (1, 2) if number % 2 else (2, 1):
                turn = closed_turn(
                    servers[count].pid,
                    targets[count],
                    seconds=args.seconds,
                    texts=args.texts,
                    in_flight=args.in_flight,
                )
                done = await stop.race(turn)
                if number:  # the first round warms up
                    turns[count].append(done)
    print(f"\n{args.rounds} turns each, {args.connections} connections, {args.texts} texts per call\n")
    print("| workers | calls/s | CPUs: server | client | calls per second of the server's CPU |")
    print("| --- | --- | --- | --- | --- |")
    for count, own in turns.items():
        middle = [statistics.median(getattr(turn, name) for turn in own) for name in ClosedTurn.__slots__]
        per_cpu = statistics.median(turn.calls_per_s / turn.server_cpus for turn in own)
        print("| {} | {:.0f} | {:.2f} | {:.2f} | {:.0f} |".format(count, *middle, per_cpu))
    ratios = [two.calls_per_s / one.calls_per_s for one, two in zip(turns[1], turns[2], strict=True)]
    print("\nTwo against one: {:.2f} [{:.2f}, {:.2f}] times the calls.".format(*median_interval(ratios)))
    return EXIT_OK


def _spread(file: Path | None) -> int:
    table = {count: [carried(workers, count) for workers in WORKERS] for count in CONNECTIONS}
    print("| connections | " + " | ".join(f"{workers} workers" for workers in WORKERS) + " |")
    print("| --- |" + " --- |" * len(WORKERS))
    for count, row in table.items():
        print(f"| {count} | " + " | ".join(f"{middle:.1f} ({low:.1f})" for middle, low, _ in row) + " |")
    if file is not None:
        curves = {f"{count} connections": row for count, row in table.items()}
        panel = Panel("Load until the fullest worker is full", "workers", "workers' worth of load", WORKERS, curves)
        file.write_bytes(of_panels([panel], 1, "How far the spreading of connections carries"))
        print(f"wrote {file}")
    return EXIT_OK


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m ml_inference_server.benchmark.studies.workers", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--spread", action="store_true", help="draw spreads of connections; starts no server")
    parser.add_argument("--figure", type=Path, metavar="FILE", help="with --spread: draw them into an SVG file")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--rounds", type=positive_int, default=15, help="turns of each server (default 15)")
    parser.add_argument("--seconds", type=positive_float, default=1.0, help="length of a turn (default 1)")
    parser.add_argument("--connections", type=positive_int, default=16, help="of the client (default 16)")
    parser.add_argument(
        "--in-flight", type=positive_int, default=2, help="calls at a time over each of them (default 2)"
    )
    parser.add_argument("--texts", type=positive_int, default=32, help="texts in a call (default 32)")
    args = parser.parse_args(argv)
    return _spread(args.figure) if args.spread else run_stoppable(lambda stop: _measure(args, stop))


if __name__ == "__main__":
    sys.exit(main())
