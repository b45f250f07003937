"""Anything changed in an exported folder is refused, by its hashes or by the gate."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ml_inference_server.backends.exported.manifest import MANIFEST
from ml_inference_server.utils.errors import ModelError
from tests.parity.exported_kit import refused, write
from tests.parity.families import built

pytestmark = [pytest.mark.real, pytest.mark.usefixtures("export_cache")]


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def put_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def put_pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def put_dead_link(file: Path) -> None:
    file.unlink()
    file.symlink_to("nowhere")


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-20])


@pytest.mark.parametrize("name", ["model.onnx", "tokenizer.json", "rows.npy", "probes.json"])
@pytest.mark.parametrize("damage", [flip, cut, Path.unlink, put_folder, put_pipe, put_dead_link])
def test_a_file_that_is_not_the_exported_one_is_refused(
    changeable: Path, name: str, damage: Callable[[Path], object]
) -> None:
    damage(changeable / name)
    assert name in refused(changeable)


@pytest.mark.parametrize("damage", [flip, cut, put_folder, put_pipe, put_dead_link])
def test_a_manifest_that_is_not_the_exported_one_is_refused(changeable: Path, damage: Callable[[Path], object]) -> None:
    damage(changeable / MANIFEST)
    assert MANIFEST in refused(changeable)


def test_without_its_manifest_a_folder_is_no_model(changeable: Path) -> None:
    (changeable / MANIFEST).unlink()
    assert "not a model" in refused(changeable)


def change_manifest(folder: Path, change: Callable[[dict[str, Any]], None], *, rehash: bool) -> None:
    content = json.loads((folder / MANIFEST).read_text())
    del content["manifest_sha256"]
    old = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    change(content)
    new = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    (folder / MANIFEST).write_text(json.dumps({**content, "manifest_sha256": new if rehash else old}))


def rehash_files(folder: Path) -> Callable[[dict[str, Any]], None]:
    def change(content: dict[str, Any]) -> None:
        for name in content["files"]:
            content["files"][name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()

    return change


def set_in(*path: str, value: object) -> Callable[[dict[str, Any]], None]:
    def change(content: dict[str, Any]) -> None:
        for key in path[:-1]:
            content = content[key]
        content[path[-1]] = value

    return change


@pytest.mark.parametrize(
    "change",
    [
        set_in("similarity", value="dot"),
        set_in("text", "max_tokens", value=40),
        set_in("text", "prompts", value={"": "query: "}),
        set_in("source", "weights_sha256", value="0" * 64),
        set_in("parity", "least", value=1.0),
        set_in("files", value={}),
    ],
)
def test_a_changed_value_in_the_manifest_is_refused(changeable: Path, change: Callable[[dict[str, Any]], None]) -> None:
    change_manifest(changeable, change, rehash=False)
    assert f"{MANIFEST} was changed after the export" in refused(changeable)


def test_a_changed_graph_needs_more_than_its_hash_in_the_manifest(changeable: Path) -> None:
    flip(changeable / "model.onnx")
    change_manifest(changeable, rehash_files(changeable), rehash=False)
    assert f"{MANIFEST} was changed after the export" in refused(changeable)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (set_in("format_version", value=2), "format_version 2, and this server reads 1"),
        (set_in("files", value={"../model.onnx": "0" * 64}), "is not a manifest (files"),
        (set_in("text", "pad_id", value="0"), "is not a manifest (text.pad_id"),
        (set_in("backend", value="pytorch"), "is not a manifest (backend"),
        (set_in("surprise", value=1), "is not a manifest (surprise"),
        (set_in("graph", "file", value="other.onnx"), "gives no hash of other.onnx"),
        (set_in("files", value={}), "gives no hash of model.onnx"),
    ],
)
def test_a_manifest_that_fits_its_hash_and_not_the_format_is_refused(
    changeable: Path, change: Callable[[dict[str, Any]], None], says: str
) -> None:
    change_manifest(changeable, change, rehash=True)
    assert says in refused(changeable)


# The gate itself: here every hash fits.


def test_the_gate_compares_with_the_stored_vectors(changeable: Path) -> None:
    rows = np.load(changeable / "rows.npy")
    np.save(changeable / "rows.npy", np.roll(rows, 1, axis=0))
    change_manifest(changeable, rehash_files(changeable), rehash=True)
    assert "answers too far from FP32" in refused(changeable)


def test_the_gate_compares_with_the_stored_tokens(changeable: Path) -> None:
    change_manifest(changeable, set_in("text", "prompts", "query", value="query: "), rehash=True)
    assert "refusing to serve answers to another text" in refused(changeable)


def test_a_folder_whose_answers_do_not_pass_never_appears(tmp_path: Path) -> None:
    """OpenVINO computes FNet's Fourier transform wrongly."""
    model = built("FNet", tmp_path)
    with pytest.raises(ModelError, match="answers too far from FP32"):
        write(model, tmp_path / "out" / "folder", "openvino")
    assert list((tmp_path / "out").iterdir()) == []
