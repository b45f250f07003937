"""All figures of one process at one moment, as a worker sends them to its supervisor."""

from dataclasses import dataclass
from typing import Any

from ml_inference_server.metrics.exposition import HistogramState
from ml_inference_server.metrics.snapshot import Gauges
from ml_inference_server.metrics.window import Slot

Labels = tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """numbers, histograms: by name and label values, since the start of the process.

    view, covered_s: of the window. closed, closed_s: what was recorded in the slots that closed since the report
    before, and how many seconds they cover: to be added up. Parts of it go on changing: use or send it at once.
    """

    numbers: dict[str, dict[Labels, float]]
    histograms: dict[str, dict[Labels, HistogramState]]
    view: Slot
    covered_s: float
    closed: Slot
    closed_s: float
    gauges: Gauges
    last_batch_unix_s: float


def summed_gpu(gpus: list[dict[str, Any] | None]) -> dict[str, Any] | None:
    """What the processes hold together on the device that they share."""
    used = [gpu for gpu in gpus if gpu is not None]
    if not used:
        return None
    return used[0] | {name: sum(gpu[name] for gpu in used) for name in ("memory_bytes", "reserved_bytes")}
