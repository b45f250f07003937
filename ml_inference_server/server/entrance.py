"""Where gRPC calls come into a server: a port of its own, or whatever else hands them over."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from ml_inference_server.door.certificates import TlsFiles
from ml_inference_server.door.door import Door
from ml_inference_server.metrics.view import View
from ml_inference_server.server.calls import Calls
from ml_inference_server.server.health import Health
from ml_inference_server.server.state import ServerState


@dataclass(frozen=True, slots=True)
class Foyer:
    """What all entrances have in common. door: lets callers in; None: everybody. tls: None: in the clear."""

    state: ServerState
    calls: Calls
    door: Door | None
    tls: TlsFiles | None
    shares_port: bool


class Entrance(Health, Protocol):
    """Where gRPC calls come in, and where those who ask hear of the server's health. port: 0 where it has none."""

    @property
    def port(self) -> int: ...


OpenEntrance = Callable[[Foyer, View], contextlib.AbstractAsyncContextManager[Entrance]]
"""Lets calls in from its beginning on, before there is a model; its end comes after the drain."""
