"""The command `mlis`: one module of this folder for each of its commands.

Each of them has `add_arguments(parser)` and `run(arguments)`, which returns the exit code. Only the module of the
command that was asked for is imported.
"""

import argparse
import importlib
import sys
from collections.abc import Iterable, Sequence
from typing import NoReturn

from ml_inference_server import __version__
from ml_inference_server.utils.errors import EXIT_OK
from ml_inference_server.utils.process import end_process, run_to_exit_code

COMMANDS = {
    "serve": "serve a model over gRPC, with a live page over HTTP",
    "export": "write a folder that serves a model without torch",
    "info": "show what a running server serves",
    "health": "say whether a running server is ready",
    "embed": "turn texts into vectors on a running server",
    "rerank": "order documents by a query on a running server",
    "key": "make the keys of those who may come in",
    "bench": "measure a running server",
    "experiments": "run experiment files and compare them",
    "report": "write the report of a result again",
    "compare": "show what changed between two results",
    "doctor": "show what is installed and what this machine can run",
    "completion": "print a completion script for your shell",
}
_USAGE = "COMMAND [ARGUMENT...]"
_EPILOG = """\
examples:
  mlis serve sentence-transformers/all-MiniLM-L6-v2
  mlis embed "what is a cell" "a cell is the unit of life"

The first serves a model on port 50051; the second, in another terminal, prints two vectors.
'mlis COMMAND --help' shows the arguments of a command.
"""


def build_parser(wanted: Iterable[str]) -> argparse.ArgumentParser:
    """The parser of all commands, with the arguments of those in `wanted`."""
    parser = argparse.ArgumentParser(
        prog="mlis",
        usage=f"mlis {_USAGE}",
        description="Serve sentence embeddings and reranking, and measure what is served.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(title="commands", metavar=_USAGE, prog="mlis", required=True)
    for name, summary in COMMANDS.items():
        command = commands.add_parser(name, help=summary, allow_abbrev=False)
        if name in wanted:
            module = importlib.import_module(f"ml_inference_server.cli.{name}")
            module.add_arguments(command)
            command.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    given = sys.argv[1:] if argv is None else argv

    def run() -> int:
        arguments = build_parser(given[:1]).parse_args(given)
        arguments.command_line = ["mlis", *given]
        try:
            return int(arguments.run(arguments))
        except BrokenPipeError:  # whoever reads the output has seen enough
            return EXIT_OK

    return run_to_exit_code(run)


def program() -> NoReturn:
    """The console script."""
    end_process(main())
