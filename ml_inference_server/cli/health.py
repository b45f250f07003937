"""mlis health: whether a running server is ready, for the probes of containers and for scripts."""

import argparse

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from ml_inference_server.cli import remote
from ml_inference_server.utils import connection


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Asks the standard health service, which needs no key. Prints SERVING and ends with 0, or says why not and "
        "ends with 5."
    )
    remote.add_arguments(parser)
    parser.set_defaults(timeout_s=5.0)
    parser.add_argument(
        "--service",
        default="",
        metavar="NAME",
        help="one service of the server, such as inference.GRPCInferenceService (default: the whole server)",
    )


def run(arguments: argparse.Namespace) -> int:
    """NotAnswered where the server is not ready, or where there is none."""
    target, given = arguments.target, connection.connection_from(arguments)
    credentials = grpc.ssl_channel_credentials(*given.pems()) if given.tls else None
    with grpc.secure_channel(target, credentials) if credentials else grpc.insecure_channel(target) as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(service=arguments.service), timeout=arguments.timeout_s
            )
        except grpc.RpcError as error:
            if error.code() == grpc.StatusCode.NOT_FOUND:
                raise remote.NotAnswered(f"{target} has no service {arguments.service!r}: see 'mlis info'") from None
            if error.code() == grpc.StatusCode.UNAVAILABLE:
                raise remote.no_server(target, given) from None
            raise remote.NotAnswered(f"{target}: {error.code().name}: {error.details()}") from None
    status = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
    if answer.status != health_pb2.HealthCheckResponse.SERVING:
        raise remote.NotAnswered(f"{target}: {status}: it is starting, stopping, or its engine has failed")
    print(status)
    return 0
