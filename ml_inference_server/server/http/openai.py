"""The OpenAI API's embeddings and models: https://platform.openai.com/docs/api-reference/embeddings."""

import base64
import time
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from aiohttp import web
from pydantic import BeforeValidator, Field

from ml_inference_server.door.rights import MODEL_FACTS
from ml_inference_server.server.call import Call
from ml_inference_server.server.encodings import EncodedRows, Encoding, encode_rows
from ml_inference_server.server.http.answer import HttpAnswer, json_bytes, json_list, written
from ml_inference_server.server.http.dialect import Dialect, Refusal
from ml_inference_server.server.http.endpoint import Endpoints, Schema, example
from ml_inference_server.server.http.text_fields import OneOrMoreTexts, is_token_ids
from ml_inference_server.server.observation import Reply
from ml_inference_server.server.options import EmbedOptions, Overflow
from ml_inference_server.server.service import Answer
from ml_inference_server.server.state import ServerState
from ml_inference_server.utils.errors import InvalidRequest


def _error(refusal: Refusal) -> Mapping[str, Any]:
    kind = "server_error" if refusal.status >= 500 else "invalid_request_error"
    return {
        "error": {
            "message": refusal.message,
            "type": "rate_limit_error" if refusal.status == 429 else kind,
            "param": refusal.field or None,
            "code": refusal.reason.lower(),
        }
    }


DIALECT = Dialect("OpenAI", _error, fields={"texts": "input"})


def _no_token_ids(value: Any) -> Any:
    if is_token_ids(value):
        raise ValueError(
            "token ids are not taken, because another tokenizer than this model's made them: send text "
            "(LangChain: OpenAIEmbeddings(check_embedding_ctx_length=False))"
        )
    return value


class EmbeddingsRequest(Schema):
    """The fields behind user are this server's own: clients pass them in extra_body."""

    model_config = example(input=["what is a cell"], model="all-MiniLM-L6-v2", input_type="query")

    input: Annotated[OneOrMoreTexts, BeforeValidator(_no_token_ids)]
    model: str = Field(
        max_length=1024, description="A name that GET /v1/models lists, perhaps with a role: name:query."
    )
    encoding_format: Literal["float", "base64"] | None = Field(
        "float", description="base64: of the numbers, little endian."
    )
    dimensions: int | None = Field(None, description="Keep so many numbers of each vector.")
    user: str | None = Field(None, description="Changes nothing.")
    input_type: str | None = Field(None, description="What the texts are for: query or document.")
    task: str | None = Field(None, description="Another name of input_type.")
    prompt_name: str | None = Field(None, description="One of the model's own prompts.")
    overflow: Overflow = Field(Overflow.CUT, strict=False, description="What happens to a text beyond the limit.")
    expect_space_id: str = Field("", description="Refuse where the vectors would be of another space.")
    embed_dtype: Encoding = Field(Encoding.FLOAT32, strict=False, description="Of the numbers of each vector.")


class OpenAi:
    def __init__(self, state: ServerState) -> None:
        self._state = state
        self._started_s = int(time.time())

    async def embeddings(self, request: EmbeddingsRequest, call: Call) -> Reply[HttpAnswer]:
        service = self._state.require_model().service
        texts = request.input
        if request.input_type and request.task and request.input_type != request.task:
            message = "says another thing than input_type: send one of them"
            raise InvalidRequest(f"task: {message}", violations=[("task", message)])
        options = EmbedOptions(
            prompt_name=request.prompt_name,
            role=request.input_type or request.task or "",
            overflow=request.overflow,
            dimensions=request.dimensions,
            expect_space_id=request.expect_space_id,
            model=request.model,
        )
        answer = await service.embed(texts, call, options)

        def write() -> bytes:
            encoded = encode_rows(answer.values, request.embed_dtype)
            return _body(answer, encoded, service.names.served, as_base64=request.encoding_format == "base64")

        body = await written(answer.values.size, write)
        return Reply(
            HttpAnswer(body, headers={"x-space-id": answer.space_id}),
            texts=len(texts),
            truncated=answer.truncated,
            stamps=answer.stamps,
        )

    def models(self, _: web.Request) -> web.Response:
        names = self._state.require_model().service.names.all
        return _json({"object": "list", "data": [self._model(name) for name in names]})

    def model(self, request: web.Request) -> web.Response:
        asked = request.match_info["model"]
        self._state.require_model().service.check_model(asked)
        return _json(self._model(asked))

    def _model(self, name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": self._started_s, "owned_by": "ml-inference-server"}


def add_routes(endpoints: Endpoints, state: ServerState) -> None:
    openai = OpenAi(state)
    for path in ("/v1/embeddings", "/embeddings"):
        endpoints.work(
            path, DIALECT, "openai.embeddings", EmbeddingsRequest, openai.embeddings, "Embeddings, one for each input"
        )
    endpoints.question("GET", "/v1/models", DIALECT, openai.models, "The names of the model", MODEL_FACTS)
    endpoints.question("GET", "/v1/models/{model:.+}", DIALECT, openai.model, "One name of the model", MODEL_FACTS)


def _body(answer: Answer, encoded: EncodedRows, model: str, *, as_base64: bool) -> bytes:
    """The vectors come last, so that the rest stays readable in a log."""
    head = {
        "object": "list",
        "model": model,
        "usage": {"prompt_tokens": answer.tokens, "total_tokens": answer.tokens},
        "space_id": answer.space_id,
        "prompt_name": answer.prompt_name,
        "token_counts": answer.lengths.total,
        "used_token_counts": answer.lengths.used,
        "truncated_rows": answer.lengths.truncated_rows,
        "warnings": answer.warnings,
    }
    items = (
        {
            "object": "embedding",
            "index": index,
            "embedding": base64.b64encode(row.data).decode() if as_base64 else row,
            **({} if encoded.scales is None else {"scale": float(encoded.scales[index])}),
        }
        for index, row in enumerate(encoded.rows)
    )
    return json_bytes(head)[:-1] + b',"data":' + json_list(items) + b"}"


def _json(content: Mapping[str, Any]) -> web.Response:
    return web.Response(
        body=json_bytes(content), content_type="application/json", headers={"Cache-Control": "no-store"}
    )
