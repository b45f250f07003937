"""What a request may ask beside its texts, in the words of no protocol."""

from enum import StrEnum
from typing import NamedTuple


class Overflow(StrEnum):
    """What happens to a text that is longer than the model's limit."""

    CUT = "cut"  # its beginning is used
    CUT_LEFT = "cut_left"  # its end is used
    REFUSE = "refuse"  # the request is refused
    CHUNK = "chunk"  # all of it is used, in overlapping windows; the mean of their vectors, weighted by tokens


class Priority(StrEnum):
    """How urgent a request is."""

    INTERACTIVE = "interactive"  # somebody waits for it
    BULK = "bulk"  # it takes what the others leave, and never less than its share


class EmbedOptions(NamedTuple):
    """prompt_name: one of the model's own prompts. role: what the texts are for (see roles.py); at most one of the two.

    dimensions: keep so many numbers of each vector; None: all. normalize: True scales vectors to length 1; False and
    None leave them as the model gives them, as sentence-transformers does. expect_space_id: refuse where the vectors
    would be of another space; empty: any. model: the name that the caller believes to be served; empty: any. priority:
    None: what the call's header says, or else what follows from its size.
    """

    prompt_name: str | None = None
    role: str = ""
    overflow: Overflow = Overflow.CUT
    dimensions: int | None = None
    normalize: bool | None = None
    expect_space_id: str = ""
    model: str = ""
    priority: Priority | None = None


class ScoreOptions(NamedTuple):
    """As in EmbedOptions. For a cross-encoder `overflow` is CUT or REFUSE."""

    overflow: Overflow = Overflow.CUT
    model: str = ""
    priority: Priority | None = None


class RerankOptions(NamedTuple):
    """max_document_tokens: use no more than so many tokens of each document; None: what the model takes."""

    overflow: Overflow = Overflow.CUT
    model: str = ""
    max_document_tokens: int | None = None
    priority: Priority | None = None
