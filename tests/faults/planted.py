"""An exception at a chosen line of the server's own code, once, in this process."""

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple


class Line(NamedTuple):
    """file: its name without the folder. number: of the line; function: that it stands in."""

    file: str
    number: int
    function: str

    def __str__(self) -> str:
        return f"{self.file}:{self.number} ({self.function})"


class Planted(RuntimeError):
    """What is raised there."""


@dataclass
class Planter:
    """Notes the lines of `files` that this thread runs, and raises at `target` when it comes there for the first time.

    A line raises before it has done anything.
    """

    files: frozenset[Path]
    target: Line | None = None
    lines: dict[Line, None] = field(default_factory=dict)  # in the order in which they were met
    has_raised: bool = False

    def __post_init__(self) -> None:
        self._names = {str(file) for file in self.files}

    def _global(self, frame: FrameType, event: str, argument: Any) -> Any:
        return self._local if frame.f_code.co_filename in self._names else None

    def _local(self, frame: FrameType, event: str, argument: Any) -> Any:
        if event == "line":
            code = frame.f_code
            line = Line(Path(code.co_filename).name, frame.f_lineno, code.co_name)
            self.lines[line] = None
            if line == self.target and not self.has_raised:
                self.has_raised = True
                raise Planted(f"planted at {line}")
        return self._local

    @contextlib.contextmanager
    def at_work(self) -> Iterator[None]:
        before = sys.gettrace()
        sys.settrace(self._global)
        try:
            yield
        finally:
            sys.settrace(before)
