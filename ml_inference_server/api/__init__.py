"""Clients for other services. They need grpcio, protobuf and numpy, and nothing else of this package."""

from ml_inference_server.api.access import tls_credentials
from ml_inference_server.api.aio import AsyncClient
from ml_inference_server.api.client import Client
from ml_inference_server.api.errors import (
    DeadlineExceededError,
    InvalidRequestError,
    ModelFailedError,
    ModelNotFoundError,
    NotAllowedError,
    OverloadedError,
    ServerError,
    SpaceMismatchError,
    UnavailableError,
    WrongTaskError,
)
from ml_inference_server.api.operations import CallDetails, Rank, ServerInfo
from ml_inference_server.api.stream_state import StreamAnswer

__all__ = [
    "AsyncClient",
    "CallDetails",
    "Client",
    "DeadlineExceededError",
    "InvalidRequestError",
    "ModelFailedError",
    "ModelNotFoundError",
    "NotAllowedError",
    "OverloadedError",
    "Rank",
    "ServerError",
    "ServerInfo",
    "SpaceMismatchError",
    "StreamAnswer",
    "UnavailableError",
    "WrongTaskError",
    "tls_credentials",
]
