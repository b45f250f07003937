"""How the commands reach a running server."""

import argparse
import contextlib
from collections.abc import Iterator

import grpc

from ml_inference_server.api import Client, ServerError, UnavailableError
from ml_inference_server.utils import connection
from ml_inference_server.utils.arguments import positive_float
from ml_inference_server.utils.errors import EXIT_FAILED_RUN, StartError


class NotAnswered(StartError):
    """The server refused the request, or there is none."""

    exit_code = EXIT_FAILED_RUN


def _target(text: str) -> str:
    if not text.strip():
        raise argparse.ArgumentTypeError("it is empty, and HOST:PORT is needed")
    return text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--target",
        type=_target,
        default="localhost:50051",
        metavar="HOST:PORT",
        help="the server's gRPC address (default: %(default)s)",
    )
    parser.add_argument(
        "--timeout-s",
        type=positive_float,
        default=60.0,
        metavar="S",
        help="how long to wait for an answer (default: %(default)g)",
    )
    connection.add_arguments(parser)


def no_server(target: str, given: connection.Connection) -> NotAnswered:
    """What to say where nobody answers at `target`."""
    if given.tls:
        return NotAnswered(
            f"no server answers at {target} by TLS: see that it speaks it, that its certificate is of --ca and has "
            "this name, and that it accepts --cert"
        )
    return NotAnswered(
        f"no server answers at {target}: start one with 'mlis serve', or name its address with --target, and --tls if "
        "it speaks that"
    )


@contextlib.contextmanager
def connected(arguments: argparse.Namespace) -> Iterator[Client]:
    """A client of the server that the arguments name; NotAnswered instead of its errors."""
    target, given = arguments.target, connection.connection_from(arguments)
    credentials = grpc.ssl_channel_credentials(*given.pems()) if given.tls else None
    with Client(
        target, timeout_s=arguments.timeout_s, credentials=credentials, api_key=given.api_key or None
    ) as client:
        try:
            yield client
        except UnavailableError as error:
            if error.reason:
                raise NotAnswered(f"{target}: {error}") from None
            raise no_server(target, given) from None
        except ServerError as error:
            raise NotAnswered(f"{target} refused: {error}") from None
