"""Files that are replaced: whole or not at all, and only where a file stands or nothing."""

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from ml_inference_server.benchmark.result.files import result_files
from ml_inference_server.utils.errors import ConfigError
from ml_inference_server.utils.files import replace_file, replaceable, whole_folder


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


def _device(path: Path) -> None:
    try:
        os.mknod(path, 0o600 | 0o020000, os.makedev(1, 3))
    except PermissionError:
        pytest.skip("only root makes devices")


OTHER_KINDS: list[tuple[str, Callable[[Path], object]]] = [
    ("a folder", Path.mkdir),
    ("a pipe", os.mkfifo),
    ("a socket", _socket),
    ("a device", _device),
]


@pytest.mark.parametrize(("kind", "make"), OTHER_KINDS, ids=[kind for kind, _ in OTHER_KINDS])
@pytest.mark.parametrize("through_a_link", [False, True], ids=["itself", "a link to it"])
def test_what_is_no_file_is_refused_and_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, make: Callable[[Path], object], through_a_link: bool
) -> None:
    monkeypatch.chdir(tmp_path)  # the address of a socket may not be long
    thing = Path("thing")
    make(thing)
    path = thing
    if through_a_link:
        path = Path("link")
        path.symlink_to(thing)
    before = thing.stat()
    with pytest.raises(ConfigError, match=f"^--flag {path}: this is {kind}, and an ordinary file is needed"):
        replaceable(path, "--flag")
    if not through_a_link:
        with pytest.raises(OSError, match=f"this is {kind}"):
            replace_file(path, "new")
    assert (thing.stat().st_mode, thing.stat().st_ino) == (before.st_mode, before.st_ino)
    assert len(list(tmp_path.iterdir())) == 1 + through_a_link, "no draft is left behind"


def test_a_link_to_a_file_stays_a_link(tmp_path: Path) -> None:
    link, file = tmp_path / "latest", tmp_path / "file"
    link.symlink_to("file")
    for content in ("first", "second"):  # at first the link leads nowhere
        replace_file(replaceable(link), content)
        assert file.read_text() == content
    assert link.is_symlink()


def test_a_link_in_a_circle_and_a_name_that_is_too_long_are_refused(tmp_path: Path) -> None:
    circle = tmp_path / "circle"
    circle.symlink_to(circle)
    for path in (circle, tmp_path / ("x" * 300)):
        with pytest.raises(ConfigError, match="cannot be written"):
            replaceable(path)


@pytest.mark.parametrize(
    "name", ["out.md", "out.json", "out.npz", "out.svg", "out_server.log", ".out.json.lock", "out.partial.json",
             "out.partial.npz"]
)  # fmt: skip
def test_no_file_of_a_result_replaces_something_else(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(ConfigError, match=f"{name}: this is a pipe"):
        result_files(str(tmp_path / "out.md"), None, tmp_path / "unused.md")


def test_a_folder_that_is_not_finished_leaves_what_was_there(tmp_path: Path) -> None:
    place = tmp_path / "folder"
    with pytest.raises(FileNotFoundError), whole_folder(place) as draft:
        (draft / "missing" / "file").touch()
    assert list(tmp_path.iterdir()) == []
    with whole_folder(place) as draft:
        (draft / "first").touch()
    with pytest.raises(FileNotFoundError), whole_folder(place) as draft:
        (draft / "missing" / "file").touch()
    assert [each.name for each in place.iterdir()] == ["first"]


def test_a_finished_folder_replaces_the_former_one(tmp_path: Path) -> None:
    place = tmp_path / "folder"
    for name in ("first", "second"):
        with whole_folder(place) as draft:
            (draft / name).touch()
            assert draft.parent == tmp_path  # on the same disk
    assert [each.name for each in place.iterdir()] == ["second"]
    assert list(tmp_path.iterdir()) == [place]
