"""Plants a bug in a copy of the project, so that tests can show that they would see it."""

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.scoreboard.by_tests import ROOT

# What tests read besides the two trees.
_FILES = ("pyproject.toml", "README.md")


class NotPlanted(Exception):
    """The text that a bug replaces is not there, or there twice: the code has changed, and the bug must follow it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Edit:
    """path: from the root of the project. old: stands there exactly once. Line breaks at their ends do not count."""

    path: str
    old: str
    new: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Bug:
    """name: what is wrong, in words. seen_by: the test that has to fail."""

    name: str
    edits: tuple[Edit, ...]
    seen_by: str


@contextmanager
def copied_project() -> Iterator[Path]:
    """The root of a copy of the package and of the tests, which is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="planted-") as folder:
        root = Path(folder)
        ignored = shutil.ignore_patterns("__pycache__", "*.pyc", "experiments")
        for tree in ("ml_inference_server", "tests"):
            shutil.copytree(ROOT / tree, root / tree, ignore=ignored)
        shutil.copytree(ROOT / "ml_inference_server/experiments", root / "ml_inference_server/experiments")
        for name in _FILES:
            shutil.copy(ROOT / name, root / name)
        yield root


@contextmanager
def planted(root: Path, edits: Sequence[Edit]) -> Iterator[None]:
    """The copy in `root` with the edits made, and as it was afterwards. NotPlanted."""
    before: dict[Path, str] = {}
    try:
        for edit in edits:
            path = root / edit.path
            text = path.read_text(encoding="utf-8")
            old, new = edit.old.strip("\n"), edit.new.strip("\n")
            if (count := text.count(old)) != 1:
                raise NotPlanted(f"{edit.path} has this {count} times, and not once: {old.strip()!r}")
            before.setdefault(path, text)
            path.write_text(text.replace(old, new), encoding="utf-8")
        yield
    finally:
        for path, text in before.items():
            path.write_text(text, encoding="utf-8")
