"""Files that are dear to make and safe to lose: one folder for each user, entries whole or not there at all."""

import atexit
import hashlib
import json
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

log = logging.getLogger(__name__)

_MANIFEST = "manifest.json"


def cache_root() -> Path:
    """MLIS_CACHE_DIR, else the operating system's place for a user's caches."""
    if configured := os.environ.get("MLIS_CACHE_DIR"):
        return Path(configured).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library/Caches/ml_inference_server"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ml_inference_server"


def cached(kind: str, key: Mapping[str, object], make: Callable[[Path], None]) -> Path:
    """The folder that `make` filled for `key`, from the cache where it is there and undamaged.

    An entry appears under its name only when it is complete, so two processes may make the same one at once. A damaged
    entry is made again. Where the cache cannot be written, the folder is a temporary one and a warning says so.
    """
    entry = _entry(kind, key)
    if entry.is_dir():
        if _is_whole(entry):
            return entry
        log.warning("cache entry %s is damaged: making it again", entry)
        shutil.rmtree(entry, ignore_errors=True)
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=f".{entry.name}.", dir=entry.parent))
    except OSError as error:
        draft = Path(tempfile.mkdtemp(prefix="mlis-"))
        atexit.register(shutil.rmtree, draft, ignore_errors=True)
        log.warning("the cache %s cannot be written (%s): using %s", entry.parent, error.strerror, draft)
        make(draft)
        return draft
    try:
        make(draft)
        manifest = {"key": key, "files": {file.name: _sha256(file) for file in sorted(draft.iterdir())}}
        (draft / _MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
        try:
            draft.rename(entry)
        except OSError:
            # Another process was faster; its entry is as good as ours.
            if not _is_whole(entry):
                raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return entry


def find(kind: str, key: Mapping[str, object]) -> Path | None:
    """The undamaged entry for `key`, or None."""
    entry = _entry(kind, key)
    return entry if entry.is_dir() and _is_whole(entry) else None


def _entry(kind: str, key: Mapping[str, object]) -> Path:
    return cache_root() / kind / hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]


def _is_whole(entry: Path) -> bool:
    try:
        files: dict[str, str] = json.loads((entry / _MANIFEST).read_text())["files"]
        return all(_sha256(entry / name) == digest for name, digest in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
