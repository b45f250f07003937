"""What a supervisor and a worker say to each other."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ml_inference_server.metrics.report import Report


@dataclass(frozen=True, slots=True, kw_only=True)
class Serving:
    """A worker's word: from now on it answers calls. server_info: what it tells of itself."""

    pid: int
    instance_id: str
    server_info: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """A worker's answer to REPORT, and its last word."""

    report: Report
    ready: bool
    reason: str


@dataclass(frozen=True, slots=True)
class Message:
    """The supervisor's word each second: what every page that listens is sent."""

    text: str


REPORT = "report"
"""The supervisor's only question."""


@dataclass(frozen=True, slots=True)
class Question:
    """A worker's: one of the methods of `metrics.view.View` that await, and its argument."""

    method: str
    argument: str | bytes | None = None
