"""Draws docs/peers.json, the throughput of this server and of others under one load, as the chart of the README.

    python -m ml_inference_server.benchmark.studies.peers [FILE.json] [--output FILE.svg]

The file holds what was measured elsewhere, with the same client and the same load for all servers in turn:
`load`, `machine`, `date`, `baseline` (a server's name), and for each server its `name`, `precision`, `is_own` and, for
each workload, the texts per second of every round. Bars are medians as multiples of the baseline's, lines reach from
the lowest to the highest round.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from ml_inference_server.benchmark.report.plots import Bar, of_bars
from ml_inference_server.utils.errors import EXIT_OK, ConfigError
from ml_inference_server.utils.installation import results_folder
from ml_inference_server.utils.process import run_to_exit_code


class PeerServer(BaseModel):
    """texts_per_s: of each round, by workload."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    precision: str
    is_own: bool = False
    texts_per_s: Mapping[str, Sequence[float]]


class Peers(BaseModel):
    """What `docs/peers.json` holds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    date: str
    machine: str
    load: str
    baseline: str
    servers: Sequence[PeerServer]


def bars(peers: Peers) -> dict[str, list[Bar]]:
    """For each workload the servers, as multiples of the baseline's median."""
    base = next((server for server in peers.servers if server.name == peers.baseline), None)
    if base is None:
        raise ConfigError(f"baseline: no server is called {peers.baseline!r}")
    found: dict[str, list[Bar]] = {}
    for workload, rounds in base.texts_per_s.items():
        unit = statistics.median(rounds)
        for server in peers.servers:
            rates = [rate / unit for rate in server.texts_per_s[workload]]
            label = f"{server.name}, {server.precision}"
            found.setdefault(workload, []).append(
                Bar(label, statistics.median(rates), min(rates), max(rates), server.is_own)
            )
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m ml_inference_server.benchmark.studies.peers", description=__doc__.split("\n")[0]
    )
    parser.add_argument("file", nargs="?", type=Path, default=results_folder() / "peers.json")
    parser.add_argument("--output", type=Path, help="default: beside the file, as .svg")
    options = parser.parse_args(argv)
    try:
        peers = Peers.model_validate(json.loads(options.file.read_text(encoding="utf-8")))
    except (OSError, ValueError, ValidationError) as error:
        raise ConfigError(f"{options.file}: {error}") from error
    title = f"Throughput as a multiple of {peers.baseline}\n{peers.load}\n{peers.machine}; {peers.date}"
    output = options.output or options.file.with_suffix(".svg")
    output.write_bytes(of_bars(bars(peers), title))
    print(output)
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(run_to_exit_code(main))
