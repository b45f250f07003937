"""The result of one benchmark: a JSON document, the raw records beside it, and how both reach the disk."""

import contextlib
import fcntl
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ml_inference_server.benchmark.load import records as raw_records
from ml_inference_server.benchmark.load.channel import CHANNEL_OPTIONS
from ml_inference_server.benchmark.load.dataset import Dataset
from ml_inference_server.benchmark.load.records import Records
from ml_inference_server.benchmark.target.machine import client_versions, git_facts, machine_facts
from ml_inference_server.utils.config import Settings
from ml_inference_server.utils.errors import EXIT_FAILED_RUN, EXIT_OK, ConfigError, StartError
from ml_inference_server.utils.files import replace_file, replaceable, write_beside
from ml_inference_server.utils.layers import command_to_repeat

SCHEMA = 2
# Less than this on the disk, and there is no point in measuring.
_LEAST_FREE_BYTES = 8 << 20
# Saving what was measured so far may take this share of the time, so that long runs do not save all the time.
_SAVING_SHARE = 0.05


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
        "command": command_to_repeat(command),
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
        "slo": [],
        "runs": [],
    }


def exit_code(document: dict[str, Any]) -> int:
    """0 if every planned row was measured without a failure, else 5; an interruption is the caller's business.

    The probes of a search for the highest rate are meant to fail, and a row that fails its quality gate was measured.
    """
    rows = [run for run in document["runs"] if run["slo"] != "probe"]
    sound = all(run["status"] == "valid" for run in rows)
    return EXIT_OK if sound and len(rows) == document["planned_rows"] else EXIT_FAILED_RUN


def encode(document: Mapping[str, Any]) -> str:
    """Indented for people, but each run on one line."""
    rest = {key: value for key, value in document.items() if key != "runs"}
    head = json.dumps(rest, indent=2, ensure_ascii=False, allow_nan=False)
    runs = ",\n    ".join(json.dumps(run, ensure_ascii=False, allow_nan=False) for run in document["runs"])
    return head.removesuffix("\n}") + ',\n  "runs": [' + (f"\n    {runs}\n  " if runs else "") + "]\n}\n"


