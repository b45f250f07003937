"""What setup_env.sh leaves to Python: whether an environment has what it needs, and how .venv is made.

Needs the standard library alone; run by the Python that is asked about, and `build` by the one that .venv is made from:

    setup_env.py lacking FILE    print what of a requirements file is not installed as it asks, on one line
    setup_env.py current FILE    exit 0 if this Python is that of .venv, and .venv was made from FILE as it is now
    setup_env.py stamp FILE      note that it was
    setup_env.py build FILE      make .venv, or bring it up to date
"""

import contextlib
import fcntl
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
DISCARDED = ROOT / ".venv.discarded"
UNFINISHED = VENV / ".setup-unfinished"  # there while pip runs; a set-up that was cut short leaves it behind


class SetupFailed(Exception):
    """The environment cannot be made; the message says why."""

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def lacking(path: Path) -> Iterator[str]:
    """What of a requirements file is not installed as it asks."""
    try:
        from packaging import requirements
    except ImportError:  # then more than that is missing
        requirements = None  # type: ignore[assignment]
    for line in path.read_text(encoding="utf-8").splitlines():
        wanted = line.split("#")[0].strip()
        if wanted.startswith("-r"):
            yield from lacking(path.parent / wanted[2:].strip())
        elif name := re.match(r"[\w.-]+", wanted):
            try:
                version = metadata.version(name[0])
            except metadata.PackageNotFoundError:
                yield name[0]
                continue
            if requirements and not requirements.Requirement(wanted).specifier.contains(version, prereleases=True):
                yield f"{wanted} (it has {version})"


def stamp_of(name: str) -> Path:
    return VENV / f".env-stamp-{name}"


def fingerprint(name: str) -> str:
    """What this environment is built from; a stamp with the same text means that there is nothing to do."""
    files = dict.fromkeys(("requirements.txt", name))
    python = f"{sys.version_info[0]}.{sys.version_info[1]} {sys.prefix != sys.base_prefix}\n"
    return python + "".join((ROOT / file).read_text(encoding="utf-8") for file in files)


def is_current(name: str) -> bool:
    stamp = stamp_of(name)
    return not UNFINISHED.exists() and stamp.is_file() and stamp.read_text(encoding="utf-8") == fingerprint(name)


def write_stamps(name: str) -> None:
    for each in dict.fromkeys(("requirements.txt", name)):
        stamp_of(each).write_text(fingerprint(each), encoding="utf-8")


def succeeds(*command: str | Path, quiet: bool = False) -> bool:
    """Run a child, which holds the lock as well; what it prints goes to stderr."""
    stderr = subprocess.DEVNULL if quiet else sys.stderr
    return subprocess.run(command, stdout=stderr, stderr=stderr, close_fds=False, check=False).returncode == 0


@contextlib.contextmanager
def locked() -> Iterator[None]:
    """One script at a time builds. The kernel drops the lock with its last holder, so that it can never be stale.

    The children hold it too, in case only this process is killed.
    """
    if not os.access(ROOT, os.W_OK):
        raise SetupFailed(f"cannot write to {ROOT}, where the environment .venv has to be made", 2)
    with (ROOT / ".env-lock").open("w") as lock:
        os.set_inheritable(lock.fileno(), True)
        with contextlib.suppress(OSError):  # a file system without locks: go on without one
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                say("Another script is setting up .venv; waiting for it.")
                fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def discard_unfinished() -> None:
    """A cut installation may hold half a package that pip takes for a whole one, so it is made again from nothing.

    It is moved first: a removal that is cut short must not leave something that looks like an environment.
    """
    shutil.rmtree(DISCARDED, ignore_errors=True)
    if VENV.is_file():
        raise SetupFailed(f"{VENV} is a file, and the environment has to be made there: move it away", 2)
    if not VENV.exists() and not VENV.is_symlink():
        return
    is_sound = "import pip, sys; sys.exit(sys.prefix == sys.base_prefix or sys.version_info < (3, 11))"
    if not UNFINISHED.exists() and PYTHON.exists() and succeeds(PYTHON, "-I", "-c", is_sound, quiet=True):
        return
    say(".venv is unfinished or broken; making it again.")
    VENV.rename(DISCARDED)
    if DISCARDED.is_symlink():
        DISCARDED.unlink()
    else:
        shutil.rmtree(DISCARDED)


def build(name: str) -> None:
    with locked():
        if PYTHON.exists() and succeeds(PYTHON, "-I", __file__, "current", name, quiet=True):
            return
        discard_unfinished()
        if VENV.is_dir():
            say(f"Bringing .venv up to date with {name}; this happens once after each change of it.")
        else:
            version = f"{sys.version_info[0]}.{sys.version_info[1]}"
            say(f"Setting up .venv with Python {version} and the packages of {name}; this takes minutes, once only.")
            VENV.mkdir()
        UNFINISHED.touch()
        if not (VENV / "pyvenv.cfg").exists() and not succeeds(sys.executable, "-I", "-m", "venv", VENV):
            raise SetupFailed(f"making {VENV} failed; the reason stands above")
        pip = ("-m", "pip", "install", "--no-input", "--disable-pip-version-check")
        if not succeeds(PYTHON, "-I", *pip, "-r", ROOT / name):
            raise SetupFailed(f"installing {name} failed; the reason stands above. Run this script again to go on")
        succeeds(PYTHON, "-I", __file__, "stamp", name)
        UNFINISHED.unlink()
        say("Set-up of .venv done.")


def main(command: str, name: str) -> int:
    match command:
        case "lacking":
            print(", ".join(lacking(ROOT / name)))
        case "current":
            return not is_current(name)
        case "stamp":
            write_stamps(name)
        case "build":
            try:
                build(name)
            except SetupFailed as error:
                say(f"setup_env.py: {error}")
                return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
