"""A sidecar whose every answer the test decides, and a page that is watched."""

import copy
from typing import Any
from urllib.parse import urlsplit

from playwright.async_api import Locator, Page

from ml_inference_server.metrics.http_server import Sidecar
from ml_inference_server.metrics.live import Live
from ml_inference_server.metrics.registry import Metrics
from ml_inference_server.utils.config import MetricsSettings
from ml_inference_server.utils.stages import Stamps

HOSTILE = '"><img src=x onerror=alert(1)><script>alert(1)</script>'
INFO: dict[str, Any] = {
    "server_version": "0.1.0",
    "experiment": "trial",
    "variant": "batched",
    "requested": {"model": "some/model", "backend": "pytorch", "device": "auto", "quantization": "none"},
    "resolved": {
        "backend": "pytorch",
        "model": "some/model",
        "task": "embedding",
        "device": "cpu",
        "device_name": "Some CPU",
        "dtype": "float32",
        "quantized_layers": 0,
        "execution_provider": "PyTorch",
        "instruction_set": "AVX2",
        "threads": 1,
        "concurrency": 2,
        "max_tokens": 256,
        "dimension": 384,
        "weights_sha256": "0123456789abcdef" * 4,
        "weights_file": "model.safetensors",
        "source": "local folder",
        "parameters": 22_713_216,
        "random_weights": False,
        "versions": {"torch": "2.13.0"},
    },
    "fallbacks": [],
    "title": "some/model on cpu, float32",
    "settings": {"name": "trial"},
    "pid": 1,
    "instance_id": "abc",
}


class Server:
    """A sidecar whose clock, information and readiness the test sets."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self.info = copy.deepcopy(INFO)
        self.ready = (True, "serving")
        self.metrics = Metrics(window_s=30, clock=lambda: self.now_s)
        self.port = 0

    async def start(self) -> None:
        """Listen; again on the same port after a stop."""
        self.sidecar = Sidecar(
            MetricsSettings(port=self.port),
            Live(
                self.metrics,
                lambda: self.info,
                lambda: self.ready,
                observe_lag=self.metrics.observe_loop_lag,
            ),
            server_info=lambda: self.info,
            liveness=lambda: (True, "ok"),
        )
        self.port = await self.sidecar.start()

    def answer(self, method: str, code: str = "OK", *, times: int = 1, seconds: float = 0.02, **answered: Any) -> None:
        for _ in range(times):
            self.metrics.request_started(method)
            stamps = Stamps(*(seconds * share for share in (0, 0.01, 0.05, 0.25, 0.95, 0.98)))
            reason = "" if code == "OK" else "QUEUE_FULL"
            passed = stamps if code == "OK" else None
            self.metrics.request_finished(method, code, seconds, stamps=passed, reason=reason, **answered)

    def batch(self, texts: int = 24) -> None:
        self.metrics.batch_finished(
            texts=texts,
            tokens=900,
            padded_tokens=1000,
            queue_s=[0.004] * texts,
            compute_s=0.05,
            closed_by="tokens",
            ok=True,
            lengths=[35] * (texts - 4) + [50] * 4,
        )


class Watched:
    """A page, what it asked for, and what it complained about."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.complaints: list[str] = []
        self.hosts: set[str | None] = set()
        page.on("console", lambda message: self.complaints.append(message.text))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("dialog", lambda dialog: self.complaints.append(dialog.message))
        page.on("request", lambda request: self.hosts.add(urlsplit(request.url).hostname))

    def field(self, name: str) -> Locator:
        return self.page.locator(f'[data-field="{name}"]')
