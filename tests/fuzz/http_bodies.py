"""Bodies that somebody might send: right ones with one thing wrong, and what is wrong on every route."""

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tests.integration.http_kit import NO_OBJECTS

# A step into a value of JSON: a key or an index.
Place = tuple[str | int, ...]

# More than a text may have, and less than a body may.
_MEGABYTES_10 = "x" * 10_000_000
_TOO_DEEP: list[Any] = []
for _ in range(300):
    _TOO_DEEP = [_TOO_DEEP]

# What may stand where another thing belongs.
WRONG_VALUES: dict[str, Any] = {
    "null": None,
    "true": True,
    "zero": 0,
    "a negative number": -1,
    "a fraction": 1.5,
    "a number beyond 32 bits": 2**40,
    "a number beyond 64 bits": 10**30,
    "a number beyond float": 10**400,
    "infinity": float("inf"),
    "an empty string": "",
    "blanks": " \t\n",
    "a lone surrogate": "a\ud800b",
    "NUL": "a\0b",
    "characters that do not show": "\u200b\ufeff\u202e",
    "an empty list": [],
    "an empty object": {},
    "a list of null": [None],
    "a list of strings": ["a", "b"],
    "a list of lists": [["a"], ["b"]],
    "a list of empty lists": [[], [[]]],
    "a list of both": ["a", 1, None, {"text": "b"}],
    "token ids": [101, 2054, 102],
    "lists of token ids": [[101, 2054], [102]],
    "numbers": [1.5, -2.5],
    "objects": [{"text": "a"}, {"text": 1}, {}],
    "an object with odd keys": {"": "a", "\ud800": "b", "__class__": "c", "a" * 10_000: "d"},
    "nested": _TOO_DEEP,
    "many texts": ["x"] * 2000,
}


def places(value: Any, place: Place = ()) -> Iterator[Place]:
    """Of everything inside a value of JSON, the value itself included."""
    yield place
    if isinstance(value, dict):
        for key, each in value.items():
            yield from places(each, (*place, key))
    elif isinstance(value, list):
        for index, each in enumerate(value):
            yield from places(each, (*place, index))


def replaced(value: Any, place: Place, new: Any) -> Any:
    """A copy with `new` at that place."""
    if not place:
        return new
    copied = copy.copy(value)
    copied[place[0]] = replaced(value[place[0]], place[1:], new)
    return copied


def without(value: Any, place: Place) -> Any:
    """A copy that lacks what stands at that place, which is inside it."""
    copied = copy.copy(value)
    if len(place) == 1:
        del copied[place[0]]
    else:
        copied[place[0]] = without(value[place[0]], place[1:])
    return copied


def no_objects() -> Iterator[tuple[str, bytes]]:
    """Bodies that are wrong on every route: no object of JSON, or none that says anything."""
    yield from NO_OBJECTS.items()
    yield "nothing in it", b"{}"
    yield "a key twice, deep inside", b'{"inputs": [{"text": "a", "text": "b"}], "documents": [{"a": 1, "a": 1}]}'
    yield "two objects", b'{"input": "a"}{"input": "b"}'
    yield "a byte order mark", b'\xef\xbb\xbf{"input": "a"}'
    yield "latin-1", '{"input": "\u00e9"}'.encode("latin-1")
    yield "half a surrogate pair in UTF-8", b'{"input": "\xed\xa0\x80"}'
    yield "UTF-32", '{"input": "a"}'.encode("utf-32")
    yield "NUL bytes", b"\0" * 100
    yield "10 MB of brackets", b"[" * 10_000_000
    yield "a form", b"input=a&model=b"
    yield "a line break in a string", b'{"input": "a\nb"}'
    yield "an escape that is none", b'{"input": "\\x41"}'


def near_misses(example: Mapping[str, Any], properties: Sequence[str]) -> Iterator[tuple[str, bytes]]:
    """Right bodies with one thing wrong, or odd, in any place. properties: that the body may have."""
    for place in places(example):
        for name, value in WRONG_VALUES.items():
            yield f"{place}: {name}", dumped(replaced(example, place, value))
        if place:
            yield f"{place} left out", dumped(without(example, place))
    for key in sorted(set(properties) - set(example)):
        for name, value in WRONG_VALUES.items():
            yield f"{key}: {name}", dumped({**example, key: value})


def large(example: Mapping[str, Any]) -> Iterator[tuple[str, bytes]]:
    """10 MB in each of its fields, and in one that nobody asked for."""
    for key, value in {**example, "unknown": ""}.items():
        new = [_MEGABYTES_10] if isinstance(value, list) else _MEGABYTES_10
        yield f"{key}: 10 MB", dumped({**example, key: new})


def dumped(body: Any) -> bytes:
    """As JSON, with what JSON does not have where it holds such: NaN, infinity, lone surrogates."""
    return json.dumps(body).encode()
