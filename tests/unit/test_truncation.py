"""What is kept of a text or a pair is what the library keeps, and time and memory grow no faster than the text."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from ml_inference_server.backends.base import Encoded
from ml_inference_server.backends.text.template import longest_first
from ml_inference_server.backends.text.tokenizer import FastTokenizer
from tests.unit.tokenizer_kit import KINDS, build, frames, library_answer

ROOT = Path(__file__).resolve().parents[2]
SIDES = ("right", "left")
FRAMES = ("none", "bert", "roberta", "segments", "second first", "no end")


def ours(tokenizer: Tokenizer, limit: int, side: str) -> FastTokenizer:
    copy = Tokenizer.from_str(tokenizer.to_str())
    return FastTokenizer(copy, max_tokens=limit, pad_id=0, side=side, prompts={})


def seen(encoded: Encoded) -> tuple[list[int], list[int], bool, int]:
    types = [0] * encoded.length if encoded.type_ids is None else encoded.type_ids.tolist()
    return encoded.ids.tolist(), types, encoded.truncated, encoded.total_tokens


def test_the_frames_are_all_tried() -> None:
    assert tuple(frames(build("bpe"))) == FRAMES


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("frame", FRAMES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_combination_of_lengths_is_cut_as_the_library_cuts(kind: str, frame: str, side: str) -> None:
    """Lengths from 0 on, rooms that are even and odd, and both up to twice the limit."""
    tokenizer = build(kind, frame)
    texts = [" ".join(["word"] * count) for count in range(24)]
    for limit in (8, 9):
        fast = ours(tokenizer, limit, side)
        pairs = [(first, second.replace("word", "the")) for first in texts[::2] for second in texts]
        for pair, found in zip(pairs, fast.encode_pairs(pairs), strict=True):
            assert seen(found) == library_answer(tokenizer, pair, limit, side), pair
        for text, found in zip(texts, fast.encode(texts), strict=True):
            assert seen(found) == library_answer(tokenizer, (text,), limit, side), text


# Pieces that show where a text was parted: words that merge, numbers, runs of blanks, characters that are taken apart
# or put together, special tokens, and words without an end.
PIECES = ["the ", "word ", "and", "x" * 70, "xxxx ", "ab" * 40, "12", "7" * 60, " ", "  ", "\n", "\t\t", " " * 90, ". "]
PIECES += ["it's ", "a-b,c.d", "[SEP]", "</s>", "<s> ", "e\u0301", "\u0301" * 40, "東京", "🙂", "\u00a0", "ÀÉ", "\x00"]
long_texts = st.lists(st.tuples(st.sampled_from(PIECES), st.integers(1, 12)), max_size=8).map(
    lambda parts: "".join(piece * times for piece, times in parts)[:900]
)


def reading_little(tokenizer: Tokenizer, limit: int, side: str) -> FastTokenizer:
    """Takes every text of more than 40 characters for a long one: the library's answers to longer ones take minutes."""
    fast = ours(tokenizer, limit, side)
    fast.most_characters = 40
    return fast


FAST = {
    (kind, frame, side, limit): (tokenizer, reading_little(tokenizer, limit, side))
    for kind, frame in (("wordpiece", "bert"), ("bpe", "roberta"), ("unigram", "segments"), ("unigram", "none"))
    for tokenizer in [build(kind, frame)]
    for side in SIDES
    for limit in (14, 15)
}


@pytest.mark.parametrize("which", FAST, ids=lambda which: " ".join(map(str, which)))
@settings(deadline=None, max_examples=30)
@given(first=long_texts, second=long_texts | st.just("the word"))
@example(first="the word " * 60, second="the word " * 61)
@example(first="the word " * 61, second="the word " * 60)
@example(first="the word " * 60, second="the word " * 60)
@example(first="the word " * 60, second="word " * 120)
@example(first="x" * 300, second="the word " * 20 + " " * 200)
def test_long_texts_are_cut_as_the_library_cuts(which: tuple[str, str, str, int], first: str, second: str) -> None:
    (_, _, side, limit), (tokenizer, fast) = which, FAST[which]
    assert seen(fast.encode_pairs([(first, second)])[0]) == library_answer(tokenizer, (first, second), limit, side)
    assert seen(fast.encode([first])[0]) == library_answer(tokenizer, (first,), limit, side)


