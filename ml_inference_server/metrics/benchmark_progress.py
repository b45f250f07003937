"""The progress that a running benchmark announces, checked, and forgotten when it falls silent."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

SILENCE_S = 10.0
MAX_BODY_BYTES = 4096

_Name = Annotated[str, Field(max_length=200)]


class ReportedProgress(BaseModel):
    """Row `row` of `rows`, `done` of it over; eta_s: seconds until the whole benchmark ends, if it knows."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, strict=True)

    name: _Name
    row: int = Field(ge=1, le=100_000)
    rows: int = Field(ge=1, le=100_000)
    label: _Name
    done: float = Field(ge=0, le=1)
    eta_s: float | None = Field(ge=0, le=1e9)
    finished: bool

    @model_validator(mode="after")
    def _check(self) -> "ReportedProgress":
        if self.row > self.rows:
            raise ValueError(f"row {self.row} of {self.rows}")
        return self


class BenchmarkProgress:
    """The latest announcement. `now_s` is an argument."""

    def __init__(self) -> None:
        self._latest: ReportedProgress | None = None
        self._told_s = 0.0

    def update(self, body: bytes, now_s: float) -> None:
        """Take a JSON body in; ValueError says in one line what is wrong with it."""
        try:
            progress = ReportedProgress.model_validate_json(body)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(str(part) for part in first["loc"])
            raise ValueError(f"{where}: {first['msg']}" if where else first["msg"]) from None
        self._latest, self._told_s = (None if progress.finished else progress), now_s

    def current(self, now_s: float) -> dict[str, Any] | None:
        """What to show, or None when no benchmark runs or it has been silent for SILENCE_S."""
        if self._latest is None or now_s - self._told_s > SILENCE_S:
            return None
        return self._latest.model_dump(exclude={"finished"})
