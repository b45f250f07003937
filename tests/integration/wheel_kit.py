"""The project's wheel, and environments that hold it and nothing else."""

import subprocess
import sys
from pathlib import Path

from tests.integration.script_copies import ROOT, clean_env


def build_wheel(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, timeout=120)
    (built,) = folder.glob("*.whl")
    return built


def install(wheel: Path, extra: str, environment: Path) -> Path:
    """Make `environment` with the core and one extra; the folder of its programs."""
    subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True, timeout=60)
    pip = [str(environment / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, f"{wheel}[{extra}]"], check=True, timeout=240, env=clean_env())
    return environment / "bin"


def run(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """A program outside of the checkout."""
    return subprocess.run(
        command, cwd=cwd, env=clean_env(HF_HUB_OFFLINE="1"), capture_output=True, text=True, timeout=120, check=False,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip
