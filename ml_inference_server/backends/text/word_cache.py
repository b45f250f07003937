"""Words that were tokenised before: a BERT tokenizer's answers, put together from a dictionary.

Most words of a text were in an earlier one. BERT's normaliser changes each character by itself, and its pre-tokenizer
parts words at blanks and at punctuation; so what stands between these has the same tokens wherever it stands. Only
special tokens, such as [SEP], are looked for across them. docs/performance.md says what this saves.
"""

import re
from collections.abc import Sequence
from itertools import chain

from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer

_MOST_CHARACTERS = 1 << 19  # of all words that are kept: some 75,000 words, 16 MB
_CHARACTERS_AT_ONCE = 1 << 15  # when tokens are only counted
# At blanks, and round each mark of ASCII's punctuation.
_split = re.compile(r"[^ !-/:-@\[-`{-~]+|[!-/:-@\[-`{-~]").findall
_next_end = re.compile(r"[ !-/:-@\[-`{-~]").search  # a place at which that parts a text


class WordCache:
    """Token ids as `tokenizer` gives them without special tokens, for some texts. Safe to share between threads."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """tokenizer: one that `fits`, without truncation."""
        self._tokenizer = tokenizer
        self._lowers = tokenizer.normalizer.lowercase
        self._special = [token.content for token in tokenizer.get_added_tokens_decoder().values()]
        self.known: dict[str, list[int]] = {}
        self._characters = 0  # of the words that are known

    @staticmethod
    def fits(tokenizer: Tokenizer) -> bool:
        """Whether this is a BERT tokenizer from end to end, with special tokens taken literally."""
        is_bert = (
            isinstance(tokenizer.normalizer, BertNormalizer)
            and isinstance(tokenizer.pre_tokenizer, BertPreTokenizer)
            and isinstance(tokenizer.model, WordPiece)
        )
        literal = not any(token.normalized for token in tokenizer.get_added_tokens_decoder().values())
        return is_bert and literal

    def tokenize(self, texts: Sequence[str]) -> list[list[int] | None]:
        """None for a text that has to be tokenised as a whole."""
        split = [self._words(text) for text in texts]
        known = self.known
        new = {word for words in split for word in words or () if word not in known}
        if new:
            self._characters += sum(map(len, new))
            if self._characters > _MOST_CHARACTERS:
                known = self.known = {}  # a thread that uses the old one still has it
                new = {word for words in split for word in words or ()}
                self._characters = sum(map(len, new))
            known.update(self._tokenize(list(new)))
        return [None if words is None else list(chain.from_iterable(map(known.__getitem__, words))) for words in split]

    def count(self, text: str) -> int | None:
        """How many tokens `text` has, however long it is; None where it has to be tokenised as a whole."""
        if any(token in text for token in self._special):
            return None
        count = start = 0
        while start < len(text):
            found = _next_end(text, start + _CHARACTERS_AT_ONCE)
            end = len(text) if found is None else found.start()
            if end - start > 2 * _CHARACTERS_AT_ONCE:
                return None
            ids = self.tokenize([text[start:end]])[0]
            assert ids is not None  # noqa: S101 - no part of it is special
            count += len(ids)
            start = end
        return count

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
