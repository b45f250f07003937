"""Bodies of sound JSON with a wrong value in them, to the routes of every dialect."""

import json
from collections.abc import Iterator
from typing import Any

from tests.scoreboard.inputs.case import HttpCase
from tests.scoreboard.inputs.http_json import COHERE, INFER, JINA, OPENAI, TEI, ask

_LENGTH = "Inference-Header-Content-Length"


def type_cases() -> Iterator[HttpCase]:
    """Something else than a text, in the place of one; each to the dialect that is likeliest to get it."""
    wrong: dict[str, tuple[Any, str]] = {
        "null": (None, "a string or a list of strings is needed, not null"),
        "a number": (7, "token ids are not taken"),
        "a fraction": (1.5, "not a number"),
        "true": (True, "not a boolean"),
        "an object": ({"text": "a"}, "not an object"),
        "token ids": ([101, 2054], "token ids are not taken"),
        "lists of token ids": ([[101], [2054]], "token ids are not taken"),
        "null among texts": (["a", None], "item 1 must be a string, not null"),
        "a number among texts": (["a", 7], "token ids are refused"),
        "a list among texts": (["a", ["b"]], "item 1 must be a string, not a list"),
        "an empty list in a list": ([[]], "item 0 must be a string, not a list"),
        "objects": ([{"text": "a"}], "item 0 must be a string, not an object"),
        "nothing": ([], "at least one is required"),
    }
    for name, (value, says) in wrong.items():
        yield ask("types", f"{name} as input", OPENAI, {"input": value, "model": "fake"}, 400, says)
    models: dict[str, Any] = {"null": None, "a number": 7, "a list": ["fake"], "an object": {}}
    for name, model in models.items():
        yield ask("types", f"{name} as model", OPENAI, {"input": "a", "model": model}, 400, "model: ")
    for path, body, status, says in (
        (TEI, {"inputs": {"a": "b"}}, 422, "not an object"),
        (TEI, {"inputs": "a", "truncate": "yes"}, 422, "truncate: "),
        (TEI, {"inputs": "a", "normalize": None}, 422, "normalize: "),
        (TEI, {"inputs": "a", "truncation_direction": "Up"}, 422, "truncation_direction: "),
        (TEI, {}, 422, "inputs: field required"),
        ("/rerank", {"query": ["q"], "texts": ["a"]}, 422, "query: "),
        ("/rerank", {"query": "q", "texts": "a"}, 422, "texts: a list of strings is needed"),
        ("/similarity", {"inputs": {"source_sentence": "a", "sentences": []}}, 400, "inputs.sentences"),
        ("/similarity", {"inputs": {"sentences": ["a"]}}, 422, "source_sentence: field required"),
        ("/similarity", {"inputs": ["a", "b"]}, 422, "inputs: "),
        ("/predict", {"inputs": "a"}, 424, "classifies nothing"),
        ("/tokenize", {"inputs": ["a", 1]}, 422, "token ids are refused"),
        ("/decode", {"ids": [[1, -1]]}, 422, "a token id is a whole number"),
        ("/decode", {"ids": [1.0]}, 422, "a token id is a whole number"),
        ("/decode", {"ids": [True]}, 422, "a token id is a whole number"),
        ("/decode", {"ids": "1,2"}, 422, "a list of token ids is needed"),
        ("/decode", {"ids": [[1], 2]}, 422, "a token id is a whole number"),
        ("/decode", {"ids": [2**31]}, 422, "a token id is a whole number"),
        ("/decode", {"ids": [999]}, 422, "ids[0]: token id 999"),
        (COHERE, {"texts": "a"}, 400, "texts: "),
        (COHERE, {"texts": ["a"], "images": ["data:image/png;base64,AA=="]}, 400, "this server embeds texts only"),
        (COHERE, {"texts": ["a"], "inputs": []}, 400, "inputs: stands beside"),
        (COHERE, {"inputs": [{"content": []}]}, 400, "inputs[0].content"),
        (COHERE, {"inputs": [{"content": [{"type": "image_url"}]}]}, 400, "inputs[0].content"),
        (COHERE, {"inputs": [{"content": [{"type": "text"}]}]}, 400, "inputs[0].content"),
        (COHERE, {"texts": ["a"], "embedding_types": ["float64"]}, 400, "embedding_types[0]: "),
        (COHERE, {"texts": ["a"], "embedding_types": "float"}, 400, "embedding_types: "),
        (COHERE, {"texts": ["a"], "truncate": "MIDDLE"}, 400, "truncate: "),
        (COHERE, {"texts": ["a"], "input_type": "image"}, 400, "input_type: no such role"),
        (COHERE, {"texts": ["a"], "max_tokens": 5}, 400, "max_tokens: below"),
        (JINA, {"query": "q", "documents": {}}, 400, "documents: "),
        (JINA, {"query": "q", "documents": [["a"]]}, 400, "item 0 must be a string or an object"),
        (JINA, {"query": "q", "documents": [{"title": "a"}]}, 400, "documents[0]: an object needs its text"),
        (JINA, {"query": "q", "documents": [{"text": 7}]}, 400, "documents[0]: an object needs its text"),
        (JINA, {"query": "q", "documents": []}, 400, "documents: at least one is required"),
        (JINA, {"query": "", "documents": ["a"]}, 400, "query: text is empty"),
        (JINA, {"query": "q", "documents": ["a"], "relevant_spans": {"mode": "all"}}, 400, "no spans are found here"),
        ("/embed_all", {"inputs": "a"}, 424, "a vector for each token"),
        ("/embed_sparse", b"\xff", 424, "sparse vectors"),
        ("/api/v1/benchmark", {"name": "a"}, 400, "not the progress of a benchmark"),
        ("/api/v1/benchmark", [], 400, "not the progress of a benchmark"),
        ("/api/v1/benchmark", b"\xff", 400, "not the progress of a benchmark"),
        ("/", {"inputs": 7}, 422, "inputs: "),
    ):
        yield ask(
            "types", f"{path}: {json.dumps(body) if not isinstance(body, bytes) else body!r}", path, body, status, says
        )


