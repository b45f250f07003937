"""Tokenising by sentence-transformers' own code: what every model can use, at some times the price of `FastTokenizer`.

Chat templates, a Router's different tokenizers, prompts that pooling leaves out, tokenizers with Python code of their
own: all of it is in the `preprocess` of a model's first module. This takes that method from a model, without its
weights, and runs it text by text, so that there is no padding to take off.
"""

import copy
import threading
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sentence_transformers.base.modules import InputModule, Router, Transformer
from sentence_transformers.sentence_transformer.modules import StaticEmbedding

from ml_inference_server.backends.base import Encoded, Token
from ml_inference_server.backends.text.reading import count, read
from ml_inference_server.backends.text.vocabulary import Vocabulary
from ml_inference_server.utils.errors import ModelError

# What Encoded holds; all else that `preprocess` gives is passed to the model with each text (see `Variant`).
_PER_TOKEN = ("input_ids", "attention_mask", "token_type_ids", "offsets")
# As in FastTokenizer: a text is cut before tokenising at so many characters for each token of the limit, then at
# _GROWTH times as many.
_CHARACTERS_PER_TOKEN = 16
_GROWTH = 4
_MARGIN_TOKENS = 256
# A longer text is counted by parts, where that gives what the library gives: see `reading`.
_MOST_CHARACTERS_AT_ONCE = 1 << 17


@dataclass(frozen=True, slots=True)
class Variant:
    """What the model is given besides the tokens of a text, such as ("task", "query") for a Router; sorted by name.

    is_bag: it takes the tokens of all texts in one row, with offsets (StaticEmbedding).
    """

    features: tuple[tuple[str, Any], ...]
    is_bag: bool


@dataclass(frozen=True, slots=True)
class Way:
    """How texts under one prompt name are prepared. `task` is what sentence-transformers calls it: query, document."""

    prompt: str
    task: str | None
    variant: int
    max_tokens: int


def input_module(first: torch.nn.Module) -> InputModule:
    """`first`, the first module of a model, without its weights: all that its `preprocess` needs.

    Can be sent to another process. ModelError for a kind of module that takes something else than text.
    """
    if isinstance(first, Router):
        router = copy.copy(first)
        routes = {
            name: torch.nn.Sequential(input_module(next(parts.children()))) for name, parts in first.sub_modules.items()
        }
        router._modules = {"sub_modules": torch.nn.ModuleDict(routes)}  # noqa: SLF001
        return router
    if not isinstance(first, Transformer | StaticEmbedding):
        raise ModelError(
            f"the model begins with the module {type(first).__name__}, which is not supported: "
            f"use a model that begins with a Transformer, a StaticEmbedding or a Router of these"
        )
    bare = copy.copy(first)
    bare._modules = {}  # noqa: SLF001
    if isinstance(first, Transformer):
        bare.processor = copy.deepcopy(first.processor)
        bare.input_formatter = copy.copy(first.input_formatter)
        bare.input_formatter.processor = bare.processor
        bare.model = types.SimpleNamespace(config=first.model.config)
    return bare


def variant_of(features: Mapping[str, Any]) -> Variant:
    """Of what `preprocess` gave. ModelError for tensors besides the tokens: they would be others for each text."""
    given = {name: value for name, value in features.items() if name not in _PER_TOKEN and value is not None}
    tensors = [name for name, value in given.items() if isinstance(value, torch.Tensor | np.ndarray | list)]
    if tensors:
        raise ModelError(f"the model takes {', '.join(tensors)} beside its tokens, which is not supported")
    return Variant(tuple(sorted(given.items())), "offsets" in features)


