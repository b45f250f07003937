"""Who comes in: a key for each caller, and what it may do. Protocols ask here, each before it does anything else."""

import logging
from collections.abc import Sequence
from contextvars import ContextVar
from pathlib import Path

from ml_inference_server.door.keys import CallerKey, Keys, read_keys
from ml_inference_server.door.rights import Needs, Right
from ml_inference_server.door.watch import FileWatch
from ml_inference_server.utils.config import ServerSettings
from ml_inference_server.utils.errors import Forbidden, Unauthenticated

log = logging.getLogger(__name__)

_SCHEME = b"bearer "
# A request's own, from where it was let in to where its call is made.
_caller: ContextVar[str] = ContextVar("caller", default="")


def open_door(settings: ServerSettings) -> "Door | None":
    """None where there are no keys. ConfigError."""
    auth = settings.auth
    if not auth.keys_file:
        return None
    door = Door(Path(auth.keys_file), open_reflection=auth.open_reflection)
    log.info("keys: %s", door.describe())
    return door


class Door:
    """Keeps out who has no key. Without a file of keys there is none of these, and everybody comes in."""

    def __init__(self, keys_file: Path, *, open_reflection: bool = True) -> None:
        """ConfigError where the file cannot be used."""
        self._path = keys_file
        self.open_reflection = open_reflection
        self.watch = FileWatch([keys_file], self._reload)
        self._keys = read_keys(keys_file)

    @property
    def keys(self) -> Keys:
        """Those that are in force now."""
        return self._keys

    def describe(self) -> str:
        """How many keys there are, and where."""
        return f"{len(self._keys.by_name) or 'none, so nobody comes in'} ({self._path})"

    def check(self, authorization: Sequence[str | bytes], needs: Needs) -> None:
        """Let this request in, and remember who it is. Unauthenticated or Forbidden.

        authorization: every value that the request has under this name. needs: nothing of what is open comes here.
        """
        key = self._key(authorization)
        if key.rights.isdisjoint(needs):
            wanted = " or ".join(sorted(needs))
            raise Forbidden(f"this key has no right to this: it takes one with the right {wanted}")
        _caller.set(key.name)

    def caller(self) -> str:
        """The name of the key under which the request of this task was let in."""
        return _caller.get()

    def check_still(self, name: str, right: Right) -> None:
        """For what lasts longer than a request. Unauthenticated where the key was taken back, or its right."""
        key = self._keys.by_name.get(name)
        if key is None or right not in key.rights:
            raise Unauthenticated

    def _key(self, authorization: Sequence[str | bytes]) -> CallerKey:
        if len(authorization) != 1:
            raise Unauthenticated
        value = authorization[0]
        raw = value.encode("utf-8", "surrogateescape") if isinstance(value, str) else value
        if raw[: len(_SCHEME)].lower() != _SCHEME:
            raise Unauthenticated
        key = self._keys.find(raw[len(_SCHEME) :].strip(b" "))
        if key is None:
            raise Unauthenticated
        return key

    def _reload(self) -> str:
        self._keys = read_keys(self._path)
        return f"keys read anew: {self.describe()}"
