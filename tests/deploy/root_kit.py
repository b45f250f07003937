"""Builds the root of the image with the RUN lines of the Containerfile, without a container engine."""

import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.deploy.containerfile import CONTAINERFILE, ROOT, environment, values

KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
TARGETARCH = {"x86_64": "amd64", "aarch64": "arm64"}


def image_release() -> str:
    """The Debian that the Containerfile starts from."""
    (name,) = re.findall(r"^ARG BASE=\S+/debian:(\w+)-slim$", CONTAINERFILE.read_text(encoding="utf-8"), re.MULTILINE)
    return str(name)


def debian_sources(folder: Path) -> Path:
    """Sources for the image's release, from where this machine takes its own. Skips where that is no Debian."""
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        pytest.skip("the root is built of Debian's packages, and this is no Debian")
    own = platform.freedesktop_os_release().get("VERSION_CODENAME", "")
    targets = ["apt-get", "indextargets", "--format", "$(REPO_URI) $(RELEASE)", "Created-By: Packages"]
    done = subprocess.run([*targets, "Component: main"], capture_output=True, text=True, check=True, timeout=60)
    lines = []
    for line in sorted(set(done.stdout.splitlines())):
        uri, release = line.split()
        if release in (own, f"{own}-updates", f"{own}-security"):
            lines.append(f"deb [signed-by={KEYRING}] {uri} {release.replace(own, image_release())} main\n")
    if not lines:
        pytest.skip(f"no sources of Debian {own} are set up here, from which those of the image could be told")
    file = folder / "sources.list"
    file.write_text("".join(lines))
    return file


def build(root: Path, scratch: Path, extras: str, architecture: str = "") -> None:
    """Run the builder's RUN lines in the checkout, but for the one that installs its packages."""
    lines = [line for line in values("builder", "RUN") if "apt-get install" not in line]
    assert len(lines) == 4
    env = {
        **os.environ,
        **environment("builder"),
        "APT_SOURCES": str(debian_sources(scratch)),
        "BUILDER": str(scratch / "builder"),
        "IMAGE": str(root),
        "TARGETARCH": architecture or TARGETARCH[platform.machine()],
        "EXTRAS": extras,
    }
    for line in lines:
        done = subprocess.run(
            ["sh", "-c", line], cwd=ROOT, env=env, capture_output=True, text=True, timeout=600, check=False,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
        assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"


def size_mb(root: Path) -> float:
    """What the files hold, hard links counted once, in 10^6 bytes."""
    files = {file.lstat().st_ino: file.lstat() for file in root.rglob("*") if file.is_file() and not file.is_symlink()}
    return sum(each.st_size for each in files.values()) / 1e6
