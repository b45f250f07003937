"""Runs programs in the root of the image as a container engine does: read-only, unprivileged, without a network."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

HERE = Path(__file__).parent
_SYSTEM = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_USER = "--userspec=10001:10001"


def skip_where_impossible() -> None:
    for program in ("unshare", "nsenter", "setpriv", "ip", "chroot"):
        if shutil.which(program, path=_SYSTEM) is None:
            pytest.skip(f"{program} is missing: apt-get install util-linux iproute2")
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("namespaces are made by root on Linux")


def _sealed(root: Path, model: Path | None, command: tuple[str, ...]) -> list[str]:
    unshare = ["unshare", "--mount", "--net", "--ipc", "--uts", "--pid", "--fork", "--kill-child"]
    return [*unshare, "sh", str(HERE / "seal.sh"), str(root), str(model or ""), *command]


def _environment(of_the_image: Mapping[str, str]) -> dict[str, str]:
    """The image's, with a PATH behind it for what makes the namespaces."""
    return {**of_the_image, "PATH": f"{of_the_image['PATH']}:{_SYSTEM}"}


def run(
    root: Path, environment: Mapping[str, str], *command: str, model: Path | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        _sealed(root, model, command), env=_environment(environment), capture_output=True, text=True, timeout=60,
        check=False, stdin=subprocess.DEVNULL,
    )  # fmt: skip


@dataclass
class Container:
    """A running server in its namespaces; pid: as this machine knows it."""

    root: Path
    environment: Mapping[str, str]
    process: subprocess.Popen[str]
    log: Path
    pid: int

    def enter(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a program beside the server, as `docker exec` does."""
        enter = ["nsenter", "--target", str(self.pid), "--mount", "--net", "--ipc", "--uts", "--pid"]
        return subprocess.run(
            [*enter, "chroot", _USER, "--groups=", str(self.root), *command], env=_environment(self.environment),
            capture_output=True, text=True, timeout=60, check=False, stdin=subprocess.DEVNULL,
        )  # fmt: skip

    def wait_until_healthy(self) -> None:
        """AssertionError with the server's log where it ends first, or is not ready after three minutes."""
        deadline = time.monotonic() + 180
        while self.enter("mlis", "health").returncode != 0:
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()

    def stop(self) -> int:
        """The exit code after one SIGTERM."""
        os.kill(self.pid, signal.SIGTERM)
        return self.process.wait(timeout=60)

    def status(self, key: str) -> list[str]:
        """What the kernel says of the server's process, `Uid` for instance."""
        lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        return next(line.split()[1:] for line in lines if line.startswith(f"{key}:"))


def _child(pid: int) -> int | None:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(children[0]) if children else None


@contextlib.contextmanager
def container(
    root: Path, environment: Mapping[str, str], *command: str, model: Path | None, log: Path
) -> Iterator[Container]:
    with (
        log.open("w") as file,
        subprocess.Popen(
            _sealed(root, model, command), env=_environment(environment), stderr=file, stdout=file, text=True,
            stdin=subprocess.DEVNULL, start_new_session=True,
        ) as process,
    ):  # fmt: skip
        try:
            while (pid := _child(process.pid)) is None or Path(f"/proc/{pid}/root").readlink() != root:
                assert process.poll() is None, log.read_text()
                time.sleep(0.01)
            yield Container(root, environment, process, log, pid)
        finally:
            process.kill()
