"""What TEI's answers carry beside their bodies, the form of its errors, and its /info."""

from collections.abc import Mapping
from typing import Any

from ml_inference_server import __version__
from ml_inference_server.server.http.dialect import Dialect, Refusal
from ml_inference_server.server.service import TOKENIZE_THREADS
from ml_inference_server.server.state import ServerState
from ml_inference_server.server.tei_words import FIELDS, LABEL, worded

# Its own words for what went wrong, by our reasons; all others are a Validation, 422.
_TYPES = {
    "EMPTY_REQUEST": "Empty",
    "QUEUE_FULL": "Overloaded",
    "WAIT_TOO_LONG": "Overloaded",
    "CALLER_LIMIT": "Overloaded",
    "MODEL_LOADING": "Unhealthy",
    "DRAINING": "Unhealthy",
    "REPLICA_LOST": "Unhealthy",
    "ENGINE_STUCK": "Unhealthy",
    "WRONG_TASK": "Backend",
    "BACKEND_ERROR": "Backend",
    "NON_FINITE_OUTPUT": "Backend",
    "OUT_OF_MEMORY": "Backend",
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
    "OUT_OF_MEMORY": 424,
}


def _error(refusal: Refusal) -> Mapping[str, Any]:
    message = worded(refusal.reason, refusal.field, refusal.message)
    return {"error": message, "error_type": _TYPES.get(refusal.reason, "Validation")}


DIALECT = Dialect("TEI", _error, _STATUSES, fields=FIELDS)


def info(state: ServerState) -> dict[str, Any]:
    """The keys of TEI's /info; none of them while there is no model."""
    model = state.model
    if model is None:
        return {}
    settings, found = state.settings, model.info
    # Its clients know four words and refuse anything else, null too: what has no word of its own is nearest to mean.
    kind: dict[str, Any] = {"embedding": {"pooling": model.described.pooling or "mean"}}
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
        "max_batch_tokens": model.batcher.max_batch_tokens,
        "max_batch_requests": settings.batching.max_batch_size,
        "max_client_batch_size": settings.server.max_texts,
        "auto_truncate": True,
        "tokenization_workers": TOKENIZE_THREADS,
        "version": __version__,
        "sha": None,
        "docker_label": None,
    }
