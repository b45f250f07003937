"""Answers as bytes: JSON with numbers in their shortest exact form, large ones written off the event loop."""

import asyncio
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import orjson

T = TypeVar("T")

# Written in well under a millisecond; handing work to a thread and back takes about as long.
_INLINE_NUMBERS = 16_384
_CHARACTERS_OF_A_NUMBER = 64


@dataclass(frozen=True, slots=True)
class HttpAnswer:
    body: bytes
    content_type: str = "application/json"
    headers: Mapping[str, str] = field(default_factory=dict)


def json_bytes(content: Any) -> bytes:
    """float32 arrays are written with as many digits as it takes to read the same float32 back."""
    return orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY)


def json_list(items: Iterable[Any]) -> bytes:
    """A list, item by item: between two items another thread may run."""
    return b"[" + b",".join(map(json_bytes, items)) + b"]"


def as_numbers(texts: Iterable[str]) -> int:
    """How many numbers take about as long to write as these texts."""
    return sum(map(len, texts)) // _CHARACTERS_OF_A_NUMBER


async def written(numbers: int, write: Callable[[], T]) -> T:
    """`write()`, in a thread where it writes many `numbers`."""
    return write() if numbers <= _INLINE_NUMBERS else await asyncio.to_thread(write)
