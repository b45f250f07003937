"""What the process is doing, as its callers may see it: the one object that RPCs, health and sidecar read."""

import asyncio
import dataclasses
import os
import secrets
from dataclasses import dataclass, field
from typing import Any

from ml_inference_server import __version__
from ml_inference_server.backends.startup.resolve import title
from ml_inference_server.server.ready_model import ReadyModel
from ml_inference_server.utils.config import Settings
from ml_inference_server.utils.errors import Unavailable

MAX_FAILURES_IN_A_ROW = 3


@dataclass(slots=True)
class ServerState:
    """phase: what the start is busy with. model: None until it is loaded and warm.

    relay_key: who knows it may say over HTTP for whom it asks. It never leaves the process.
    """

    settings: Settings
    phase: str = "starting"
    model: ReadyModel | None = None
    draining: asyncio.Event = field(default_factory=asyncio.Event)
    instance_id: str = field(default_factory=lambda: secrets.token_hex(8))
    relay_key: str = field(default_factory=lambda: secrets.token_hex(32), repr=False)

    def require_model(self) -> ReadyModel:
        """The model, or Unavailable while it is loading."""
        if self.model is None:
            raise Unavailable(f"the model is not ready yet ({self.phase}); retry", reason="MODEL_LOADING")
        return self.model

    def readiness(self) -> tuple[bool, str]:
        """(ready, why not). Ready: warm, not draining, no batch hangs, and texts do not fail one after the other."""
        if self.draining.is_set():
            return False, "draining"
        if self.model is None:
            return False, self.phase
        batcher = self.model.batcher
        if batcher.trouble:
            return False, batcher.trouble
        if batcher.failures_in_a_row >= MAX_FAILURES_IN_A_ROW:
            return False, f"the last {batcher.failures_in_a_row} texts failed in the model"
        return True, "ready"

    def requested(self) -> dict[str, str]:
        resolution = self.model.described.resolution if self.model is not None else None
        model = resolution.requested if resolution is not None else self.settings.model
        asked_on = resolution.device if resolution is not None and model.device == "auto" else model.device
        return {
            "model": model.name,
            "backend": model.backend,
            "device": model.device,
            "quantization": model.requested_quantization(asked_on),
        }

    def _title(self) -> str:
        if self.model is None:
            return self.settings.model.name
        described = self.model.described
        return title(described.resolution, described.info, self.settings.cache.max_mb)

    def as_dict(self) -> dict[str, Any]:
        """What GetServerInfo and /info answer: requested, resolved, and each difference in words."""
        described = self.model.described if self.model is not None else None
        return {
            "server_version": __version__,
            "experiment": self.settings.name,
            "variant": self.settings.variant,
            "requested": self.requested(),
            "resolved": dataclasses.asdict(described.info) if described else None,
            "fallbacks": list(described.resolution.fallbacks) if described else [],
            "title": self._title(),
            "settings": self.settings.model_dump(mode="json"),
            "pid": os.getpid(),
            "instance_id": self.instance_id,
            "auto_choice": described.auto_choice if described else "",
            "space_ids": dict(self.model.service.space_ids) if self.model else {},
            "models": list(self.model.service.names.all) if self.model else [],
        }
