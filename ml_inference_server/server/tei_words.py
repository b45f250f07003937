"""Words of Text Embeddings Inference that its clients look for, the same over HTTP and gRPC."""

import re

from ml_inference_server.utils.stages import Stamps

FIELDS = {"texts": "inputs", "pairs": "inputs", "documents": "texts"}
"""What it calls the fields of the service."""

LABEL = "LABEL_0"
"""What a model of one output calls it, where its files give it no other name."""

_BEGINNINGS = {
    "QUEUE_FULL": "Model is overloaded: ",
    "WAIT_TOO_LONG": "Model is overloaded: ",
    "CALLER_LIMIT": "Model is overloaded: ",
    "EMPTY_TEXT": "Input validation error: ",
    "TEXT_TOO_LONG": "Input validation error: ",
    "INVALID_FIELD": "Input validation error: ",
}


def worded(reason: str, field: str, message: str) -> str:
    """The message of an error in TEI's own words. field: where it lies, by TEI's name; or empty."""
    if reason == "EMPTY_REQUEST" and field:
        return f"`{field}` cannot be empty"
    if reason == "TOO_MANY_TEXTS" and (numbers := re.search(r"(\d+) items, the limit is (\d+)", message)):
        return f"batch size {numbers[1]} > maximum allowed batch size {numbers[2]}"
    return _BEGINNINGS.get(reason, "") + message


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


def _ms(seconds: float) -> str:
    return str(max(0, int(1e3 * seconds)))
