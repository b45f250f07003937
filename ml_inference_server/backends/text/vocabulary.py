"""What the tokenizer inside a module of sentence-transformers can tell besides what `preprocess` gives."""

import json
from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer

from ml_inference_server.backends.base import NoSpans
from ml_inference_server.backends.text.reading import decode, unknown_token


def without_limits(tokenizer: Any) -> Tokenizer | None:
    """A copy of the `tokenizers.Tokenizer` in a tokenizer of transformers; None where there is none.

    transformers keeps padding and truncation of the last call in the shared object, and the copy has neither.
    """
    backend = tokenizer if isinstance(tokenizer, Tokenizer) else getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    description = json.loads(backend.to_str()) | {"truncation": None, "padding": None}
    return Tokenizer.from_str(json.dumps(description))


class Vocabulary:
    """The names and the text of tokens. Not to be used while `preprocess` runs in another thread."""

    def __init__(self, tokenizer: Any) -> None:
        """tokenizer: of transformers or of `tokenizers`; None where the ways through a model have different ones."""
        self._tokenizer = tokenizer
        self._plain: Tokenizer | None = None

    @property
    def plain(self) -> Tokenizer | None:
        """A copy of the tokenizer without truncation, made once; None for one in Python. It may be used at any time."""
        if self._plain is None:
            self._plain = without_limits(self._tokenizer)
        return self._plain

    @property
    def special_ids(self) -> set[int]:
        return set(getattr(self._tokenizer, "all_special_ids", ()))

    def names(self, ids: Sequence[int]) -> list[str]:
        """What the vocabulary calls tokens. ValueError for an id that is none."""
        if self._tokenizer is None:
            raise self.no_spans()
        if isinstance(self._tokenizer, Tokenizer):
            name_of, size = self._tokenizer.id_to_token, self._tokenizer.get_vocab_size()
        else:
            name_of, size = self._tokenizer.convert_ids_to_tokens, len(self._tokenizer)
        names = [name_of(token) if 0 <= token < size else None for token in ids]
        for token, name in zip(ids, names, strict=True):
            if name is None:
                raise ValueError(unknown_token(token))
        return [str(name) for name in names]

    def decode(self, ids: Sequence[int], skip_special: bool) -> str:
        """The text of tokens. ValueError for an id that is none."""
        if self.plain is not None:
            return decode(self.plain, ids, skip_special)
        self.names(ids)
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=skip_special))

    def no_spans(self) -> NoSpans:
        """Why there is no `plain`."""
        reason = (
            "it has another one for each of its prompts"
            if self._tokenizer is None
            else "it is written in Python; save the model with a tokenizer.json"
        )
        return NoSpans(f"this model's tokenizer cannot tell where the tokens of a text are: {reason}")