def number_cases() -> Iterator[HttpCase]:
    borders: dict[str, bytes] = {
        "0": b"0",
        "-1": b"-1",
        "one too many": b"9",
        "2^31": b"2147483648",
        "2^64": b"18446744073709551616",
        "a fraction": b"4.5",
        "a whole fraction": b"4.0",
        "an exponent": b"4e0",
        "beyond floats": b"1e400",
        "a text": b'"4"',
        "true": b"true",
        "minus zero": b"-0",
        "10^300": b"1" + b"0" * 300,
    }
    for name, number in borders.items():
        yield ask(
            "numbers",
            f"{name} dimensions over OpenAI",
            OPENAI,
            b'{"model": "fake", "input": "a", "dimensions": %b}' % number,
            400,
            "dimensions: ",
        )
        yield ask(
            "numbers",
            f"{name} dimensions over tei",
            TEI,
            b'{"inputs": "a", "dimensions": %b}' % number,
            422,
            "dimensions: ",
        )
    for key, number in (
        ("top_n", b"0"),
        ("top_n", b"-1"),
        ("top_n", b"1.5"),
        ("top_n", b"2147483648"),
        ("max_tokens_per_doc", b"0"),
        ("max_chunks_per_doc", b"0"),
        ("priority", b"1.5"),
    ):
        body = b'{"query": "q", "documents": ["a"], "%b": %b}' % (key.encode(), number)
        yield ask("numbers", f"{key} {number.decode()}", JINA, body, 400, f"{key}: ")
    most = b'{"query": "q", "documents": ["a"], "top_n": 2147483647}'
    yield ask("numbers", "the largest top_n", JINA, most, 200)


def infer_cases() -> Iterator[HttpCase]:
    def infer(name: str, tensor: Any, status: int, says: str, **fields: Any) -> HttpCase:
        whole = {"name": "TEXT", "shape": [1], "datatype": "BYTES", "data": ["a"]} | tensor
        return ask("open inference", f"JSON: {name}", INFER, {"inputs": [whole], **fields}, status, says)

    for name, tensor, says in (
        ("a shape of fractions", {"shape": [1.0]}, "inputs[0].shape[0]: "),
        ("a shape beyond 64 bits", {"shape": [2**63]}, "inputs[0].shape[0]: "),
        ("a shape that is a number", {"shape": 1}, "inputs[0].shape: "),
        ("a shape below 0", {"shape": [-1]}, "inputs[0].shape: "),
        ("more than the shape says", {"data": ["a", "b"]}, "inputs[0].data: the shape says 1"),
        ("less than the shape says", {"data": []}, "inputs[0].data: the shape says 1"),
        ("data that is a text", {"data": "a"}, "inputs[0].data: "),
        ("data that is null", {"data": None}, "inputs[0].data: the shape says 1"),
        ("numbers as data", {"data": [1]}, "inputs[0].data[0]: not a string"),
        ("nested data in a flat shape", {"data": [["a"]]}, "inputs[0].data[0]: not a string"),
        ("data nested too deep", {"shape": [1, 1], "data": [[["a"]]]}, "inputs[0].data[0]: not a string"),
        ("a datatype that is null", {"datatype": None}, "inputs[0].datatype: "),
        ("parameters that are a list", {"parameters": []}, "inputs[0].parameters: "),
        (
            "binary data that is not there",
            {"data": None, "parameters": {"binary_data_size": 5}},
            "inputs[0].parameters",
        ),
        ("data in both forms", {"parameters": {"binary_data_size": 0}}, "inputs[0].data: stands beside"),
        (
            "a size that is true",
            {"data": None, "parameters": {"binary_data_size": True}},
            "binary_data_size is not one",
        ),
    ):
        yield infer(name, tensor, 400, says)
    yield infer(
        "binary outputs as a text",
        {},
        400,
        "binary_data_output is true or false",
        parameters={"binary_data_output": "yes"},
    )
    yield infer("a parameter that is a list", {}, 400, "overflow: expected a string", parameters={"overflow": []})
    yield infer("a timeout beyond 64 bits", {}, 200, "", parameters={"timeout": 10**30})
    yield infer("an id that is a number", {}, 400, "id: ", id=7)
    yield infer("outputs that are null", {}, 200, "", outputs=None)
    for name, length in {
        "no number": "x",
        "below 0": "-1",
        "beyond the body": "99999",
        "of 30 digits": "9" * 30,
        "empty": "",
        "in other digits": "\xb2",
        "with a blank": "1 0",
    }.items():
        headers = ["Content-Type: application/octet-stream", f"Inference-Header-Content-Length: {length}"]
        body = b'{"inputs": [{"name": "TEXT", "shape": [1], "datatype": "BYTES", "data": ["a"]}]}'
        yield ask(
            "open inference",
            f"length of the JSON {name}",
            INFER,
            body,
            400,
            "Inference-Header-Content-Length",
            headers=headers,
        )
    yield ask(
        "open inference",
        "bytes behind the JSON that nobody names",
        INFER,
        body + b"rest",
        400,
        "4 bytes behind the JSON are no tensor's",
        headers=[headers[0], f"{_LENGTH}: {len(body)}"],
    )


def all_cases() -> list[HttpCase]:
    """By type, by number, and in tensors."""
    return [*type_cases(), *number_cases(), *infer_cases()]