def test_a_request_of_long_and_short_texts_is_answered_in_order() -> None:
    for kind in KINDS:
        tokenizer = build(kind, "bert")
        texts = ["word", "the word " * 60, "", "x" * 500, "ab", "the " * 150, "and", "word " * 120]
        fast = reading_little(tokenizer, 16, "right")
        assert [seen(each) for each in fast.encode(texts)] == [
            library_answer(tokenizer, (text,), 16, "right") for text in texts
        ]
        pairs = [(first, second) for first in texts for second in texts]
        assert [seen(each) for each in fast.encode_pairs(pairs)] == [
            library_answer(tokenizer, pair, 16, "right") for pair in pairs
        ]


def test_a_limit_that_the_special_tokens_fill_leaves_only_them() -> None:
    fast = ours(build("wordpiece", "bert"), 2, "right")
    assert [seen(each)[0] for each in fast.encode(["word word", ""])] == [[101, 102]] * 2
    assert fast.encode_pairs([("word", "word")])[0].ids.tolist() == [101, 102, 102]


def test_a_limit_beyond_all_texts_cuts_nothing() -> None:
    tokenizer = build("unigram", "roberta")
    fast = ours(tokenizer, int(1e30), "right")
    text = "the word " * 5000
    ids = tokenizer.encode(text).ids
    assert seen(fast.encode([text])[0]) == (ids, tokenizer.encode(text).type_ids, False, len(ids))


def test_it_can_be_sent_to_another_process() -> None:
    tokenizer = build("wordpiece")
    fast = ours(tokenizer, 16, "left")
    sent = pickle.loads(pickle.dumps(fast))  # noqa: S301 - our own bytes
    pair = ("the word " * 90, "and " * 90)
    assert seen(sent.encode_pairs([pair])[0]) == library_answer(tokenizer, pair, 16, "left")


@given(st.integers(0, 40), st.integers(0, 40), st.integers(0, 30))
def test_longest_first_fills_the_room_and_spares_the_shorter(first: int, second: int, room: int) -> None:
    kept = longest_first(first, second, room)
    assert sum(kept) == min(first + second, room)
    assert kept[0] <= first
    assert kept[1] <= second
    if first <= room // 2:
        assert kept[0] == first
    if second <= room // 2:
        assert kept[1] == second


# Time and memory. Each measurement runs in a process of its own, whose memory nothing else moves.

SHAPES = {"words": "query words here some passage text ", "one word": "x", "blanks": " ", "punctuation": "."}
CHILD = """
import resource, sys, time
from tests.unit.test_truncation import SHAPES, ours
from tests.unit.tokenizer_kit import build
kind, frame, side, shape, characters, work = sys.argv[1:]
fast = ours(build(kind, frame), 128, side)
text = (SHAPES[shape] * int(characters))[: int(characters)]
calls = {
    "text": lambda: fast.encode([text]),
    "pair": lambda: fast.encode_pairs([(text, text[:-1])]),
    "texts": lambda: fast.encode([text[i:] for i in range(24)]),
}
fast.encode_pairs([("warm", "up")])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
repeats = 3 if work != "texts" else 1
took = []
for _ in range(repeats):
    began = time.process_time()
    calls[work]()
    took.append(time.process_time() - began)
print(min(took), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def measure(kind: str, side: str, shape: str, characters: int, work: str) -> tuple[float, float]:
    """(CPU seconds, MiB by which the process grew)."""
    command = [sys.executable, "-c", CHILD, kind, "bert", side, shape, str(characters), work]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"PYTHONPATH": "."}, capture_output=True, text=True, check=True, timeout=120
    )
    seconds, grown = done.stdout.split()
    return float(seconds), float(grown) / (1024 if sys.platform == "linux" else 1 << 20)


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_time_and_memory_grow_no_faster_than_the_text(kind: str, shape: str) -> None:
    """Eight times the text, of which both parts of a pair have to be read to their end; squared it would be 64."""
    short_s, _ = measure(kind, "right", shape, 1 << 16, "pair")
    long_s, grown_mib = measure(kind, "right", shape, 1 << 19, "pair")
    assert long_s < 8 * 3 * short_s, (short_s, long_s)
    assert grown_mib < 200


def test_a_pair_that_the_library_cannot_join_takes_next_to_no_memory() -> None:
    """It would build every combination of what is cut off: 16 GB."""
    _, grown_mib = measure("wordpiece", "right", "words", 315_000, "pair")
    assert grown_mib < 32


def test_many_long_texts_take_little_more_memory_than_one() -> None:
    _, grown_mib = measure("bpe", "right", "one word", 1 << 18, "texts")
    assert grown_mib < 100
