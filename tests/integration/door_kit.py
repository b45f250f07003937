"""What tests of keys and of TLS share: a file of keys with one token for each set of rights, and who may do what."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from ml_inference_server.door.keys import create_key
from ml_inference_server.door.rights import Right

RIGHTS = tuple(Right)


@dataclass
class KeysFile:
    """tokens: by the name of the key."""

    path: Path
    tokens: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, rights: Iterable[Right]) -> str:
        self.tokens[name], content = create_key(self.path, name, rights)
        self.path.write_text(content)
        return self.tokens[name]

    def bearer(self, name: str) -> str:
        return f"Bearer {self.tokens[name]}"


def keys_file(folder: Path, names: Iterable[Right] = RIGHTS) -> KeysFile:
    """One key for each right, named after it."""
    made = KeysFile(folder / "keys.yaml")
    made.path.write_text(json.dumps({"keys": []}))
    for right in names:
        made.add(right.value, [right])
    return made
