"""What the process is doing, as its callers may see it: the one object that servicers, health and sidecar read."""

import asyncio
import dataclasses
import os
import secrets
from dataclasses import dataclass, field
from typing import Any

from ml_inference_server import __version__
from ml_inference_server.backends.base import BackendInfo
from ml_inference_server.backends.startup.resolve import Resolution, title
from ml_inference_server.server.scheduler import DynamicBatcher
from ml_inference_server.server.service import InferenceService
from ml_inference_server.utils.config import Settings
from ml_inference_server.utils.errors import Unavailable

MAX_FAILURES_IN_A_ROW = 3


@dataclass(slots=True)
class ServerState:
    """`service`, `batcher`, `resolution` and `info` are there once the model is loaded and warm."""

    settings: Settings
    phase: str = "starting"
    resolution: Resolution | None = None
    info: BackendInfo | None = None
    auto_choice: str = ""
    service: InferenceService | None = None
    batcher: DynamicBatcher | None = None
    draining: asyncio.Event = field(default_factory=asyncio.Event)
    instance_id: str = field(default_factory=lambda: secrets.token_hex(8))

    def require_service(self) -> InferenceService:
        """The service, or Unavailable while the model is loading."""
        if self.service is None:
            raise Unavailable(f"the model is not ready yet ({self.phase}); retry", reason="MODEL_LOADING")
        return self.service

    def readiness(self) -> tuple[bool, str]:
        """(ready, why not). Ready: warm, not draining, no batch hangs, and texts do not fail one after the other."""
        if self.draining.is_set():
            return False, "draining"
        if self.batcher is None:
            return False, self.phase
        running_s = self.batcher.oldest_batch_s()
        if running_s * 1000 > self.settings.server.hang_timeout_ms:
            return False, f"a batch has been running for {running_s:.0f} s"
        if self.batcher.trouble:
            return False, self.batcher.trouble
        if self.batcher.failures_in_a_row >= MAX_FAILURES_IN_A_ROW:
            return False, f"the last {self.batcher.failures_in_a_row} texts failed in the model"
        return True, "ready"

    def requested(self) -> dict[str, str]:
        model = self.resolution.requested if self.resolution else self.settings.model
        asked_on = self.resolution.device if self.resolution and model.device == "auto" else model.device
        return {
            "model": model.name,
            "backend": model.backend,
            "device": model.device,
            "quantization": model.requested_quantization(asked_on),
        }

    def as_dict(self) -> dict[str, Any]:
        """What GetServerInfo and /info tell: requested, resolved, and each difference in words."""
        fallbacks = list(self.resolution.fallbacks) if self.resolution else []
        resolved = dataclasses.asdict(self.info) if self.info else None
        name = title(self.resolution, self.info) if self.resolution and self.info else self.settings.model.name
        return {
            "server_version": __version__,
            "experiment": self.settings.name,
            "variant": self.settings.variant,
            "requested": self.requested(),
            "resolved": resolved,
            "fallbacks": fallbacks,
            "title": name,
            "settings": self.settings.model_dump(mode="json"),
            "pid": os.getpid(),
            "instance_id": self.instance_id,
            "auto_choice": self.auto_choice,
        }
