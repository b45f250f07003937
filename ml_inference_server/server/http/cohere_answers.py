"""What stands in the answers of Cohere's embed and rerank, and which texts a request means."""

import base64
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from ml_inference_server.server.encodings import Encoding, encode_rows
from ml_inference_server.server.http.answer import json_bytes, json_list
from ml_inference_server.server.http.cohere_schemas import (
    CohereEmbedRequest,
    CohereRerankRequest,
    Document,
    EmbeddingType,
)
from ml_inference_server.server.service import TextLengths
from ml_inference_server.utils.errors import InvalidRequest

# So many documents under one query are a search unit, as Cohere counts them.
_DOCUMENTS_OF_A_UNIT = 100


def embed_texts(request: CohereEmbedRequest) -> list[str]:
    """The texts to embed, from `texts` or from `inputs`. InvalidRequest where it asks for anything else."""
    if request.images:
        raise _invalid("images", "this server embeds texts only: send `texts`")
    if request.inputs is None:
        return request.texts if request.texts is not None else []
    if request.texts is not None:
        raise _invalid("inputs", "stands beside `texts`: send one of the two")
    texts = []
    for place, each in enumerate(request.inputs):
        content = each.content[0] if len(each.content) == 1 else None
        if content is None or content.type != "text" or content.text is None:
            raise _invalid(f"inputs[{place}].content", "one item of type text is served, and nothing else")
        texts.append(content.text)
    return texts


def document_texts(documents: Sequence[Document], rank_fields: Sequence[str] | None) -> list[str]:
    """The text of each document. InvalidRequest names those that have none."""
    texts: list[str] = []
    wrong: list[tuple[str, str]] = []
    for place, document in enumerate(documents):
        if isinstance(document, str):
            texts.append(document)
            continue
        parts = [document[name] for name in rank_fields or ("text",) if name in document]
        if parts and all(isinstance(part, str) for part in parts):
            texts.append("\n".join(parts))
        else:
            wrong.append((f"documents[{place}]", _no_text(rank_fields)))
    if wrong:
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise InvalidRequest(f"{wrong[0][0]}: {wrong[0][1]}{more}", violations=wrong)
    return texts


def _no_text(rank_fields: Sequence[str] | None) -> str:
    if rank_fields:
        return "an object needs one of the keys that rank_fields names, and strings under them"
    return "an object needs its text as a string under the key text, or the keys to use in rank_fields"


def returned_documents(documents: Sequence[Document]) -> list[orjson.Fragment]:
    """As they come back beside their scores. InvalidRequest for an object that cannot be written as JSON again."""
    out = []
    for place, document in enumerate(documents):
        try:
            out.append(orjson.Fragment(json_bytes({"text": document} if isinstance(document, str) else document)))
        except TypeError:
            raise _invalid(
                f"documents[{place}]", "holds what cannot be sent back: a lone surrogate or a number out of range"
            ) from None
    return out


def embeddings_by_type(
    values: NDArray[np.float32], types: Sequence[EmbeddingType]
) -> tuple[dict[str, orjson.Fragment], list[float] | None]:
    """(the rows under the name of each type, the scales of int8 and uint8)."""
    found: dict[str, orjson.Fragment] = {}
    scales: NDArray[np.float32] | None = None
    for name in dict.fromkeys(types):
        match name:
            case "float":
                rows: Any = np.ascontiguousarray(values, np.float32)
            case "base64":
                rows = [base64.b64encode(row.tobytes()).decode() for row in np.ascontiguousarray(values, "<f4")]
            case "int8" | "uint8":
                encoded = encode_rows(values, Encoding.INT8)
                scales = encoded.scales
                rows = encoded.rows if name == "int8" else (encoded.rows.astype(np.int16) + 128).astype(np.uint8)
            case _:
                rows = encode_rows(values, Encoding(name)).rows
        found[name] = orjson.Fragment(json_list(rows))
    return found, None if scales is None else scales.tolist()


def embed_body(
    request_id: str,
    version: str,
    model: str,
    texts: Sequence[str],
    values: NDArray[np.float32],
    types: Sequence[EmbeddingType] | None,
    meta: dict[str, Any],
) -> bytes:
    """Version 1 answers a bare list of float where no type is asked for."""
    embeddings, scales = embeddings_by_type(values, types or ("float",))
    is_list = version == "1" and not types
    if scales is not None:
        meta = meta | {"scales": orjson.Fragment(json_bytes(np.array(scales, np.float32)))}
    return json_bytes(
        {
            "id": request_id,
            "response_type": "embeddings_floats" if is_list else "embeddings_by_type",
            "model": model,
            "embeddings": embeddings["float"] if is_list else embeddings,
            "texts": texts,
            "meta": meta,
        }
    )


def rerank_body(
    request_id: str,
    model: str,
    results: Sequence[dict[str, Any]],
    tokens: int,
    meta: dict[str, Any],
) -> bytes:
    """`usage` is for the clients of Jina, Infinity and vLLM, `meta` for those of Cohere."""
    return json_bytes(
        {
            "id": request_id,
            "object": "rerank",
            "model": model,
            "results": results,
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
            "meta": meta,
        }
    )


def rerank_warnings(request: CohereRerankRequest) -> list[str]:
    """What the request asks for that changes nothing."""
    found = priority_warnings(request.priority)
    if request.max_chunks_per_doc not in (None, 1):
        found.append("max_chunks_per_doc changes nothing: each document is scored as one text, cut at the limit")
    return found


def priority_warnings(priority: int | None) -> list[str]:
    return ["priority changes nothing: requests are served in order of arrival"] if priority else []


def answer_meta(
    version: str, billed: dict[str, int], tokens: int, lengths: TextLengths, warnings: Sequence[str]
) -> dict[str, Any]:
    """Cohere's own keys, and beside them what was done to each text."""
    meta = {
        "api_version": {"version": version},
        "billed_units": billed,
        "tokens": {"input_tokens": tokens, "output_tokens": 0},
        "token_counts": lengths.total,
        "used_token_counts": lengths.used,
        "truncated_rows": lengths.truncated_rows,
    }
    return meta | {"warnings": list(warnings)} if warnings else meta


def search_units(documents: int) -> int:
    return math.ceil(documents / _DOCUMENTS_OF_A_UNIT)


def _invalid(field: str, message: str) -> InvalidRequest:
    return InvalidRequest(f"{field}: {message}", violations=[(field, message)])
