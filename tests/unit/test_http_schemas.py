"""What the bodies of Cohere and TEI may hold, and the sentences for what they may not."""

from collections.abc import Iterator
from typing import Any

import pytest

from ml_inference_server.server.http import api
from ml_inference_server.server.http.body import parse_json
from ml_inference_server.server.http.cohere_answers import document_texts, embed_texts
from ml_inference_server.server.http.cohere_schemas import CohereEmbedRequest, CohereRerankRequest
from ml_inference_server.server.http.endpoint import Schema, validated
from ml_inference_server.server.http.tei_schemas import TeiDecodeRequest, TeiEmbedRequest, TeiPredictRequest
from ml_inference_server.utils.errors import InvalidRequest

IDS = (
    "token ids are refused, as another tokenizer than this model's may have made them: send the text itself as a string"
)


@pytest.mark.parametrize(
    ("schema", "body", "sentence"),
    [
        (TeiEmbedRequest, {}, "inputs: field required"),
        (TeiEmbedRequest, {"inputs": None}, "inputs: a string or a list of strings is needed, not null"),
        (TeiEmbedRequest, {"inputs": True}, "inputs: a string or a list of strings is needed, not a boolean"),
        (TeiEmbedRequest, {"inputs": {}}, "inputs: a string or a list of strings is needed, not an object"),
        (TeiEmbedRequest, {"inputs": [1]}, f"inputs: {IDS}"),
        (TeiEmbedRequest, {"inputs": [[1]]}, f"inputs: {IDS}"),
        (TeiEmbedRequest, {"inputs": ["a", [[2]]]}, f"inputs: {IDS}"),
        (TeiEmbedRequest, {"inputs": ["a", ["b"]]}, "inputs: item 1 must be a string, not a list"),
        (TeiEmbedRequest, {"inputs": ["a", 1.5]}, "inputs: item 1 must be a string, not a number"),
        (TeiPredictRequest, {"inputs": 1}, "inputs: a pair of strings or a list of pairs is needed, not a number"),
        (TeiPredictRequest, {"inputs": ["a", 1]}, "inputs: inputs must hold one or two strings and nothing else"),
        (
            TeiPredictRequest,
            {"inputs": [["a"], "b"]},
            "inputs: item 1 must be a list of one or two strings, not a string",
        ),
        (TeiDecodeRequest, {"ids": 1}, "ids: a list of token ids is needed, not a number"),
        (CohereEmbedRequest, {"texts": [1]}, f"texts: {IDS}"),
        (CohereEmbedRequest, {"texts": "a"}, "texts: a list of strings is needed, not a string"),
        (
            CohereRerankRequest,
            {"query": "q", "documents": {}},
            "documents: a list of strings or objects is needed, not an object",
        ),
        (
            CohereRerankRequest,
            {"query": "q", "documents": [None]},
            "documents: item 0 must be a string or an object, not null",
        ),
    ],
)
def test_what_is_wrong_is_said_in_a_sentence(schema: type[Schema], body: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        validated(schema, body)
    assert str(caught.value) == sentence


@pytest.mark.parametrize(
    ("inputs", "sequences", "single"),
    [
        ("a", [["a"]], True),
        (["a"], [["a"]], True),
        (["a", "b"], [["a", "b"]], True),
        ([["a"], ["a", "b"]], [["a"], ["a", "b"]], False),
        ([], [], False),
    ],
)
def test_predict_tells_a_pair_from_a_list(inputs: Any, sequences: list[list[str]], single: bool) -> None:
    found = validated(TeiPredictRequest, {"inputs": inputs}).inputs
    assert (found.sequences, found.single) == (sequences, single)


def test_ids_are_lists_of_lists() -> None:
    for ids, rows in (([], []), ([1, 2], [[1, 2]]), ([[1], [2, 3]], [[1], [2, 3]]), ([[]], [[]])):
        assert validated(TeiDecodeRequest, {"ids": ids}).ids == rows


def test_unknown_fields_are_ignored_and_null_is_as_left_out() -> None:
    names = [name for name in CohereEmbedRequest.model_fields if name != "texts"]
    request = validated(CohereEmbedRequest, {"texts": ["a"], "unknown": 1, **dict.fromkeys(names)})
    assert request == validated(CohereEmbedRequest, {"texts": ["a"]})
    assert embed_texts(request) == ["a"]


def test_the_text_of_a_document_is_under_its_key() -> None:
    documents: list[str | dict[str, Any]] = ["a", {"text": "b", "x": 1}]
    assert document_texts(documents, None) == document_texts(documents, []) == ["a", "b"]
    fields: list[str | dict[str, Any]] = [{"title": "t", "body": "b"}, {"body": "only"}, "a"]
    assert document_texts(fields, ["body", "title"]) == ["b\nt", "only", "a"]
    with pytest.raises(InvalidRequest) as caught:
        document_texts(["a", {}, {"text": 1}], None)
    assert [field for field, _ in caught.value.violations] == ["documents[1]", "documents[2]"]
    with pytest.raises(InvalidRequest, match=r"documents\[0\]: an object needs one of the keys"):
        document_texts([{"text": "a"}], ["title"])


def test_every_schema_can_be_documented() -> None:
    for schema in (CohereEmbedRequest, CohereRerankRequest, TeiEmbedRequest, TeiPredictRequest, TeiDecodeRequest):
        assert schema.model_json_schema()["type"] == "object"
    inputs = TeiEmbedRequest.model_json_schema()["properties"]["inputs"]
    assert inputs["anyOf"] == [{"type": "string"}, {"items": {"type": "string"}, "type": "array"}]


def collected_errors(schema: Any, place: str) -> Iterator[str]:
    """Where pydantic would make an error of each wrong item, however many there are."""
    if isinstance(schema, dict):
        if schema.get("type") == "list" and not schema.get("fail_fast"):
            yield from [place] if schema.get("items_schema", {"type": "any"})["type"] != "any" else []
        if schema.get("type") == "dict" and schema.get("keys_schema", {"type": "any"})["type"] != "any":
            yield place
        for key, each in schema.items():
            if key not in ("metadata", "serialization"):
                yield from collected_errors(each, f"{place}.{key}")
    elif isinstance(schema, list | tuple):
        for each in schema:
            yield from collected_errors(each, place)


def test_no_list_collects_an_error_of_each_item() -> None:
    """Of a body of millions of them, all memory and minutes of the event loop."""
    assert api  # it brings all of them
    schemas = [each for each in subclasses(Schema) if each.__module__.startswith("ml_inference_server.")]
    assert len(schemas) >= 12
    assert [place for each in schemas for place in collected_errors(each.__pydantic_core_schema__, each.__name__)] == []


def subclasses(schema: type[Schema]) -> Iterator[type[Schema]]:
    for each in schema.__subclasses__():
        yield each
        yield from subclasses(each)


def test_a_body_of_brackets_is_refused_before_it_is_parsed() -> None:
    with pytest.raises(InvalidRequest, match="more than 1000000 opening brackets"):
        parse_json(b'{"a": [' + b"[]," * 500_000 + b"{}," * 500_000 + b"1]}")
    assert parse_json(b'{"a": "' + b"[" * 999_999 + b'"}')
