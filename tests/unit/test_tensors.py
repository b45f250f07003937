"""Tensors to texts and back: both forms of contents, and everything that can be wrong with them."""

import struct
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ml_inference_server.server.tensors import (
    InputTensor,
    OutputTensor,
    RequestedOutput,
    select_outputs,
)
from ml_inference_server.server.tensors import read_texts as read_texts_up_to
from ml_inference_server.utils.errors import InvalidRequest

TEXTS = st.lists(st.text(st.characters(exclude_categories=["Cs"])), max_size=8)


def packed(elements: Sequence[bytes]) -> bytes:
    return b"".join(struct.pack("<I", len(element)) + element for element in elements)


def raw(name: str, texts: Sequence[str], *, column: bool = False) -> InputTensor:
    shape = (len(texts), 1) if column else (len(texts),)
    return InputTensor(name, "BYTES", shape, packed([text.encode() for text in texts]))


def listed(name: str, texts: Sequence[object], shape: tuple[int, ...] | None = None) -> InputTensor:
    return InputTensor(name, "BYTES", (len(texts),) if shape is None else shape, list(texts))


def read_texts(inputs: Sequence[InputTensor], *, needs_query: bool = False) -> tuple[list[str] | None, list[str]]:
    return read_texts_up_to(inputs, needs_query=needs_query, max_texts=20)


def refused(*inputs: InputTensor, needs_query: bool = False) -> str:
    with pytest.raises(InvalidRequest) as caught:
        read_texts(inputs, needs_query=needs_query)
    assert str(caught.value).startswith(f"{caught.value.violations[0][0]}: {caught.value.violations[0][1]}")
    return str(caught.value)


@given(TEXTS, st.booleans())
def test_every_text_comes_through_in_every_form(texts: list[str], column: bool) -> None:
    shape = (len(texts), 1) if column else (len(texts),)
    forms = [
        raw("TEXT", texts, column=column),
        InputTensor("TEXT", "BYTES", shape, memoryview(packed([text.encode() for text in texts]))),
        listed("TEXT", texts, shape),
        listed("TEXT", [text.encode() for text in texts], shape),
    ]
    if column:
        forms.append(InputTensor("TEXT", "BYTES", shape, [[text] for text in texts]))
    for form in forms:
        assert read_texts([form]) == (None, texts)


@given(st.binary(max_size=64), st.one_of(st.integers(-2, 9), st.integers(-(2**63), 2**63 - 1)))
def test_any_bytes_of_any_shape_are_texts_or_refused(data: bytes, count: int) -> None:
    """Those that are texts pack to the same bytes again."""
    try:
        _, texts = read_texts([InputTensor("TEXT", "BYTES", (count,), data)])
    except InvalidRequest:
        return
    assert len(texts) == count
    assert packed([text.encode() for text in texts]) == data


@given(TEXTS.filter(bool), st.data())
def test_a_changed_length_is_noticed(texts: list[str], data: st.DataObject) -> None:
    sound = packed([text.encode() for text in texts])
    cut = data.draw(st.integers(0, len(sound) - 1))
    assert "bytes end within element" in refused(InputTensor("TEXT", "BYTES", (len(texts),), sound[:cut]))
    assert "bytes are left" in refused(InputTensor("TEXT", "BYTES", (len(texts),), sound + b"\0"))
    assert "bytes" in refused(InputTensor("TEXT", "BYTES", (len(texts) + 1,), sound))
    assert refused(listed("TEXT", texts, (len(texts) + 1,))).endswith(f"{len(texts)} are there")


def test_a_query_stands_for_all_texts_or_there_are_as_many() -> None:
    texts = ["a", "b", "c"]
    assert read_texts([raw("QUERY", ["q"]), raw("TEXT", texts)], needs_query=True) == (["q"] * 3, texts)
    assert read_texts([raw("TEXT", texts), listed("QUERY", list("qrs"))]) == (list("qrs"), texts)
    assert "QUERY has 2 elements and TEXT 3" in refused(raw("QUERY", ["q", "r"]), raw("TEXT", texts))
    assert "QUERY has 0 elements" in refused(raw("QUERY", []), raw("TEXT", texts))


