"""Which families of models run on which backend, each answer compared with plain sentence-transformers.

python -m tests.parity.families            tries all of them and prints what it finds
python -m tests.parity.families --write    writes the tables in the README and in docs/models.md as well
"""

import argparse
import functools
import os
import re
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sentence_transformers import CrossEncoder, SentenceTransformer

from ml_inference_server.backends.base import Backend, Encoded, TokenBatch
from ml_inference_server.utils.errors import ModelError
from tests.parity.tiny_model import start
from tests.parity.zoo import CROSS_ENCODERS, FAMILIES

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
DOCS = ROOT / "ml_inference_server" / "docs" / "models.md"
BACKENDS: Mapping[str, Mapping[str, Any]] = {
    "pytorch": {"backend": "pytorch"},
    "compile": {"backend": "pytorch", "compile": True},
    "onnx": {"backend": "onnx"},
    "openvino": {"backend": "openvino"},
}
YES = "yes"
# The most that an answer may differ, as a share of the largest number in it: rounding of FP32.
TOLERANCE = 2e-3
TEXTS = (
    "a",
    "how do cells divide",
    "Ünïcödé, ﬁligree ½ 東京タワー привет 🙂👩‍👧 e\u0301 nul\x00 zero\u200bwidth \ufeff ǅ İ",
    "literal <pad> and [PAD] and </s> <s> [SEP] [CLS] <mask> [MASK] <end> <unk> <sep> <cls> <pad>",
    "  blanks \t tabs \n\n lines  ",
    "antidisestablishmentarianism" * 6,
    "the mitochondria of a cell make most of the energy that it needs, and have genes of their own",
    "every good boy deserves fruit and a long walk by the river " * 4,
    "this one is well above the limit of tokens whatever the tokenizer makes of it " * 20,
)
PAIRS = (
    *zip(TEXTS, (*TEXTS[3:], *TEXTS[:3]), strict=True),
    ("a", "b"),
    (TEXTS[1], TEXTS[8]),
    (TEXTS[8], TEXTS[1]),
    (TEXTS[8], TEXTS[7]),
    (TEXTS[3], TEXTS[3]),
)


def built(family: str, folder: Path) -> Path:
    """The model of a family, below `folder`; written where it is not there yet."""
    place = folder / re.sub(r"\W+", "-", family).strip("-").lower()
    note = place / "model.path"
    if not note.exists():
        place.mkdir(parents=True, exist_ok=True)
        note.write_text(str(FAMILIES[family](place)))
    return Path(note.read_text())


def try_family(family: str, backend: str, folder: Path) -> str:
    """`YES`, or "refused: " and why. AssertionError where it starts and then answers something else.

    folder: where models of families are kept.
    """
    model = built(family, folder)
    is_pairs = family in CROSS_ENCODERS
    try:
        started = start(model, **BACKENDS[backend])
    except ModelError as error:
        reason = str(error).replace(str(model), "MODEL")
        assert "\n" not in reason
        return f"refused: {reason}"
    assert started.info.task == ("cross_encoder" if is_pairs else "embedding")
    names, expected = plain_answers(model, is_pairs)
    check_answers(started.backend, names, expected)
    return YES


