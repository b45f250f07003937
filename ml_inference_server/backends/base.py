"""What a backend is: token ids in, float32 rows out; synchronous; it knows no server."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from ml_inference_server.utils.config import ModelSettings, Quantization
from ml_inference_server.utils.errors import ModelError

Progress = Callable[[int, int], None]
"""Called as progress(done, total) during a warm-up."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """One text as token ids, special tokens included.

    ids: (length,) int32. type_ids: (length,) int32, or None where the model has no segments or they are all 0.
    variant: which of the model's ways this text takes; 0 but for a few kinds (see `loading.LoadedModel`).
    uncut_tokens: how many it had before it was cut; 0 where nothing was cut.
    """

    ids: NDArray[np.int32]
    type_ids: NDArray[np.int32] | None = None
    truncated: bool = False
    variant: int = 0
    uncut_tokens: int = 0

    @property
    def length(self) -> int:
        return len(self.ids)

    @property
    def total_tokens(self) -> int:
        """Before anything was cut, prompt and special tokens included; of a pair, both parts."""
        return self.uncut_tokens or len(self.ids)


@dataclass(frozen=True, slots=True)
class PaddedBatch:
    """Right-padded rows. All arrays are (texts, longest) int64; attention_mask is 1 on tokens and 0 on padding."""

    input_ids: NDArray[np.int64]
    attention_mask: NDArray[np.int64]
    token_type_ids: NDArray[np.int64] | None = None


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """The texts of a batch, one behind the other, without padding.

    ids: (tokens,) int32; starts: (texts + 1,) int64, where each text begins in it, and where the last one ends.
    type_ids: (tokens,) int32, None where all are 0. variants: (texts,) int64, None where all are 0.
    """

    ids: NDArray[np.int32]
    starts: NDArray[np.int64]
    type_ids: NDArray[np.int32] | None = None
    variants: NDArray[np.int64] | None = None

    @classmethod
    def of(cls, texts: Sequence[Encoded]) -> "TokenBatch":
        """At least one text."""
        ids = [text.ids for text in texts]
        lengths = list(map(len, ids))
        types, variants = [text.type_ids for text in texts], [text.variant for text in texts]
        if [each for each in types if each is not None]:
            none = np.zeros(max(lengths), np.int32)
            segments = [none[:length] if each is None else each for each, length in zip(types, lengths, strict=True)]
        else:
            segments = []
        return cls(
            np.concatenate(ids, dtype=np.int32),
            _starts(lengths),
            np.concatenate(segments, dtype=np.int32) if segments else None,
            np.array(variants, np.int64) if any(variants) else None,
        )

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def lengths(self) -> NDArray[np.int64]:
        """(texts,): tokens of each."""
        return np.diff(self.starts)

    @property
    def tokens(self) -> int:
        return len(self.ids)

    @property
    def padded_tokens(self) -> int:
        """What `padded` makes of it: texts times the longest."""
        return len(self) * int(self.lengths.max())

    def padded(self, pad_id: int) -> PaddedBatch:
        """For engines that take rectangles: every text filled up to the longest."""
        lengths = self.lengths
        kept = np.arange(lengths.max()) < lengths[:, None]
        ids = np.full(kept.shape, pad_id, np.int64)
        ids[kept] = self.ids
        types = None
        if self.type_ids is not None:
            types = np.zeros(kept.shape, np.int64)
            types[kept] = self.type_ids
        return PaddedBatch(ids, kept.astype(np.int64), types)

    def texts(self, places: Sequence[int]) -> "TokenBatch":
        """Some of the texts, in the order of `places`."""
        parts = [slice(self.starts[i], self.starts[i + 1]) for i in places]
        return TokenBatch(
            np.concatenate([self.ids[part] for part in parts]),
            _starts([int(self.starts[i + 1] - self.starts[i]) for i in places]),
            None if self.type_ids is None else np.concatenate([self.type_ids[part] for part in parts]),
            None if self.variants is None else self.variants[list(places)],
        )


def _starts(lengths: Sequence[int]) -> NDArray[np.int64]:
    return np.array([0, *itertools.accumulate(lengths)], np.int64)


class Company(Enum):
    """Which texts may run together without changing each other's answers. Found at load, by trying."""

    ANY = "any"  # padded to the longest
    EQUAL_LENGTHS = "equal_lengths"  # the model's answers change with padding
    NONE = "none"  # one by one


def run_in_company(
    batch: TokenBatch, company: Company, run: Callable[[TokenBatch], NDArray[np.float32]]
) -> NDArray[np.float32]:
    """`run` over the batch, as a whole or in the groups that `company` allows; texts of other variants stay apart."""
    if company is Company.ANY and batch.variants is None:
        return run(batch)
    lengths = batch.lengths
    keys = [
        (
            0 if batch.variants is None else int(batch.variants[i]),
            i if company is Company.NONE else int(lengths[i]) if company is Company.EQUAL_LENGTHS else 0,
        )
        for i in range(len(batch))
    ]
    out: NDArray[np.float32] | None = None
    for key in dict.fromkeys(keys):
        places = [i for i in range(len(batch)) if keys[i] == key]
        got = run(batch.texts(places))
        if out is None:
            out = np.empty((len(batch), *got.shape[1:]), np.float32)
        out[places] = got
    assert out is not None  # noqa: S101 - a batch has at least one text
    return out


