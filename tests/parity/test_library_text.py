"""What sentence-transformers' own code tokenises: how many tokens texts had, where they are, and windows over them."""

import pickle
import re
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import transformers as hf

from ml_inference_server.backends.base import NoSpans, TextTokenizer
from ml_inference_server.backends.model.loading import load_model
from ml_inference_server.backends.text import library_tokenizer
from ml_inference_server.backends.text.library_tokenizer import LibraryTokenizer
from ml_inference_server.backends.text.probes import PROBES
from ml_inference_server.backends.text.reading import count
from ml_inference_server.backends.text.tokenizer import FastTokenizer
from ml_inference_server.backends.text.vocabulary import Vocabulary
from ml_inference_server.backends.text.windows import head, keep_end, placed_windows
from tests.parity.families import built
from tests.parity.tiny_model import settings

pytestmark = pytest.mark.real

CHAT = "Decoder with a chat template"
INSTRUCTOR = "Prompts that pooling leaves out (Instructor)"
STATIC = "StaticEmbedding (model2vec, potion)"
ROUTER = "Router (queries static, documents BERT)"
LOGIT = "Qwen3 reranker by two words (Qwen3-Reranker)"
FAST = ["XLM-R (multilingual E5, BGE-M3)", "RoBERTa (all-distilroberta, SimCSE)", "T5 encoder (GTR, sentence-T5)"]
Of = Callable[[str], TextTokenizer]
LONG = "the mitochondria of a cell make most of the energy, 東京 🙂 e\u0301 " * 60


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Of:
    folder = tmp_path_factory.mktemp("models")
    known: dict[str, TextTokenizer] = {}

    def of(family: str) -> TextTokenizer:
        if family not in known:
            known[family] = load_model(settings(built(family, folder))).tokenizer
        return known[family]

    return of


@pytest.mark.parametrize("family", [CHAT, INSTRUCTOR, STATIC, ROUTER])
def test_it_is_the_library_that_tokenises_these(family: str, tokenizer: Of) -> None:
    assert isinstance(tokenizer(family), LibraryTokenizer)


@pytest.mark.parametrize("family", [CHAT, INSTRUCTOR])
def test_total_tokens_are_those_of_the_uncut_text(family: str, tokenizer: Of) -> None:
    found = tokenizer(family)
    for name in (None, *found.prompts):
        for text in (*PROBES, LONG):
            encoded = found.encode([text], name)[0]
            assert encoded.total_tokens == len(found.tokens(text, name))
            assert encoded.truncated == (encoded.total_tokens > encoded.length)
    assert found.encode([LONG])[0].truncated


@pytest.mark.parametrize("family", [CHAT, INSTRUCTOR])
def test_a_long_text_is_counted_by_parts(family: str, tokenizer: Of, monkeypatch: pytest.MonkeyPatch) -> None:
    found = tokenizer(family)
    text = LONG * 4
    blank, bare = (found.encode([each])[0].total_tokens for each in (text, text.strip()))
    counted = []

    def spy(*given: Any) -> int:
        counted.append(given)
        return count(*given)

    monkeypatch.setattr(library_tokenizer, "count", spy)
    monkeypatch.setattr(library_tokenizer, "_MOST_CHARACTERS_AT_ONCE", 100)
    assert found.encode([text.strip()])[0].total_tokens == bare
    assert len(counted) == 1
    # A chat template may strip blanks, so that the whole text has to go through it.
    assert found.encode([text])[0].total_tokens == blank
    assert len(counted) == 1


def test_a_pair_that_the_library_tokenises_tells_the_tokens_of_both_parts(tokenizer: Of) -> None:
    found = tokenizer(LOGIT)
    assert isinstance(found, LibraryTokenizer)
    short = found.encode_pairs([("a cell", "a river")])[0]
    assert short.total_tokens == short.length
    for pair in (("a cell", LONG), (LONG, "a river"), (LONG, LONG)):
        encoded = found.encode_pairs([pair])[0]
        parts_alone = [len(found.spans(part)) for part in pair]
        framing = short.total_tokens - sum(len(found.spans(part)) for part in ("a cell", "a river"))
        assert encoded.truncated
        assert encoded.total_tokens == sum(parts_alone) + framing


