"""The root of the image, built by the Containerfile's own lines, runs read-only, as uid 10001 and without a network."""

import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel

from ml_inference_server import cli
from tests.deploy import root_kit, sealed
from tests.deploy.containerfile import environment, values
from tests.parity.tiny_model import SHAPE, TEXTS, embed, save, start

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

# Of the core and ONNX Runtime, in 10^6 bytes.
LARGEST_MB = 330


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The core and ONNX Runtime."""
    sealed.skip_where_impossible()
    folder = tmp_path_factory.mktemp("image")
    folder.chmod(0o755)
    root_kit.build(folder / "root", folder, "onnx")
    return folder / "root"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small exported folder that everybody may read."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    whole = save(BertModel(BertConfig(num_hidden_layers=1, **SHAPE)), folder)
    assert cli.main(["export", str(whole), str(folder / "exported"), "--backend", "onnx"]) == 0
    for each in (folder / "exported", *(folder / "exported").iterdir()):
        each.chmod(each.stat().st_mode | stat.S_IRGRP | stat.S_IROTH | (stat.S_IXOTH if each.is_dir() else 0))
    return folder / "exported"


@pytest.fixture(scope="module")
def served(root: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[sealed.Container]:
    """The image as it starts by itself, with a model at /model."""
    command = [*json.loads(values("runtime", "ENTRYPOINT")[0]), *json.loads(values("runtime", "CMD")[0])]
    log = tmp_path_factory.mktemp("log") / "server.log"
    with sealed.container(root, environment(), *command, model=model, log=log) as running:
        running.wait_until_healthy()
        yield running


def test_the_image_holds_nothing_that_a_server_does_not_need(root: Path) -> None:
    programs = {file.name for folder in ("usr/bin", "usr/sbin") for file in (root / folder).iterdir()}
    assert {name for name in programs if not name.startswith("python3")} == set()
    special = [file for file in root.rglob("*") if not file.is_symlink() and file.lstat().st_mode & 0o6000]
    assert special == []
    assert not any(root.rglob("pip"))


def test_nothing_but_the_cache_and_tmp_belongs_to_the_user_or_is_writable_for_all(root: Path) -> None:
    files = [file for file in root.rglob("*") if not file.is_symlink()]
    owned = [file for file in files if file.lstat().st_uid != 0 or file.lstat().st_gid != 0]
    writable = [file for file in files if file.lstat().st_mode & stat.S_IWOTH]
    assert owned == [root / "cache"]
    assert writable == [root / "tmp"]


def test_the_image_is_small(root: Path) -> None:
    assert 100 < root_kit.size_mb(root) <= LARGEST_MB


def test_every_module_has_its_bytecode(root: Path) -> None:
    """Without it each start would compile, since a read-only root keeps nothing."""
    (site,) = root.glob("usr/local/lib/python3.*/dist-packages")
    modules = list((site / "ml_inference_server").rglob("*.py"))
    assert len(modules) > 200
    assert [file for file in modules if not list(file.parent.glob(f"__pycache__/{file.stem}.*.pyc"))] == []


def test_scanners_find_debians_packages(root: Path) -> None:
    names = {file.name for file in (root / "var/lib/dpkg/status.d").iterdir()}
    assert {"libc6", "libssl3t64", "base-files", "ca-certificates"} <= names
    assert "VERSION_CODENAME=" + root_kit.image_release() in (root / "etc/os-release").read_text()


def test_the_server_is_unprivileged_and_cannot_write(served: sealed.Container) -> None:
    assert served.status("Uid") == ["10001"] * 4
    assert served.status("Gid") == ["10001"] * 4
    assert served.status("CapEff") == ["0" * 16]
    assert served.status("NoNewPrivs") == ["1"]
    writing = "import os\nfor folder in ('/', '/usr', '/etc', '/model', '/cache', '/tmp'):\n"
    writing += " try: open(f'{folder}/x', 'w'); print(folder)\n except OSError: pass\n"
    assert served.enter("python3", "-c", writing).stdout.split() == ["/cache", "/tmp"]  # noqa: S108
    interfaces = "import socket; print([name for _, name in socket.if_nameindex()])"
    assert served.enter("python3", "-c", interfaces).stdout == "['lo']\n"


def test_it_answers_with_the_vectors_of_the_model(served: sealed.Container, model: Path) -> None:
    done = served.enter("mlis", "embed", *TEXTS)
    assert done.returncode == 0, done.stderr
    vectors = np.array([json.loads(line) for line in done.stdout.splitlines()], np.float32)
    np.testing.assert_allclose(vectors, embed(start(model).backend), atol=1e-5)


def test_its_healthcheck_is_true(served: sealed.Container) -> None:
    (line,) = values("runtime", "HEALTHCHECK")
    command = json.loads(line.partition("CMD")[2])
    assert served.enter(*command).stdout == "SERVING\n"
    nobody = served.enter(*command, "--target", "localhost:1")
    assert (nobody.returncode, nobody.stdout) == (5, "")


def test_its_log_is_json_and_warns_that_it_is_open(served: sealed.Container) -> None:
    lines = [json.loads(line) for line in served.log.read_text().splitlines()]
    assert any("open to the network" in line["message"] for line in lines if line["level"] == "WARNING")


def test_engines_in_processes_of_their_own_start_too(root: Path, model: Path, tmp_path: Path) -> None:
    command = ["mlis", "serve", "--set", "model.process_per_stream=true", "--set", "model.streams=1"]
    with sealed.container(root, environment(), *command, model=model, log=tmp_path / "log") as running:
        running.wait_until_healthy()
        assert running.enter("mlis", "embed", "a river").returncode == 0
        assert running.stop() == 0


def test_a_folder_without_a_model_is_refused_in_one_line(root: Path) -> None:
    done = sealed.run(root, environment(), "mlis", "serve")
    assert done.returncode in (2, 3)
    assert len(done.stderr.strip().splitlines()[-1:]) == 1
    assert "/model" in done.stderr


def test_another_mirror_is_taken_from_the_callers_environment(tmp_path: Path) -> None:
    """The builder's lines name no registry."""
    lines = "\n".join(values("builder", "RUN"))
    assert "://" not in lines
    assert os.sep in lines
