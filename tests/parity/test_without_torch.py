"""An exported folder where only the wheel and one engine are installed: served, asked, and every import recorded."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from ml_inference_server.backends.base import TokenBatch
from ml_inference_server.utils.errors import EXIT_MODEL
from tests.integration.script_copies import ROOT, clean_env
from tests.integration.wheel_kit import build_wheel, install, run
from tests.parity.tiny_model import TEXTS, start

pytestmark = [pytest.mark.real, pytest.mark.slow, pytest.mark.timeout(600)]

# The libraries that a model is read, exported and quantised with, and those that only the benchmark needs.
FORBIDDEN = {
    "torch", "transformers", "sentence_transformers", "safetensors", "scipy", "sklearn", "sympy", "onnx", "onnxscript",
    "nncf", "datasets", "pandas", "matplotlib",
}  # fmt: skip
LARGEST_MB = {"onnx": 330, "openvino": 450}
# Python runs it at its start: from then on the first part of every name that is looked for goes into a file.
SITE = """
import os, sys
class Record:
    def find_spec(self, name, path=None, target=None):
        with open(os.environ["IMPORTS"], "a") as file:
            file.write(name.partition(".")[0] + "\\n")
        if name.partition(".")[0] in os.environ["FORBIDDEN"].split():
            raise AssertionError(f"{name} must not be imported")
sys.meta_path.insert(0, Record())
"""


class Installed(NamedTuple):
    """said: what `mlis export` printed, and what it told meanwhile."""

    extra: str
    environment: Path
    folder: Path
    said: tuple[str, str]

    @property
    def mlis(self) -> Path:
        return self.environment / "bin" / "mlis"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module", params=["onnx", "openvino"])
def installed(
    request: pytest.FixtureRequest, wheel: Path, tiny: Path, tmp_path_factory: pytest.TempPathFactory
) -> Installed:
    """A folder that is exported here, and an environment that can only serve it."""
    place = tmp_path_factory.mktemp(request.param)
    export = ["-m", "ml_inference_server", "export", str(tiny), str(place / "folder"), "--backend", request.param]
    done = subprocess.run([sys.executable, *export], cwd=ROOT, capture_output=True, text=True, timeout=120, check=True)
    install(wheel, request.param, place / "environment")
    return Installed(request.param, place / "environment", place / "folder", (done.stdout, done.stderr))


def test_the_export_says_what_it_does_and_how_to_go_on(installed: Installed) -> None:
    printed, told = installed.said
    assert f"mlis serve {installed.folder}" in printed
    assert "parity to FP32: mean 1.00000" in printed
    assert [line[:5] for line in told.splitlines()] == [f"[{step}/5]" for step in range(1, 6)]


def test_the_environment_is_small(installed: Installed) -> None:
    files = [file.stat(follow_symlinks=False) for file in installed.environment.rglob("*")]
    assert sum(file.st_blocks * 512 for file in files) / 2**20 <= LARGEST_MB[installed.extra]
    listed = run(installed.environment / "bin" / "pip", "list", "--format", "json", cwd=installed.folder)
    packages = {each["name"].lower().replace("-", "_") for each in json.loads(listed.stdout)}
    assert "tokenizers" in packages
    assert packages & (FORBIDDEN | {"scikit_learn"}) == set()


def test_it_serves_the_same_vectors_and_imports_none_of_the_models_libraries(
    installed: Installed, tiny: Path, tmp_path: Path, own_cache: Path
) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(SITE)
    imports, ready = tmp_path / "imports", tmp_path / "ready.json"
    recorded = {"PYTHONPATH": str(tmp_path / "site"), "IMPORTS": str(imports), "FORBIDDEN": " ".join(FORBIDDEN)}
    options = ["--port", "0", "--http-port", "0", "--ready-file", str(ready)]
    command = [str(installed.mlis), "serve", str(installed.folder), *options]
    with subprocess.Popen(command, cwd=tmp_path, env=clean_env(**recorded)) as server:
        try:
            while not ready.exists():
                assert server.poll() is None
                time.sleep(0.02)
            target = ["--target", f"127.0.0.1:{json.loads(ready.read_text())['grpc_port']}"]
            embedded = run(installed.mlis, "embed", *TEXTS, *target, cwd=tmp_path)
            info = json.loads(run(installed.mlis, "info", *target, cwd=tmp_path).stdout)["resolved"]
        finally:
            server.send_signal(signal.SIGTERM)
        assert server.wait(timeout=30) == 0
    looked_for = set(imports.read_text().split())
    assert looked_for >= {"tokenizers", "onnxruntime" if installed.extra == "onnx" else "openvino"}
    assert looked_for & FORBIDDEN == set()
    started = start(tiny, installed.extra)
    rows = started.backend.infer(TokenBatch.of(started.tokenizer.encode(TEXTS)))
    vectors = np.array([json.loads(line) for line in embedded.stdout.splitlines()], np.float32)
    np.testing.assert_allclose(vectors, rows, rtol=0, atol=1e-5)
    assert (info["backend"], info["source"]) == (installed.extra, "exported folder")
    assert info["model_sha256"] == started.info.model_sha256
    assert info["parity_min"] > 0.9999


def test_what_needs_torch_says_so_in_one_line(installed: Installed, tiny: Path, tmp_path: Path) -> None:
    ports = ["--port", "0", "--http-port", "0"]
    for command in (["serve", str(tiny), *ports], ["export", str(tiny), "folder"]):
        refused = run(installed.mlis, *command, cwd=tmp_path)
        assert refused.returncode == EXIT_MODEL
        line = refused.stderr.splitlines()[-1]
        assert line.startswith("error: ")
        assert f"mlis export {tiny}" in line
        assert "pip install 'ml-inference-server[torch]'" in line
        assert "Traceback" not in refused.stderr
    assert list(tmp_path.iterdir()) == []
