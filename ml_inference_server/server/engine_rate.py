"""How fast the engine works, measured from its batches: what admission and dispatch predict with."""

from dataclasses import dataclass

_WEIGHT = 0.1  # of the newest batch in the moving means


@dataclass(slots=True)
class EngineRate:
    """Exponentially weighted means over the batches so far; 0 before the first one.

    tokens_per_s: real tokens, of all streams together, with the time that passes between two batches.
    s_per_cost_token: seconds of one batch for each token of its cost, which is its work and the fixed overhead (see
    batching). batches: how many that is known from.
    """

    tokens_per_s: float = 0.0
    s_per_cost_token: float = 0.0
    batches: int = 0

    def observe(self, *, tokens: int, cost_tokens: int, streams: int, compute_s: float, held_s: float) -> None:
        """One batch that took `compute_s` and held one of `streams` streams for `held_s`, from call to answer."""
        if compute_s <= 0:
            return
        self.batches += 1
        self.tokens_per_s = _mean(self.tokens_per_s, tokens * streams / max(compute_s, held_s))
        self.s_per_cost_token = _mean(self.s_per_cost_token, compute_s / cost_tokens)


def _mean(before: float, newest: float) -> float:
    return (1 - _WEIGHT) * before + _WEIGHT * newest if before else newest
