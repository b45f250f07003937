"""What a key may do, and what each thing asks for."""

from enum import StrEnum


class Right(StrEnum):
    """infer: work of every kind. metrics: figures and settings. admin: what changes the server."""

    INFER = "infer"
    METRICS = "metrics"
    ADMIN = "admin"


Needs = frozenset[Right]
"""The rights of which one is enough."""

OPEN: Needs = frozenset()
ANY_KEY: Needs = frozenset(Right)
INFER: Needs = frozenset({Right.INFER})
METRICS: Needs = frozenset({Right.METRICS})
ADMIN: Needs = frozenset({Right.ADMIN})
# What callers of a model and those who watch it both have to know of it.
MODEL_FACTS: Needs = INFER | METRICS
