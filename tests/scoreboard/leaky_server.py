"""The server as main starts it, with a leak: it keeps some bytes of every call that was cancelled (K2).

In place of ml_inference_server.main, with its arguments. MLIS_TEST_LEAK_BYTES: of each call, 1024 where it is not set.
"""

import os
from typing import Any

from ml_inference_server.main import main
from ml_inference_server.metrics.registry import Metrics
from ml_inference_server.utils.process import end_process

LEAK_BYTES = "MLIS_TEST_LEAK_BYTES"
_kept: list[bytearray] = []


def plant(leak_bytes: int) -> None:
    """From now on."""
    finished = Metrics.request_finished

    def leaking(self: Metrics, method: str, code: str, seconds: float, **more: Any) -> None:
        if code == "CANCELLED":
            _kept.append(bytearray(leak_bytes))
        finished(self, method, code, seconds, **more)

    Metrics.request_finished = leaking  # type: ignore[method-assign]


if __name__ == "__main__":
    plant(int(os.environ.get(LEAK_BYTES, "1024")))
    end_process(main())
