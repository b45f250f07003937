"""The wheel: built, installed into an environment of its own, and used from a folder outside the checkout."""

import json
import signal
import subprocess
import time
import zipfile
from pathlib import Path

import pytest

from tests.integration.script_copies import ROOT, clean_env
from tests.integration.wheel_kit import build_wheel, install, run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

PACKAGE = ROOT / "ml_inference_server"

# Imports every module; what it prints are those that need an extra which is not there, with the reason.
IMPORT_ALL = """
import importlib, json, pkgutil
import ml_inference_server
from ml_inference_server.utils.installation import extra_of
lacking = {}
for module in pkgutil.walk_packages(ml_inference_server.__path__, "ml_inference_server."):
    if not module.name.endswith("__main__"):
        try:
            importlib.import_module(module.name)
        except ModuleNotFoundError as error:
            lacking[module.name] = extra_of(error.name)
print(json.dumps(lacking))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def programs(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the programs of an environment with the core and one small extra."""
    return install(wheel, "tracing", tmp_path_factory.mktemp("environment"))


def test_the_wheel_holds_every_file_but_the_documentation(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    there = {path.relative_to(ROOT) for path in PACKAGE.rglob("*") if path.is_file()}
    wanted = {path.as_posix() for path in there if not {"__pycache__", "docs"} & set(path.parts)}
    assert held == wanted
    assert "ml_inference_server/metrics/dashboard/index.html" in held


def test_help_and_doctor_work_outside_the_checkout(programs: Path, tmp_path: Path) -> None:
    shown = run(programs / "mlis", "--help", cwd=tmp_path)
    assert (shown.returncode, shown.stderr) == (0, "")
    assert "serve a model over gRPC" in shown.stdout
    found = json.loads(run(programs / "mlis", "doctor", "--json", cwd=tmp_path).stdout)
    assert found["checkout"] is None
    assert (found["extras"]["core"]["missing"], found["extras"]["tracing"]["missing"]) == ([], [])
    assert found["extras"]["onnx"]["missing"] == ["onnxruntime"]
    assert found["extras"]["onnx"]["install"] == "pip install 'ml-inference-server[onnx]'"
    assert found["machine"]["cuda"] is None


def test_every_module_can_be_imported_that_needs_no_other_extra(programs: Path, tmp_path: Path) -> None:
    done = run(programs / "python", "-c", IMPORT_ALL, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lacking = json.loads(done.stdout)
    behind_ray = {name: lacking.pop(name) for name in list(lacking) if name.split(".")[1] == "deploy"}
    assert set(behind_ray.values()) == {"ray"}, behind_ray
    assert set(lacking.values()) <= {"torch", "onnx", "openvino", "export", "bench"}, lacking
    rooms = {name.split(".")[1] for name in lacking}
    assert rooms <= {"backends", "engine_bench"}, lacking


def test_a_missing_extra_is_one_line_with_the_command(programs: Path, tmp_path: Path) -> None:
    for command in (["bench"], ["experiments", "quickstart"], ["compare", "a.json", "b.json"]):
        refused = run(programs / "mlis", *command, cwd=tmp_path)
        assert refused.returncode == 2
        (line,) = refused.stderr.splitlines()
        assert line.endswith("pip install 'ml-inference-server[bench]'")
    refused = run(programs / "mlis", "serve", "--port", "0", "--http-port", "0", cwd=tmp_path)
    assert refused.returncode != 0
    assert "Traceback" not in refused.stderr
    assert "pip install 'ml-inference-server[torch]'" in refused.stderr.splitlines()[-1]


def test_results_land_beside_the_caller(programs: Path, tmp_path: Path) -> None:
    shown = run(programs / "mlis", "experiments", "--help", cwd=tmp_path)
    assert "ml_inference_server_results/experiments" in "".join(shown.stdout.split())


def test_it_serves_and_embeds(programs: Path, tmp_path: Path) -> None:
    ready = tmp_path / "ready.json"
    options = ["--port", "0", "--http-port", "0", "--ready-file", str(ready), "--set", "model.backend=fake"]
    with subprocess.Popen([programs / "mlis", "serve", *options], cwd=tmp_path, env=clean_env()) as server:
        try:
            while not ready.exists():
                assert server.poll() is None
                time.sleep(0.02)
            target = f"127.0.0.1:{json.loads(ready.read_text())['grpc_port']}"
            embedded = run(programs / "mlis", "embed", "text", "--target", target, cwd=tmp_path)
            assert (embedded.returncode, embedded.stderr) == (0, "")
            assert len(json.loads(embedded.stdout)) > 1
        finally:
            server.send_signal(signal.SIGTERM)
        assert server.wait(timeout=30) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) in ([], ["ready.json"])
