"""Where the values of settings come from: files, environment variables and `--set`, each with a name for errors."""

import difflib
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ml_inference_server.utils.errors import ConfigError
from ml_inference_server.utils.yaml_text import NotYaml, has_comment, parse_yaml

EXPERIMENTS_DIR = Path(__file__).resolve().parent.parent / "experiments"
# The baseline on few rows.
QUICKSTART = EXPERIMENTS_DIR / "quickstart.yaml"


@dataclass(frozen=True)
class Given:
    """A value for the setting with the dotted name `key`, and who brings it, for errors: "--port 8080", say."""

    key: str
    value: Any
    source: str


@dataclass(frozen=True)
class Layer:
    source: str
    tree: Mapping[str, Any]

    def sets(self, path: Sequence[int | str]) -> bool:
        """Whether this layer says what stands at `path`, or at a part of it that holds a plain value."""
        node: Any = self.tree
        for part in path:
            if not isinstance(node, Mapping):
                return True
            if part not in node:
                return False
            node = node[part]
        return True


def experiment_file(name: str) -> Path:
    """The file at this path, or the experiment of this name that ships with the project."""
    path = Path(name)
    shipped = EXPERIMENTS_DIR / f"{name.removesuffix('.yaml')}.yaml"
    return shipped if path.name == name and not path.exists() and shipped.is_file() else path


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in `path`. ConfigError names the file, and the line where YAML knows it."""
    try:
        content = parse_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, sorted(p.name for p in EXPERIMENTS_DIR.glob("*.yaml")), 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"{path}: no such file{hint}") from None
    except NotYaml as error:
        line = f":{error.line}" if error.line else ""
        raise ConfigError(f"{path}{line}: not valid YAML: {error}") from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected keys and values at the top, found {type(content).__name__}")
    return content


def deep_merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with `over` laid on it key by key; lists are replaced whole."""
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        merged[key] = deep_merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged


def nested(dotted: str, value: Any) -> dict[str, Any]:
    *parents, leaf = dotted.split(".")
    tree = {leaf: value}
    for part in reversed(parents):
        tree = {part: tree}
    return tree


def parse_override(text: str) -> Given:
    """`a.b=value` of --set; the value is read as YAML, so 8, true, [1, 2] mean what they say."""
    source = f"--set {text:.200}"
    key, equals, raw = text.partition("=")
    if not equals or not all(key.strip().split(".")):
        raise ConfigError(f"{source}: expected key.path=value, for instance batching.max_batch_size=16")
    return Given(key.strip(), _read_value(raw, source), source)


def given_by(environment: Mapping[str, str]) -> list[Given]:
    """The settings that environment variables bring: MLIS_SERVER__PORT=50052 is server.port. Empty ones bring nothing.

    Two underscores stand for the dot, so that what Kubernetes sets for a service called mlis-server
    (MLIS_SERVER_PORT=tcp://...) is no setting. Values are read as those of --set.
    """
    found = []
    for name, raw in sorted(environment.items()):
        if _is_setting(name) and raw.strip():
            key = name.removeprefix("MLIS_").lower().replace("__", ".")
            found.append(Given(key, _read_value(raw, f"{name}={raw:.200}"), f"{name}={raw:.200}"))
    return found


def without_settings(environment: Mapping[str, str]) -> dict[str, str]:
    """For a child whose settings are all on its command line."""
    return {name: value for name, value in environment.items() if not _is_setting(name)}


def _is_setting(variable: str) -> bool:
    return variable.startswith("MLIS_") and "__" in variable


def command_to_repeat(command: Sequence[str], environment: Mapping[str, str] = os.environ) -> str:
    """The shell's line for `command` under the settings that come from the environment."""
    names = [given.source.partition("=")[0] for given in given_by(environment)]
    variables = [f"{name}={environment[name]}" for name in names]
    return shlex.join([*(["env", *variables] if variables else []), *command])


def _read_value(raw: str, source: str) -> Any:
    try:
        value = parse_yaml(raw)
        cut = has_comment(raw)
    except NotYaml as error:
        raise ConfigError(f"{source}: the value is not valid YAML ({error}): put a text in quotes") from error
    if cut:
        raise ConfigError(f"{source}: in YAML a comment begins at the #: put the value in quotes")
    return value
