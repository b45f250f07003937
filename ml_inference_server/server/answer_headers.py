"""What an answer tells beside its body, where the body has no room: as headers of HTTP or initial metadata of gRPC."""

from ml_inference_server.server.service import TextLengths
from ml_inference_server.utils.stages import Stamps

# A line that every client takes.
_MOST_BYTES = 4096


def length_headers(lengths: TextLengths) -> dict[str, str]:
    """How many tokens each text had, how many were used, and which were cut. A list that is too long is left out."""
    lists = {
        "x-token-counts": ",".join(map(str, lengths.total)),
        "x-used-token-counts": ",".join(map(str, lengths.used)),
        "x-truncated-rows": ",".join(map(str, lengths.truncated_rows)),
    }
    kept = {name: value for name, value in lists.items() if len(value) <= _MOST_BYTES}
    return {"x-truncated-texts": str(lengths.truncated), **kept}


def timing_headers(stamps: Stamps, device: str, characters: int, tokens: int) -> dict[str, str]:
    """TEI's own, in whole milliseconds. The stages are those of the whole request, where TEI tells means over texts."""
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
