"""Builds the Containerfile by a real builder and runs what it built: the long form of test_container_root.py.

    python -m tests.deploy.image [--architectures amd64,arm64] [--model FOLDER] [--scratch FOLDER]

Takes root, and Debian's buildah and mmdebstrap. The base image is put together from Debian's packages, since there may
be no registry of images here. The image of this machine's own architecture is run as an engine runs it with --read-only
--network none --cap-drop all --user 10001:10001; FOLDER, as `mlis export` writes it, is then in the image.
"""

import argparse
import contextlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tests.deploy import root_kit, sealed
from tests.deploy.containerfile import CONTAINERFILE, ROOT

BASE = "localhost/base"
CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")
# e_machine of the ELF header.
MACHINES = {"amd64": 0x3E, "arm64": 0xB7}


class Builder:
    """buildah with storage of its own."""

    def __init__(self, scratch: Path) -> None:
        self._scratch = scratch
        self._store = ["--root", str(scratch / "storage"), "--runroot", str(scratch / "run"), "--storage-driver", "vfs"]

    def run(self, *arguments: str) -> str:
        done = subprocess.run(["buildah", *self._store, *arguments], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise SystemExit(f"buildah {arguments[0]} failed:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
        return done.stdout.strip()

    def make_base(self) -> None:
        """A Debian of the image's release, and what this machine trusts."""
        sources, tar = root_kit.debian_sources(self._scratch), self._scratch / "base.tar"
        bootstrap = ["mmdebstrap", "--quiet", "--variant=apt", "--mode=root", "--include=ca-certificates"]
        subprocess.run([*bootstrap, root_kit.image_release(), str(tar), str(sources)], check=True)
        container = self.run("from", "scratch")
        self.run("add", "--quiet", container, str(tar), "/")
        self.run("copy", "--quiet", container, str(CERTIFICATES), "/trusted.pem")
        trusted = ["--env", "PIP_CERT=/trusted.pem", "--env", "SSL_CERT_FILE=/trusted.pem"]
        self.run("config", *trusted, container)
        self.run("commit", "--quiet", "--rm", container, BASE)
        tar.unlink()

    def build(self, architecture: str, model: Path | None) -> str:
        """The image's name."""
        name = f"localhost/mlis-{architecture}"
        target = ["--target", "with-model", "--build-context", f"model={model}"] if model else []
        arguments = [f"--build-arg=TARGETARCH={architecture}", f"--build-arg=BASE={BASE}"]
        kind = ["--isolation", "chroot", "--pull=never", "--format", "docker"]
        self.run("bud", *kind, *arguments, *target, "--file", str(CONTAINERFILE), "--tag", name, str(ROOT))
        return name

    def compressed_mb(self, image: str) -> float:
        """What a registry keeps and a node fetches."""
        place = self._scratch / "pushed"
        self.run("push", "--quiet", image, f"oci:{place}:image")
        size = sum(file.stat().st_size for file in place.rglob("*") if file.is_file())
        shutil.rmtree(place)
        return size / 1e6

    @contextlib.contextmanager
    def mounted(self, image: str) -> Iterator[tuple[Path, dict[str, str], list[str]]]:
        """The image's root, environment and command."""
        container = self.run("from", "--pull=never", image)
        config = json.loads(self.run("inspect", "--type", "image", image))["Docker"]["config"]
        try:
            environment = dict(each.split("=", 1) for each in config["Env"])
            yield Path(self.run("mount", container)), environment, [*config["Entrypoint"], *config["Cmd"]]
        finally:
            self.run("rm", container)


def strangers(root: Path, architecture: str) -> list[Path]:
    """Machine code that is for another processor."""
    found = []
    for file in root.rglob("*"):
        if file.is_file() and not file.is_symlink():
            with file.open("rb") as opened:
                head = opened.read(20)
            is_code = head[:4] == b"\x7fELF"
            if is_code and int.from_bytes(head[18:20], "little") != MACHINES[architecture]:
                found.append(file)
    return found


def serve(root: Path, environment: dict[str, str], command: list[str], scratch: Path, model: Path | None) -> None:
    """SystemExit where it does not answer."""
    asked = ["mlis", "embed", "a cell is the unit of life"]
    if model is None:
        command = [*command, "--set", "model.backend=fake"]
    began = time.monotonic()
    with sealed.container(root, environment, *command, model=None, log=scratch / "server.log") as running:
        running.wait_until_healthy()
        ready_s = time.monotonic() - began
        answer = running.enter(*asked)
        if answer.returncode != 0:
            raise SystemExit(answer.stderr)
        uid, memory_mb = running.status("Uid")[0], int(running.status("VmRSS")[0]) / 1e3
        print(f"  runs as uid {uid}, read-only, without network; {memory_mb:.0f} MB resident")
        print(f"  healthy after {ready_s:.1f} s")
        print(f"  answers with {len(json.loads(answer.stdout))} numbers; ends with {running.stop()} on SIGTERM")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--architectures", default="amd64,arm64")
    parser.add_argument("--model", type=Path)
    parser.add_argument("--scratch", type=Path)
    arguments = parser.parse_args()
    missing = [name for name in ("buildah", "mmdebstrap", "unshare") if shutil.which(name) is None]
    if missing or os.geteuid() != 0:
        raise SystemExit(
            f"this takes root, and {' and '.join(missing) or 'nothing else'}: apt-get install buildah mmdebstrap"
        )
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as folder:
        scratch = Path(folder)
        builder = Builder(scratch)
        builder.make_base()
        for architecture in arguments.architectures.split(","):
            began = time.monotonic()
            image = builder.build(architecture, arguments.model)
            took_s = time.monotonic() - began
            with builder.mounted(image) as (root, environment, command):
                size, wrong = root_kit.size_mb(root), strangers(root, architecture)
                compressed = builder.compressed_mb(image)
                print(f"{architecture}: {size:.0f} MB, {compressed:.0f} MB compressed, built in {took_s:.0f} s")
                if wrong:
                    raise SystemExit(f"code for another processor: {wrong[:5]}")
                if root_kit.TARGETARCH.get(platform.machine()) == architecture:
                    serve(root, environment, command, scratch, arguments.model)
                else:
                    print("  all of its machine code is for that processor; it cannot be run here")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
