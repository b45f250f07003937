"""Calls of the chaos row: what each sends, what it may end with, and whether its answer is the right one."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from google.protobuf.message import Message

from ml_inference_server.backends.fake import fake_embedding
from ml_inference_server.proto import inference_pb2 as pb

# Cosines are computed in float32 there and in float64 here.
_COSINE_ERROR = 1e-5
_WORDS = 30

# What a call may end with through no fault of its own: the queue is full, or a shared fault hit it (V8).
REFUSED = "RESOURCE_EXHAUSTED"
SHARED = ("UNAVAILABLE", "DEADLINE_EXCEEDED")


@dataclass(frozen=True, slots=True)
class Kind:
    """weight: how often, of all. ends: what its own fault may end it with besides REFUSED and SHARED.

    word: stands in one of its texts. lane: "" for the usual connection; "proxied", "stranger" or "extra" for others.
    """

    weight: float
    ends: frozenset[str]
    word: str = ""
    lane: str = ""


def _kind(weight: float, ends: str, word: str = "", lane: str = "") -> Kind:
    return Kind(weight, frozenset(ends.split()), word, lane)


KINDS: dict[str, Kind] = {
    "plain": _kind(640, "OK"),
    "cancel": _kind(80, "OK CANCELLED"),
    "deadline": _kind(80, "OK DEADLINE_EXCEEDED"),
    "proxied": _kind(80, "OK UNAVAILABLE", lane="proxied"),
    "empty": _kind(25, "INVALID_ARGUMENT"),
    "malformed": _kind(10, "INVALID_ARGUMENT"),
    "raise": _kind(10, "INTERNAL", "!raise"),
    "raise-once": _kind(10, "OK INTERNAL", "!raise-once"),
    "nan": _kind(10, "INTERNAL", "!nan"),
    "inf": _kind(5, "INTERNAL", "!inf"),
    "short": _kind(5, "INTERNAL", "!short"),
    "oom": _kind(2, "OK", "!oom:3"),
    "slow": _kind(5, "OK", "!slow:20"),
    "stranger": _kind(10, "UNAUTHENTICATED", lane="stranger"),
    "extra": _kind(10, "OK UNAUTHENTICATED", lane="extra"),
    # Sent by the driver, as they cost an engine.
    "crash": _kind(0, "INTERNAL", "!crash"),
    "hang": _kind(0, "INTERNAL", "!hang"),
    "probe": _kind(0, "OK"),
}
# The server must have refused these before anything of them was computed (V6).
NEVER_EXECUTED = frozenset({"INVALID_ARGUMENT", "UNAUTHENTICATED", REFUSED})


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedCall:
    """One call. name: of the call, unique; its words begin each of its texts. after_s: when it is cancelled."""

    name: str
    kind: str
    method: str
    texts: Sequence[str]
    timeout_s: float
    after_s: float = 0.0

    @property
    def body(self) -> bytes:
        if self.kind == "malformed":
            return b"\xff"
        return self._request().SerializeToString()

    def _request(self) -> Message:
        first, rest = self.texts[0], self.texts[1:]
        if self.method == "Embed":
            return pb.EmbedRequest(texts=self.texts)
        if self.method == "Rerank":
            return pb.RerankRequest(query=first, documents=rest)
        return pb.ScoreRequest(pairs=[pb.Pair(query=first, passage=passage) for passage in rest])

    def is_right(self, reply: bytes) -> bool:
        """Whether this is the answer to these texts: as many rows, in order, each the one of its text (V3)."""
        rows = np.stack([fake_embedding(text) for text in self.texts])
        if self.method == "Embed":
            embedded = pb.EmbedResponse.FromString(reply)
            return (embedded.count, embedded.embeddings) == (len(rows), rows.tobytes())
        cosines = rows[1:].astype(np.float64) @ rows[0]
        if self.method == "Score":
            scores = np.array(pb.ScoreResponse.FromString(reply).scores)
            return scores.shape == cosines.shape and bool(np.abs(scores - cosines).max() < _COSINE_ERROR)
        ranks = pb.RerankResponse.FromString(reply).ranks
        indexes, found = [rank.index for rank in ranks], np.array([rank.score for rank in ranks])
        if sorted(indexes) != list(range(len(cosines))):
            return False
        is_falling = bool((np.diff(found) <= 0).all())
        return is_falling and bool(np.abs(found - cosines[indexes]).max() < _COSINE_ERROR)


def name_words(name: str) -> str:
    """The two words that begin each text of a call."""
    return f"{name}a {name}b"


def planned(rng: random.Random, name: str, timeout_s: float, kinds: Mapping[str, Kind] = KINDS) -> PlannedCall:
    """The next call of a caller, at random."""
    kind = rng.choices(list(kinds), [each.weight for each in kinds.values()])[0]
    return planned_as(kind, rng, name, timeout_s)


def planned_as(kind: str, rng: random.Random, name: str, timeout_s: float) -> PlannedCall:
    """A call of that kind, its size at random."""
    method = rng.choices(("Embed", "Score", "Rerank"), (80, 10, 10))[0]
    count = rng.choice((1, 1, 1, 1, 2, 2, 5, 16)) + (method != "Embed")
    words = name_words(name)
    texts = [f"{words} {i} " + "w " * rng.randint(0, _WORDS) for i in range(count)]
    at = rng.randrange(count)
    if kind == "empty":
        texts[at] = " "
    elif word := KINDS[kind].word:
        texts[at] = f"{words} {word} {at}"
    if kind == "deadline":
        timeout_s = rng.uniform(0.001, 0.04)
    after_s = rng.uniform(0, 0.03) if kind == "cancel" else 0.0
    return PlannedCall(name=name, kind=kind, method=method, texts=texts, timeout_s=timeout_s, after_s=after_s)
