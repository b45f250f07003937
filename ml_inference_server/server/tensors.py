"""Tensors of the Open Inference Protocol: texts out of those that come in, and those that go out. Knows no transport.

A model here takes TEXT, or QUERY and TEXT for pairs; both are BYTES, one element a text, of shape [n] or [n, 1].
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from ml_inference_server.utils.errors import InvalidRequest

TEXT, QUERY = "TEXT", "QUERY"
EMBEDDING, SCORE = "EMBEDDING", "SCORE"
TOTAL_TOKENS, USED_TOKENS = "TOTAL_TOKENS", "USED_TOKENS"

# The little-endian form in which a datatype travels.
_FORMS = {"FP32": "<f4", "INT32": "<i4"}
_LENGTH_BYTES = 4
_MOST_VIOLATIONS = 16
# Of inputs and outputs: what asks for something that this server has not, and what changes nothing here.
_SHARED_MEMORY = "shared_memory_"
_IGNORED_PARAMETERS = {"binary_data", "binary_data_size", "content_type", "headers"}


@dataclass(frozen=True, slots=True)
class InputTensor:
    """As it was sent. data: the raw form, each element behind its length in 4 bytes; or the elements, maybe nested."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    data: bytes | memoryview | Sequence[object]
    parameters: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class RequestedOutput:
    name: str
    parameters: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class OutputTensor:
    name: str
    datatype: str
    values: NDArray[Any]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    def raw(self) -> bytes:
        """Little endian, row by row."""
        return np.ascontiguousarray(self.values, _FORMS[self.datatype]).tobytes()


def read_texts(
    inputs: Sequence[InputTensor], *, needs_query: bool, max_texts: int
) -> tuple[list[str] | None, list[str]]:
    """(queries, texts): as many queries as texts, or None where only texts were sent. InvalidRequest names the tensor.

    A single query stands for all texts. needs_query: of a model that only scores pairs. max_texts: the most elements.
    """
    found: dict[str, list[str]] = {}
    for place, tensor in enumerate(inputs):
        at = f"inputs[{place}]"
        if tensor.name not in (TEXT, QUERY):
            _refuse(f"{at}.name", "this model has no such input: it takes TEXT, and QUERY for pairs")
        if tensor.name in found:
            _refuse(f"{at}.name", f"{tensor.name} is there twice: send each input once")
        _check_parameters(tensor.parameters, f"{at}.parameters")
        found[tensor.name] = _texts_of(tensor, at, max_texts)
    texts, queries = found.get(TEXT), found.get(QUERY)
    if texts is None:
        _refuse("inputs", "TEXT is missing")
    if queries is None:
        if needs_query:
            _refuse("inputs", "QUERY is missing: this model is a cross-encoder, which scores pairs of QUERY and TEXT")
        return None, texts
    if len(queries) not in (1, len(texts)):
        _refuse("inputs", f"QUERY has {len(queries)} elements and TEXT {len(texts)}: send one query, or one per text")
    return queries * len(texts) if len(queries) == 1 else queries, texts


def select_outputs(requested: Sequence[RequestedOutput], available: Sequence[str]) -> list[str]:
    """The names to answer with, in the order asked for; all where none is named."""
    if not requested:
        return list(available)
    names: list[str] = []
    for place, output in enumerate(requested):
        at = f"outputs[{place}]"
        if output.name not in available:
            _refuse(f"{at}.name", f"there is no such output to these inputs: ask for {', '.join(available)}")
        if output.name in names:
            _refuse(f"{at}.name", f"{output.name} is there twice: ask for each output once")
        _check_parameters(output.parameters, f"{at}.parameters")
        names.append(output.name)
    return names


def _texts_of(tensor: InputTensor, at: str, max_texts: int) -> list[str]:
    if tensor.datatype != "BYTES":
        _refuse(f"{at}.datatype", f"{tensor.name} holds texts: its datatype is BYTES")
    shape = tensor.shape
    if len(shape) not in (1, 2) or shape[1:] not in ((), (1,)) or shape[0] < 0:
        _refuse(f"{at}.shape", "texts have shape [n] or [n, 1]")
    if shape[0] > max_texts:  # before millions of empty elements are looked at
        _refuse(f"{at}.shape", f"{shape[0]} items, the limit is {max_texts}: send several requests", "TOO_MANY_TEXTS")
    if isinstance(tensor.data, bytes | memoryview):
        elements: Sequence[object] = list(_raw_elements(memoryview(tensor.data), shape[0], at))
    else:
        elements = _flat(tensor.data, nested=len(shape) == 2)
        if len(elements) != shape[0]:
            _refuse(f"{at}.data", f"the shape says {shape[0]} elements, {len(elements)} are there")
    texts: list[str] = []
    wrong: list[tuple[str, str]] = []
    for place, element in enumerate(elements):
        try:
            texts.append(_text_of(element))
        except ValueError as error:
            wrong.append((f"{at}.data[{place}]", str(error)))
            if len(wrong) == _MOST_VIOLATIONS:
                break
    if wrong:
        raise InvalidRequest(f"{wrong[0][0]}: {wrong[0][1]}", violations=wrong)
    return texts


def _text_of(element: object) -> str:
    """ValueError says what is wrong with it."""
    if isinstance(element, str):
        return element
    if not isinstance(element, bytes | memoryview):
        raise ValueError("not a string")
    try:
        return str(element, "utf-8")
    except UnicodeDecodeError:
        raise ValueError("not valid UTF-8") from None


def _raw_elements(data: memoryview, count: int, at: str) -> Iterator[memoryview]:
    start, end = 0, len(data)
    for done in range(count):
        size_end = start + _LENGTH_BYTES
        size = int.from_bytes(data[start:size_end], "little")
        if size_end + size > end:
            _refuse(f"{at}.data", f"the shape says {count} elements, the {end} bytes end within element {done}")
        yield data[size_end : size_end + size]
        start = size_end + size
    if start != end:
        _refuse(f"{at}.data", f"the shape says {count} elements, and {end - start} bytes are left after them")


def _flat(data: Sequence[object], *, nested: bool) -> Sequence[object]:
    """JSON may nest elements as the shape does, or not."""
    if nested and data and all(isinstance(row, list) and len(row) == 1 for row in data):
        return [row[0] for row in data if isinstance(row, list)]
    return data


def _check_parameters(parameters: Mapping[str, object], at: str) -> None:
    for name, value in parameters.items():
        if name.startswith(_SHARED_MEMORY):
            _refuse(at, "this server has no shared memory: send the tensor itself, and receive it in the answer")
        if name == "classification":
            if value:
                _refuse(at, "this model has no classes: leave out classification (class_count)")
        elif name not in _IGNORED_PARAMETERS:
            _refuse(at, "a tensor takes no such parameter here: leave it out, or send it with the request")


def _refuse(at: str, message: str, reason: str | None = None) -> NoReturn:
    raise InvalidRequest(f"{at}: {message}", reason=reason, violations=[(at, message)])
