"""Files that our programs replace: whole or not at all, and never in the place of something that is no file."""

import contextlib
import errno
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ml_inference_server.utils.errors import ConfigError

_OTHER_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
}


def replaceable(path: Path, name: str = "") -> Path:
    """The file that stands, or will stand, at `path`: where a link leads to. ConfigError if it cannot be replaced.

    name: what the user calls it, such as a flag; the error begins with it.
    """
    shown = f"{name} {path}" if name else str(path)
    try:
        real = path.resolve() if path.is_symlink() else path
        kind = _other_kind(real)
    except (OSError, RuntimeError) as error:  # RuntimeError: a link that leads to itself
        reason = error.strerror if isinstance(error, OSError) else "the link leads in a circle"
        raise ConfigError(f"{shown}: cannot be written: {reason}") from None
    if kind:
        raise ConfigError(f"{shown}: this is {kind}, and an ordinary file is needed, which is replaced as a whole")
    return real


def writable(path: Path, name: str) -> Path:
    """As `replaceable`, and its folder can be written to: refused now rather than when the content is there."""
    real = replaceable(path, name)
    if not os.access(real.parent, os.W_OK | os.X_OK):
        raise ConfigError(f"{name} {path}: nothing can be written in {real.parent}")
    return real


def _other_kind(path: Path) -> str:
    """What stands at `path` if it is no ordinary file; "" if it is one, or nothing stands there."""
    try:
        mode = path.lstat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return ""
    return "" if stat.S_ISREG(mode) else _OTHER_KINDS.get(stat.S_IFMT(mode), "no file")


def replace_file(path: Path, content: str | bytes) -> None:
    """Write `content` to `path` whole or not at all, so that nobody reads half of it. OSError names `path`."""
    write_beside(path, content).replace(path)


def write_beside(path: Path, content: str | bytes) -> Path:
    """A temporary file in the folder of `path`, complete and on the disk, that may replace it. OSError names `path`."""
    name = ""
    try:
        if not path.is_symlink() and (kind := _other_kind(path)):
            raise OSError(errno.EINVAL, f"this is {kind}, not an ordinary file")
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(descriptor)
        Path(name).chmod(0o644)  # mkstemp's own is for secrets
    except OSError as error:
        if name:
            Path(name).unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error
    return Path(name)


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """An empty folder beside `path` to fill, which takes its place at the end, and is gone if that is not reached.

    What stood at `path` is removed once the new one stands there.
    """
    draft = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    old = draft.with_suffix(".old")
    try:
        yield draft
        for each in [*draft.rglob("*"), draft]:
            _to_disk(each)
        draft.chmod(0o755)  # mkdtemp's own is for secrets
        if path.exists():
            path.rename(old)
        try:
            draft.rename(path)
        except OSError:
            if old.exists():
                old.rename(path)
            raise
        _to_disk(path.parent)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
