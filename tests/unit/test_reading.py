"""A long text that is read by parts has the tokens that the library gives for all of it, in the same places."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, pre_tokenizers
from tokenizers.models import Unigram

from ml_inference_server.backends.text import reading
from ml_inference_server.backends.text.reading import Sizes, count, decode, read
from tests.unit.test_truncation import PIECES
from tests.unit.tokenizer_kit import KINDS, build

ROOT = Path(__file__).resolve().parents[2]
TOKENIZERS = {kind: build(kind, frame) for kind, frame in (("wordpiece", "bert"), ("bpe", "roberta"), ("unigram", ""))}
LITTLE = Sizes(part=400, seam=200, agreed_tokens=8)
WHOLE = Sizes(part=1 << 30)
PROSE = "the word 12 and it's a-b,c.d: ÀÉ 東京 🙂 e\u0301 "

texts = st.lists(st.tuples(st.sampled_from([*PIECES, PROSE]), st.integers(1, 9)), max_size=14).map(
    lambda parts: "".join(piece * times for piece, times in parts)
)


def check(tokenizer: Tokenizer, text: str, sizes: Sizes = LITTLE) -> None:
    whole = tokenizer.encode_batch([text], add_special_tokens=False)[0]
    found = read(tokenizer, text, sizes)
    if isinstance(tokenizer.model, Unigram) and "xxx" in text:
        # In a run of x, "xxx x" is as likely as "x xxx": rounding of what was added up before decides between them.
        assert sorted(found.ids.tolist()) == sorted(whole.ids)
        assert count(tokenizer, text, sizes) == len(whole.ids)
        return
    assert found.ids.tolist() == whole.ids
    assert found.spans[:, 1].tolist() == [stop for _, stop in whole.offsets]
    starts = [start for start, _ in whole.offsets]
    assert found.spans[:, 0].tolist() == np.maximum.accumulate(np.array(starts, int)).tolist()
    assert count(tokenizer, text, sizes) == len(whole.ids)


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=150)
@given(text=texts)
@example(text="")
@example(text=PROSE * 60)
@example(text="x" * 1500)
@example(text="7" * 1500)
@example(text="the " * 150 + "7" * 900 + " word" * 150)
@example(text=" " * 1500 + "word")
@example(text="東京は日本の首都です" * 100)
@example(text=("x" * 300 + " ") * 8)
@example(text="the " * 5 + "x" * 490 + "🙂🙂🙂" + "x" * 70 + "and" + "x" * 70)
def test_parts_have_the_tokens_of_the_whole(kind: str, text: str) -> None:
    check(TOKENIZERS[kind], text)


def mask_that_takes_blanks() -> Tokenizer:
    tokenizer = build("bpe")
    tokenizer.add_special_tokens([AddedToken("<mask>", lstrip=True)])
    return tokenizer


@pytest.mark.parametrize("before", range(380, 620, 7))
def test_a_special_token_may_take_the_blanks_before_it(before: int) -> None:
    """Wherever that stands in a seam, or is cut by its end."""
    text = ("the word, and " * 60)[:before] + " " * 60 + "<mask> " + "the word and more " * 40
    check(mask_that_takes_blanks(), text)


def groups_digits() -> Tokenizer:
    """By threes from the end of a number, as the newest decoders do."""
    tokenizer = build("bpe")
    threes = pre_tokenizers.Split(Regex(r"\d{1,3}(?=(?:\d{3})*(?!\d))"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([threes, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    return tokenizer


@pytest.mark.parametrize("digits", [40, 41, 120, 700])
def test_a_number_may_be_grouped_from_its_end(digits: int) -> None:
    tokenizer = groups_digits()
    for before in range(400, 640, 11):
        start, end = ("the word, and " * 60)[:before], " the word and more" * 60
        check(tokenizer, start + ("12" * digits)[:digits] + end)
        check(tokenizer, start[200:] + ("12" * 20 + "7" * digits)[:digits] + end)  # the same wherever 7s are parted


@pytest.mark.parametrize("kind", KINDS)
def test_prose_is_really_read_by_parts(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    longest = []
    part = reading._read_part  # noqa: SLF001 - what it was given is the point

    def spy(tokenizer: Tokenizer, text: str, start: int, end: int) -> reading.Reading:
        longest.append(end - start)
        return part(tokenizer, text, start, end)

    monkeypatch.setattr(reading, "_read_part", spy)
    read(TOKENIZERS[kind], PROSE * 100, LITTLE)
    assert max(longest) <= LITTLE.part + LITTLE.seam


def test_parts_that_disagree_are_not_joined() -> None:
    """A run of one letter is pieces of three and a rest, whose place depends on how long the run is."""
    tokenizer = build("unigram")
    for length in range(1000, 1040):
        check(tokenizer, "x" * length)


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_become_text_again_and_an_unknown_id_is_refused(kind: str) -> None:
    tokenizer = TOKENIZERS[kind]
    ids = tokenizer.encode("the word").ids
    assert decode(tokenizer, ids, True) == tokenizer.decode(ids)
    for wrong in (-1, 1 << 20, 1 << 40):
        with pytest.raises(ValueError, match=f"token id {wrong} is not in the model's vocabulary"):
            decode(tokenizer, [*ids, wrong], True)


CHILD = """
import resource, sys
from tests.unit.tokenizer_kit import build
from ml_inference_server.backends.text.reading import count, read
kind, shape, work = sys.argv[1:]
tokenizer = build(kind, "bert")
text = (shape * (1 << 20))[: 1 << 20]
tokenizer.encode("warm up")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
count(tokenizer, text) if work == "count" else read(tokenizer, text)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("work", ["count", "read"])
@pytest.mark.parametrize(("kind", "shape"), [(kind, "the word 東京 ") for kind in KINDS] + [("bpe", "x")])
def test_a_text_of_a_mebibyte_takes_little_memory(kind: str, shape: str, work: str) -> None:
    """As a whole it would take 200 to 500 MiB."""
    done = subprocess.run(
        [sys.executable, "-c", CHILD, kind, shape, work],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": "."},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert float(done.stdout) / (1024 if sys.platform == "linux" else 1 << 20) < 100
