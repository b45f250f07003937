"""What TEI's answers carry beside their bodies, the form of its errors, and its /info."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from ml_inference_server import __version__
from ml_inference_server.server.http.dialect import Dialect, Refusal
from ml_inference_server.server.scheduler import batch_limits
from ml_inference_server.server.service import TOKENIZE_THREADS
from ml_inference_server.server.state import ServerState
from ml_inference_server.utils.stages import Stamps

# What a model of one output calls it, where its files give it no other name.
LABEL = "LABEL_0"
_MOST_WARNING_BYTES = 1024
# Its own words for what went wrong, by our reasons; all others are a Validation, 422.
_TYPES = {
    "EMPTY_REQUEST": "Empty",
    "QUEUE_FULL": "Overloaded",
    "WAIT_TOO_LONG": "Overloaded",
    "MODEL_LOADING": "Unhealthy",
    "DRAINING": "Unhealthy",
    "WRONG_TASK": "Backend",
    "BACKEND_ERROR": "Backend",
    "NON_FINITE_OUTPUT": "Backend",
    "DEADLINE_EXCEEDED": "Backend",
    "INTERNAL_BUG": "Backend",
}
_STATUSES = {
    "EMPTY_REQUEST": 400,
    "EMPTY_TEXT": 422,
    "TEXT_TOO_LONG": 422,
    "TOO_MANY_TEXTS": 422,
    "REPLY_TOO_LARGE": 422,
    "INVALID_FIELD": 422,
    "WRONG_TASK": 424,
    "BACKEND_ERROR": 424,
    "NON_FINITE_OUTPUT": 424,
}
# How its messages begin, for clients that look at them.
_BEGINNINGS = {
    "QUEUE_FULL": "Model is overloaded: ",
    "WAIT_TOO_LONG": "Model is overloaded: ",
    "EMPTY_TEXT": "Input validation error: ",
    "TEXT_TOO_LONG": "Input validation error: ",
    "INVALID_FIELD": "Input validation error: ",
}


def _error(refusal: Refusal) -> Mapping[str, Any]:
    return {"error": _worded(refusal), "error_type": _TYPES.get(refusal.reason, "Validation")}


def _worded(refusal: Refusal) -> str:
    """In its own words where clients may look for them."""
    if refusal.reason == "EMPTY_REQUEST" and refusal.field:
        return f"`{refusal.field}` cannot be empty"
    if refusal.reason == "TOO_MANY_TEXTS" and (
        numbers := re.search(r"(\d+) items, the limit is (\d+)", refusal.message)
    ):
        return f"batch size {numbers[1]} > maximum allowed batch size {numbers[2]}"
    return _BEGINNINGS.get(refusal.reason, "") + refusal.message


DIALECT = Dialect("TEI", _error, _STATUSES, fields={"texts": "inputs", "pairs": "inputs", "documents": "texts"})


def info(state: ServerState) -> dict[str, Any]:
    """The keys of TEI's /info; none of them while there is no model."""
    model = state.model
    if model is None:
        return {}
    settings, found = state.settings, model.info
    kind: dict[str, Any] = {"embedding": {"pooling": model.described.pooling or None}}
    if found.task == "cross_encoder":
        kind = {"reranker": {"id2label": {"0": LABEL}, "label2id": {LABEL: 0}}}
    return {
        "model_id": model.service.names.served,
        "served_model_name": model.service.names.served,
        "model_sha": found.model_sha256 or None,
        "model_dtype": found.dtype,
        "model_type": kind,
        "max_concurrent_requests": settings.batching.max_queue_requests,
        "max_input_length": found.max_tokens,
        "max_batch_tokens": batch_limits(settings.batching, found).max_batch_tokens,
        "max_batch_requests": settings.batching.max_batch_size,
        "max_client_batch_size": settings.server.max_texts,
        "auto_truncate": True,
        "tokenization_workers": TOKENIZE_THREADS,
        "version": __version__,
        "sha": None,
        "docker_label": None,
    }


def timing_headers(stamps: Stamps, device: str, characters: int, tokens: int) -> dict[str, str]:
    """In whole milliseconds, as there. The stages are those of the whole request, where TEI tells means over texts."""
    total = _ms(stamps.gathered_at - stamps.received_at)
    return {
        "x-compute-type": device,
        "x-compute-time": total,
        "x-compute-characters": str(characters),
        "x-compute-tokens": str(tokens),
        "x-total-time": total,
        "x-tokenization-time": _ms(stamps.tokenized_at - stamps.admitted_at),
        "x-queue-time": _ms(stamps.engine_started_at - stamps.tokenized_at),
        "x-inference-time": _ms(stamps.engine_ended_at - stamps.engine_started_at),
    }


def warning_headers(warnings: Sequence[str]) -> dict[str, str]:
    """Sentences for people, which the bodies have no room for."""
    printable = "".join(c if " " <= c <= "~" else "?" for c in "; ".join(warnings))
    return {"x-warnings": printable[:_MOST_WARNING_BYTES]} if printable else {}


def _ms(seconds: float) -> str:
    return str(max(0, int(1e3 * seconds)))
