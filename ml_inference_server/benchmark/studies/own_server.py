"""A server that a study starts for itself: on free ports, known by what it says of itself, ended afterwards."""

import argparse
import contextlib
import tempfile
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ml_inference_server.benchmark.load.channel import Target
from ml_inference_server.benchmark.runner import START_TIMEOUT_S
from ml_inference_server.benchmark.target.interrupt import Stop
from ml_inference_server.benchmark.target.server_process import LOOPBACK, ServerOptions, ServerProcess
from ml_inference_server.utils.config import load_settings
from ml_inference_server.utils.connection import IN_THE_CLEAR, Connection


@dataclass(frozen=True)
class OwnServer:
    """info: what GetServerInfo tells."""

    target: Target
    info: dict[str, Any]
    grpc_port: int
    http_port: int
    pid: int

    @property
    def model(self) -> str:
        """The name that its answers carry."""
        return str(self.info["models"][0])

    @property
    def scores_pairs(self) -> bool:
        """A cross-encoder, which has no embeddings."""
        return bool(self.info["resolved"]["task"] == "cross_encoder")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What is served, and on which labelled texts it is tried."""
    parser.add_argument("--experiment", type=Path, required=True, metavar="FILE", help="experiment file (YAML)")
    parser.add_argument(
        "--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE", help="change a setting"
    )
    parser.add_argument(
        "--pairs", default="", metavar="FILE", help="labelled texts (qid, pid, query, passage); unset: the sample"
    )
    parser.add_argument("--qrels", default="", metavar="FILE", help="TREC judgements of --pairs")


@contextlib.asynccontextmanager
async def own_server(
    experiment: Path | None, overrides: Sequence[str], stop: Stop, connection: Connection = IN_THE_CLEAR
) -> AsyncIterator[OwnServer]:
    """A server that is ready. ConfigError for settings that cannot be, StartError where it does not start.

    experiment: None takes the settings as they are by default. connection: how it is reached with these settings.
    """
    settings = load_settings(experiment, overrides=overrides)
    given = [part for override in overrides for part in ("--set", override)]
    with tempfile.TemporaryDirectory(prefix="ml_inference_server-") as folder:
        named = ["--experiment", str(experiment)] if experiment else []
        arguments = [*named, *given, "--port", "0", "--http-port", "0"]
        drain_s = settings.server.drain_timeout_ms / 1e3
        options = ServerOptions(arguments, Path(folder) / "server.log", START_TIMEOUT_S, drain_s, connection=connection)
        async with ServerProcess(options, stop) as server:
            ports = await stop.race(server.start())
            async with Target(LOOPBACK, ports["grpc_port"], connection) as target:
                info = await target.server_info()
                yield OwnServer(target, info, ports["grpc_port"], ports["http_port"], ports["pid"])
