"""The manifests as kustomize renders them, and the settings that a server started by one of their containers has."""

import argparse
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from ml_inference_server import cli, main
from ml_inference_server.utils.config import Settings
from tests.deploy.containerfile import ROOT, environment

FOLDER = ROOT / "ml_inference_server" / "deploy" / "kubernetes"
NAMESPACE = "inference"
Manifest = dict[str, Any]


def render(folder: Path) -> list[Manifest]:
    """Skips where there is neither kustomize nor a kubectl that holds it."""
    program = shutil.which("kustomize")
    command = [program, "build"] if program else [shutil.which("kubectl") or "", "kustomize"]
    if not command[0]:
        pytest.skip("neither kustomize nor kubectl is here")
    done = subprocess.run([*command, str(folder)], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return [each for each in yaml.safe_load_all(done.stdout) if each]


def with_components(scratch: Path, *components: str) -> list[Manifest]:
    """The base in a namespace, with these components in this order."""
    folder = scratch / ("-".join(components) or "base")
    shutil.copytree(FOLDER, folder)
    overlay = folder / "overlay"
    overlay.mkdir()
    content = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "namespace": NAMESPACE,
        "resources": ["../base"],
        "components": [f"../components/{name}" for name in components],
    }
    (overlay / "kustomization.yaml").write_text(yaml.safe_dump(content))
    return render(overlay)


def only(manifests: list[Manifest], kind: str, name: str = "") -> Manifest:
    (found,) = [each for each in manifests if each["kind"] == kind and name in ("", each["metadata"]["name"])]
    return found


def pod_of(deployment: Manifest) -> Manifest:
    return deployment["spec"]["template"]["spec"]  # type: ignore[no-any-return]


def arguments_of(container: Manifest, files: dict[str, Path]) -> argparse.Namespace:
    """The container's arguments as `mlis` reads them; files: what stands in the pod at the paths that they name."""
    words = [str(files.get(word, word)) for word in container["args"]]
    return cli.build_parser([words[0]]).parse_args(words)


def settings_of(container: Manifest, files: dict[str, Path], patch: pytest.MonkeyPatch) -> Settings:
    """What the server runs with: the image's environment, the container's, its files and its flags."""
    values = {each["name"]: each["value"] for each in container.get("env", []) if "value" in each}
    for name, value in (environment() | values).items():
        if name.startswith("MLIS_"):
            patch.setenv(name, value.replace("$(POD_NAMESPACE)", NAMESPACE))
    return main.settings_from(arguments_of(container, files))
