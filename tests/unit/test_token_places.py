"""What a tokenizer tells besides ids: how many tokens a text had, where they stand, their names, and text again."""

import numpy as np
import pytest

from ml_inference_server.backends.base import Encoded, Token
from ml_inference_server.backends.fake import FakeTokenizer, fake_embedding
from ml_inference_server.backends.text.probes import PROBES
from ml_inference_server.backends.text.tokenizer import FastTokenizer
from tests.unit.tokenizer_kit import KINDS, build, frames

PROMPTS = {"": "word: ", "query": "the word "}
LONG = "the word, and 12 ab-ab x\u0301 東京 🙂 " * 1100


def fast(kind: str, frame: str = "bert", **options: object) -> FastTokenizer:
    keys: dict[str, object] = {"max_tokens": 16, "pad_id": 0, "prompts": {}}
    return FastTokenizer(build(kind, frame), **(keys | options))  # type: ignore[arg-type]


def test_total_tokens_is_the_length_where_nothing_was_cut() -> None:
    assert Encoded(np.ones(5, np.int32)).total_tokens == 5
    assert Encoded(np.ones(0, np.int32)).total_tokens == 0
    assert Encoded(np.ones(5, np.int32), truncated=True, uncut_tokens=7).total_tokens == 7


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("frame", frames(build("bpe")))
def test_spans_are_those_of_the_text_alone(kind: str, frame: str) -> None:
    tokenizer = fast(kind, frame, prompts=PROMPTS)
    for text in (*PROBES, "", LONG if frame == "bert" else ""):
        encoding = build(kind, frame).encode_batch([text], add_special_tokens=False)[0]
        found = tokenizer.spans(text)
        assert found.dtype == np.int32
        assert found.shape == (len(encoding.ids), 2)
        assert found[:, 1].tolist() == [stop for _, stop in encoding.offsets]
        assert (np.diff(found[:, 0]) >= 0).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("frame", ["none", "bert", "no end"])
def test_tokens_are_those_that_the_library_gives_uncut(kind: str, frame: str) -> None:
    tokenizer, library = fast(kind, frame, prompts=PROMPTS), build(kind, frame)
    for name, prompt in ((None, PROMPTS[""]), ("query", PROMPTS["query"])):
        for text in (*PROBES, "", LONG if (frame, name) == ("bert", "query") else ""):
            tokens = tokenizer.tokens(text, name)
            expected = library.encode(prompt + text)
            assert [token.id for token in tokens] == expected.ids
            assert [token.special for token in tokens] == [bool(each) for each in expected.special_tokens_mask]
            own = tokenizer.tokens(text, name, special=False)
            assert own == [token for token in tokens if not token.special]
            assert all(token.text == (prompt + text)[token.start : token.stop] for token in own)
            assert tokenizer.encode([text], name)[0].total_tokens == len(tokens)


def test_special_tokens_have_their_name_and_no_place() -> None:
    assert fast("wordpiece").tokens("a Word") == [
        Token(101, "[CLS]", True, None, None),
        Token(1037, "a", False, 0, 1),
        Token(2773, "Word", False, 2, 6),
        Token(102, "[SEP]", True, None, None),
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_decoded_tokens_are_text_again(kind: str) -> None:
    tokenizer, library = fast(kind), build(kind, "bert")
    ids = library.encode("the word and").ids
    assert tokenizer.decode(ids) == library.decode(ids)
    assert tokenizer.decode(ids, skip_special=False) == library.decode(ids, skip_special_tokens=False)
    assert tokenizer.decode(ids) != tokenizer.decode(ids, skip_special=False)
    with pytest.raises(ValueError, match="token id 999999 is not in the model's vocabulary"):
        tokenizer.decode([999_999])


def test_unknown_prompts_are_key_errors() -> None:
    for call in (fast("bpe").tokens, FakeTokenizer(8).tokens):
        with pytest.raises(KeyError):
            call("word", "nope")


def test_the_fake_tokenizer_tells_its_words() -> None:
    tokenizer = FakeTokenizer(5)
    text = "  one\ttwo\u00a0three \n!slow:50 four "
    encoded = tokenizer.encode([text])[0]
    assert (encoded.length, encoded.truncated, encoded.total_tokens) == (5, True, 8)
    spans = tokenizer.spans(text)
    assert [text[start:stop] for start, stop in spans] == ["one", "two", "three", "!slow:50", "!slow:50", "four"]
    tokens = tokenizer.tokens(text)
    assert [token.id for token in tokens] == FakeTokenizer(99).encode([text])[0].ids.tolist()
    assert [token.special for token in tokens] == [True, *[False] * 6, True]
    assert tokenizer.tokens(text, special=False) == tokens[1:-1]
    assert tokenizer.spans("").shape == (0, 2)
    pair = tokenizer.encode_pairs([("one two", "three four")])[0]
    assert (pair.length, pair.truncated, pair.total_tokens) == (5, True, 7)
    assert FakeTokenizer(7).encode_pairs([("one two", "three four")])[0].total_tokens == 7


def test_the_fake_tokenizer_decodes_words_that_it_has_seen() -> None:
    tokenizer = FakeTokenizer(8)
    ids = [token.id for token in tokenizer.tokens("one two")]
    assert tokenizer.decode(ids) == "one two"
    assert tokenizer.decode(ids, skip_special=False) == "[START] one two [END]"
    with pytest.raises(ValueError, match="token id 4321 is of no word that was tokenised before"):
        tokenizer.decode([4321])


def test_the_fake_tokenizer_forgets_words_before_it_grows_without_end() -> None:
    tokenizer = FakeTokenizer(8)
    first = tokenizer.tokens("first", special=False)[0].id
    last = tokenizer.tokens(" ".join(f"word{number}" for number in range(12_000)) + " last", special=False)[-1].id
    tokenizer.tokens("another word")
    assert tokenizer.decode([last]) == "last"
    with pytest.raises(ValueError, match="no word that was tokenised"):
        tokenizer.decode([first])


def test_the_fake_backend_cuts_as_it_did() -> None:
    words = [f"w{number}" for number in range(9)]
    for limit in (2, 5, 11):
        kept = " ".join(words[: limit - 2])
        assert fake_embedding(" ".join(words), limit).tolist() == fake_embedding(kept, limit).tolist()
