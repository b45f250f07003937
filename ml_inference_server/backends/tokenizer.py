"""Text to token ids: the only tokenizer call of the project."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from ml_inference_server.backends.base import Encoded
from ml_inference_server.backends.word_cache import WordCache

# A text is cut before tokenising at this many characters for each token of the limit, so that one huge text cannot
# hold a thread for seconds. The cut is used only if what it keeps still fills the limit with a margin.
_CHARACTERS_PER_TOKEN = 16
_MARGIN_TOKENS = 256
# More text than this at once goes to the library as a whole, which lets the event loop run meanwhile: looking words up
# holds Python's lock, for some milliseconds by then.
_MOST_CHARACTERS_FROM_WORDS = 1 << 16


class FastTokenizer:
    """A `tokenizers.Tokenizer` whose truncation is set once, which makes it safe to share between threads."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        max_tokens: int,
        pad_id: int,
        side: str = "right",
        prompts: Mapping[str, str],
        takes_segments: bool = True,
    ) -> None:
        """`tokenizer` is taken over: its padding is switched off and its truncation set.

        takes_segments: whether the model has segments; without, those that the tokenizer gives are left out.
        """
        self._whole = tokenizer
        self._whole.no_padding()
        self._whole.no_truncation()
        self._cut = Tokenizer.from_str(tokenizer.to_str())
        self._cut.enable_truncation(max_tokens, strategy="longest_first", direction=side)
        self.max_tokens = max_tokens
        self.pad_id = pad_id
        self.prompts = prompts
        self._uses_prefix = side == "right"
        self._words: WordCache | None = None
        if self._uses_prefix and WordCache.fits(self._whole):
            self._words = WordCache(self._whole, max_tokens)
        # Most tokenizers give a single text the segment 0 throughout; then there is nothing to read off each answer.
        self._has_segments = takes_segments and any(self._whole.encode_batch_fast(["a"])[0].type_ids)
        self._has_pair_segments = takes_segments
        self.needs_prompt_name = False

    def encode(self, texts: Sequence[str], prompt_name: str | None = None) -> list[Encoded]:
        """One Encoded for each text, cut at max_tokens. Prompt "" is the default; KeyError for an unknown one."""
        prompt = self.prompts[prompt_name] if prompt_name is not None else self.prompts.get("", "")
        full = [prompt + text for text in texts] if prompt else list(texts)
        limit = self.max_tokens * _CHARACTERS_PER_TOKEN
        short = [self._prefix(text, limit) if len(text) > limit else text for text in full]
        found: list[Encoded | None] = [None] * len(short)
        if self._words is not None and sum(map(len, short)) <= _MOST_CHARACTERS_FROM_WORDS:
            found = self._words.encode(short)
        rest = self._cut.encode_batch_fast([text for text, known in zip(short, found, strict=True) if known is None])
        others = iter(rest)
        return [_encoded(next(others), self._has_segments) if known is None else known for known in found]

    def encode_pairs(self, pairs: Sequence[tuple[str, str]]) -> list[Encoded]:
        """One Encoded for each pair, the longer part cut first until both fit into max_tokens."""
        if prompt := self.prompts.get("", ""):
            pairs = [(prompt + query, passage) for query, passage in pairs]
        limit = self.max_tokens * _CHARACTERS_PER_TOKEN
        short = [tuple(self._prefix(text, limit) if len(text) > limit else text for text in pair) for pair in pairs]
        return [_encoded(each, self._has_pair_segments) for each in self._cut.encode_batch_fast(short)]

    def _prefix(self, text: str, limit: int) -> str:
        """The start of `text` where that gives the same tokens up to max_tokens, else all of it."""
        if not self._uses_prefix:
            return text
        prefix = text[:limit]
        enough = self.max_tokens + _MARGIN_TOKENS
        return prefix if len(self._whole.encode_batch_fast([prefix])[0].ids) >= enough else text


def _encoded(encoding: Any, has_segments: bool) -> Encoded:
    ids, truncated = np.array(encoding.ids, np.int32), bool(encoding.overflowing)
    if not has_segments:
        return Encoded(ids, None, truncated)
    types = np.array(encoding.type_ids, np.int32)
    return Encoded(ids, types if types.any() else None, truncated)