def packed_size(tokens: int) -> int:
    """How many tokens a padding-free engine computes for `tokens` real ones: the next of a small set of sizes.

    Matrix kernels are made for each size they meet, which takes longer than a small batch: so sizes come in steps of 16
    up to 256, of 32 up to 512, and of 64 beyond.
    """
    step = 16 if tokens <= 256 else 32 if tokens <= 512 else 64
    return -(-tokens // step) * step


@dataclass(frozen=True, slots=True)
class BackendInfo:
    """What really runs, read from the loaded model and never from the settings.

    compiled: the model runs as machine code made for it. padding_free: a batch costs `packed_size` of its tokens,
    whatever its mix of lengths. parity_mean, parity_min: cosine to sentence-transformers in FP32, measured at load;
    None where it was not. model_sha256: over all files that an answer depends on. similarity: how Score and Rerank
    compare two embeddings (cosine, dot, euclidean or manhattan); logit for a cross-encoder. normalized: every vector
    has length 1; found at load, by trying.
    """

    backend: str
    model: str
    task: str
    device: str
    device_name: str
    dtype: str
    quantized_layers: int
    execution_provider: str
    instruction_set: str
    threads: int
    concurrency: int
    max_tokens: int
    dimension: int
    weights_sha256: str
    weights_file: str
    model_sha256: str
    source: str
    parameters: int
    similarity: str = "cosine"
    normalized: bool = False
    random_weights: bool = False
    compiled: bool = False
    padding_free: bool = False
    parity_mean: float | None = None
    parity_min: float | None = None
    versions: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Token:
    """One token of a text, and where it stands: at [start, stop) of the prompt and the text, in characters.

    special: not of the text itself, but put round it for the model; its `text` is then its name in the vocabulary.
    start, stop: None for a special token, and where the tokenizer cannot tell.
    """

    id: int
    text: str
    special: bool
    start: int | None
    stop: int | None


class NoSpans(ValueError):
    """The tokenizer cannot tell where in a text its tokens stand."""


class TextTokenizer(Protocol):
    """Text to token ids; safe to call from several threads.

    needs_prompt_name: the model has no default way for a text, so a request must name a prompt.
    """

    pad_id: int
    max_tokens: int
    prompts: Mapping[str, str]
    needs_prompt_name: bool

    def encode(self, texts: Sequence[str], prompt_name: str | None = None) -> list[Encoded]:
        """One Encoded for each text, cut at max_tokens. `prompt_name` must be a key of `prompts`, or None."""
        ...

    def encode_pairs(self, pairs: Sequence[tuple[str, str]]) -> list[Encoded]:
        """One Encoded for each (query, passage), as one sequence with segments; the longer part is cut first."""
        ...

    def spans(self, text: str) -> NDArray[np.int32]:
        """(tokens, 2): the characters [start, end) of each token of `text`, without prompt and special tokens.

        Starts never go back; tokens that share a character, as the bytes of an emoji do, have the same one. NoSpans
        where the tokenizer cannot tell.
        """
        ...

    def tokens(self, text: str, prompt_name: str | None = None, special: bool = True) -> list[Token]:
        """All tokens of `text` behind its prompt, uncut. special: with what is put round them for the model."""
        ...

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """The text of tokens. ValueError for an id that is none."""
        ...


class Backend(Protocol):
    """A model that can be run.

    `infer` is called from `info.concurrency` threads at a time, and on a CPU from one more; everything else from one.
    A backend runs what its settings say or raises ModelError in `load_model`; it never falls back by itself.
    """

    def __init__(self, model: ModelSettings) -> None: ...

    @staticmethod
    def supported() -> Mapping[str, Sequence[Quantization]]:
        """The devices of this machine that it can use, best first, with the precisions it runs there."""
        ...

    def load_model(self) -> None: ...

    def warmup(self, progress: Progress) -> None: ...

    def infer(self, batch: TokenBatch) -> NDArray[np.float32]:
        """(batch, dimension) float32, rows in the order of the batch; dimension is 1 for a cross-encoder's logits."""
        ...

    @property
    def info(self) -> BackendInfo:
        """Valid after `load_model`."""
        ...

    @property
    def tokenizer(self) -> TextTokenizer:
        """Valid after `load_model`."""
        ...


@runtime_checkable
class AcceptsFaults(Protocol):
    """What a backend for tests has beside: it can misbehave on request."""

    def enable_faults(self) -> None:
        """Obey fault words from now on."""
        ...


def enable_faults(backend: Backend) -> None:
    """ModelError where the backend has no faults to switch on."""
    if not isinstance(backend, AcceptsFaults):
        raise ModelError(f"server.enable_test_faults: backend {backend.info.backend} has no faults; unset it")
    backend.enable_faults()


# Names under which models keep the prompt of a document, in the order in which sentence-transformers looks for them.
DOCUMENT_PROMPTS = ("document", "passage", "corpus")


def packed_sizes(most: int) -> list[int]:
    """All values of `packed_size` up to that of `most`."""
    sizes = [packed_size(1)]
    while sizes[-1] < most:
        sizes.append(packed_size(sizes[-1] + 1))
    return sizes
