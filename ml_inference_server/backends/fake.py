"""A backend without a model, for tests and for measuring the server's own cost.

Its answer is a hash of the text, so that any client can check that it got its own: `fake_embedding(text)`. Its name
may say how long a batch takes: `fake:base_ms=2,per_token_us=10` (slept, not burnt). With fault words switched on, a
text that holds one of FAULTS makes its batch misbehave.
"""

import hashlib
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ml_inference_server.backends.base import BackendInfo, Encoded, Progress, Token, TokenBatch
from ml_inference_server.utils.config import ModelSettings, Quantization
from ml_inference_server.utils.errors import ModelError

DIMENSION = 8
_START, _END = 1, 2
_FIRST_WORD = 1000
_SPECIAL = {_START: "[START]", _END: "[END]"}
_MOST_SEEN_WORDS = 10_000
_word = re.compile(r"\S+")

# Fault word -> token id. A word may carry a number behind a colon (!slow:50), which becomes the next token.
FAULTS = {
    "!raise": 10,
    "!raise-once": 11,
    "!nan": 12,
    "!short": 13,
    "!slow": 14,
    "!inf": 15,
    "!crash": 16,
    "!hang": 17,
    "!oom": 18,
    "!stderr": 19,
}


def _word_id(word: str) -> int:
    digest = hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=4).digest()
    return _FIRST_WORD + int.from_bytes(digest, "little") % (2**31 - 2 * _FIRST_WORD)


def _text_ids(text: str) -> list[int]:
    ids = [_START]
    for word in text.split():
        ids += _word_ids(word) if word[0] == "!" else [_word_id(word)]
    ids.append(_END)
    return ids


def _word_ids(word: str) -> list[int]:
    """One token for a word, and one more for the number of a fault word."""
    name, _, number = word.partition(":")
    if name not in FAULTS:
        return [_word_id(word)]
    return [FAULTS[name], _FIRST_WORD + int(number)] if number.isdigit() else [FAULTS[name]]


def _number_of(word: str, row: Sequence[int]) -> int:
    """What stands behind the colon of a fault word."""
    return row[row.index(FAULTS[word]) + 1] - _FIRST_WORD


def _words(text: str) -> Iterator[tuple[int, int, int]]:
    """(token id, start, stop), as `_text_ids` has them."""
    for found in _word.finditer(text):
        for token in _word_ids(found[0]):
            yield token, *found.span()


def _cut(ids: list[int], max_tokens: int) -> list[int]:
    """The end token stays."""
    return ids if len(ids) <= max_tokens else [*ids[: max_tokens - 1], _END]


def _row(ids: Sequence[int]) -> NDArray[np.float32]:
    digest = hashlib.blake2b(np.array(ids, np.int64).tobytes(), digest_size=4 * DIMENSION).digest()
    row = np.frombuffer(digest, "<u4").astype(np.float64) / 2**31 - 1
    return (row / np.linalg.norm(row)).astype(np.float32)


def fake_embedding(text: str, max_tokens: int = 256) -> NDArray[np.float32]:
    """What the fake backend answers for `text`: (8,) float32 of length 1."""
    return _row(_cut(_text_ids(text), max_tokens))


def _pair_ids(query: str, passage: str, max_tokens: int) -> tuple[list[int], int]:
    """(ids, how many there were before they were cut)."""
    parts = _text_ids(query), _text_ids(passage)
    ids = [*_cut(parts[0], max_tokens), *_cut(parts[1], max_tokens)[1:]]
    return ids[:max_tokens], len(parts[0]) + len(parts[1]) - 1


def fake_logit(query: str, passage: str, max_tokens: int = 256) -> float:
    """What the fake backend answers for a pair when its task is cross_encoder."""
    return float(_row(_pair_ids(query, passage, max_tokens)[0])[0])