class LibraryTokenizer:
    """A TextTokenizer over the `preprocess` of a model's first module. Safe to share between threads."""

    def __init__(
        self,
        module: InputModule,
        *,
        pad_id: int,
        prompts: Mapping[str, str],
        ways: Mapping[str | None, Way],
        truncation_side: str = "right",
        reason: str = "",
    ) -> None:
        """module: from `input_module`, with its limit set. ways: by prompt name; None is the default.

        reason: why it takes this tokenizer and no faster one.
        """
        self._module = module
        self._ways = ways
        self._side = truncation_side
        self.reason = reason
        self._lock = threading.Lock()  # the library keeps the settings of the last call in the tokenizer
        self._vocabulary = Vocabulary(None if isinstance(module, Router) else getattr(module, "tokenizer", None))
        self.max_tokens = max(way.max_tokens for way in ways.values())
        self.pad_id = pad_id
        self.prompts = prompts
        self.needs_prompt_name = None not in ways

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()

    def encode(self, texts: Sequence[str], prompt_name: str | None = None) -> list[Encoded]:
        """One Encoded for each text, cut at the limit of its way. KeyError for an unknown prompt."""
        way = self._ways[prompt_name]
        with self._lock:
            return [self._one(text, way) for text in texts]

    def encode_pairs(self, pairs: Sequence[tuple[str, str]]) -> list[Encoded]:
        """One Encoded for each (query, passage)."""
        way = self._ways[None]
        with self._lock:
            return [self._one(pair, way) for pair in pairs]

    def spans(self, text: str) -> NDArray[np.int32]:
        """As TextTokenizer has it. NoSpans for a tokenizer in Python, and for several of them behind a Router."""
        with self._lock:
            plain = self._vocabulary.plain
        if plain is None:
            raise self._vocabulary.no_spans()
        return read(plain, text).spans

    def tokens(self, text: str, prompt_name: str | None = None, special: bool = True) -> list[Token]:
        """As TextTokenizer has it; without places where the model's own code changes a text before it tokenises it."""
        way = self._ways[prompt_name]
        with self._lock:
            found = self._uncut(text, way)
            ids = found.tolist()
            names, plain = self._vocabulary.names(ids), self._vocabulary.plain
            special_ids = self._vocabulary.special_ids
        full = way.prompt + text
        own = None if plain is None else read(plain, full)
        at = None if own is None else _find(found, own.ids)
        if own is None or at is None:
            everything = [
                Token(token, name, token in special_ids, None, None) for token, name in zip(ids, names, strict=True)
            ]
        else:
            end = at + len(own.ids)
            framed = [Token(token, name, True, None, None) for token, name in zip(ids, names, strict=True)]
            inside = [
                Token(token, full[start:stop], False, start, stop)
                for token, (start, stop) in zip(ids[at:end], own.spans.tolist(), strict=True)
            ]
            everything = [*framed[:at], *inside, *framed[end:]]
        return everything if special else [token for token in everything if not token.special]

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """As TextTokenizer has it. ValueError for an id that is none, and for several tokenizers behind a Router."""
        with self._lock:
            return self._vocabulary.decode(ids, skip_special)

    def _one(self, text: str | tuple[str, str], way: Way) -> Encoded:
        if isinstance(text, tuple):
            short: str | tuple[str, str] = (self._shortened(text[0], way), self._shortened(text[1], way))
        else:
            short = self._shortened(text, way)
        features = self._preprocess(short, way)
        ids = self._row(features, "input_ids")
        total = 0
        if short != text:
            total = self._total(text, short, way)
        elif len(ids) >= way.max_tokens:
            total = self._uncut_tokens(text, way)
        is_cut = total > len(ids)
        segments = self._row(features, "token_type_ids") if "token_type_ids" in features else None
        types = segments if segments is not None and segments.any() else None
        return Encoded(ids, types, is_cut, way.variant, total if is_cut else 0)

    def _total(self, text: str | tuple[str, str], short: str | tuple[str, str], way: Way) -> int:
        """The tokens of `text`, of which `short` is a part. Long parts of a pair are counted alone."""
        if isinstance(text, str):
            return self._long_tokens(text, way)
        added = [
            self._long_tokens(whole, way) - self._uncut_tokens(part, way)
            for whole, part in zip(text, short, strict=True)
            if whole != part
        ]
        return self._uncut_tokens(short, way) + sum(added)

    def _long_tokens(self, text: str, way: Way) -> int:
        """As `_uncut_tokens`, in little memory where the library only puts something round the tokens of a text."""
        if len(text) <= _MOST_CHARACTERS_AT_ONCE or text != text.strip() or (plain := self._vocabulary.plain) is None:
            return self._uncut_tokens(text, way)
        sample = text[: way.max_tokens * _CHARACTERS_PER_TOKEN].strip()
        bare = read(plain, way.prompt + sample).ids
        framed = self._uncut(sample, way)
        if _find(framed, bare) is None:
            return self._uncut_tokens(text, way)
        return count(plain, way.prompt + text) + len(framed) - len(bare)

    def _shortened(self, text: str, way: Way) -> str:
        """The part of a long text that fills the limit, with a margin; all of it where no such part does.

        No more than that: for a pair, the library builds every combination of what it cuts off.
        """
        size = way.max_tokens * _CHARACTERS_PER_TOKEN
        while size < len(text):
            part = text[:size] if self._side == "right" else text[-size:]
            if self._uncut_tokens(part, way) >= way.max_tokens + _MARGIN_TOKENS:
                return part
            size *= _GROWTH
        return text

    def _uncut_tokens(self, text: str | tuple[str, str], way: Way) -> int:
        return len(self._uncut(text, way))

    def _uncut(self, text: str | tuple[str, str], way: Way) -> NDArray[np.int32]:
        features = self._preprocess(text, way, processing_kwargs={"text": {"truncation": False}})
        return self._row(features, "input_ids")

    def _preprocess(self, text: str | tuple[str, str], way: Way, **options: Any) -> dict[str, Any]:
        if way.task is not None:
            options["task"] = way.task
        given: dict[str, Any] = self._module.preprocess([text], prompt=way.prompt or None, **options)
        return given

    @staticmethod
    def _row(features: Mapping[str, Any], name: str) -> NDArray[np.int32]:
        values = features[name].reshape(-1)
        if "attention_mask" in features:
            values = values[features["attention_mask"].reshape(-1).bool()]
        ids: NDArray[np.int32] = values.numpy().astype(np.int32)
        return ids


def _find(ids: NDArray[np.int32], part: NDArray[np.int32]) -> int | None:
    """Where `part` stands in `ids` as a whole."""
    for at in range(len(ids) - len(part) + 1):
        if np.array_equal(ids[at : at + len(part)], part):
            return at
    return None
