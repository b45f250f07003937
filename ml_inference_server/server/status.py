"""Error to status: the one table where an error meets a name of gRPC and a number of HTTP."""

from typing import NamedTuple

from ml_inference_server.utils.errors import (
    BackendFailure,
    BodyRefused,
    DeadlinePassed,
    Forbidden,
    InvalidRequest,
    ModelNotFound,
    NonFiniteOutput,
    OutOfMemory,
    Overloaded,
    ServiceError,
    SpaceMismatch,
    Unauthenticated,
    Unavailable,
    WrongTask,
)


class ErrorStatus(NamedTuple):
    """grpc: the name of a gRPC status code. http: a status of HTTP; a dialect may have one of its own instead."""

    grpc: str
    http: int


# UNKNOWN never stands here and is never sent.
STATUS: dict[type[ServiceError], ErrorStatus] = {
    ServiceError: ErrorStatus("INTERNAL", 500),
    Unauthenticated: ErrorStatus("UNAUTHENTICATED", 401),
    Forbidden: ErrorStatus("PERMISSION_DENIED", 403),
    InvalidRequest: ErrorStatus("INVALID_ARGUMENT", 400),
    BodyRefused: ErrorStatus("INVALID_ARGUMENT", 400),
    WrongTask: ErrorStatus("FAILED_PRECONDITION", 400),
    ModelNotFound: ErrorStatus("NOT_FOUND", 404),
    SpaceMismatch: ErrorStatus("FAILED_PRECONDITION", 412),
    Overloaded: ErrorStatus("RESOURCE_EXHAUSTED", 429),
    DeadlinePassed: ErrorStatus("DEADLINE_EXCEEDED", 504),
    Unavailable: ErrorStatus("UNAVAILABLE", 503),
    BackendFailure: ErrorStatus("INTERNAL", 500),
    NonFiniteOutput: ErrorStatus("INTERNAL", 500),
    OutOfMemory: ErrorStatus("INTERNAL", 500),
}


# Reasons that only HTTP has, with a status of their own.
HTTP_STATUS_OF_REASON = {"BODY_TOO_SLOW": 408, "BODY_TOO_LONG": 413, "BODY_TYPE": 415}


def status_of(error: ServiceError) -> ErrorStatus:
    return STATUS[type(error)]
