"""The file of keys: what is read, what is refused and how, and what is compared."""

import ast
import hashlib
import json
from pathlib import Path

import pytest

from ml_inference_server.door import keys as keys_module
from ml_inference_server.door.door import Door
from ml_inference_server.door.keys import Keys, create_key, list_keys, new_token, read_keys, revoke_key
from ml_inference_server.door.rights import ADMIN, INFER, Right
from ml_inference_server.utils.errors import ConfigError, Forbidden, Unauthenticated

HASH = "sha256:" + "0" * 64


def file_of(folder: Path, content: object, name: str = "keys.json") -> Path:
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


@pytest.mark.parametrize("name", ["keys.yaml", "keys.json"])
def test_a_key_that_was_made_is_found_and_one_that_was_taken_back_is_not(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    token, content = create_key(path, "search", [Right.INFER, Right.METRICS])
    path.write_text(content)
    assert token not in content
    other, content = create_key(path, "watcher", [Right.METRICS])
    path.write_text(content)
    found = read_keys(path).find(token.encode())
    assert found is not None
    assert found.name == "search"
    assert found.rights == frozenset({Right.INFER, Right.METRICS})
    path.write_text(revoke_key(path, "search"))
    keys = read_keys(path)
    assert keys.find(token.encode()) is None
    assert keys.find(other.encode()) is not None
    assert [key.name for key in list_keys(path)] == ["watcher"]


def test_limits_are_kept_when_another_key_is_made(tmp_path: Path) -> None:
    limits = {"requests_per_s": 5, "tokens_per_s": 1e4, "queue_share": 0.25}
    path = file_of(tmp_path, {"keys": [{"name": "a", "hash": HASH, "rights": ["infer"], "limits": limits}]})
    path.write_text(create_key(path, "b", [Right.INFER])[1])
    assert read_keys(path).by_name["a"].limits.model_dump() == limits


def test_tokens_differ_and_are_long() -> None:
    tokens = {new_token() for _ in range(100)}
    assert len(tokens) == 100
    assert {len(token) for token in tokens} == {len("mlis_") + 43}


SECRET = "mlis_" + "s" * 43


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("keys: [", "no valid YAML or JSON"),
        ("- a", "valid dictionary"),
        ({"key": []}, "unknown key at the top"),
        ({"keys": [{"name": "a", "hash": HASH, "rights": ["infer"], "token": SECRET}]}, "unknown key keys[0]"),
        ({"keys": [{"name": "a", "hash": SECRET, "rights": ["infer"]}]}, "keys[0].hash: expected sha256:"),
        ({"keys": [{"name": "a", "hash": HASH.upper(), "rights": ["infer"]}]}, "keys[0].hash"),
        ({"keys": [{"name": SECRET * 2, "hash": HASH, "rights": ["infer"]}]}, "keys[0].name"),
        ({"keys": [{"name": "a", "hash": HASH, "rights": []}]}, "keys[0].rights: expected a list of infer"),
        ({"keys": [{"name": "a", "hash": HASH, "rights": "infer"}]}, "keys[0].rights"),
        ({"keys": [{"name": "a", "hash": HASH, "rights": ["infer", SECRET]}]}, "keys[0].rights"),
        ({"keys": [{"name": "a", "hash": HASH, "rights": [["infer"]]}]}, "keys[0].rights"),
        ({"keys": [{"name": "a", "hash": HASH}]}, "keys[0].rights"),
        (
            {"keys": [{"name": "a", "hash": HASH, "rights": ["infer"], "limits": {"queue_share": 2}}]},
            "keys[0].limits.queue_share",
        ),
        (
            {"keys": [{"name": n, "hash": HASH, "rights": ["infer"]} for n in ("a", "b")]},
            "keys[1] has the hash of another key",
        ),
        (
            {"keys": [{"name": "a", "hash": HASH[:-1] + n, "rights": ["infer"]} for n in "01"]},
            "keys[1] has the name of another key",
        ),
    ],
)  # fmt: skip
def test_a_broken_file_is_refused_in_one_line_that_shows_no_secret(tmp_path: Path, content: object, told: str) -> None:
    path = file_of(tmp_path, content)
    with pytest.raises(ConfigError) as caught:
        read_keys(path)
    assert told in str(caught.value)
    assert str(caught.value).startswith(f"keys file {path}")
    assert "ssss" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there_or_no_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        read_keys(tmp_path / "none.yaml")
    (tmp_path / "raw").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="no UTF-8"):
        read_keys(tmp_path / "raw")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_keys(tmp_path)


