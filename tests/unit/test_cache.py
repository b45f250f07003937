"""The cache of exported models: whole entries or none, whatever happens to them or beside them."""

import logging
import multiprocessing
import os
from pathlib import Path

import pytest

from ml_inference_server.utils.cache import cache_root, cached


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MLIS_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write(folder: Path) -> None:
    (folder / "model.bin").write_bytes(b"x" * 1000)


def never(folder: Path) -> None:
    pytest.fail("the entry was in the cache")


def test_an_entry_is_made_once_for_each_key() -> None:
    first = cached("onnx", {"a": 1}, write)
    assert cached("onnx", {"a": 1}, never) == first
    assert cached("onnx", {"a": 2}, write) != first
    assert (first / "model.bin").read_bytes() == b"x" * 1000


@pytest.mark.parametrize("damage", ["changed", "cut", "missing", "manifest"])
def test_a_damaged_entry_is_made_again_and_said(damage: str, caplog: pytest.LogCaptureFixture) -> None:
    entry = cached("onnx", {"a": 1}, write)
    file = entry / "model.bin"
    if damage == "changed":
        file.write_bytes(b"y" * 1000)
    elif damage == "cut":
        file.write_bytes(b"x" * 999)
    elif damage == "missing":
        file.unlink()
    else:
        (entry / "manifest.json").write_text("{")
    again = cached("onnx", {"a": 1}, write)
    assert (again / "model.bin").read_bytes() == b"x" * 1000
    assert "is damaged: making it again" in caplog.text


def test_a_failure_leaves_no_half_entry(own_cache: Path) -> None:
    def fail(folder: Path) -> None:
        write(folder)
        raise RuntimeError("the export failed")

    with pytest.raises(RuntimeError):
        cached("onnx", {"a": 1}, fail)
    assert list((own_cache / "onnx").iterdir()) == []


def test_a_cache_that_cannot_be_written_is_said_and_the_work_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    blocked = tmp_path / "a file"
    blocked.write_text("")
    monkeypatch.setenv("MLIS_CACHE_DIR", str(blocked / "cache"))
    folder = cached("onnx", {"a": 1}, write)
    assert (folder / "model.bin").exists()
    assert "cannot be written" in caplog.text


def _make_and_end(results) -> None:
    logging.disable()
    results.put(str(cached("onnx", {"a": 1}, write)))


def test_what_stands_in_for_the_cache_goes_with_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a file").touch()
    monkeypatch.setenv("MLIS_CACHE_DIR", str(tmp_path / "a file"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=_make_and_end, args=(results,))
    process.start()
    folder = Path(results.get(timeout=60))
    process.join()
    assert folder.parent == tmp_path
    assert not folder.exists()


def _make_at_once(barrier, results) -> None:
    logging.disable()

    def slow(folder: Path) -> None:
        barrier.wait()  # both are inside `make`
        write(folder)

    results.put(str(cached("onnx", {"a": 1}, slow)))


def test_two_processes_may_make_the_same_entry_at_once(own_cache: Path) -> None:
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(2), context.Queue()
    processes = [context.Process(target=_make_at_once, args=(barrier, results)) for _ in range(2)]
    for process in processes:
        process.start()
    paths = {results.get(timeout=60) for _ in processes}
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert len(paths) == 1
    assert [p.name for p in (own_cache / "onnx").iterdir()] == [Path(paths.pop()).name]


def test_the_default_place_is_the_users_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLIS_CACHE_DIR")
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert os.fspath(cache_root()).startswith("/home/somebody")
