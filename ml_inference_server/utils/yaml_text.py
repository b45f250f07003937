"""YAML as the settings use it: strict about keys, and with the numbers that people write."""

import re
from collections.abc import Hashable
from typing import Any

import yaml


class NotYaml(ValueError):
    """The text is no YAML of ours; the message says why. `line` counts from 1, 0 where it is not known."""

    def __init__(self, reason: str, line: int = 0) -> None:
        super().__init__(reason)
        self.line = line


class _Loader(yaml.SafeLoader):
    """PyYAML keeps the last of two equal keys without a word; this one refuses."""

    # Nothing here is a date: 2024-11-05 is a name.
    yaml_implicit_resolvers = {  # noqa: RUF012 - PyYAML's own name and form
        first: [(tag, pattern) for tag, pattern in found if tag != "tag:yaml.org,2002:timestamp"]
        for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._checked: set[int] = set()

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Called for each mapping before it is read, and for each that `<<` draws in."""
        if id(node) not in self._checked:
            self._checked.add(id(node))
            seen: set[Any] = set()
            for key_node, _ in node.value:
                is_merge = key_node.tag == "tag:yaml.org,2002:merge"
                key = key_node.value if is_merge else self.construct_object(key_node)
                if not isinstance(key, Hashable):
                    continue  # construct_mapping refuses it with its line
                if key in seen:
                    raise yaml.MarkedYAMLError(problem=f"key {key!r} stands twice", problem_mark=key_node.start_mark)
                seen.add(key)
        super().flatten_mapping(node)


def _whole_mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _whole_mapping)
# YAML 1.1 wants a point and a sign in 1.0e+5, and takes 1e5, 1e-3 and -.5 for texts.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(?:(?:\.[0-9]+|[0-9]+\.?[0-9]*)[eE][-+]?[0-9]+|\.[0-9]+)$"),
    list("-+.0123456789"),
)


def parse_yaml(text: str) -> Any:
    """What `text` means. NotYaml where it means nothing, or where a key stands twice."""
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 0
        raise NotYaml(error.problem or str(error), line) from error
    # Values with a tag (`!!int many`) raise whatever Python raises.
    except (yaml.YAMLError, RecursionError, ValueError, LookupError, AttributeError) as error:
        raise NotYaml(" ".join(str(error).split()) or type(error).__name__) from error


def has_comment(text: str) -> bool:
    """Whether a comment follows the value of `text`, which is YAML."""
    node = yaml.compose(text, Loader=_Loader)
    return node is not None and bool(text[node.end_mark.index :].strip())
