"""Who gets in, and how what they say is hidden from others."""

from pydantic import Field

from ml_inference_server.utils.section import Section


class TlsSettings(Section):
    cert: str = Field(
        "",
        description="PEM file of the certificate, with those between it and the authority behind it. gRPC and HTTP "
        "then speak TLS only. The files are read anew when they change.",
    )
    key: str = Field("", description="PEM file of its private key, without a passphrase.")
    client_ca: str = Field(
        "", description="PEM file of the authorities whose certificates clients must show; empty: they need none."
    )


class AuthSettings(Section):
    keys_file: str = Field(
        "", description="File of the keys that may come in, as `mlis key` writes it; read anew when it changes."
    )
    open_reflection: bool = Field(True, description="Whether gRPC's reflection answers callers without a key.")
