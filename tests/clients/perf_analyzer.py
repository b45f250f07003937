"""Triton's load generator, perf_analyzer, on a Debian whose glibc is too old for it: with the glibc of a newer one.

    python -m tests.clients.perf_analyzer -i grpc -u localhost:50051 -m MODEL ...

runs it with these arguments. What it takes is fetched once, into .venv-clients/perf_analyzer: the wheel from PyPI, and
the libraries out of Debian's packages, which apt checks by their signatures. Nothing is installed on the machine.
"""

import os
import platform
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from tests.clients.environments import FOLDER, locked

VERSION = "2.60.0"  # its wheel and the libraries below go together
SUITE = "trixie"
LIBRARIES = ("libc6", "libgcc-s1", "libssl3t64", "libstdc++6", "libzstd1", "zlib1g")
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
STEP_LIMIT_S = 120


class PerfAnalyzerMissing(Exception):
    """It cannot be had here; the message says why."""


def perf_analyzer() -> list[str]:
    """The command, to which arguments are added."""
    folder = FOLDER / f"perf_analyzer-{VERSION}-{SUITE}"
    with locked():
        if not folder.is_dir():
            unfinished = folder.with_suffix(".unfinished")
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir()
            _fetch(unfinished)
            unfinished.rename(folder)
    libraries = folder / "root" / "usr" / "lib" / "x86_64-linux-gnu"
    program = folder / "perf_analyzer" / "bin" / "perf_analyzer"
    return [str(libraries / "ld-linux-x86-64.so.2"), "--library-path", str(libraries), str(program)]


def _fetch(folder: Path) -> None:
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        raise PerfAnalyzerMissing("perf_analyzer is published for Linux on x86-64 alone")
    if not (shutil.which("apt-get") and shutil.which("dpkg-deb") and KEYRING.is_file()):
        raise PerfAnalyzerMissing("perf_analyzer needs libraries that are taken from Debian, and this is no Debian")
    print("Fetching perf_analyzer and the libraries it needs, once", file=sys.stderr, flush=True)
    wheel_for = ["--only-binary=:all:", "--platform", "manylinux_2_38_x86_64", "--python-version", "3.11"]
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps", *wheel_for]
    _run(folder, *pip, f"perf-analyzer=={VERSION}")
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    wheel.unlink()
    (folder / "perf_analyzer" / "bin" / "perf_analyzer").chmod(0o755)
    _fetch_libraries(folder)


def _fetch_libraries(folder: Path) -> None:
    """Through an apt that knows one suite and nothing of what is installed, from where this machine gets its own."""
    apt = folder / "apt"
    for name in ("lists/partial", "archives/partial"):
        (apt / name).mkdir(parents=True)
    (apt / "status").touch()
    targets = _run(apt, "apt-get", "indextargets", "--format", "$(COMPONENT) $(REPO_URI)", "Created-By: Packages")
    mirrors = [line.split()[1] for line in targets.splitlines() if line.startswith("main ")]
    mirror = next((each for each in mirrors if each.rstrip("/").endswith("/debian")), None)
    if mirror is None:
        raise PerfAnalyzerMissing("apt on this machine knows no mirror of Debian that has the libraries")
    (apt / "sources.list").write_text(f"deb [arch=amd64 signed-by={KEYRING}] {mirror} {SUITE} main\n", encoding="utf-8")
    options = {
        "Dir::Etc::sourcelist": apt / "sources.list",
        "Dir::Etc::sourceparts": "-",
        "Dir::State::lists": apt / "lists",
        "Dir::State::status": apt / "status",
        "Dir::Cache": apt,
        "APT::Sandbox::User": "root",
    }
    command = ["apt-get", "-qq", *(part for name, value in options.items() for part in ("-o", f"{name}={value}"))]
    _run(apt, *command, "update")
    _run(apt, *command, "download", *LIBRARIES)
    packages = sorted(apt.glob("*.deb"))
    if len(packages) != len(LIBRARIES):
        raise PerfAnalyzerMissing(f"Debian's {SUITE} gave {len(packages)} of {len(LIBRARIES)} libraries")
    for package in packages:
        _run(apt, "dpkg-deb", "-x", str(package), str(folder / "root"))
    shutil.rmtree(apt)


def _run(folder: Path, *command: str) -> str:
    """What it prints; PerfAnalyzerMissing with its last line where it fails."""
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=STEP_LIMIT_S, check=False)
    except subprocess.TimeoutExpired:
        raise PerfAnalyzerMissing(f"{command[0]} took longer than {STEP_LIMIT_S} s to fetch perf_analyzer") from None
    if done.returncode:
        last = (done.stderr.strip() or "it said nothing").splitlines()[-1]
        raise PerfAnalyzerMissing(f"{Path(command[0]).name} could not fetch perf_analyzer: {last}")
    return done.stdout


def main() -> None:
    try:
        command = [*perf_analyzer(), *sys.argv[1:]]
    except PerfAnalyzerMissing as missing:
        raise SystemExit(f"{missing}.") from None
    os.execv(command[0], command)  # noqa: S606 - the arguments are those of whoever calls


if __name__ == "__main__":
    main()
