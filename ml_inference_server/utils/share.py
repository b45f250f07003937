"""Shares of what cannot be exceeded: one above 1 says that something was measured wrongly."""


def is_impossible(share: float) -> bool:
    """Above 1 by more than is shown."""
    return round(share, 2) > 1


def of_limit(share: float) -> str:
    """In percent."""
    return f"{share:.0%}" + (" (more than all: an error of the measurement)" if is_impossible(share) else "")
