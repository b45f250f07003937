"""Windows over a long text fit, lose nothing and overlap; the end and the beginning of a text are as long as asked."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tokenizers import Tokenizer

from ml_inference_server.backends.base import Encoded, NoSpans, TextTokenizer
from ml_inference_server.backends.fake import FakeTokenizer
from ml_inference_server.backends.text.tokenizer import FastTokenizer
from ml_inference_server.backends.text.windows import Window, head, keep_end, placed_windows, windows
from tests.unit.test_truncation import PIECES
from tests.unit.tokenizer_kit import build

LIMIT = 16
PROMPTS = {"query": "the word: "}


def fast(kind: str, frame: str, limit: int = LIMIT, side: str = "right") -> FastTokenizer:
    return FastTokenizer(build(kind, frame), max_tokens=limit, pad_id=0, side=side, prompts=PROMPTS)


TOKENIZERS: dict[str, TextTokenizer] = {
    "fake": FakeTokenizer(LIMIT),
    "wordpiece": fast("wordpiece", "bert"),
    "wordpiece, cut on the left": fast("wordpiece", "bert", side="left"),
    "bpe": fast("bpe", "roberta"),
    "bpe without special tokens": fast("bpe", "none"),
    "unigram": fast("unigram", "segments"),
}
# Kinds of texts in which there is no good place to cut: no blanks, and characters that belong together.
NO_BLANKS = "東京は日本の首都です。" * 30
EMOJI = "👩‍👩‍👧👍🏽❤️🇯🇵" * 12
MARKS = "e\u0301a\u0308\u0323o\u0302" * 40
ONE_WORD = "supercalifragilistic" * 40
texts = st.lists(st.tuples(st.sampled_from([*PIECES, "👩‍👩‍👧", "ﷺ", "ﬁ½"]), st.integers(1, 12)), max_size=12).map(
    lambda parts: "".join(piece * times for piece, times in parts)
)


def own_ids(tokenizer: TextTokenizer, text: str) -> list[int]:
    return [token.id for token in tokenizer.tokens(text, special=False)]


def check(tokenizer: TextTokenizer, text: str, name: str | None, overlap: int) -> list[Window]:
    found = placed_windows(tokenizer, text, name, overlap)
    whole = tokenizer.encode([text], name)[0]
    if not whole.truncated:
        assert len(found) == 1
        assert (found[0].start, found[0].stop) == (0, len(text))
        assert found[0].encoded.ids.tolist() == whole.ids.tolist()
        return found
    assert len(found) > 1
    assert found[0].start == 0
    assert found[-1].stop == len(text)
    for window in found:
        assert not window.encoded.truncated
        assert window.encoded.length == window.encoded.total_tokens <= whole.length
        again = tokenizer.encode([text[window.start : window.stop]], name)[0]
        assert again.ids.tolist() == window.encoded.ids.tolist()
    for before, after in pairwise(found):
        assert before.start < after.start <= before.stop < after.stop, "no character is left out, and each goes on"
        if not overlap:
            assert after.start == before.stop
    return found


@pytest.mark.parametrize("which", TOKENIZERS)
@settings(deadline=None, max_examples=60)
@given(text=texts, name=st.sampled_from([None, "query"]), overlap=st.integers(0, 40))
@example(text="", name=None, overlap=4)
@example(text="the word " * 60, name="query", overlap=0)
@example(text=NO_BLANKS, name=None, overlap=5)
@example(text=EMOJI, name=None, overlap=5)
@example(text=MARKS, name="query", overlap=3)
@example(text=ONE_WORD, name=None, overlap=0)
@example(text=" " * 300 + "word", name=None, overlap=2)
@example(text="ﷺ" * 30, name=None, overlap=7)
def test_every_window_fits_and_together_they_are_the_text(
    which: str, text: str, name: str | None, overlap: int
) -> None:
    tokenizer = TOKENIZERS[which]
    check(tokenizer, text, None if which == "fake" else name, overlap)


@pytest.mark.parametrize("which", TOKENIZERS)
@pytest.mark.parametrize("overlap", [0, 1, 3, 6])
def test_words_are_cut_between_and_overlap_as_asked(which: str, overlap: int) -> None:
    tokenizer = TOKENIZERS[which]
    text = "the word and the word and the word " * 20
    found = check(tokenizer, text, None, overlap)
    for window in found[1:]:
        assert text[window.start - 1].isspace() or text[window.start].isspace()
    shared = [len(own_ids(tokenizer, text[after.start : before.stop])) for before, after in pairwise(found)]
    assert all(overlap / 2 <= count <= 1.5 * overlap + 1 for count in shared[:-1])
    assert abs(np.mean(shared) - overlap) <= 1


@pytest.mark.parametrize("which", TOKENIZERS)
def test_tokens_of_windows_without_overlap_are_those_of_the_text(which: str) -> None:
    tokenizer = TOKENIZERS[which]
    text = "word " * 100
    found = check(tokenizer, text, None, 0)
    together = [token for window in found for token in own_ids(tokenizer, text[window.start : window.stop])]
    if not which.startswith("bpe"):  # there, the first word of a text is another token than one behind a blank
        assert together == own_ids(tokenizer, text)
    assert len(together) == pytest.approx(len(own_ids(tokenizer, text)), abs=2 * len(found))
    used = [window.encoded.length for window in found[:-1]]
    assert min(used) > LIMIT / 2, "windows are well filled"


@pytest.mark.parametrize("text", [EMOJI, MARKS], ids=["emoji", "marks"])
@pytest.mark.parametrize("overlap", [0, 4])
def test_what_is_read_as_one_character_is_not_cut(text: str, overlap: int) -> None:
    tokenizer = fast("unigram", "bert", 64)
    found = check(tokenizer, text, None, overlap)
    for window in found[1:]:
        assert text[window.start] not in "\u0301\u0308\u0323\u0302\u200d\ufe0f🏽"
        assert text[window.start - 1] != "\u200d"


@pytest.mark.parametrize(("limit", "most"), [(4, 2), (5, 3), (8, 6)])
def test_an_overlap_that_the_limit_has_no_room_for_becomes_smaller(limit: int, most: int) -> None:
    tokenizer = fast("wordpiece", "bert", limit)
    text = "word " * 50
    found = check(tokenizer, text, None, 1000)
    assert len(found) < 2 * 50 / (most / 2)


def test_a_prompt_that_leaves_no_room_is_refused_in_a_sentence() -> None:
    tokenizer = fast("wordpiece", "bert", 5)  # two special tokens and three of the prompt
    says = "the prompt and the special tokens fill the model's limit of 5 tokens, so there is no room for the text"
    for call in (lambda: windows(tokenizer, "word", "query", 2), lambda: keep_end(tokenizer, "word", "query")):
        with pytest.raises(ValueError, match=says):
            call()
    tokenizer = fast("wordpiece", "bert", 6)
    assert len(windows(tokenizer, "word word word", "query", 2)) == 3


def test_a_character_that_is_longer_than_the_room_is_refused_in_a_sentence() -> None:
    tokenizer = fast("bpe", "bert", 5)
    text = "aa🙂aa"
    for call in (lambda: windows(tokenizer, text, None, 0), lambda: keep_end(tokenizer, "aaaa🙂", None)):
        with pytest.raises(ValueError, match="one character of the text takes more than the 3 tokens"):
            call()


def test_a_negative_overlap_is_refused() -> None:
    with pytest.raises(ValueError, match="overlap_tokens is -1"):
        windows(FakeTokenizer(8), "word", None, -1)


class Shouting(FakeTokenizer):
    """Reads the first words of a short text three times, and those of a long one once."""

    def encode(self, texts: Sequence[str], prompt_name: str | None = None) -> list[Encoded]:
        words = [text.split() for text in texts]
        again = [" ".join([*each[:4], *each[:4], *each]) if len(each) < 50 else " ".join(each) for each in words]
        return super().encode(again, prompt_name)


def test_a_piece_with_more_tokens_than_expected_is_made_smaller() -> None:
    text = " ".join(f"w{number}" for number in range(100))
    for overlap in (0, 7):
        check(Shouting(LIMIT), text, None, overlap)
    assert keep_end(Shouting(LIMIT), text, None).length <= LIMIT


class Blind(FakeTokenizer):
    def spans(self, text: str) -> NDArray[np.int32]:
        raise NoSpans("this tokenizer cannot tell")


def test_a_tokenizer_without_spans_says_so_only_where_they_are_needed() -> None:
    assert len(windows(Blind(8), "a text that fits", None, 2)) == 1
    assert keep_end(Blind(8), "a text that fits", None).total_tokens == 6
    for call in (windows, placed_windows):
        with pytest.raises(NoSpans):
            call(Blind(8), "word " * 20, None, 2)
    with pytest.raises(NoSpans):
        head(Blind(8), "word " * 20, 3)


@pytest.mark.parametrize("which", TOKENIZERS)
@settings(deadline=None, max_examples=60)
@given(text=texts, name=st.sampled_from([None, "query"]))
@example(text="the word and " * 40, name="query")
@example(text=NO_BLANKS, name=None)
@example(text=EMOJI, name=None)
@example(text=ONE_WORD, name=None)
@example(text="word " + " " * 300, name=None)
def test_the_end_is_kept_behind_the_prompt(which: str, text: str, name: str | None) -> None:
    tokenizer = TOKENIZERS[which]
    name = None if which == "fake" else name
    whole, found = tokenizer.encode([text], name)[0], keep_end(tokenizer, text, name)
    assert found.truncated == whole.truncated
    assert found.total_tokens == whole.total_tokens
    assert found.length <= whole.length
    if not whole.truncated:
        assert found.ids.tolist() == whole.ids.tolist()
        return
    pieces = (tokenizer.encode([text[start:]], name)[0] for start in range(len(text) - 1, -1, -1))
    assert any(piece.ids.tolist() == found.ids.tolist() for piece in pieces)


@pytest.mark.parametrize("which", TOKENIZERS)
def test_the_end_fills_the_limit(which: str) -> None:
    tokenizer = TOKENIZERS[which]
    text = "the word and " * 20 + "another and word" * 20
    found = keep_end(tokenizer, text, None)
    assert found.length >= LIMIT - 4
    end = own_ids(tokenizer, text)[-3:]
    assert end == [token for token in found.ids.tolist() if token in own_ids(tokenizer, text)][-3:]


@pytest.mark.parametrize("which", TOKENIZERS)
@settings(deadline=None, max_examples=60)
@given(text=texts, tokens=st.integers(-1, 40))
@example(text=EMOJI, tokens=5)
@example(text="the word and " * 400, tokens=9)
@example(text=" " * 900 + "word word", tokens=1)
def test_a_head_has_at_most_so_many_tokens(which: str, text: str, tokens: int) -> None:
    tokenizer = TOKENIZERS[which]
    found = head(tokenizer, text, tokens)
    assert text.startswith(found)
    assert len(tokenizer.spans(found)) <= max(tokens, 0)
    if 0 < tokens >= len(tokenizer.spans(text)):
        assert found == text


def test_a_head_is_as_long_as_it_may_be() -> None:
    for tokenizer in TOKENIZERS.values():
        text = "word and " * 900
        assert len(tokenizer.spans(head(tokenizer, text, 12))) in range(11, 13)
    assert head(TOKENIZERS["wordpiece"], "one two three", 2) == "one two "
    assert head(TOKENIZERS["wordpiece"], "one two three", 0) == ""
    assert head(TOKENIZERS["fake"], "one two three", 3) == "one two three"


def minilm(limit: int) -> FastTokenizer:
    return FastTokenizer(build("wordpiece"), max_tokens=limit, pad_id=0, prompts={})


def test_windows_over_a_book_with_the_models_own_tokenizer() -> None:
    text = Path(__file__).read_text(encoding="utf-8") * 6
    found = check(minilm(256), text, None, 64)
    assert sum(window.encoded.length - 2 for window in found) > minilm(256).encode([text])[0].total_tokens
    assert np.mean([window.encoded.length for window in found[:-1]]) > 245


def test_the_end_of_a_piece_is_where_a_real_token_begins() -> None:
    tokenizer = Tokenizer.from_str(build("wordpiece").to_str())
    text = "unbelievable " * 300
    starts = {start for start, _ in tokenizer.encode(text, add_special_tokens=False).offsets}
    assert {window.start for window in check(minilm(64), text, None, 8)} <= starts
