"""The result of one benchmark: a JSON document, the raw records beside it, and how both reach the disk."""

import contextlib
import fcntl
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from ml_inference_server.benchmark.load import records as raw_records
from ml_inference_server.benchmark.load.channel import CHANNEL_OPTIONS
from ml_inference_server.benchmark.load.dataset import Dataset
from ml_inference_server.benchmark.load.records import Records
from ml_inference_server.benchmark.result.document import (
    ClientFacts,
    DatasetFacts,
    Document,
    Git,
    HighestRate,
    Machine,
    MeasuredServer,
    NotStarted,
    Purpose,
    Run,
    Start,
    Status,
)
from ml_inference_server.benchmark.result.stored import to_json
from ml_inference_server.benchmark.target.machine import client_versions, git_facts, machine_facts
from ml_inference_server.utils.config import Settings
from ml_inference_server.utils.errors import EXIT_FAILED_RUN, EXIT_OK, ConfigError, StartError
from ml_inference_server.utils.files import replace_file, replaceable, write_beside
from ml_inference_server.utils.layers import command_to_repeat

# Less than this on the disk, and there is no point in measuring.
_LEAST_FREE_BYTES = 8 << 20
# Saving what was measured so far may take this share of the time, so that long runs do not save all the time.
_SAVING_SHARE = 0.05


class ResultsNotWritten(StartError):
    """The disk is full or the folder is not writable; an earlier result is still intact."""

    exit_code = EXIT_FAILED_RUN


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def new_document(
    kind: Literal["single", "suite"], settings: Settings, dataset: Dataset, command: Sequence[str]
) -> Document:
    """A document without servers and runs; `command` is what repeats it."""
    return Document(
        kind=kind,
        name=settings.name,
        description=settings.description,
        command=command_to_repeat(command),
        started_at=now(),
        finished_at=None,
        interrupted=False,
        planned_rows=0,
        client=ClientFacts(settings=settings.model_dump(), channel_options=dict(CHANNEL_OPTIONS)),
        dataset=DatasetFacts(**dataset.facts()),
        machine=Machine(**machine_facts()),
        versions=client_versions(),
        git=Git(**git_facts()),
        servers=[],
        not_started=[],
        slo=[],
        runs=[],
    )


def exit_code(document: Document) -> int:
    """0 if every planned row was measured without a failure, else 5; an interruption is the caller's business.

    The probes of a search for the highest rate are meant to fail, and a row that fails its quality gate was measured.
    """
    sound = all(run.status is Status.VALID for run in document.rows)
    return EXIT_OK if sound and len(document.rows) == document.planned_rows else EXIT_FAILED_RUN


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


class Result:
    """A document while it grows. Each row is saved as it is measured, under the names of `files.partial`."""

    def __init__(self, document: Document, files: ResultFiles, raw: dict[str, Records] | None = None) -> None:
        self.document = document
        self.files = files
        self.raw = raw or {}
        self._saved_s = 0.0
        self._saving_s = 0.0
        self._warned = False

    def plan(self, rows: int) -> None:
        """So many more rows are to come; of a negative number, so many will not."""
        self.set(planned_rows=self.document.planned_rows + rows)

    def set(self, **fields: Any) -> None:
        """Go on with a document that has other values of these fields."""
        self.document = self.document.model_copy(update=fields)

    def next_raw(self) -> str:
        """The name for the records of the next run."""
        return f"run_{len(self.document.runs) + 1:04d}"

    def add(self, run: Run, records: Records) -> None:
        self.raw[run.raw] = records
        self.set(runs=[*self.document.runs, run])
        started_s = time.monotonic()
        if self._saving_s <= _SAVING_SHARE * (started_s - self._saved_s):
            self.save()
            self._saved_s = time.monotonic()
            self._saving_s = self._saved_s - started_s

    def call_probes(self, runs: Sequence[Run]) -> None:
        """They were to confirm a rate that did not hold."""
        names = {run.raw for run in runs}
        probe = {"slo": Purpose.PROBE}
        self.set(runs=[r.model_copy(update=probe) if r.raw in names else r for r in self.document.runs])

    def server(self, variant: str) -> MeasuredServer | None:
        return next((server for server in self.document.servers if server.variant == variant), None)

    def add_server(self, server: MeasuredServer) -> None:
        self.set(servers=[*self.document.servers, server])

    def about_server(self, variant: str, **found: Any) -> None:
        """What was found out about a server that is there: quality, in_process, died."""
        servers = self.document.servers
        self.set(servers=[s.model_copy(update=found) if s.variant == variant else s for s in servers])

    def add_start(self, variant: str, start: Start) -> None:
        server = self.server(variant)
        if server is not None:
            self.about_server(variant, starts=[*server.starts, start])

    def refuse(self, variant: str, exit_code: int, message: str) -> None:
        """A variant whose server did not run."""
        refused = NotStarted(variant=variant, exit_code=exit_code, message=message)
        self.set(not_started=[*self.document.not_started, refused])

    def searched(self, found: HighestRate) -> None:
        """What a search has found so far; in place of what it said before."""

        def search(entry: HighestRate) -> tuple[str, int]:
            return entry.variant, entry.batch_size

        self.set(slo=[*(other for other in self.document.slo if search(other) != search(found)), found])

    def save(self) -> None:
        """A full disk is no reason to lose what can still be measured: it is told once, and again at the end."""
        partial = self.files.partial
        try:
            for path, content in (
                (partial.raw, raw_records.encode(self.raw)),
                (partial.data, to_json(self.document.model_copy(update={"interrupted": True})).encode()),
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
