"""How many requests the property tests send: together more than 20,000, the same ones at every run.

With FUZZ_FACTOR=50 in the environment it is 50 times as many, and others at every run, but for those with the same
--hypothesis-seed; then pass --timeout 0 too. A factor below 1 does as well.
"""

import math
import os

from hypothesis import HealthCheck, settings

FACTOR = float(os.environ.get("FUZZ_FACTOR", "1"))
# In flight at once, and one example of Hypothesis.
BATCH = 25

HTTP_REQUESTS = 12_000
SCHEMA_REQUESTS = 500
RAW_REQUESTS = 1000
GRPC_REQUESTS = 8_000


def fuzzing(requests: int, batch: int = BATCH) -> settings:
    """For a property of a list of `batch` requests, so that this many are sent, times FACTOR."""
    return settings(
        max_examples=math.ceil(requests * FACTOR / batch),
        derandomize=FACTOR == 1,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
