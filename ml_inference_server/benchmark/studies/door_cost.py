"""What the door costs: keys, limits and TLS on, against off.

    python -m ml_inference_server.benchmark.studies.door_cost [--tls-cert FILE --tls-key FILE] [--experiment FILE]

Each block starts one server for each way and loads them in short turns, in an order that changes with each round. Two
processes of one program differ by some percent, so there are several blocks, and two servers of them have no door: what
they differ by is the noise. Without --experiment the model costs nothing: the worst case.
"""

import argparse
import contextlib
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from ml_inference_server.benchmark.result.stats import median_interval
from ml_inference_server.benchmark.studies.closed_turn import ClosedTurn, closed_turn
from ml_inference_server.benchmark.studies.own_server import own_server
from ml_inference_server.benchmark.target.interrupt import Stop, run_stoppable
from ml_inference_server.door.keys import CallerKey, create_key, list_keys, written
from ml_inference_server.door.rights import Right
from ml_inference_server.utils.arguments import positive_float, positive_int
from ml_inference_server.utils.connection import IN_THE_CLEAR, Connection
from ml_inference_server.utils.errors import EXIT_FAILED_RUN, EXIT_OK, ConfigError

_OFF, _CONTROL, _LIMITED = "off", "off (control)", "keys and limits"
# Never reached, so that what is measured is the looking.
_LIMITS = {"requests_per_s": 1e6, "tokens_per_s": 1e9, "queue_share": 1.0}
_MOST_LOSS = 0.02  # of throughput, by keys and limits

Way = tuple[list[str], Connection]
"""The settings of a server, and how it is reached then."""


def _ways(folder: Path, tls_cert: str, tls_key: str, tls_ca: str) -> dict[str, Way]:
    plain, limited = folder / "keys.json", folder / "limited.json"
    token, content = create_key(plain, "study", [Right.INFER])
    plain.write_text(content)
    only = list_keys(plain)[0].model_dump(mode="json") | {"limits": _LIMITS}
    limited.write_text(written([CallerKey.model_validate(only | {"rights": list(only["rights"])})], limited))
    with_key = Connection(api_key=token)
    found: dict[str, Way] = {
        _OFF: ([], IN_THE_CLEAR),
        _CONTROL: ([], IN_THE_CLEAR),
        "keys": ([f"server.auth.keys_file={plain}"], with_key),
        _LIMITED: ([f"server.auth.keys_file={limited}"], with_key),
    }
    if tls_cert:
        tls = [f"server.tls.cert={tls_cert}", f"server.tls.key={tls_key}"]
        found["TLS"] = (tls, Connection(tls=True, ca=tls_ca))
        found["TLS, keys and limits"] = (
            [*tls, f"server.auth.keys_file={limited}"],
            Connection(tls=True, ca=tls_ca, api_key=token),
        )
    return found


async def _run(args: argparse.Namespace, stop: Stop) -> int:
    if bool(args.tls_cert) != bool(args.tls_key):
        raise ConfigError("--tls-cert and --tls-key go together: name both files")
    overrides = args.overrides or ([] if args.experiment else ["model.backend=fake"])
    with tempfile.TemporaryDirectory(prefix="ml_inference_server-") as folder:
        ways = _ways(Path(folder), args.tls_cert, args.tls_key, args.tls_ca or args.tls_cert)
        turns: dict[str, list[ClosedTurn]] = {name: [] for name in ways}
        bar = tqdm(total=args.blocks * args.rounds * len(ways), desc="turns", disable=None)
        for block in range(args.blocks):
            async with contextlib.AsyncExitStack() as stack:
                servers = {
                    name: await stack.enter_async_context(
                        own_server(args.experiment, [*overrides, *settings], stop, connection)
                    )
                    for name, (settings, connection) in ways.items()
                }
                names = list(servers)
                for number in range(args.rounds + 1):
                    first = (number + block) % len(names)
                    for name in [*names[first:], *names[:first]]:
                        done = await stop.race(
                            closed_turn(
                                servers[name].pid,
                                [servers[name].target],
                                seconds=args.seconds,
                                texts=args.texts,
                                in_flight=args.in_flight,
                            )
                        )
                        if number:  # the first round warms up
                            turns[name].append(done)
                            bar.update()
                title = servers[_OFF].info["title"]
        bar.close()
    print(f"{title}; {args.in_flight} requests of {args.texts} texts in flight; {len(turns[_OFF])} turns each\n")
    cpu_us = 1e6 * statistics.median(turn.server_cpu_s_per_call for turn in turns[_OFF])
    print(f"A request costs the server {cpu_us:.0f} us of CPU without a door. Of that, median [95 % interval]:\n")
    print("| door | requests/s | CPU per request |\n| --- | --- | --- |")
    limited = (1.0, 1.0, 1.0)
    for name, own in turns.items():
        if name == _OFF:
            continue
        pairs = list(zip(own, turns[_OFF], strict=True))
        speed = median_interval([a.calls_per_s / b.calls_per_s for a, b in pairs])
        cpu = median_interval([a.server_cpu_s_per_call / b.server_cpu_s_per_call for a, b in pairs])
        print(f"| {name} | {_told(speed)} | {_told(cpu)} |")
        if name == _LIMITED:
            limited = speed
    print(f"\nKeys and limits cost less than {_MOST_LOSS:.0%} of the throughput: {_verdict(*limited)}.")
    if not args.tls_cert:
        print("TLS was not measured: name a certificate for 127.0.0.1 with --tls-cert and --tls-key.")
    return EXIT_FAILED_RUN if limited[2] < 1 - _MOST_LOSS else EXIT_OK


def _verdict(_: float, low: float, high: float) -> str:
    if low >= 1 - _MOST_LOSS:
        return "yes"
    return (
        "NO" if high < 1 - _MOST_LOSS else "cannot be told, the noise is larger: take more blocks, or a quiet machine"
    )


def _told(ratio: tuple[float, float, float]) -> str:
    return "{:.3f} [{:.3f}, {:.3f}]".format(*ratio)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m ml_inference_server.benchmark.studies.door_cost", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--experiment", type=Path, metavar="FILE", help="experiment file (YAML)")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--tls-cert", default="", metavar="FILE", help="a certificate for 127.0.0.1")
    parser.add_argument("--tls-key", default="", metavar="FILE", help="its private key")
    parser.add_argument("--tls-ca", default="", metavar="FILE", help="who signed it (default: it itself)")
    parser.add_argument("--blocks", type=positive_int, default=4, help="times that all servers are started (default 4)")
    parser.add_argument("--rounds", type=positive_int, default=15, help="turns of each server in a block (default 15)")
    parser.add_argument("--seconds", type=positive_float, default=0.7, help="length of a turn (default 0.7)")
    parser.add_argument("--in-flight", type=positive_int, default=32, help="requests in flight (default 32)")
    parser.add_argument("--texts", type=positive_int, default=1, help="texts in a request (default 1)")
    return run_stoppable(lambda stop: _run(parser.parse_args(argv), stop))


if __name__ == "__main__":
    sys.exit(main())
