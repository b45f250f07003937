"""Where a result was measured, and with what: facts that a reader needs to repeat it."""

import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import psutil

from ml_inference_server import __version__
from ml_inference_server.utils.cpu import available_cpus, cpu_name, instruction_set, quota_cpus
from ml_inference_server.utils.installation import checkout


def machine_facts() -> dict[str, Any]:
    """The machine that this process runs on; `cpus` is what the process may use, not what the host has.

    Results with the same `fingerprint` come from machines of the same kind.
    """
    lasting = {
        "cpu": cpu_name(),
        "instruction_set": instruction_set(),
        "cpus": available_cpus(),
        "cpu_quota": quota_cpus(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "os": platform.platform(),
    }
    digest = hashlib.sha256(json.dumps(lasting, sort_keys=True).encode()).hexdigest()
    return {**lasting, "fingerprint": digest[:12], "load_average_1min": round(os.getloadavg()[0], 2)}


def client_versions() -> dict[str, str]:
    """Versions of what takes part in the measuring; the server reports its own."""
    found = {"ml_inference_server": __version__, "python": platform.python_version()}
    for package in ("grpcio", "protobuf", "numpy", "datasets"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def git_facts(but_for: Sequence[str] = ()) -> dict[str, Any]:
    """The commit of the project's checkout and whether files differ from it; both None outside a checkout.

    but_for: files that may, from the root of the checkout.
    """
    commit = _git("rev-parse", "HEAD")
    changes = (
        _git("status", "--porcelain", "--untracked-files=no", "--", ".", *(f":!{path}" for path in but_for))
        if commit
        else None
    )
    return {"commit": commit or None, "modified": None if changes is None else bool(changes)}


def _git(*arguments: str) -> str | None:
    root = checkout()
    if root is None:
        return None
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
