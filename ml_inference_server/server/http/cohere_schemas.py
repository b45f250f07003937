"""The bodies of Cohere's embed and rerank, versions 1 and 2, and of what Jina and others made after them.

Where a field may be left out it may be null: their clients send either. What is no field here is ignored, as it is
there: a later client sends more.
"""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, SkipValidation, WithJsonSchema
from pydantic_core import PydanticCustomError

from ml_inference_server.server.http.endpoint import Schema, example
from ml_inference_server.server.http.text_fields import Texts, json_type

EmbeddingType = Literal["float", "int8", "uint8", "binary", "ubinary", "base64"]
Document = str | dict[str, Any]
Count = Annotated[int, Field(ge=1, le=2**31 - 1)]


def _documents(value: Any) -> list[Document]:
    if not isinstance(value, list):
        wrong = {"what": json_type(value)}
        raise PydanticCustomError("documents", "a list of strings or objects is needed, not {what}", wrong)
    for place, each in enumerate(value):
        if not isinstance(each, str | dict):
            context = {"place": place, "what": json_type(each)}
            raise PydanticCustomError("documents", "item {place} must be a string or an object, not {what}", context)
    return value


_DOCUMENTS_SCHEMA: dict[str, Any] = {
    "type": "array",
    "items": {"anyOf": [{"type": "string"}, {"type": "object"}]},
    "description": 'Strings, or objects with a "text"; their other keys come back with `return_documents`.',
}
Documents = Annotated[
    list[Annotated[Document, SkipValidation]], BeforeValidator(_documents), WithJsonSchema(_DOCUMENTS_SCHEMA)
]


class _CohereRequest(Schema):
    model: str | None = Field(None, description="The served name, or one that it is also known by; left out: it.")
    priority: int | None = Field(None, description="Changes nothing: requests are served in order of arrival.")


class CohereContent(Schema):
    """A part of an input of `inputs`; only texts are served."""

    type: str
    text: str | None = None


class CohereInput(Schema):
    content: Annotated[list[CohereContent], Field(fail_fast=True)]


class CohereEmbedRequest(_CohereRequest):
    model_config = example(texts=["cells are the unit of life"], input_type="search_document")

    texts: Texts | None = None
    inputs: Annotated[list[CohereInput], Field(fail_fast=True)] | None = Field(
        None, description="Instead of `texts`: each with one text as its content."
    )
    images: list[Any] | None = Field(None, description="Refused: this server embeds texts.")
    input_type: str | None = Field(
        None,
        description="search_query, search_document, classification or clustering; query or document do as well.",
    )
    embedding_types: Annotated[list[EmbeddingType], Field(fail_fast=True)] | None = Field(
        None, description="Left out: float, which version 1 answers as a bare list."
    )
    output_dimension: Count | None = None
    truncate: Literal["NONE", "START", "END"] | None = Field(
        None, description="END (default) or START is cut off a text that is too long; NONE refuses it."
    )
    max_tokens: Count | None = Field(None, description="Refused below the model's own limit.")


class CohereSpans(Schema):
    mode: str | None = None


class CohereRerankRequest(_CohereRequest):
    model_config = example(query="what is a cell", documents=["a bank", "the unit of life"])

    query: str
    documents: Documents
    top_n: Count | None = Field(None, description="Left out: all.")
    return_documents: bool | None = None
    rank_fields: Texts | None = Field(
        None, description="Keys of documents that are objects; their texts are joined by a line break."
    )
    max_chunks_per_doc: int | None = Field(
        None, ge=1, description="A document is one text, cut at the limit: anything but 1 comes back with a warning."
    )
    max_tokens_per_doc: Count | None = None
    relevant_spans: CohereSpans | None = Field(None, description="Refused where its mode is not disabled.")
