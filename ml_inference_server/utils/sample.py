"""The labelled pairs that ship with the project: where they lie, and their one reader."""

from pathlib import Path

PAIRS = Path(__file__).resolve().parent.parent / "sample" / "pairs.tsv"
QRELS = PAIRS.with_name("qrels.txt")


def sample_pairs() -> list[tuple[str, str]]:
    """(query, passage) in file order."""
    rows = [line.split("\t") for line in PAIRS.read_text(encoding="utf-8").splitlines()]
    return [(row[2], row[3]) for row in rows]
