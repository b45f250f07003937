"""Words that were tokenised before: a BERT tokenizer's answers, put together from a dictionary.

Most words of a text were in an earlier one. BERT's normaliser changes each character by itself, and its pre-tokenizer
parts words at blanks and at punctuation; so what stands between these has the same tokens wherever it stands. Only
special tokens, such as [SEP], are looked for across them. docs/performance.md says what this saves.
"""

import re
from collections.abc import Iterable, Sequence
from itertools import chain

import numpy as np
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer

from ml_inference_server.backends.base import Encoded

_MOST_CHARACTERS = 1 << 19  # of all words that are kept: some 75,000 words, 16 MB
# At blanks, and round each mark of ASCII's punctuation.
_split = re.compile(r"[^ !-/:-@\[-`{-~]+|[!-/:-@\[-`{-~]").findall


class WordCache:
    """Answers as `tokenizer` does, for some texts. Safe to share between threads."""

    def __init__(self, tokenizer: Tokenizer, max_tokens: int) -> None:
        """tokenizer: one that `fits`, without truncation. Texts are cut on the right, at max_tokens."""
        self._tokenizer = tokenizer
        self._lowers = tokenizer.normalizer.lowercase
        self._special = [token.content for token in tokenizer.get_added_tokens_decoder().values()]
        self._before, self._after = _frame(tokenizer)
        self._room = max_tokens - len(self._before) - len(self._after)
        self._known: dict[str, list[int]] = {}
        self._characters = 0  # of the words that are known

    @staticmethod
    def fits(tokenizer: Tokenizer) -> bool:
        """Whether this is a BERT tokenizer from end to end, with one segment and special tokens taken literally."""
        is_bert = (
            isinstance(tokenizer.normalizer, BertNormalizer)
            and isinstance(tokenizer.pre_tokenizer, BertPreTokenizer)
            and isinstance(tokenizer.model, WordPiece)
        )
        literal = not any(token.normalized for token in tokenizer.get_added_tokens_decoder().values())
        return is_bert and literal and not any(tokenizer.encode("a").type_ids)

    def encode(self, texts: Sequence[str]) -> list[Encoded | None]:
        """None for a text that has to be tokenised as a whole."""
        split = [self._words(text) for text in texts]
        known = self._known
        new = {word for words in split for word in words or () if word not in known}
        if new:
            self._characters += sum(map(len, new))
            if self._characters > _MOST_CHARACTERS:
                known = self._known = {}  # a thread that uses the old one still has it
                new = {word for words in split for word in words or ()}
                self._characters = sum(map(len, new))
            known.update(self._tokenize(list(new)))
        return [None if words is None else self._framed(map(known.__getitem__, words)) for words in split]

    def _words(self, text: str) -> list[str] | None:
        for token in self._special:
            if token in text:
                return None
        # Fewer words to know. Other scripts are left to the tokenizer, whose rules for case are not Python's.
        return _split(text.lower() if self._lowers and text.isascii() else text)

    def _tokenize(self, words: list[str]) -> dict[str, list[int]]:
        found = self._tokenizer.encode(words, is_pretokenized=True, add_special_tokens=False)
        ids: dict[str, list[int]] = {word: [] for word in words}
        for token_id, place in zip(found.ids, found.word_ids, strict=True):
            assert place is not None  # noqa: S101 - only special tokens have no word
            ids[words[place]].append(token_id)
        return ids

    def _framed(self, words: Iterable[list[int]]) -> Encoded:
        ids = list(chain(self._before, *words))
        room = len(self._before) + self._room
        truncated = len(ids) > room
        del ids[room:]
        ids += self._after
        return Encoded(np.array(ids, np.int32), None, truncated)


def _frame(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """The special tokens before and after a text, such as [CLS] and [SEP]."""
    bare, whole = (tokenizer.encode("a", add_special_tokens=special).ids for special in (False, True))
    at = next(i for i in range(len(whole)) if whole[i : i + len(bare)] == bare)
    return whole[:at], whole[at + len(bare) :]
