"""Keys and the file they stand in. The file holds the SHA-256 of each token, never a token.

A plain hash, and not a slow one, because a token is 256 random bits and no password: nobody can try them all, and a
slow hash would be paid for with each request.
"""

import hashlib
import hmac
import json
import secrets
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BeforeValidator, Field, ValidationError, model_validator

from ml_inference_server.door.rights import Right
from ml_inference_server.utils.errors import ConfigError
from ml_inference_server.utils.section import Section
from ml_inference_server.utils.yaml_text import NotYaml, parse_yaml

TOKEN_PREFIX = "mlis_"  # noqa: S105 - so that scanners for secrets know one that was published
_HASH_PREFIX = "sha256:"
_RANDOM_BYTES = 32
_MOST_FILE_BYTES = 4 << 20


class KeyLimits(Section):
    """What the callers who share a key may take together; None: as much as there is."""

    requests_per_s: float | None = Field(None, gt=0, le=1e6)
    tokens_per_s: float | None = Field(None, gt=0, le=1e9)
    queue_share: float | None = Field(None, gt=0, le=1, description="Of the queue's requests and of its tokens.")


def _rights(given: object) -> object:
    return frozenset(Right(each) for each in given) if isinstance(given, list) else given


class CallerKey(Section):
    """One line of the file. hash: "sha256:" and the hexadecimal digest of the token."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    hash: str = Field(pattern=rf"^{_HASH_PREFIX}[0-9a-f]{{64}}$")
    rights: Annotated[frozenset[Right], BeforeValidator(_rights)] = Field(min_length=1)
    limits: KeyLimits = Field(default_factory=KeyLimits)

    @property
    def digest(self) -> bytes:
        return bytes.fromhex(self.hash.removeprefix(_HASH_PREFIX))


class _Content(Section):
    keys: list[CallerKey] = Field(default_factory=list, max_length=10_000)

    @model_validator(mode="after")
    def _check(self) -> "_Content":
        for what, values in (("name", [key.name for key in self.keys]), ("hash", [key.hash for key in self.keys])):
            seen: set[str] = set()
            for place, value in enumerate(values):
                if value in seen:
                    raise ValueError(f"keys[{place}] has the {what} of another key")
                seen.add(value)
        return self


class Keys:
    """The keys that may come in."""

    def __init__(self, keys: Iterable[CallerKey]) -> None:
        self.by_name = {key.name: key for key in keys}
        # By the beginning of the digest, which tells nobody anything of the token; what remains is compared in
        # constant time.
        self._by_start: dict[bytes, list[CallerKey]] = {}
        for key in self.by_name.values():
            self._by_start.setdefault(key.digest[:4], []).append(key)

    def find(self, token: bytes) -> CallerKey | None:
        """The key whose token this is."""
        digest = hashlib.sha256(token).digest()
        found = None
        for key in self._by_start.get(digest[:4], ()):
            if hmac.compare_digest(key.digest, digest):
                found = key
        return found


def read_keys(path: Path) -> Keys:
    """The keys in that file. ConfigError in one line, which shows nothing of what the file holds."""
    return Keys(_read(path))


def _read(path: Path) -> Sequence[CallerKey]:
    try:
        with path.open("rb") as file:
            raw = file.read(_MOST_FILE_BYTES + 1)
        if len(raw) > _MOST_FILE_BYTES:
            raise ConfigError(f"keys file {path}: larger than {_MOST_FILE_BYTES} bytes")
        content = parse_yaml(raw.decode("utf-8"))
    except OSError as error:
        raise ConfigError(f"keys file {path}: cannot be read: {error.strerror}: see 'mlis key create'") from None
    except NotYaml as error:
        line = f", line {error.line}" if error.line else ""
        raise ConfigError(f"keys file {path}{line}: no valid YAML or JSON") from None
    except UnicodeDecodeError:
        raise ConfigError(f"keys file {path}: no UTF-8") from None
    try:
        return _Content.model_validate({} if content is None else content).keys
    except ValidationError as error:
        raise ConfigError(f"keys file {path}: {_explain(error)}") from None


def _explain(error: ValidationError) -> str:
    """The first problem. Never the value, which may be a token that was pasted in the place of its hash."""
    problem = error.errors(include_input=False, include_url=False, include_context=False)[0]
    at = ""
    for part in problem["loc"]:
        at += f"[{part}]" if isinstance(part, int) else f".{part}" if at else str(part)
    if problem["type"] == "extra_forbidden":
        return f"unknown key {at.rpartition('.')[0] or 'at the top'}: known are keys, name, hash, rights, limits"
    if at.endswith(".hash"):
        return f"{at}: expected sha256: and 64 hexadecimal digits, as 'mlis key create' writes it"
    if at.rpartition(".")[2] == "name":
        return f"{at}: expected 1 to 64 letters, digits, dots, dashes and underscores"
    if at.endswith(".rights"):
        return f"{at}: expected a list of {', '.join(Right)}"
    message = problem["msg"].removeprefix("Value error, ")
    return f"{at}: {message[:1].lower()}{message[1:]}" if at else message


def new_token() -> str:
    return TOKEN_PREFIX + secrets.token_urlsafe(_RANDOM_BYTES)


def create_key(path: Path, name: str, rights: Iterable[Right]) -> tuple[str, str]:
    """(the new key's token, the new content of the file at `path`, which need not be there). ConfigError."""
    keys = list(_read(path)) if path.exists() else []
    if any(key.name == name for key in keys):
        raise ConfigError(f"keys file {path} has a key {name} already: take another name, or revoke it first")
    token = new_token()
    hashed = _HASH_PREFIX + hashlib.sha256(token.encode()).hexdigest()
    try:
        key = CallerKey.model_validate({"name": name, "hash": hashed, "rights": list(rights)})
    except ValidationError as error:
        raise ConfigError(f"key {_explain(error)}") from None
    return token, written([*keys, key], path)


def revoke_key(path: Path, name: str) -> str:
    """The file's new content. ConfigError where it has no such key."""
    keys = _read(path)
    left = [key for key in keys if key.name != name]
    if len(left) == len(keys):
        known = ", ".join(key.name for key in keys) or "none"
        raise ConfigError(f"keys file {path} has no key {name}; it has: {known}")
    return written(left, path)


def list_keys(path: Path) -> Sequence[CallerKey]:
    return _read(path)


def written(keys: Sequence[CallerKey], path: Path) -> str:
    """As JSON where the name of the file ends so, else as YAML."""
    content: dict[str, Any] = {"keys": [_plain(key) for key in keys]}
    if path.suffix == ".json":
        return json.dumps(content, indent=2) + "\n"
    text: str = yaml.safe_dump(content, sort_keys=False)
    return text


def _plain(key: CallerKey) -> dict[str, Any]:
    plain: dict[str, Any] = {"name": key.name, "hash": key.hash, "rights": sorted(key.rights)}
    if limits := key.limits.model_dump(exclude_none=True):
        plain["limits"] = limits
    return {name: [str(each) for each in value] if name == "rights" else value for name, value in plain.items()}
