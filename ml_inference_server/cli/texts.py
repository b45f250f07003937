"""What the commands send to a server: texts among the arguments, or lines of standard input."""

import sys
from collections.abc import Iterator, Sequence

from ml_inference_server.utils.errors import ConfigError


def given_or_lines(given: Sequence[str], what: str) -> Iterator[str]:
    """`given`, or without any the lines of standard input; ConfigError where there is none, or one is not UTF-8."""
    is_there = False
    try:
        for text in given or (line.rstrip("\r\n") for line in sys.stdin):
            text.encode()  # what was no UTF-8 among the arguments is a surrogate here
            is_there = True
            yield text
    except UnicodeError:
        raise ConfigError(f"a {what} is not valid UTF-8") from None
    if not is_there:
        raise ConfigError(f"there is no {what}: give some as arguments, or as lines on standard input")
