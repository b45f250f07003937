"""The result of one benchmark: one JSON document that holds everything, and its files on disk."""

import json
import os
import shlex
import sys
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ml_inference_server.benchmark.channel import CHANNEL_OPTIONS
from ml_inference_server.benchmark.dataset import Dataset
from ml_inference_server.benchmark.machine import client_versions, git_facts, machine_facts
from ml_inference_server.utils.config import Settings
from ml_inference_server.utils.errors import EXIT_FAILED_RUN, EXIT_OK, ConfigError, StartError

DOCS = Path(__file__).resolve().parents[1] / "docs"
SCHEMA = 1


class ResultsNotWritten(StartError):
    """The disk is full or the folder is not writable; an earlier result is still intact."""

    exit_code = EXIT_FAILED_RUN


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def new_document(kind: str, settings: Settings, dataset: Dataset, command: Sequence[str]) -> dict[str, Any]:
    """A document without servers and runs. `kind` is single or suite; `command` is what repeats it."""
    return {
        "schema": SCHEMA,
        "kind": kind,
        "name": settings.name,
        "description": settings.description,
        "command": shlex.join(command),
        "started_at": now(),
        "finished_at": None,
        "interrupted": False,
        "planned_rows": 0,
        "client": {"settings": settings.model_dump(), "channel_options": dict(CHANNEL_OPTIONS)},
        "dataset": dataset.facts(),
        "machine": machine_facts(),
        "versions": client_versions(),
        "git": git_facts(),
        "servers": [],
        "not_started": [],
        "runs": [],
    }


def exit_code(document: dict[str, Any]) -> int:
    """0 if every planned row was measured without a failure, else 5; an interruption is the caller's business."""
    sound = all(run["status"] == "valid" for run in document["runs"])
    return EXIT_OK if sound and len(document["runs"]) == document["planned_rows"] else EXIT_FAILED_RUN


def encode(document: dict[str, Any]) -> str:
    """Indented for people, but each run, with its raw latencies, on one line."""
    head = json.dumps({key: value for key, value in document.items() if key != "runs"}, indent=2, ensure_ascii=False)
    runs = ",\n    ".join(json.dumps(run, ensure_ascii=False) for run in document["runs"])
    return head.removesuffix("\n}") + ',\n  "runs": [' + (f"\n    {runs}\n  " if runs else "") + "]\n}\n"


def output_paths(output: str | None, json_output: str | None, default: Path) -> tuple[Path, Path]:
    """(Markdown, JSON). ConfigError, before anything is measured, if they cannot be written."""
    markdown = Path(output) if output else default
    data = Path(json_output) if json_output else markdown.with_suffix(".json")
    if markdown == data:
        raise ConfigError(f"--output and --json are both {markdown}: give the Markdown another name")
    for path in (markdown, data):
        if path.exists() and not path.is_file():
            raise ConfigError(f"{path}: results need an ordinary file, and this is not one")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"{path.parent}: this folder cannot be made: {error.strerror}") from None
        if not os.access(path.parent, os.W_OK):
            raise ConfigError(f"{path.parent}: results cannot be written there: no permission")
    return markdown, data


def write_results(texts: dict[Path, str]) -> None:
    """Write all of them or none; a result that is already there is kept under its own time of writing."""
    written: dict[Path, Path] = {}
    try:
        for path, text in texts.items():
            written[path] = _write_beside(path, text)
        _keep_earlier(list(texts))
        for path, temporary in written.items():
            temporary.replace(path)
    except OSError as error:
        for temporary in written.values():
            temporary.unlink(missing_ok=True)
        raise ResultsNotWritten(f"the results cannot be written: {error.strerror}: {error.filename}") from None


def _write_beside(path: Path, text: str) -> Path:
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(descriptor)
        Path(name).chmod(0o644)  # mkstemp's own is for secrets
    except OSError as error:
        Path(name).unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error
    return Path(name)


def _keep_earlier(paths: Sequence[Path]) -> None:
    """Rename what stands at `paths`, all with one stamp, to <name>.<stamp><suffix>."""
    there = [path for path in paths if path.exists()]
    if not there:
        return
    written_at = datetime.fromtimestamp(max(path.stat().st_mtime for path in there), UTC)
    stamp = base = written_at.strftime("%Y%m%dT%H%M%SZ")
    number = 1
    while any(_kept(path, stamp).exists() for path in there):
        number += 1
        stamp = f"{base}-{number}"
    for path in there:
        path.rename(_kept(path, stamp))
        print(f"The earlier result is kept as {_kept(path, stamp)}", file=sys.stderr)


def _kept(path: Path, stamp: str) -> Path:
    return path.with_name(f"{path.stem}.{stamp}{path.suffix}")
