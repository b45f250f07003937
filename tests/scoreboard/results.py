"""The file of results: for each row its last figure, with where, when and how it came about."""

from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from ml_inference_server.utils.files import replace_file

JSON_NAME = "scoreboard.json"


class BrokenResults(Exception):
    """The file that is to be continued is none of ours; the message says what to do."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Origin(_Part):
    """Where a figure comes from. ended_at: UTC. commit: with "+" behind it where files differed from it."""

    ended_at: str
    took_s: float
    commit: str
    machine: str
    python: str
    seed: int
    is_quick: bool
    command: str


class Recorded(_Part):
    """A row's figure, as Figure has it. was_run: False where something was lacking, and note says what."""

    title: str
    pass_line: str
    was_run: bool
    text: str
    passed: bool | None
    note: str
    details: dict[str, float | int | str]
    origin: Origin


class Results(_Part):
    """By the key of the row."""

    rows: dict[str, Recorded] = {}

    def with_row(self, key: str, recorded: Recorded) -> "Results":
        """This row anew, the others as they are. What could not be run does not replace what once was."""
        if not recorded.was_run and key in self.rows and self.rows[key].was_run:
            return self
        return Results(rows={**self.rows, key: recorded})


def read(folder: Path) -> Results:
    """What stands in the folder; nothing where no file is. BrokenResults."""
    path = folder / JSON_NAME
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return Results()
    except OSError as error:
        raise BrokenResults(f"{path} cannot be read: {error.strerror}") from None
    try:
        return Results.model_validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise BrokenResults(
            f"{path} is no scoreboard ({where}: {first['msg']}); move it away, or choose another --out"
        ) from None


def write(folder: Path, results: Results) -> None:
    """Whole or not at all. OSError."""
    replace_file(folder / JSON_NAME, results.model_dump_json(indent=2) + "\n")
