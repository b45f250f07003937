"""Bytes that are no longer what they were."""

from hypothesis import strategies as st


@st.composite
def damaged(draw: st.DrawFn, raw: bytes) -> bytes:
    """Cut, changed, doubled, or with others among them."""
    start = draw(st.integers(0, len(raw)))
    end = draw(st.integers(start, min(len(raw), start + 20)))
    match draw(st.sampled_from(["cut", "replace", "flip", "insert", "double"])):
        case "cut":
            return raw[:start]
        case "replace":
            return raw[:start] + draw(st.binary(min_size=end - start, max_size=end - start)) + raw[end:]
        case "flip" if start < len(raw):
            return raw[:start] + bytes([raw[start] ^ (1 << draw(st.integers(0, 7)))]) + raw[start + 1 :]
        case "double":
            return raw[:end] + raw[start:]
    return raw[:start] + draw(st.binary(min_size=1, max_size=20)) + raw[start:]


@st.composite
def string_elements(draw: st.DrawFn) -> tuple[int, bytes]:
    """(how many, the elements of a raw tensor of BYTES, each behind its length), sometimes damaged."""
    texts = draw(st.lists(st.text(max_size=10).map(str.encode) | st.binary(max_size=10), max_size=4))
    raw = b"".join(len(text).to_bytes(4, "little") + text for text in texts)
    return len(texts), draw(damaged(raw)) if draw(st.integers(0, 3)) == 0 else raw


def shapes(count: int) -> st.SearchStrategy[list[int]]:
    """Of so many elements, or not."""
    odd = st.integers(-1, 3) | st.sampled_from([-(2**63), 2**31, 2**63 - 1])
    return st.sampled_from([[count], [count, 1]]) | st.lists(odd, max_size=3)
