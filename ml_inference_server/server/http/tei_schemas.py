"""The bodies of Text Embeddings Inference over HTTP, as strict as its own: null only where it takes null."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, SkipValidation, WithJsonSchema
from pydantic_core import PydanticCustomError

from ml_inference_server.server.http.endpoint import Schema, example
from ml_inference_server.server.http.text_fields import OneOrMoreTexts, Texts, json_type

MAX_TOKEN_ID = 2**31 - 1


class TeiCut(Schema):
    truncate: bool | None = Field(
        None, description="Whether a text that is too long is cut, which is the default, or refused."
    )
    truncation_direction: Literal["Left", "Right", "left", "right"] = "Right"


class TeiEmbedRequest(TeiCut):
    model_config = example(inputs=["what is a cell"])

    inputs: OneOrMoreTexts
    prompt_name: str | None = None
    normalize: bool = True
    dimensions: Annotated[int, Field(ge=1, le=MAX_TOKEN_ID)] | None = None


class TeiRerankRequest(TeiCut):
    model_config = example(query="what is a cell", texts=["a bank", "the unit of life"])

    query: str
    texts: Texts
    raw_scores: bool = False
    return_text: bool = False


class TeiSentences(Schema):
    source_sentence: str
    sentences: Texts


class TeiSimilarityParameters(TeiCut):
    prompt_name: str | None = None


class TeiSimilarityRequest(Schema):
    model_config = example(inputs={"source_sentence": "what is a cell", "sentences": ["a bank", "the unit of life"]})

    inputs: TeiSentences
    parameters: TeiSimilarityParameters | None = None


class PredictInputs(Schema):
    """What /predict is asked about: each a text or a pair. `single`: it was sent outside a list of its own."""

    sequences: SkipValidation[list[list[str]]]
    single: bool


def _predict_inputs(value: Any) -> PredictInputs:
    if isinstance(value, str):
        return PredictInputs(sequences=[[value]], single=True)
    if isinstance(value, list) and value and isinstance(value[0], str):
        return PredictInputs(sequences=[_sequence(value, "inputs")], single=True)
    if not isinstance(value, list):
        context = {"what": json_type(value)}
        raise PydanticCustomError("sequences", "a pair of strings or a list of pairs is needed, not {what}", context)
    sequences = [_sequence(each, f"item {place}") for place, each in enumerate(value)]
    return PredictInputs(sequences=sequences, single=False)


def _sequence(value: Any, place: str) -> list[str]:
    if not isinstance(value, list):
        context = {"place": place, "what": json_type(value)}
        raise PydanticCustomError("sequences", "{place} must be a list of one or two strings, not {what}", context)
    if not 1 <= len(value) <= 2 or not all(isinstance(each, str) for each in value):
        raise PydanticCustomError(
            "sequences", "{place} must hold one or two strings and nothing else", {"place": place}
        )
    return value


_TEXT = {"type": "string"}
_SEQUENCE = {"type": "array", "items": _TEXT, "minItems": 1, "maxItems": 2}
_PREDICT_SCHEMA = {"anyOf": [_TEXT, _SEQUENCE, {"type": "array", "items": _SEQUENCE}]}


class TeiPredictRequest(TeiCut):
    model_config = example(inputs=["what is a cell", "the unit of life"])

    inputs: Annotated[PredictInputs, BeforeValidator(_predict_inputs), WithJsonSchema(_PREDICT_SCHEMA)]
    raw_scores: bool = False


class TeiTokenizeRequest(Schema):
    model_config = example(inputs=["what is a cell"])

    inputs: OneOrMoreTexts
    add_special_tokens: bool = True
    prompt_name: str | None = None


def _token_ids(value: Any) -> list[list[int]]:
    """A list of ids, or a list of such lists; always as the latter."""
    if not isinstance(value, list):
        context = {"what": json_type(value)}
        raise PydanticCustomError("ids", "a list of token ids is needed, not {what}", context)
    rows = value if value and isinstance(value[0], list) else [value] if value else []
    for row in rows:
        if not isinstance(row, list) or not all(_is_token_id(each) for each in row):
            raise PydanticCustomError(
                "ids",
                "a token id is a whole number from 0 to {most}; send a list of them, or a list of such lists",
                {"most": MAX_TOKEN_ID},
            )
    return rows


def _is_token_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_TOKEN_ID


_IDS = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": MAX_TOKEN_ID}}
_IDS_SCHEMA = {"anyOf": [_IDS, {"type": "array", "items": _IDS}]}


class TeiDecodeRequest(Schema):
    model_config = example(ids=[[101, 2054, 102]])

    ids: Annotated[SkipValidation[list[list[int]]], BeforeValidator(_token_ids), WithJsonSchema(_IDS_SCHEMA)]
    skip_special_tokens: bool = True
