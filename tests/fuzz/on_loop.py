"""An async context for a property that is not async, as Hypothesis wants it."""

import asyncio
import contextlib
from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager
from typing import TypeVar

T = TypeVar("T")


@contextlib.contextmanager
def entered(runner: asyncio.Runner, context: AbstractAsyncContextManager[T]) -> Iterator[T]:
    """`context` on the runner's loop, left as an async with block leaves it, after a failure as well.

    Left open, its generators are all closed at once at the end of the loop, and that ends Python 3.11 with a
    segmentation fault in place of telling the failure.
    """
    value = runner.run(context.__aenter__())
    try:
        yield value
    except BaseException as error:
        if not runner.run(context.__aexit__(type(error), error, error.__traceback__)):
            raise
    else:
        runner.run(context.__aexit__(None, None, None))
