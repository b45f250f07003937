"""Right bodies of the described routes, changed at random: in their JSON, in their bytes, in the tensors behind it."""

from collections.abc import Mapping, Sequence
from typing import Any

from hypothesis import strategies as st

from tests.fuzz.byte_damage import damaged, shapes, string_elements
from tests.fuzz.http_bodies import WRONG_VALUES, dumped, places, replaced, without
from tests.fuzz.http_wire import JSON_TYPE, PostRoute, http_request

_SMALL_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=6,
)
_TEXTS = st.text(max_size=20) | st.sampled_from(["a", "a longer text of words", "word " * 300])


@st.composite
def http_requests(draw: st.DrawFn, routes: Sequence[PostRoute], words: Sequence[str]) -> tuple[PostRoute, bytes]:
    """(the route, the whole request). words: that mean something to some route."""
    route = draw(st.sampled_from(routes))
    if route.path.endswith("/infer") and draw(st.booleans()):
        return route, draw(tensor_requests(route))
    values = (
        st.sampled_from(list(WRONG_VALUES.values()))
        | st.sampled_from(words)
        | st.integers(1, 12)
        | _SMALL_JSON
        | _TEXTS
        | st.lists(_TEXTS, max_size=4)
    )
    place = draw(st.integers(0, max(len(route.examples) - 1, 0)))
    body: Any = dict(route.examples[place]) if route.examples else {}
    properties = list(route.schemas[place]["properties"]) if route.examples else ["inputs"]
    for _ in range(draw(st.integers(0, 3))):
        body = draw(changed(body, properties, values))
    raw = dumped(body)
    match draw(st.integers(0, 7)):
        case 0 | 1:
            raw = draw(damaged(raw))
        case 2:
            raw = b'{"%b": 1, ' % draw(st.sampled_from(sorted(properties))).encode() + raw[1:]  # a key twice
    return route, http_request(route.path, raw, JSON_TYPE)


@st.composite
def changed(draw: st.DrawFn, body: Any, properties: Sequence[str], values: st.SearchStrategy[Any]) -> Any:
    """One thing replaced, left out, added, wrapped, or there many times."""
    place = draw(st.sampled_from(list(places(body))))
    at: Any = body
    for step in place:
        at = at[step]
    match draw(st.sampled_from(["replace", "replace", "add", "add", "leave out", "wrap", "name", "repeat"])):
        case "add" if isinstance(body, dict):
            return {**body, draw(st.sampled_from(properties)): draw(values)}
        case "leave out" if place:
            return without(body, place)
        case "wrap":
            return replaced(body, place, [at])
        case "name":
            return replaced(body, place, {draw(st.sampled_from(["text", "inputs", ""])): at})
        case "repeat" if isinstance(at, list):
            return replaced(body, place, at * draw(st.integers(0, 20)))
    return replaced(body, place, draw(values))


@st.composite
def tensor_requests(draw: st.DrawFn, route: PostRoute) -> bytes:
    """Tensors behind the JSON, whose shape, sizes and bytes may disagree."""
    count, raw = draw(string_elements())
    wrong_size = st.sampled_from([0, -1, 1, 2**31, 2**64, None, "4", 1.0])
    size: Any = draw(st.just(len(raw)) | st.just(len(raw)) | wrong_size)
    tensor: dict[str, Any] = {
        "name": draw(st.sampled_from(["TEXT", "TEXT", "TEXT", "QUERY", ""])),
        "shape": draw(shapes(count)),
        "datatype": draw(st.sampled_from(["BYTES", "BYTES", "BYTES", "FP32", "INT64", ""])),
        "parameters": {"binary_data_size": size},
    }
    content: Mapping[str, Any] = {
        "inputs": [tensor] * draw(st.sampled_from([1, 1, 1, 2])),
        "outputs": draw(st.sampled_from([[], [{"name": "EMBEDDING", "parameters": {"binary_data": True}}]])),
        "parameters": {"binary_data_output": draw(st.booleans())},
    }
    head = dumped(content)
    told = draw(
        st.just(str(len(head))) | st.just(str(len(head))) | st.sampled_from(["0", "-1", "1", "9" * 30, "x", ""])
    )
    return http_request(
        route.path, head + raw, "Content-Type: application/octet-stream", f"Inference-Header-Content-Length: {told}"
    )


def words_of(described: Any) -> list[str]:
    """What the description lists as values, and what else has a meaning."""
    found: set[str] = {"query", "document", "search_query", "text"}
    for place in places(described):
        if len(place) >= 2 and place[-2] == "enum":
            at: Any = described
            for step in place:
                at = at[step]
            found.add(at)
    return sorted(found)
