"""How many replicas Ray Serve's autoscaler should run: by how long a text waits for the engine.

Requests in flight, which Ray scales by, say little here: a replica works well on a hundred of them in batches, and may
be too slow for ten long ones. Ray runs this in its controller, and sends the text of this module there: it imports
nothing of the project.
"""

import math
from typing import Any

QUEUE_WAIT_MS = "queue_wait_ms"
BUSY_SHARE = "busy_share"
# Nobody is sent away where the others would be busier than this afterwards.
_MOST_BUSY = 0.7


class QueueWaitPolicy:
    """A class for `autoscaling_config.policy`. target_ms: of the wait, as the mean over the replicas.

    Above it: as many replicas as would bring it there, at most twice as many as now. At half of it and below: one less,
    where the rest are not too busy then, but never the last one. Ray applies its bounds and its delays to what this
    says.
    """

    def __init__(self, target_ms: float = 50.0) -> None:
        if not target_ms > 0:
            raise ValueError(f"target_ms is {target_ms}: give the wait that is right, in milliseconds")
        self._target_ms = target_ms

    def __call__(self, ctx: Any) -> tuple[int, dict[str, Any]]:
        """ctx: Ray's AutoscalingContext, with what each replica's `record_autoscaling_stats` said."""
        now = ctx.current_num_replicas
        waits, busy = (
            list((ctx.aggregated_metrics or {}).get(name, {}).values()) for name in (QUEUE_WAIT_MS, BUSY_SHARE)
        )
        if not waits or not now:
            return ctx.target_num_replicas, {}
        wait_ms = sum(waits) / len(waits)
        if wait_ms > self._target_ms:
            return min(2 * now, math.ceil(now * wait_ms / self._target_ms)), {}
        # Without a replica there are no waits, and so nothing that would ask for one.
        needed = max(1, math.ceil(sum(busy) / _MOST_BUSY))
        if wait_ms <= self._target_ms / 2 and needed < now:
            return now - 1, {}
        return now, {}
