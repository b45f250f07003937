"""When the requests of an open loop are due: fixed before the run, whatever the server does."""

from typing import Literal

import numpy as np
from numpy.typing import NDArray

Process = Literal["poisson", "constant"]


def arrivals_s(
    process: Process, rate_per_s: float, *, requests: int = 0, duration_s: float = 0.0, seed: int, repeat: int
) -> NDArray[np.float64]:
    """Instants in seconds from the start, ascending: `requests` of them, or all that fall into `duration_s`.

    A Poisson process has exponential gaps; a constant one equal gaps. The same arguments give the same schedule, and
    each repeat another one.
    """
    if duration_s:
        # Enough for any draw: a Poisson count this far above its mean does not happen.
        expected = rate_per_s * duration_s
        requests = int(expected + 10 * np.sqrt(expected) + 20)
    if process == "constant":
        instants = np.arange(requests) / rate_per_s
    else:
        instants = np.cumsum(np.random.default_rng([seed, repeat]).exponential(1 / rate_per_s, requests))
    kept: NDArray[np.float64] = instants[instants < duration_s] if duration_s else instants
    return kept if len(kept) else instants[:1]
