"""How the commands reach a running server."""

import argparse
import contextlib
from collections.abc import Iterator

import grpc

from ml_inference_server.proto import inference_pb2_grpc
from ml_inference_server.utils.errors import EXIT_FAILED_RUN, StartError

# The server's own limit is lower; this is the largest that its settings allow.
_OPTIONS = (("grpc.max_receive_message_length", 1 << 30), ("grpc.max_send_message_length", 1 << 30))


class RequestFailed(StartError):
    """The server refused the request, or there is none."""

    exit_code = EXIT_FAILED_RUN


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--target",
        default="localhost:50051",
        metavar="HOST:PORT",
        help="the server's gRPC address (default: %(default)s)",
    )
    parser.add_argument(
        "--timeout-s",
        type=float,
        default=60.0,
        metavar="S",
        help="how long to wait for an answer (default: %(default)g)",
    )


@contextlib.contextmanager
def connected(target: str) -> Iterator[inference_pb2_grpc.InferenceServiceStub]:
    """The stub of the server at `target`; RequestFailed instead of gRPC's own errors."""
    with grpc.insecure_channel(target, options=_OPTIONS) as channel:
        try:
            yield inference_pb2_grpc.InferenceServiceStub(channel)
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.UNAVAILABLE and not error.trailing_metadata():
                raise RequestFailed(
                    f"no server answers at {target}: start one with 'mlis serve', or name its address with --target"
                ) from None
            raise RequestFailed(f"{target} refused: {error.code().name}: {error.details()}") from None