def read_document(path: Path) -> dict[str, Any]:
    """A result's or a summary's JSON. ConfigError if it is none, or of another version."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; a result is the .json beside its Markdown") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: not the JSON of a result: {error}") from None
    if not isinstance(content, dict) or not {"schema", "kind", "runs"} <= content.keys():
        raise ConfigError(f"{path}: not the JSON of a result of this benchmark")
    if content["schema"] != SCHEMA:
        raise ConfigError(f"{path}: has schema {content['schema']}, and this version reads {SCHEMA}: measure again")
    return content


@dataclass(frozen=True)
class ResultFiles:
    """Where one result goes: the report, everything as JSON, the raw records, the plots."""

    markdown: Path
    data: Path

    @property
    def raw(self) -> Path:
        return self.data.with_suffix(".npz")

    @property
    def plot(self) -> Path:
        return self.markdown.with_suffix(".svg")

    @property
    def server_log(self) -> Path:
        return self.markdown.with_name(f"{self.markdown.stem}_server.log")

    @property
    def lock(self) -> Path:
        return self.data.with_name(f".{self.data.name}.lock")

    @property
    def partial(self) -> "ResultFiles":
        """What is saved while the benchmark still runs."""
        return ResultFiles(
            self.markdown.with_name(f"{self.markdown.stem}.partial.md"),
            self.data.with_name(f"{self.data.stem}.partial.json"),
        )

    def all_names(self) -> list[Path]:
        """Everything that a benchmark may write or replace."""
        partial = self.partial
        kept = [self.markdown, self.data, self.raw, self.plot, self.server_log]
        return [*kept, self.lock, partial.data, partial.raw]


def result_files(output: str | None, json_output: str | None, default: Path) -> ResultFiles:
    """ConfigError, before anything is measured, if they cannot be written."""
    markdown = replaceable(Path(output) if output else default)
    data = replaceable(Path(json_output) if json_output else markdown.with_suffix(".json"))
    if markdown == data:
        raise ConfigError(f"--output and --json are both {markdown}: give the Markdown another name")
    files = ResultFiles(markdown, data)
    for path in files.all_names():
        replaceable(path)
    for path in (files.markdown, files.data):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"{path.parent}: this folder cannot be made: {error.strerror}") from None
        if not os.access(path.parent, os.W_OK):
            raise ConfigError(f"{path.parent}: results cannot be written there: no permission")
        free = shutil.disk_usage(path.parent).free
        if free < _LEAST_FREE_BYTES:
            raise ResultsNotWritten(f"{path.parent}: only {free >> 10} KiB are free there: make room first")
    return files


@contextlib.contextmanager
def locked(files: ResultFiles) -> Iterator[None]:
    """Keep a second benchmark from writing the same results at the same time. ConfigError if one does already."""
    path = files.lock
    with path.open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise ConfigError(
                f"another benchmark (process {lock.read().strip() or 'unknown'}) is writing {files.data} at this"
                " moment: wait for it, or write elsewhere with --output"
            ) from None
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


@dataclass
class Result:
    """A document while it grows. Each row is saved as it is measured, under the names of `files.partial`."""

    document: dict[str, Any]
    files: ResultFiles
    raw: dict[str, Records] = field(default_factory=dict)
    _saved_s: float = 0.0
    _saving_s: float = 0.0
    _warned: bool = False

    def add(self, run: dict[str, Any], records: Records) -> None:
        run["raw"] = f"run_{len(self.document['runs']) + 1:04d}"
        self.raw[run["raw"]] = records
        self.document["runs"].append(run)
        started_s = time.monotonic()
        if self._saving_s <= _SAVING_SHARE * (started_s - self._saved_s):
            self.save()
            self._saved_s = time.monotonic()
            self._saving_s = self._saved_s - started_s

    def save(self) -> None:
        """A full disk is no reason to lose what can still be measured: it is told once, and again at the end."""
        partial = self.files.partial
        try:
            for path, content in (
                (partial.raw, raw_records.encode(self.raw)),
                (partial.data, encode({**self.document, "interrupted": True}).encode()),
            ):
                replace_file(path, content)
        except OSError as error:
            if not self._warned:
                print(f"Warning: what was measured so far cannot be saved: {error.strerror}", file=sys.stderr)
            self._warned = True

    def forget_partial(self) -> None:
        for path in (self.files.partial.raw, self.files.partial.data):
            path.unlink(missing_ok=True)


def keep_partial(files: ResultFiles) -> None:
    """A benchmark that was killed left its rows behind: give them a name that the next one does not overwrite."""
    there = [path for path in (files.partial.data, files.partial.raw) if path.exists()]
    if there:
        keep_earlier(there)
        print("It is what an earlier benchmark had measured when it was killed.", file=sys.stderr)


def write_results(contents: Mapping[Path, str | bytes]) -> None:
    """Write all of them or none; a result that is already there is kept under its own time of writing."""
    written: dict[Path, Path] = {}
    try:
        for path, content in contents.items():
            written[path] = write_beside(path, content)
        keep_earlier(list(contents))
        for path, temporary in written.items():
            temporary.replace(path)
    except OSError as error:
        for temporary in written.values():
            temporary.unlink(missing_ok=True)
        raise ResultsNotWritten(f"the results cannot be written: {error.strerror}: {error.filename}") from None


def rescue(contents: Mapping[Path, str | bytes]) -> Path | None:
    """Write what found no room where it belongs into a temporary folder; None if there is no room either."""
    try:
        folder = Path(tempfile.mkdtemp(prefix="ml_inference_server-results-"))
        for path, content in contents.items():
            (folder / path.name).write_bytes(content.encode() if isinstance(content, str) else content)
    except OSError:
        return None
    return folder


def keep_earlier(paths: Sequence[Path]) -> None:
    """Rename what stands at `paths`, all with one stamp, to <name>.<stamp><suffix>; links among them follow."""
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
        if path.suffix == ".md":
            text = path.read_text(encoding="utf-8")
            for other in there:
                text = text.replace(f"({other.name})", f"({_kept(other, stamp).name})")
            replace_file(_kept(path, stamp), text)
            path.unlink()
        else:
            path.rename(_kept(path, stamp))
        print(f"The earlier result is kept as {_kept(path, stamp)}", file=sys.stderr)


def _kept(path: Path, stamp: str) -> Path:
    return path.with_name(f"{path.stem}.{stamp}{path.suffix}")
