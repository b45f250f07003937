"""THE table of stages: where the time of an answered request goes, in order and without a gap.

The wire's Timing, metrics, the page, traces, log lines, reports and docs/metrics.md use these names with these
meanings; tests/unit/test_stages.py holds them to it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple


class Stamps(NamedTuple):
    """When an answered request entered each stage, on one monotonic clock. The last stage ends with the request."""

    received_at: float
    admitted_at: float
    tokenized_at: float
    engine_started_at: float
    engine_ended_at: float
    gathered_at: float


@dataclass(frozen=True, slots=True)
class Stage:
    """meaning: short enough for the page. wire: its field in the message Timing, in microseconds; or empty."""

    name: str
    meaning: str
    wire: str = ""


# "Its batches" are those that the request's texts travelled in. A batch starts when the model begins with it; one that
# raised is not counted.
STAGES = (
    Stage("receive", "decode, check, admit"),
    Stage("tokenize", "text to token ids", wire="tokenize_us"),
    Stage("queue", "until its first batch starts", wire="queue_us"),
    Stage("engine", "until its last batch ends", wire="compute_us"),
    Stage("scatter", "rows back to the request"),
    Stage("reply", "compare, encode the answer"),
)
STAGE_NAMES = tuple(stage.name for stage in STAGES)
WIRE_TOTAL = Stage("total", "all of its time but the stage reply", wire="total_us")


def spans(stamps: Stamps, ended_at: float) -> Iterator[tuple[str, float, float]]:
    """The name, the begin and the end of each stage of a request that ended at `ended_at`."""
    return zip(STAGE_NAMES, stamps, (*stamps[1:], ended_at), strict=True)


# A field, and the stamps between which its time lies.
_WIRE = [(stage.wire, place, place + 1) for place, stage in enumerate(STAGES) if stage.wire]
_WIRE += [(WIRE_TOTAL.wire, 0, len(Stamps._fields) - 1)]


def wire_us(stamps: Stamps) -> dict[str, int]:
    """The fields of the message Timing."""
    return {wire: max(0, round(1e6 * (stamps[end] - stamps[begin]))) for wire, begin, end in _WIRE}
