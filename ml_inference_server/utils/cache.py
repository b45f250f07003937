"""Files that are expensive to make and safe to lose: one folder for each user, entries whole or not there at all.

Where that folder cannot be written, a temporary one stands in for it until the program ends. Whoever makes it hands it
to the processes that it starts and removes it, `remove_temporary`, as the last thing it does.
"""

import atexit
import contextlib
import errno
import hashlib
import json
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from ml_inference_server.utils.errors import ConfigError

log = logging.getLogger(__name__)

_MANIFEST = "manifest.json"
# Tells the processes that this one starts about the folder that stands in.
_STAND_IN = "MLIS_CACHE_STAND_IN"
_MIB = 1 << 20
# With less on the disk, something that was written is not all there: not every library says so.
_LEAST_FREE_BYTES = 1 * _MIB

# What this process has to remove: (its pid, for forks must not) the folder that stands in, and entries being made.
_temporary: set[tuple[int, Path]] = set()
_told: set[str] = set()


def cache_root() -> Path:
    """MLIS_CACHE_DIR, else the operating system's place for a user's caches; it may be one that cannot be written.

    ConfigError if MLIS_CACHE_DIR names the home of a user that there is not.
    """
    if configured := os.environ.get("MLIS_CACHE_DIR"):
        try:
            return Path(configured).expanduser()
        except RuntimeError:
            raise ConfigError(f"MLIS_CACHE_DIR is {configured}, and there is no such home folder") from None
    if sys.platform != "darwin" and (caches := os.environ.get("XDG_CACHE_HOME")):
        return Path(caches) / "ml_inference_server"
    try:
        home = Path.home()
    except RuntimeError:  # a user without a name, and no HOME
        home = Path("/nonexistent")
    return home / ("Library/Caches" if sys.platform == "darwin" else ".cache") / "ml_inference_server"


def writable_root(*, quiet: bool = False) -> Path:
    """`cache_root()`, or what stands in for it, which a warning says.

    A program that starts processes calls this first, quietly, so that what stands in is its own to remove.
    """
    root = cache_root()
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=root):
            return root
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _no_room(root) from error
        why = error.strerror
    stand_in = os.environ.get(_STAND_IN)
    if not stand_in:
        try:
            stand_in = os.environ[_STAND_IN] = tempfile.mkdtemp(prefix="mlis-")
        except OSError as error:
            raise ConfigError(
                f"neither the cache {root} ({why}) nor a temporary folder ({error.strerror}) can be written: set "
                f"MLIS_CACHE_DIR to a folder that can"
            ) from error
        _to_remove(Path(stand_in))
    if not quiet and stand_in not in _told:
        _told.add(stand_in)
        log.warning(
            "the cache %s cannot be written (%s): using %s, which is removed at the end; set MLIS_CACHE_DIR to a "
            "folder that stays",
            root,
            why,
            stand_in,
        )
    return Path(stand_in)


def working_folder(kind: str, name: str, *, room_bytes: int) -> Path:
    """A folder in the cache for a library that keeps its own files. ConfigError if so much does not find room there."""
    folder = writable_root() / kind / name
    folder.mkdir(parents=True, exist_ok=True)
    if not any(folder.iterdir()) and shutil.disk_usage(folder).free < room_bytes:
        raise _no_room(folder, at_least=room_bytes)
    return folder


def cached(kind: str, key: Mapping[str, object], make: Callable[[Path], None]) -> Path:
    """The folder that `make` filled for `key`, from the cache where it is there and undamaged.

    An entry appears under its name only when it is complete, so two processes may make the same one at once. A damaged
    entry is made again. ConfigError, with the remedy, where the disk is full.
    """
    for entry in _entries(kind, key):
        if _is_there(entry):
            if _is_whole(entry):
                return entry
            log.warning("cache entry %s is damaged: making it again", entry)
            shutil.rmtree(entry, ignore_errors=True)
    entry = writable_root() / _name(kind, key)
    with _draft_of(entry) as draft:
        make(draft)
        manifest = {"key": key, "files": {file.name: _sha256(file) for file in sorted(draft.iterdir())}}
        (draft / _MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
        try:
            draft.rename(entry)
        except OSError:
            # Another process was faster; its entry is as good as ours.
            if not _is_whole(entry):
                raise
    return entry


@contextlib.contextmanager
def _draft_of(entry: Path) -> Iterator[Path]:
    """A folder beside `entry` that is gone afterwards unless it was renamed. ConfigError if the disk is full."""
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=f".{entry.name}.", dir=entry.parent))
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _no_room(entry.parent) from error
        raise ConfigError(
            f"the cache {entry.parent} cannot be written: {error.strerror}; set MLIS_CACHE_DIR"
        ) from error
    mark = _to_remove(draft)
    try:
        yield draft
    except Exception as error:
        if _is_about_room(error) or shutil.disk_usage(entry.parent).free < _LEAST_FREE_BYTES:
            raise _no_room(entry.parent, at_least=_size_bytes(draft)) from error
        raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
        _temporary.discard(mark)


def _no_room(folder: Path, at_least: int = 0) -> ConfigError:
    needs = f", and more than {at_least // _MIB} MiB are needed" if at_least >= _MIB else ""
    free = shutil.disk_usage(folder if folder.exists() else folder.parent).free
    return ConfigError(
        f"the disk of the cache {folder} is full ({free // _MIB} MiB are free{needs}): make room there, or set "
        f"MLIS_CACHE_DIR to a folder with more"
    )


def _is_about_room(error: BaseException | None) -> bool:
    """Whether the disk, a quota or a limit on file sizes is behind `error`, which a library may have wrapped."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return True
        if os.strerror(errno.ENOSPC) in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def _size_bytes(folder: Path) -> int:
    with contextlib.suppress(OSError):
        return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return 0


def _to_remove(folder: Path) -> tuple[int, Path]:
    mark = os.getpid(), folder
    _temporary.add(mark)
    return mark


@atexit.register
def remove_temporary() -> None:
    """Remove what this process made for the time that it runs. To be called before `os._exit`."""
    for mark in list(_temporary):
        pid, folder = mark
        if pid == os.getpid():
            # Another thread may still write into it: under this name it finds it no more.
            gone = folder.with_name(f"{folder.name}.gone")
            with contextlib.suppress(OSError):
                folder.rename(gone)
            shutil.rmtree(gone, ignore_errors=True)
            _temporary.discard(mark)
            if os.environ.get(_STAND_IN) == str(folder):
                del os.environ[_STAND_IN]


def find(kind: str, key: Mapping[str, object]) -> Path | None:
    """The undamaged entry for `key`, or None."""
    return next((entry for entry in _entries(kind, key) if _is_whole(entry)), None)


def cached_files() -> set[Path]:
    """All files that are there, of whatever kind: those that are new later were made in between."""
    return {Path(folder) / name for root in _roots() for folder, _, names in os.walk(root) for name in names}


def _entries(kind: str, key: Mapping[str, object]) -> list[Path]:
    return [root / _name(kind, key) for root in _roots()]


def _roots() -> list[Path]:
    """Where an entry may be: a cache that cannot be written may have been filled before."""
    return [cache_root(), *map(Path, filter(None, [os.environ.get(_STAND_IN)]))]


def _name(kind: str, key: Mapping[str, object]) -> str:
    return f"{kind}/{hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]}"


def _is_there(entry: Path) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # in a folder that may not be read
        return False


def _is_whole(entry: Path) -> bool:
    try:
        files: dict[str, str] = json.loads((entry / _MANIFEST).read_text())["files"]
        return all(_sha256(entry / name) == digest for name, digest in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