def check_answers(backend: Backend, names: Sequence[str | None], expected: np.ndarray) -> None:
    """AssertionError unless all texts under all `names` (pairs where there are none) get their rows of `expected`."""
    tokenizer = backend.tokenizer
    texts: list[Encoded] = tokenizer.encode_pairs(PAIRS) if not names else []
    for name in names:
        texts += tokenizer.encode(TEXTS, name)
    order = np.random.default_rng(0).permutation(len(texts))
    batches = [[int(place) for place in order[start : start + 5]] for start in range(0, len(order), 5)]
    for batch in [*batches, *([place] for place in range(len(texts)))]:
        got = backend.infer(TokenBatch.of([texts[place] for place in batch]))
        assert got.shape == (len(batch), expected.shape[1])
        for row, place in zip(got, batch, strict=True):
            off = float(np.abs(row - expected[place]).max() / _scale(expected, place))
            asked = (TEXTS[place % len(TEXTS)], names[place // len(TEXTS)]) if names else PAIRS[place]
            assert off <= TOLERANCE, f"{asked} in a batch of {len(batch)} is {off:.3g} off"


def _scale(expected: np.ndarray, place: int) -> float:
    """Of a vector its largest number; of logits the range of all, since a single one may be near 0."""
    return float(np.abs(expected[place]).max() if expected.shape[1] > 1 else np.ptp(expected))


@functools.lru_cache(maxsize=1)
def plain_answers(model: Path, is_pairs: bool) -> tuple[Sequence[str | None], np.ndarray]:
    """(prompt names, rows) of sentence-transformers alone, text by text."""
    options: dict[str, Any] = {"batch_size": 1, "show_progress_bar": False}
    if is_pairs:
        scorer = CrossEncoder(str(model), device="cpu", local_files_only=True)
        scores = scorer.predict(list(PAIRS), activation_fn=torch.nn.Identity(), **options)
        names, rows = [], np.asarray(scores, np.float32)[:, None]
    else:
        plain = SentenceTransformer(str(model), device="cpu", local_files_only=True)
        names, rows = list(_names(plain)), np.empty((0, 0), np.float32)
        encoders = {"query": plain.encode_query, "document": plain.encode_document}
        found = []
        for name in names:
            keys: dict[str, Any] = {} if name is None else {"prompt_name": name}
            found.append(encoders.get(name or "", plain.encode)(list(TEXTS), **keys, **options))
        rows = np.concatenate(found)
    spread = np.abs(rows[:, None] - rows[None]).max(axis=2)
    scale = np.abs(rows).max() if rows.shape[1] > 1 else np.ptp(rows)
    assert np.median(spread) > 20 * TOLERANCE * scale, "this model gives all texts the same answer: it proves nothing"
    return names, rows


def _names(plain: SentenceTransformer) -> Sequence[str | None]:
    needs_one = type(plain[0]).__name__ == "Router" and not plain[0].default_route
    return [*([] if needs_one else [None]), *plain.prompts]


# The tables.


def table(outcomes: Mapping[str, Mapping[str, str]]) -> str:
    """Families by backend, yes or no."""
    lines = [f"| family | {' | '.join(BACKENDS)} |", "| --- |" + " --- |" * len(BACKENDS)]
    for family, found in outcomes.items():
        cells = [YES if found[backend] == YES else "no" for backend in BACKENDS]
        lines.append(f"| {family} | {' | '.join(cells)} |")
    return "\n".join(lines)


def summary(table_of: Mapping[str, Mapping[str, str]]) -> str:
    """The same in a few rows: the families that run on the same backends side by side, by their short names."""
    groups: dict[str, list[str]] = {}
    for family, found in table_of.items():
        runs = [backend for backend, outcome in found.items() if outcome == YES]
        lacks = [backend for backend in found if backend not in runs]
        where = (
            "all"
            if not lacks
            else "none"
            if not runs
            else f"all but {lacks[0]}"
            if len(lacks) == 1
            else ", ".join(runs)
        )
        groups.setdefault(where, []).append(family)
    rows = (
        f"| {where} | {'; '.join(families)} |" for where, families in sorted(groups.items(), key=lambda i: -len(i[1]))
    )
    return "\n".join(["| runs on | families |", "| --- | --- |", *rows])


def refusals(outcomes: Mapping[str, Mapping[str, str]]) -> str:
    """What the server says where a family is refused, each sentence once."""
    reasons: dict[str, list[str]] = {}
    for family, found in outcomes.items():
        for backend, outcome in found.items():
            if outcome != YES:
                reasons.setdefault(outcome.removeprefix("refused: "), []).append(f"{family} ({backend})")
    return "\n".join(f"- {'; '.join(who)}: `{reason}`" for reason, who in reasons.items())


def between_markers(file: Path, name: str) -> str:
    """The text of `file` that belongs to this program."""
    first, last = _markers(name)
    return file.read_text(encoding="utf-8").split(first)[1].split(last)[0].strip()


def replace_between_markers(file: Path, name: str, text: str) -> None:
    first, last = _markers(name)
    before, rest = file.read_text(encoding="utf-8").split(first)
    file.write_text(f"{before}{first}\n{text}\n{last}{rest.split(last)[1]}", encoding="utf-8")


def _markers(name: str) -> tuple[str, str]:
    return f"<!-- {name}: written by python -m tests.parity.families --write -->", f"<!-- end of {name} -->"


def read_table(text: str) -> dict[str, dict[str, str]]:
    """{family: {backend: "yes" or "no"}} of what `table` wrote."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    return {row[0]: dict(zip(rows[0][1:], row[1:], strict=True)) for row in rows[2:]}


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.parity.families", description=__doc__)
    parser.add_argument("--write", action="store_true", help="write the tables in README.md and docs/models.md")
    parser.add_argument("--only", default="", metavar="PART", help="families whose name holds this; writes nothing")
    parser.add_argument("--backend", choices=BACKENDS, action="append", help="these backends; writes nothing")
    options = parser.parse_args(arguments)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    families = [family for family in FAMILIES if options.only in family]
    outcomes: dict[str, dict[str, str]] = {}
    wrong = 0
    with tempfile.TemporaryDirectory(prefix="families-") as folder:
        os.environ["MLIS_CACHE_DIR"] = f"{folder}/cache"
        for number, family in enumerate(families, 1):
            for backend in options.backend or BACKENDS:
                started = time.monotonic()
                try:
                    outcome = try_family(family, backend, Path(folder))
                except AssertionError as error:
                    outcome, wrong = f"WRONG: {error}", wrong + 1
                outcomes.setdefault(family, {})[backend] = outcome
                passed = time.monotonic() - started
                print(f"{number}/{len(families)} {family}, {backend} ({passed:.0f} s): {outcome}", flush=True)
    if options.write and not wrong and not options.only and not options.backend:
        replace_between_markers(README, "families", summary(outcomes))
        replace_between_markers(DOCS, "families", table(outcomes))
        replace_between_markers(DOCS, "refusals", refusals(outcomes))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
