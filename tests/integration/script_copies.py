"""Throw-away copies of the project's scripts, and how the tests run them."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = [*sorted(ROOT.glob("*.sh")), ROOT / ".ci" / "run"]

# Stands where the server and the runner stand, and tells what reached it.
ECHO = """
import json, os, sys
print(json.dumps({"argv": sys.argv[1:], "cwd": os.getcwd(), "pid": os.getpid(), "prefix": sys.prefix}))
sys.exit(7)
"""


def make_copy(folder: Path, requirements: str) -> Path:
    """A tree with the real scripts in a folder whose name holds a space."""
    copy = folder / "a clone"
    for name in ("server", "benchmark"):
        (copy / "ml_inference_server" / name).mkdir(parents=True)
    for script in (*SCRIPTS, ROOT / "setup_env.py"):
        target = copy / script.relative_to(ROOT)
        target.parent.mkdir(exist_ok=True)
        shutil.copy(script, target)
    (copy / "requirements.txt").write_text(requirements)
    (copy / "requirements-dev.txt").write_text("-r requirements.txt\n")
    (copy / "ml_inference_server" / "__init__.py").touch()
    (copy / "ml_inference_server" / "benchmark" / "__init__.py").touch()
    (copy / "ml_inference_server" / "main.py").write_text(ECHO)
    (copy / "ml_inference_server" / "benchmark" / "runner.py").write_text(ECHO)
    return copy


def clean_env(**extra: str) -> dict[str, str]:
    """The caller's environment with no environment active, and with the Python of this test found first."""
    dropped = ("VIRTUAL_ENV", "CONDA_PREFIX", "CONDA_DEFAULT_ENV", "PYTHONPATH")
    env = {key: value for key, value in os.environ.items() if key not in dropped}
    env["PATH"] = f"{sys.base_prefix}/bin:{env['PATH']}"
    return env | extra


def run(
    script: Path, *arguments: str, cwd: Path, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(script), *arguments],
        cwd=cwd,
        env=clean_env() if env is None else env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )


@contextmanager
def started(script: Path, *arguments: str, cwd: Path) -> Iterator[subprocess.Popen[str]]:
    """The script while it runs; it is ended even when the test fails."""
    with subprocess.Popen(
        [str(script), *arguments],
        cwd=cwd,
        env=clean_env(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.terminate()


def bare_venv(folder: Path) -> Path:
    """An environment with nothing in it, not even pip."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True, timeout=60)
    return folder
