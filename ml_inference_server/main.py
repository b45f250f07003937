"""The server's entry point: arguments to settings, serve, exit code."""

import argparse
import asyncio
import logging
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if sys.platform != "win32":
    import uvloop

from ml_inference_server import __version__
from ml_inference_server.utils.cache import writable_root
from ml_inference_server.utils.config import Settings, load_settings
from ml_inference_server.utils.cores import worker_count
from ml_inference_server.utils.cpu import SHARE_VARIABLE
from ml_inference_server.utils.files import writable
from ml_inference_server.utils.layers import Given, experiment_file, given_by
from ml_inference_server.utils.logging import LOG_FORMATS, set_up_logging
from ml_inference_server.utils.process import (
    ENGINE_ADDRESS_SPACE_BYTES,
    check_address_space,
    end_process,
    run_to_exit_code,
)
from ml_inference_server.utils.supervise import Supervisor, supervised_command
from ml_inference_server.worker_processes.seat import WORKER_FLAG, Seat

if TYPE_CHECKING:
    from ml_inference_server.server.serve import Started

log = logging.getLogger(__name__)

if sys.platform != "win32":

    class _EventLoop(uvloop.Loop):
        """uvloop's own clock has steps of a millisecond and stands still within a turn: no base for measurements."""

        def time(self) -> float:
            return time.monotonic()

else:
    _EventLoop = asyncio.ProactorEventLoop


# Never closed: that would cancel what is still open, and gRPC answers a call whose task is cancelled with CANCELLED,
# which no client repeats. The end of the process closes the connections, which every client takes for UNAVAILABLE.
_runners: list[asyncio.Runner] = []


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Serve sentence embeddings and pair scores over gRPC, with a dashboard and metrics over HTTP."
    parser.epilog = (
        "Exit codes: 0 stopped, 2 configuration, 3 model or device, 4 port in use, 5 work cut off, "
        "6 the engine hangs: start again, 130 Ctrl-C."
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--experiment",
        type=experiment_file,
        metavar="FILE",
        help="experiment file (YAML), or the name of one that ships",
    )
    source.add_argument("--config", type=Path, metavar="FILE", help="legacy single-file configuration (deprecated)")
    parser.add_argument("--variant", default="", metavar="NAME", help="one of the experiment's variants")
    parser.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override a setting; repeatable",
    )
    parser.add_argument("--host", help="gRPC address, and that of the dashboard (default 127.0.0.1)")
    parser.add_argument("--port", type=int, help="gRPC port (default 50051; 0: a free one)")
    parser.add_argument("--http-port", type=int, help="dashboard and metrics port (default 8080; 0: a free one)")
    parser.add_argument("--device", help="auto, cpu, cuda or mps")
    parser.add_argument("--model-name", help="Hugging Face name or local folder")
    parser.add_argument(
        "--ready-file", type=Path, metavar="PATH", help="written as JSON (ports, pid) once the server serves"
    )
    parser.add_argument(
        "--exit-with-parent", action="store_true", help="stop when the process that started this one ends"
    )
    parser.add_argument(
        "--supervise",
        action="store_true",
        help="start the server again when it crashes or hangs, later each time; a stop and a bad start stay one",
    )
    parser.add_argument("--heartbeat", type=int, help=argparse.SUPPRESS)
    parser.add_argument(WORKER_FLAG, type=Seat.read, help=argparse.SUPPRESS)
    parser.add_argument("--log-level", default="INFO", choices=("DEBUG", "INFO", "WARNING", "ERROR"))
    parser.add_argument(
        "--log-format", default="text", choices=LOG_FORMATS, help="text (default), or json: one object a line"
    )
    parser.add_argument("--otlp-endpoint", metavar="URL", help="send traces there, such as http://localhost:4318")
    parser.add_argument("--version", action="version", version=__version__)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="run_server.sh")
    add_arguments(parser)
    return parser.parse_args(argv)


def settings_from(args: argparse.Namespace) -> Settings:
    """Flags are short forms of --set and win over it."""
    short = [
        ("server.host", "--host", args.host),
        ("metrics.host", "--host", args.host),
        ("server.port", "--port", args.port),
        ("metrics.port", "--http-port", args.http_port),
        ("model.device", "--device", args.device),
        ("model.name", "--model-name", args.model_name),
        ("metrics.otlp_endpoint", "--otlp-endpoint", args.otlp_endpoint),
    ]
    flags = [Given(key, value, f"{flag} {value}") for key, flag, value in short if value is not None]
    return load_settings(args.experiment, legacy=args.config, overrides=[*args.overrides, *flags], variant=args.variant)


def run(args: argparse.Namespace, started: "Started | None" = None) -> int:
    """Serve until a signal ends it; StartError where it cannot start. started: gets the server once it serves.

    Whoever calls it ends the process then.
    """
    seat: Seat | None = args.worker
    set_up_logging(args.log_level, args.log_format, None if seat is None else seat.index)
    if args.supervise:
        command = supervised_command("--supervise")
        return Supervisor(command, ready_file=args.ready_file, exit_with_parent=args.exit_with_parent).run()
    settings = settings_from(args)
    if seat is not None:
        os.environ[SHARE_VARIABLE] = str(seat.cpus)
    elif (count := worker_count(settings.server.workers)) > 1:
        from ml_inference_server.worker_processes.supervisor import Orders, run_workers

        orders = Orders(ready_file=_ready_file(args), exit_with_parent=args.exit_with_parent, heartbeat=args.heartbeat)
        return run_workers(settings, count, orders)
    if from_environment := given_by(os.environ):
        log.info("from the environment: %s", ", ".join(given.source for given in from_environment))
    if args.config is not None:
        log.warning("--config is deprecated: write an experiment file and pass it with --experiment")
    if settings.model.backend != "fake":
        check_address_space(ENGINE_ADDRESS_SPACE_BYTES)
    writable_root(quiet=True)
    # Anybody who can connect could fill the log: gRPC writes a line for each handshake that fails.
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    # Not before the limits are known to be sound: gRPC's libraries are large, and abort where they find no room.
    from ml_inference_server.server.serve import serve

    _runners.append(runner := asyncio.Runner(loop_factory=_EventLoop))
    return runner.run(
        serve(
            settings,
            ready_file=None if seat is not None else _ready_file(args),
            exit_with_parent=args.exit_with_parent,
            heartbeat=args.heartbeat,
            started=started,
            seat=seat,
        )
    )


def _ready_file(args: argparse.Namespace) -> Path | None:
    return None if args.ready_file is None else writable(args.ready_file, "--ready-file")


def main(argv: Sequence[str] | None = None, started: "Started | None" = None) -> int:
    return run_to_exit_code(lambda: run(parse(argv), started))


if __name__ == "__main__":
    end_process(main())