class FakeTokenizer:
    """One token for each word, plus a start and an end token.

    A token is a hash of its word: `decode` knows the words that `tokens` has seen, up to a number of them.
    """

    def __init__(self, max_tokens: int) -> None:
        self.max_tokens = max_tokens
        self.pad_id = 0
        self.prompts: Mapping[str, str] = {}
        self.needs_prompt_name = False
        self._seen: dict[int, str] = {}

    def encode(self, texts: Sequence[str], prompt_name: str | None = None) -> list[Encoded]:
        out = []
        for text in texts:
            full = _text_ids(text)
            ids = _cut(full, self.max_tokens)
            out.append(_encoded(ids, None, len(full)))
        return out

    def encode_pairs(self, pairs: Sequence[tuple[str, str]]) -> list[Encoded]:
        out = []
        for query, passage in pairs:
            ids, total = _pair_ids(query, passage, self.max_tokens)
            types = np.array([0] * (len(ids) // 2) + [1] * (len(ids) - len(ids) // 2), np.int32)
            out.append(_encoded(ids, types, total))
        return out

    def spans(self, text: str) -> NDArray[np.int32]:
        return np.array([(start, stop) for _, start, stop in _words(text)], np.int32).reshape(-1, 2)

    def tokens(self, text: str, prompt_name: str | None = None, special: bool = True) -> list[Token]:
        if prompt_name is not None:
            raise KeyError(prompt_name)
        own = [Token(token, text[start:stop], False, start, stop) for token, start, stop in _words(text)]
        seen = self._seen | {token.id: token.text for token in own}
        self._seen = dict(list(seen.items())[-_MOST_SEEN_WORDS:])
        if not special:
            return own
        start, end = (Token(token, _SPECIAL[token], True, None, None) for token in (_START, _END))
        return [start, *own, end]

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        known = _SPECIAL | self._seen
        for token in ids:
            if token not in known:
                raise ValueError(f"token id {token} is of no word that was tokenised before: tokenise its text first")
        return " ".join(known[token] for token in ids if not (skip_special and token in _SPECIAL))


def _encoded(ids: list[int], types: NDArray[np.int32] | None, total: int) -> Encoded:
    is_cut = total > len(ids)
    return Encoded(np.array(ids, np.int32), types, is_cut, uncut_tokens=total if is_cut else 0)


@dataclass(frozen=True, slots=True)
class ExecutedBatch:
    """One call of `infer`: its rows' token ids (padding removed)."""

    rows: tuple[tuple[int, ...], ...]
    padded_tokens: int


class FakeBackend:
    """Deterministic answers, a gate that holds batches until a test lets them go, and a log of what was executed.

    log: empty until `keep_log`, as it grows with every batch.
    """

    def __init__(self, model: ModelSettings, *, faults: bool = False) -> None:
        self._settings = model
        self._task = "cross_encoder" if model.task == "cross_encoder" else "embedding"
        self._faults = faults
        self._base_s, self._per_token_s = _service_time(model.name)
        self._raised: set[tuple[int, ...]] = set()
        self.log: list[ExecutedBatch] = []
        self._keeps_log = False
        self._open = threading.Event()
        self._open.set()

    @staticmethod
    def supported() -> Mapping[str, Sequence[Quantization]]:
        return {"cpu": ("none",)}

    def load_model(self) -> None:
        self._tokenizer = FakeTokenizer(self._settings.max_tokens or 256)

    def warmup(self, progress: Progress) -> None:
        progress(1, 1)

    def hold(self) -> None:
        """Batches wait inside `infer` until `release`."""
        self._open.clear()

    def release(self) -> None:
        self._open.set()

    def keep_log(self) -> None:
        """Add every batch from now on to `log`."""
        self._keeps_log = True

    def enable_faults(self) -> None:
        """Obey fault words from now on."""
        self._faults = True

    def infer(self, batch: TokenBatch) -> NDArray[np.float32]:
        rows = [tuple(each.tolist()) for each in np.split(batch.ids, batch.starts[1:-1])]
        if self._keeps_log:
            self.log.append(ExecutedBatch(tuple(rows), batch.padded_tokens))
        self._open.wait()
        delay_s = self._base_s + self._per_token_s * batch.padded_tokens
        if delay_s:
            time.sleep(delay_s)
        out = np.stack([_row(row) for row in rows])[:, : self.info.dimension]
        return self._misbehave(rows, out) if self._faults else out

    def _misbehave(self, rows: list[tuple[int, ...]], out: NDArray[np.float32]) -> NDArray[np.float32]:
        for i, row in enumerate(rows):
            if FAULTS["!slow"] in row:
                time.sleep(_number_of("!slow", row) / 1000)
            if FAULTS["!oom"] in row and len(rows) > _number_of("!oom", row):
                raise MemoryError(f"{len(rows)} texts")
            if FAULTS["!stderr"] in row:
                sys.stderr.write(1000 * _number_of("!stderr", row) * "!")
                sys.stderr.flush()
            if FAULTS["!hang"] in row:
                threading.Event().wait()
            if FAULTS["!crash"] in row:
                os.kill(os.getpid(), signal.SIGKILL)
            if FAULTS["!raise"] in row:
                raise RuntimeError("fault word !raise")
            if FAULTS["!raise-once"] in row and row not in self._raised:
                self._raised.add(row)
                raise RuntimeError("fault word !raise-once")
            if FAULTS["!nan"] in row:
                out[i] = np.nan
            if FAULTS["!inf"] in row:
                out[i, 0] = np.inf
        return out[:-1] if any(FAULTS["!short"] in row for row in rows) else out

    @property
    def info(self) -> BackendInfo:
        return BackendInfo(
            backend="fake",
            model=self._settings.name if self._settings.name.startswith("fake") else "fake",
            task=self._task,
            device="cpu",
            device_name="none",
            dtype="float32",
            quantized_layers=0,
            execution_provider="blake2b",
            instruction_set="",
            threads=1,
            concurrency=self._settings.streams or 1,
            max_tokens=self._tokenizer.max_tokens,
            dimension=1 if self._task == "cross_encoder" else DIMENSION,
            similarity="logit" if self._task == "cross_encoder" else "cosine",
            weights_sha256="",
            weights_file="",
            model_sha256="",
            source="none",
            parameters=0,
        )

    @property
    def tokenizer(self) -> FakeTokenizer:
        return self._tokenizer


def _service_time(name: str) -> tuple[float, float]:
    """(base seconds, seconds for each padded token) from `fake:base_ms=2,per_token_us=10`."""
    values = {"base_ms": 0.0, "per_token_us": 0.0}
    for part in filter(None, name.partition(":")[2].split(",")):
        key, _, number = part.partition("=")
        try:
            values[key] = values[key] * 0 + float(number)
        except (KeyError, ValueError):
            raise ModelError(f"model.name {name}: expected fake:base_ms=NUMBER,per_token_us=NUMBER") from None
    return values["base_ms"] / 1e3, values["per_token_us"] / 1e6
