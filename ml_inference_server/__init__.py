"""A gRPC server for sentence embeddings and reranking, a client for it, and the benchmark that measures it."""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from ml_inference_server.api import AsyncClient, Client

__all__ = ["AsyncClient", "Client", "__version__"]


def __getattr__(name: str) -> Any:
    """The clients, imported when they are asked for: a server or a test of a part needs no gRPC for its name."""
    if name in ("AsyncClient", "Client"):
        from ml_inference_server import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