@pytest.mark.parametrize("family", [CHAT, INSTRUCTOR, STATIC])
def test_tokens_and_their_places(family: str, tokenizer: Of) -> None:
    found = tokenizer(family)
    text = "The mitochondria of a cell, 東京"
    tokens = found.tokens(text, special=False)
    assert [(token.start, token.stop) for token in tokens] == [tuple(each) for each in found.spans(text).tolist()]
    assert all(token.text == text[token.start : token.stop] for token in tokens)
    everything = found.tokens(text)
    assert [token.id for token in everything] == found.encode([text])[0].ids.tolist()
    assert [token for token in everything if not token.special] == tokens
    assert all(token.text and token.start is None for token in everything if token.special)
    assert "mitochondria" in re.sub("[ Ġ▁]", "", found.decode([token.id for token in everything]))
    with pytest.raises(ValueError, match="token id 999999 is not in the model's vocabulary"):
        found.decode([999_999])


def test_places_in_a_text_with_a_prompt_count_from_the_prompt(tokenizer: Of) -> None:
    found = tokenizer(INSTRUCTOR)
    prompt = found.prompts["query"]
    tokens = found.tokens("cell", "query", special=False)
    assert tokens[-1].text == "cell"
    assert tokens[-1].start == len(prompt)


def test_a_router_cannot_tell_spans_and_says_so(tokenizer: Of) -> None:
    found = tokenizer(ROUTER)
    says = "cannot tell where the tokens of a text are: it has another one for each of its prompts"
    for call in (lambda: found.spans("a"), lambda: found.tokens("a", "document"), lambda: found.decode([5])):
        with pytest.raises(NoSpans, match=says):
            call()
    assert found.encode([LONG], "document")[0].total_tokens > found.encode([LONG], "document")[0].length


def test_a_tokenizer_in_python_names_its_tokens_and_tells_no_places() -> None:
    tokenizer = hf.ByT5Tokenizer()
    vocabulary = Vocabulary(tokenizer)
    ids = tokenizer("cell").input_ids
    assert vocabulary.plain is None
    assert vocabulary.names(ids) == ["c", "e", "l", "l", "</s>"]
    assert vocabulary.decode(ids, skip_special=True) == "cell"
    assert vocabulary.decode(ids, skip_special=False) == "cell</s>"
    assert "it is written in Python" in str(vocabulary.no_spans())
    with pytest.raises(ValueError, match="token id 999999 is not in"):
        vocabulary.decode([999_999], skip_special=True)


@pytest.mark.parametrize("family", [CHAT, INSTRUCTOR, *FAST])
@pytest.mark.parametrize("overlap", [0, 9])
def test_windows_over_texts_of_every_kind(family: str, overlap: int, tokenizer: Of) -> None:
    found = tokenizer(family)
    assert isinstance(found, FastTokenizer) == (family in FAST)
    long = LONG * (1 + found.max_tokens // 400)
    for text in (long, "東京は日本の首都です" * len(long), "👩‍👩‍👧e\u0301" * len(long), "word" * len(long), *PROBES):
        text = text[: len(long)]
        for name in (None, *found.prompts)[:2]:
            whole = found.encode([text], name)[0]
            windows = placed_windows(found, text, name, overlap)
            assert (len(windows) == 1) != whole.truncated
            assert (windows[0].start, windows[-1].stop) == (0, len(text))
            for window in windows:
                assert not window.encoded.truncated
                assert window.encoded.length <= max(whole.length, 1)
            for before, after in pairwise(windows):
                assert before.start < after.start <= before.stop < after.stop
            end = keep_end(found, text, name)
            assert (end.truncated, end.total_tokens) == (whole.truncated, whole.total_tokens)
            assert end.length <= whole.length
        assert len(found.spans(head(found, text, 7))) <= 7


def test_places_go_to_another_process(tokenizer: Of) -> None:
    found = tokenizer(INSTRUCTOR)
    spans = found.spans("a cell")
    sent = pickle.loads(pickle.dumps(found))  # noqa: S301 - our own bytes
    assert sent.spans("a cell").tolist() == spans.tolist()
