"""Clients for other services. They need grpcio, protobuf and numpy, and nothing else of this package."""

from ml_inference_server.api.aio import AsyncClient
from ml_inference_server.api.client import Client
from ml_inference_server.api.errors import (
    DeadlineExceededError,
    InvalidRequestError,
    ModelFailedError,
    OverloadedError,
    ServerError,
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
    "OverloadedError",
    "Rank",
    "ServerError",
    "ServerInfo",
    "StreamAnswer",
    "UnavailableError",
    "WrongTaskError",
]
