"""Shares of what cannot be exceeded: one above 1 says that something was measured wrongly."""

MARK = "(!)"
NOTE = "a share above 1 is an error of the measurement: measure again on an idle machine, and longer"


def is_impossible(share: float) -> bool:
    """Above 1 by more than is shown."""
    return round(share, 2) > 1


def of_limit(share: float) -> str:
    """In percent, for a sentence."""
    return f"{share:.0%}" + (" (more than all: an error of the measurement)" if is_impossible(share) else "")


def cell(share: float) -> str:
    """For a table, below which NOTE explains MARK."""
    return f"{share:.2f}" + (f" {MARK}" if is_impossible(share) else "")
