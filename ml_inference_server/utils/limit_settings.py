"""What a caller may ask for who has no key that says it."""

from pydantic import Field

from ml_inference_server.utils.section import Section


class LimitSettings(Section):
    requests_per_s: float | None = Field(
        None, gt=0, le=1e6, description="Requests of one caller without a limit of a key's; unset: any."
    )
    tokens_per_s: float | None = Field(
        None, gt=0, le=1e9, description="Likewise their tokens, as admission counts them."
    )
    queue_share: float | None = Field(
        None, gt=0, le=1, description="Likewise the part of the queue that they may take, of its requests and tokens."
    )