@pytest.mark.parametrize("content", ["", "keys: []\n", "{}"])
def test_a_file_without_keys_lets_nobody_in(tmp_path: Path, content: str) -> None:
    door = Door(file_of(tmp_path, content))
    with pytest.raises(Unauthenticated):
        door.check(["Bearer x"], INFER)


def make_door(folder: Path) -> tuple[Door, str]:
    path = folder / "keys.yaml"
    token, content = create_key(path, "search", [Right.INFER])
    path.write_text(content)
    return Door(path), token


def test_whatever_is_wrong_with_a_key_the_answer_is_the_same(tmp_path: Path) -> None:
    door, token = make_door(tmp_path)
    wrong: list[list[str | bytes]] = [
        [], [""], ["Bearer"], ["Bearer "], [f"Basic {token}"], [token], [f"Bearer {token}", f"Bearer {token}"],
        [f"Bearer {token}x"], [f"Bearer {token[:-1]}"], ["Bearer \u00fc\udcff\u20ac"], [b"Bearer \xff\x00"],
        [f"Bearer {token},"], [f"Bearer {token.swapcase()}"], ["Bearer " + "x" * 100_000],
    ]  # fmt: skip
    texts = set()
    for values in wrong:
        with pytest.raises(Unauthenticated) as caught:
            door.check(values, INFER)
        texts.add(str(caught.value))
    assert len(texts) == 1


def test_the_scheme_is_read_as_http_wants_it(tmp_path: Path) -> None:
    door, token = make_door(tmp_path)
    for value in (f"Bearer {token}", f"bearer {token}", f"BEARER  {token} ".encode()):
        door.check([value], INFER)
        assert door.caller() == "search"
    with pytest.raises(Forbidden):
        door.check([f"Bearer {token}"], ADMIN)


def test_digests_that_begin_alike_are_told_apart() -> None:
    """The first bytes choose, the rest is compared."""
    token = b"a token"
    digest = hashlib.sha256(token).hexdigest()
    alike = digest[:8] + "0" * 56
    made = [
        keys_module.CallerKey.model_validate({"name": name, "hash": f"sha256:{each}", "rights": ["infer"]})
        for name, each in (("other", alike), ("own", digest))
    ]
    found = Keys(made).find(token)
    assert found is not None
    assert found.name == "own"
    assert Keys(made[:1]).find(token) is None


def test_digests_are_compared_in_constant_time_only() -> None:
    """In `Keys` nothing of a token or its digest meets == or `in`."""
    tree = ast.parse(Path(keys_module.__file__).read_text())
    found = next(each for each in ast.walk(tree) if isinstance(each, ast.ClassDef) and each.name == "Keys")
    assert not [each for each in ast.walk(found) if isinstance(each, ast.Compare)]
    assert "hmac.compare_digest" in ast.unparse(found)


async def test_a_change_is_read_and_a_broken_one_is_not(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    door, token = make_door(tmp_path)
    path = tmp_path / "keys.yaml"
    new, content = create_key(path, "new", [Right.INFER])
    path.write_text(content)
    await door.watch.look()
    door.check([f"Bearer {new}"], INFER)
    path.write_text("keys: [")
    await door.watch.look()
    await door.watch.look()
    path.unlink()
    await door.watch.look()
    await door.watch.look()
    door.check([f"Bearer {token}"], INFER)
    errors = [record for record in caplog.records if record.levelname == "ERROR"]
    assert len(errors) == 2
    assert "what was read before stays in force" in errors[0].message
    path.write_text("keys: []")
    await door.watch.look()
    with pytest.raises(Unauthenticated):
        door.check([f"Bearer {token}"], INFER)
    with pytest.raises(Unauthenticated):
        door.check_still("search", Right.INFER)


async def test_a_secret_that_is_mounted_as_a_turning_link_is_read_anew(tmp_path: Path) -> None:
    """As Kubernetes does it: the file is a link into a folder that a link names, and that one is turned."""
    for number in "12":
        (tmp_path / number).mkdir()
    tokens = []
    for number in "12":
        token, content = create_key(tmp_path / number / "keys.yaml", f"key{number}", [Right.INFER])
        (tmp_path / number / "keys.yaml").write_text(content)
        tokens.append(token)
    (tmp_path / "data").symlink_to("1")
    (tmp_path / "keys.yaml").symlink_to("data/keys.yaml")
    door = Door(tmp_path / "keys.yaml")
    door.check([f"Bearer {tokens[0]}"], INFER)
    (tmp_path / "next").symlink_to("2")
    (tmp_path / "next").replace(tmp_path / "data")
    await door.watch.look()
    door.check([f"Bearer {tokens[1]}"], INFER)
    with pytest.raises(Unauthenticated):
        door.check([f"Bearer {tokens[0]}"], INFER)
