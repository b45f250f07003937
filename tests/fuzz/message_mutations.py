"""Right messages of protobuf, changed at random: in their fields, in their bytes, in the tensors that they carry."""

from collections.abc import Sequence
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from hypothesis import strategies as st

from tests.fuzz.byte_damage import damaged, shapes, string_elements
from tests.fuzz.grpc_wire import Method

_TEXTS = st.text(max_size=20) | st.sampled_from(["", " \t", "\0", "\u200b", "word " * 300, "x" * 100_000, "fake:query"])
_RANGES = {
    FieldDescriptor.CPPTYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.CPPTYPE_INT64: (-(2**63), 2**63 - 1),
    FieldDescriptor.CPPTYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.CPPTYPE_UINT64: (0, 2**64 - 1),
    FieldDescriptor.CPPTYPE_ENUM: (-1, 2**31 - 1),
}


@st.composite
def messages(draw: st.DrawFn, methods: Sequence[Method]) -> tuple[Method, list[bytes]]:
    """(a method, what to send it): several messages where it takes a stream."""
    method = draw(st.sampled_from(methods))
    count = draw(st.integers(0, 3)) if method.descriptor.client_streaming else 1
    return method, [draw(serialized(method)) for _ in range(count)]


@st.composite
def serialized(draw: st.DrawFn, method: Method) -> bytes:
    message = type(method.right[0])()
    message.CopyFrom(draw(st.sampled_from(method.right)))
    for _ in range(draw(st.integers(0, 3))):
        draw(changed(message))
    if "raw_input_contents" in message.DESCRIPTOR.fields_by_name and draw(st.booleans()):
        draw(with_raw_tensor(message))
    raw = message.SerializeToString()
    return draw(damaged(raw)) if draw(st.integers(0, 2)) == 0 else raw


@st.composite
def changed(draw: st.DrawFn, message: Any) -> None:
    """One field, of it or of a message inside it, gets another value, none, or many."""
    fields = list(message.DESCRIPTOR.fields)
    if not fields:
        return
    field = draw(st.sampled_from(fields))
    if draw(st.integers(0, 5)) == 0:
        message.ClearField(field.name)
        return
    found = getattr(message, field.name)
    if field.message_type is None:
        values = st.lists(scalars(field), max_size=5) if field.is_repeated else scalars(field)
        if field.is_repeated:
            found.extend(draw(values))
        else:
            setattr(message, field.name, draw(values))
    elif field.message_type.GetOptions().map_entry:
        of = field.message_type.fields_by_name["value"]
        key: Any = draw(st.sampled_from(["dimensions", "overflow", "timeout", "prompt_name", "a"]))
        if of.message_type is None:
            found[key] = draw(scalars(of))
        else:
            draw(changed(found[key]))
    elif not field.is_repeated:
        draw(changed(found))
    elif found and draw(st.booleans()):
        if draw(st.booleans()):
            found.extend(list(found) * draw(st.sampled_from([1, 2, 1500])))
        draw(changed(found[0]))
    else:
        draw(changed(found.add()))


def scalars(field: FieldDescriptor) -> st.SearchStrategy[Any]:
    if field.cpp_type in _RANGES:
        least, most = _RANGES[field.cpp_type]
        return st.integers(0, 12) | st.sampled_from([least, most]) | st.integers(least, most)
    if field.type == FieldDescriptor.TYPE_BYTES:
        return st.binary(max_size=20)
    if field.cpp_type == FieldDescriptor.CPPTYPE_STRING:
        return _TEXTS
    if field.cpp_type == FieldDescriptor.CPPTYPE_BOOL:
        return st.booleans()
    return st.floats(width=32)


@st.composite
def with_raw_tensor(draw: st.DrawFn, request: Any) -> None:
    """A tensor whose shape and bytes may disagree, in an Open Inference request."""
    del request.inputs[:], request.raw_input_contents[:]
    for name in draw(st.sampled_from([["TEXT"], ["TEXT"], ["TEXT"], ["QUERY", "TEXT"], ["TEXT", "TEXT"], []])):
        count, raw = draw(string_elements())
        tensor = request.inputs.add(name=name, datatype=draw(st.sampled_from(["BYTES", "BYTES", "BYTES", "FP32", ""])))
        tensor.shape.extend(draw(shapes(count)))
        if draw(st.integers(0, 5)) > 0:
            request.raw_input_contents.append(raw)
