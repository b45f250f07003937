"""What an answer tells beside its body, where the body has no room: as headers of HTTP or initial metadata of gRPC."""

from collections.abc import Sequence

from ml_inference_server.server.service import TextLengths

# A line that every client takes.
_MOST_BYTES = 4096
_MOST_WARNING_BYTES = 1024


def length_headers(lengths: TextLengths) -> dict[str, str]:
    """How many tokens each text had, how many were used, and which were cut. A list that is too long is left out."""
    lists = {
        "x-token-counts": ",".join(map(str, lengths.total)),
        "x-used-token-counts": ",".join(map(str, lengths.used)),
        "x-truncated-rows": ",".join(map(str, lengths.truncated_rows)),
    }
    kept = {name: value for name, value in lists.items() if len(value) <= _MOST_BYTES}
    return {"x-truncated-texts": str(lengths.truncated), **kept}


def warning_headers(warnings: Sequence[str]) -> dict[str, str]:
    """Sentences for people."""
    printable = "".join(c if " " <= c <= "~" else "?" for c in "; ".join(warnings))
    return {"x-warnings": printable[:_MOST_WARNING_BYTES]} if printable else {}