@pytest.mark.parametrize(
    ("tensor", "said"),
    [
        (InputTensor("TEXT", "FP32", (1,), b"abcd"), "inputs[0].datatype: TEXT holds texts: its datatype is BYTES"),
        (InputTensor("TEXT", "", (1,), b"abcd"), "inputs[0].datatype"),
        (InputTensor("TEXT", "BYTES", (), b""), "inputs[0].shape: texts have shape [n] or [n, 1]"),
        (InputTensor("TEXT", "BYTES", (1, 2), b""), "inputs[0].shape"),
        (InputTensor("TEXT", "BYTES", (1, 1, 1), b""), "inputs[0].shape"),
        (InputTensor("TEXT", "BYTES", (-1,), b""), "inputs[0].shape"),
        (InputTensor("TEXT", "BYTES", (-1, 1), []), "inputs[0].shape"),
        (
            InputTensor("TEXT", "BYTES", (2**62,), b""),
            "inputs[0].shape: 4611686018427387904 items, the limit is 20: send",
        ),
        (InputTensor("TEXT", "BYTES", (21,), b"\0" * 84), "inputs[0].shape: 21 items, the limit is 20"),
        (
            InputTensor("TEXT", "BYTES", (20,), b"\0" * 79),
            "inputs[0].data: the shape says 20 elements, the 79 bytes end",
        ),
        (listed("TEXT", ["a", 1, None, True, 2.5, ["b"], {}]), "inputs[0].data[1]: not a string"),
        (listed("TEXT", [["a"], ["b", "c"]], (2, 1)), "inputs[0].data[0]: not a string"),
        (listed("TEXT", ["a", b"\xff"]), "inputs[0].data[1]: not valid UTF-8"),
        (listed("TEXT", [b"\xed\xa0\x80"]), "inputs[0].data[0]: not valid UTF-8"),
        (InputTensor("TEXT", "BYTES", (1,), packed([b"\xc3"])), "inputs[0].data[0]: not valid UTF-8"),
        (InputTensor("TEXT", "BYTES", (1,), b"\xff\xff\xff\xff"), "inputs[0].data: the shape says 1 elements, the 4"),
        (InputTensor("IMAGE", "BYTES", (1,), b""), "inputs[0].name: this model has no such input"),
        (raw("QUERY", ["q"]), "inputs: TEXT is missing"),
        (
            InputTensor("TEXT", "BYTES", (1,), [], {"shared_memory_region": "x"}),
            "inputs[0].parameters: this server has",
        ),
        (InputTensor("TEXT", "BYTES", (1,), [], {"x": 1}), "inputs[0].parameters: a tensor takes no such parameter"),
    ],
)
def test_what_is_wrong_is_said(tensor: InputTensor, said: str) -> None:
    assert refused(tensor).startswith(said)


def test_a_list_of_inputs_can_be_wrong_too() -> None:
    assert refused().startswith("inputs: TEXT is missing")
    assert refused(raw("TEXT", ["a"]), raw("TEXT", ["a"])).startswith("inputs[1].name: TEXT is there twice")
    assert "cross-encoder" in refused(raw("TEXT", ["a"]), needs_query=True)


def test_at_most_16_faults_are_listed() -> None:
    with pytest.raises(InvalidRequest) as caught:
        read_texts([listed("TEXT", [1] * 20)])
    assert [at for at, _ in caught.value.violations] == [f"inputs[0].data[{i}]" for i in range(16)]


def test_outputs_are_chosen_by_name_in_the_order_asked_for() -> None:
    available = ["EMBEDDING", "TOTAL_TOKENS"]
    assert select_outputs([], available) == available
    asked = [RequestedOutput("TOTAL_TOKENS", {"binary_data": True, "classification": 0}), RequestedOutput("EMBEDDING")]
    assert select_outputs(asked, available) == ["TOTAL_TOKENS", "EMBEDDING"]


@pytest.mark.parametrize(
    ("outputs", "said"),
    [
        ([RequestedOutput("SCORE")], "outputs[0].name: there is no such output to these inputs: ask for EMBEDDING"),
        ([RequestedOutput("EMBEDDING")] * 2, "outputs[1].name: EMBEDDING is there twice"),
        ([RequestedOutput("EMBEDDING", {"classification": 3})], "outputs[0].parameters: this model has no classes"),
        ([RequestedOutput("EMBEDDING", {"shared_memory_region": "r"})], "outputs[0].parameters: this server has no"),
    ],
)
def test_outputs_that_cannot_be_had_are_refused(outputs: list[RequestedOutput], said: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        select_outputs(outputs, ["EMBEDDING"])
    assert str(caught.value).startswith(said)


def test_an_output_travels_as_little_endian_rows() -> None:
    values = np.asfortranarray(np.array([[1, 2], [3, 4]], ">f4"))
    output = OutputTensor("EMBEDDING", "FP32", values)
    assert output.shape == (2, 2)
    assert np.frombuffer(output.raw(), "<f4").tolist() == [1, 2, 3, 4]
    assert OutputTensor("TOTAL_TOKENS", "INT32", np.array([7], np.int64)).raw() == b"\7\0\0\0"
