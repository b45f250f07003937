"""How a client shows who it is, and finds out who the server is."""

from collections.abc import Sequence
from os import PathLike
from pathlib import Path

import grpc

Metadata = tuple[tuple[str, str], ...]


def tls_credentials(
    ca: str | PathLike[str] | None = None,
    cert: str | PathLike[str] | None = None,
    key: str | PathLike[str] | None = None,
) -> grpc.ChannelCredentials:
    """For `credentials`, from files in PEM form.

    ca: authorities that the server's certificate may be of; None: those that gRPC trusts by itself. cert and key: what
    the server asks its clients for.
    """
    if (cert is None) != (key is None):
        raise ValueError("cert and key go together: name both files")
    roots, private_key, chain = (None if each is None else Path(each).read_bytes() for each in (ca, key, cert))
    return grpc.ssl_channel_credentials(roots, private_key, chain)


def sent_metadata(metadata: Sequence[tuple[str, str]], api_key: str | None) -> Metadata:
    """With every call. ValueError for a key that no header can hold; it does not show the key."""
    if api_key is None:
        return tuple(metadata)
    if not api_key or not all("!" <= each <= "~" for each in api_key):
        raise ValueError("api_key: printable ASCII characters are needed, without spaces")
    return (*metadata, ("authorization", f"Bearer {api_key}"))
