"""The cache of exported models: whole entries or none, whatever happens to them or beside them."""

import contextlib
import logging
import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest

from ml_inference_server.utils.cache import (
    cache_root,
    cached,
    find,
    remove_temporary,
    working_folder,
    writable_root,
)
from ml_inference_server.utils.errors import ConfigError, ModelError


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("MLIS_CACHE_DIR", str(tmp_path / "cache"))
    yield tmp_path / "cache"
    remove_temporary()


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


def _make_and_end(results: "Queue[str]") -> None:
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
    assert folder.is_relative_to(tmp_path)
    assert list(tmp_path.glob("mlis-*")) == []


def _make_at_once(barrier: Barrier, results: "Queue[str]") -> None:
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


def test_what_stands_in_is_one_folder_for_a_program_and_its_children_and_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a file").touch()
    monkeypatch.setenv("MLIS_CACHE_DIR", str(tmp_path / "a file"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    stand_in = writable_root(quiet=True)
    entry = cached("onnx", {"a": 1}, write)
    assert entry.parent.parent == stand_in
    assert cached("onnx", {"a": 1}, never) == find("onnx", {"a": 1}) == entry
    child = "import sys; from ml_inference_server.utils.cache import *; print(find('onnx', {'a': 1}), writable_root())"
    told = subprocess.run([sys.executable, "-c", child], capture_output=True, text=True, check=True, timeout=60).stdout
    assert told.split() == [str(entry), str(stand_in)]
    assert entry.exists(), "the child has not removed what is not its own"
    remove_temporary()
    assert list(tmp_path.glob("mlis-*")) == []
    assert find("onnx", {"a": 1}) is None


def test_an_entry_that_is_being_made_goes_when_the_program_ends_at_once(own_cache: Path) -> None:
    program = (
        "import os, threading; from ml_inference_server.utils.cache import cached; "
        "from ml_inference_server.utils.process import end_process; begun = threading.Event();\n"
        "def make(folder):\n    (folder / 'half').touch(); begun.set(); threading.Event().wait()\n"
        "threading.Thread(target=cached, args=('onnx', {'a': 1}, make), daemon=True).start(); begun.wait()\n"
        "end_process(7)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False, timeout=60).returncode == 7
    assert list((own_cache / "onnx").iterdir()) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(disk)], check=False)
    if mounted.returncode:
        pytest.skip("mounting is not allowed here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("wrapped", [False, True], ids=["as it comes", "wrapped by a library"])
def test_a_full_disk_names_the_remedy_and_leaves_nothing(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch, wrapped: bool
) -> None:
    monkeypatch.setenv("MLIS_CACHE_DIR", str(small_disk / "cache"))

    def fill(folder: Path) -> None:
        try:
            with (folder / "model.bin").open("wb") as file:
                for _ in range(8):
                    file.write(b"x" * 2**20)
        except OSError as error:
            if wrapped:
                raise ModelError(f"cannot be exported ({error}): use model.backend pytorch") from error
            raise

    with pytest.raises(
        ConfigError, match=r"is full \(. MiB are free, and more than [34] MiB are needed.*MLIS_CACHE_DIR"
    ):
        cached("onnx", {"a": 1}, fill)
    assert list((small_disk / "cache" / "onnx").iterdir()) == []
    with pytest.raises(ConfigError, match=r"is full \(. MiB are free, and more than 64 MiB are needed"):
        working_folder("compiled", "a", room_bytes=64 << 20)


def test_a_library_that_does_not_tell_of_a_full_disk_makes_no_entry(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLIS_CACHE_DIR", str(small_disk))

    def fill(folder: Path) -> None:
        with contextlib.suppress(OSError), (folder / "model.bin").open("wb") as file:
            file.write(b"x" * (8 << 20))

    with pytest.raises(ConfigError, match="is full"):
        cached("onnx", {"a": 1}, fill)
    assert find("onnx", {"a": 1}) is None


def test_a_failure_that_has_nothing_to_do_with_the_disk_stays_what_it_is() -> None:
    def fail(folder: Path) -> None:
        raise ModelError("no such operator")

    with pytest.raises(ModelError, match="no such operator"):
        cached("onnx", {"a": 1}, fail)


needs_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can become somebody else")
NOBODY = 12345


def as_nobody(program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run by a user that no file knows, without HOME; what is imported is imported before, by root."""
    kept = {key: value for key, value in os.environ.items() if key in ("PATH", "PYTHONPATH")} | environment
    become = f"import os; os.setgroups([]); os.setgid({NOBODY}); os.setuid({NOBODY})"
    program = (
        f"import logging; logging.basicConfig(); from ml_inference_server.utils.cache import *; {become}; {program}"
    )
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60, env=kept
    )


@needs_root
def test_a_user_without_a_home_gets_a_temporary_cache_and_a_warning() -> None:
    done = as_nobody("folder = writable_root(); print(folder.is_dir(), folder)")
    assert done.returncode == 0, done.stderr
    is_there, folder = done.stdout.split()
    assert is_there == "True"
    assert "set MLIS_CACHE_DIR to a folder that stays" in done.stderr
    assert not Path(folder).exists()


@needs_root
def test_a_cache_that_can_only_be_read_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory() as folder:  # pytest's own folders are closed to others
        Path(folder).chmod(0o755)
        monkeypatch.setenv("MLIS_CACHE_DIR", folder)
        entry = cached("onnx", {"a": 1}, write)
        entry.chmod(0o755)
        done = as_nobody("writable_root(quiet=True); print(cached('onnx', {'a': 1}, None))", MLIS_CACHE_DIR=folder)
        assert done.stdout.strip() == str(entry), done.stderr
        assert done.stderr == "", "nothing had to be made, so there is nothing to warn of"
        Path(folder).chmod(0o700)
        done = as_nobody("print(find('onnx', {'a': 1}))", MLIS_CACHE_DIR=folder)
        assert done.stdout.strip() == "None", done.stderr


def test_the_home_of_a_user_that_there_is_not_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLIS_CACHE_DIR", "~no-such-user/cache")
    with pytest.raises(ConfigError, match="MLIS_CACHE_DIR is ~no-such-user/cache, and there is no such home folder"):
        cache_root()
