"""What a client asks, without the asking: how work is split, when it is repeated, and how answers become one."""

import json
import logging
import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from ml_inference_server.api.errors import ServerError, UnavailableError, malformed_answer, not_sent
from ml_inference_server.proto import inference_pb2 as pb

log = logging.getLogger("ml_inference_server.client")

Result = TypeVar("Result")

# gRPC's own limit on what a client receives is 4 MiB: 2,700 vectors of 384 numbers.
CHANNEL_OPTIONS: list[tuple[str, Any]] = [
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.ping_timeout_ms", 10_000),  # else gRPC's own minute holds
    # Pings go on while a stream waits in silence: otherwise a peer that is gone is not noticed after two of them.
    ("grpc.http2.max_pings_without_data", 0),
    # gRPC's own pauses before it connects again grow to two minutes, far beyond a restart.
    ("grpc.max_reconnect_backoff_ms", 5_000),
    # A name is asked for again when a connection ends, but by gRPC's own choice twice a minute at most: so long would
    # new servers wait for their share, and a client whose servers have all moved for an address that answers.
    ("grpc.dns_min_time_between_resolutions_ms", 2_000),
    # All addresses behind a name such as dns:///embeddings.default.svc:50051 take their turn.
    ("grpc.service_config", json.dumps({"loadBalancingConfig": [{"round_robin": {}}]})),
]

# Tags and lengths round each text of a message, and what else a message holds.
_BYTES_PER_ITEM, _REST_BYTES = 16, 1024
_RANK_BYTES, _LENGTHS_BYTES = 16, 12  # of a rank; of what is told of the length of a text
_LONGEST_S = 1e8


@dataclass(frozen=True, slots=True)
class Rank:
    """index: of the document in the list that was given."""

    index: int
    score: float


@dataclass(frozen=True, slots=True)
class CallDetails:
    """What a server said beside the result of one call. truncated: how many of the texts it cut at the model's limit.

    timing: tokenize_us, queue_us, compute_us, total_us on the server. request_id: under which its log knows the call.
    token_counts: tokens that each text had; used_token_counts: what the model got of them. truncated_rows: which texts
    were cut. space_id: of the vectors; empty where there are none. warnings: sentences.
    """

    method: str
    texts: int
    truncated: int
    timing: pb.Timing
    request_id: str
    token_counts: tuple[int, ...] = ()
    used_token_counts: tuple[int, ...] = ()
    truncated_rows: tuple[int, ...] = ()
    space_id: str = ""
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ServerInfo:
    """What runs there. title: in one line. space_ids: of full-length vectors, by the name of the prompt, "" being the
    default. message: all of it, as it came over the wire."""

    title: str
    server_version: str
    model: str
    task: str
    dimension: int
    max_tokens: int
    similarity: str
    max_texts: int
    max_message_bytes: int
    space_ids: dict[str, str]
    message: pb.GetServerInfoResponse

    @classmethod
    def of(cls, message: pb.GetServerInfoResponse) -> "ServerInfo":
        ran = message.resolved
        return cls(
            message.title,
            message.server_version,
            ran.model,
            ran.task,
            ran.dimension,
            ran.max_tokens,
            ran.similarity,
            message.max_texts,
            message.max_message_bytes,
            dict(message.space_ids),
            message,
        )


@dataclass(frozen=True, slots=True)
class RequestLimits:
    """Of one request: items, bytes either way, and bytes of the answer for one text (0: not known yet).

    The defaults are those of a server that nobody configured; a refusal makes the client ask.
    """

    items: int = 1024
    message_bytes: int = 16 << 20
    row_bytes: int = 0

    @classmethod
    def of(cls, info: ServerInfo) -> "RequestLimits":
        return cls(info.max_texts, info.max_message_bytes, 4 * info.dimension)


class Pauses:
    """Waits between attempts: as long as the server asks, or else twice as long each time.

    At random within a fifth or a half, so that callers that were refused together do not come back together.
    """

    def __init__(self) -> None:
        self._next_s = 0.1

    def after(self, error: ServerError) -> float:
        pause_s = self._next_s * random.uniform(0.5, 1)  # noqa: S311 - no secret
        self._next_s = min(2 * self._next_s, 5.0)
        return error.retry_after_s * random.uniform(1, 1.2) if error.retry_after_s else pause_s  # noqa: S311


class RetryBudget:
    """What the calls of one client may ask again of a server that is overloaded: one in ten, and two a second.

    Otherwise each call that it refuses comes back several times, and keeps it overloaded. Safe to use from threads.
    """

    _FOR_A_CALL, _PER_S, _MOST = 0.1, 2.0, 10.0

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._level, self._at = self._MOST, clock()
        self._lock = threading.Lock()

    def called(self) -> None:
        """A call begins."""
        with self._lock:
            self._level = min(self._level + self._FOR_A_CALL, self._MOST)

    def pause_s(self, pause_s: float, most_s: float) -> float:
        """At least `pause_s`, and longer where others wait already. From `most_s` on it is not taken."""
        with self._lock:
            now = self._clock()
            self._level = min(self._level + (now - self._at) * self._PER_S, self._MOST)
            self._at = now
            pause_s = max(pause_s, (1 - self._level) / self._PER_S)
            if pause_s < most_s:
                self._level -= 1
            return pause_s


class Attempts:
    """How often one call may be made, and for how long in all. budget: of its client."""

    def __init__(self, ends_at: float, most: int, budget: RetryBudget) -> None:
        """ends_at: on time.monotonic's clock."""
        self._ends_at = ends_at
        self._left = most - 1
        self._pauses = Pauses()
        self._budget = budget
        budget.called()

    @property
    def remaining_s(self) -> float:
        return max(0.0, self._ends_at - time.monotonic())

    def pause_s(self, error: ServerError) -> float | None:
        """How long to wait before the next attempt; None if there is to be none."""
        if self._left <= 0 or not error.can_be_repeated:
            return None
        self._left -= 1
        pause_s, remaining_s = self._pauses.after(error), self.remaining_s
        # A limit of the caller's own says exactly when there is room.
        if error.code == "RESOURCE_EXHAUSTED" and error.reason != "CALLER_LIMIT":
            pause_s = self._budget.pause_s(pause_s, remaining_s)
        return None if pause_s >= remaining_s else pause_s


@dataclass(frozen=True)
class Operation(Generic[Result]):
    """One kind of request about a list of items that may be split and asked for in parts.

    sizes: bytes of each item. row_bytes: of the answer for one item, from what is known of the server. problem: what
    makes a reply to so many items no answer to them, or "".
    """

    method: str
    items: Sequence[Any]
    sizes: Sequence[int]
    request: Callable[[Sequence[Any]], Any]
    join: Callable[[Sequence[Any], Sequence[range]], Result]
    row_bytes: Callable[[RequestLimits], int]
    problem: Callable[[Any, int], str]

    def parts(self, limits: RequestLimits) -> list[range]:
        """Ranges of items, each within the limits where its items are."""
        rows = self.row_bytes(limits)
        room = limits.message_bytes - _REST_BYTES
        most = min(limits.items, max(1, room // rows)) if rows else limits.items
        found, first, size = [], 0, 0
        for i, item_bytes in enumerate(self.sizes):
            if i > first and (i - first >= most or size + item_bytes + _BYTES_PER_ITEM > room):
                found.append(range(first, i))
                first, size = i, 0
            size += item_bytes + _BYTES_PER_ITEM
        return [*found, range(first, len(self.items))]

    def part(self, places: range) -> Any:
        return self.request(self.items[places.start : places.stop])

    def details(self, reply: Any, places: range, request_id: str) -> CallDetails:
        """Of a reply about the items at `places`. ServerError unless it answers all of them."""
        if problem := self.problem(reply, len(places)):
            raise malformed_answer(problem, request_id)
        return CallDetails(
            self.method,
            len(places),
            reply.truncated,
            reply.timing,
            request_id,
            tuple(reply.token_counts),
            tuple(reply.used_token_counts),
            tuple(reply.truncated_rows),
            getattr(reply, "space_id", ""),
            tuple(reply.warnings),
        )


Overflow = Literal["cut", "cut_left", "refuse", "chunk"]
_OVERFLOWS = {
    "cut": pb.OVERFLOW_CUT,
    "cut_left": pb.OVERFLOW_CUT_LEFT,
    "refuse": pb.OVERFLOW_REFUSE,
    "chunk": pb.OVERFLOW_CHUNK,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbedArguments:
    """What `embed` and `stream` take beside the texts, as `Client.embed` names it. ValueError for nonsense."""

    prompt_name: str | None = None
    input_type: str | None = None
    truncate: bool = True
    overflow: Overflow | None = None
    dimensions: int | None = None
    expect_space_id: str = ""

    def __post_init__(self) -> None:
        if self.overflow is not None and self.overflow not in _OVERFLOWS:
            raise ValueError(f"overflow: expected one of {', '.join(_OVERFLOWS)}, not {self.overflow!r:.40}")
        if self.overflow not in (None, "refuse") and not self.truncate:
            raise ValueError("truncate=False refuses long texts: leave it out to use overflow")
        if self.dimensions is not None and not 1 <= self.dimensions < 1 << 32:
            raise ValueError(f"dimensions: expected 1 or more, not {self.dimensions}")

    def request(self, texts: Sequence[str]) -> pb.EmbedRequest:
        """A message about `texts`."""
        return pb.EmbedRequest(
            texts=texts,
            prompt_name=self.prompt_name,
            input_type=self.input_type,
            truncate=None if self.overflow else self.truncate,
            overflow=_OVERFLOWS[self.overflow] if self.overflow else None,
            dimensions=self.dimensions,
            expect_space_id=self.expect_space_id,
        )


def embed_operation(texts: Sequence[str], arguments: EmbedArguments) -> Operation[NDArray[np.float32]]:
    texts = checked_texts("texts", texts)

    def join(replies: Sequence[pb.EmbedResponse], parts: Sequence[range]) -> NDArray[np.float32]:
        if len({(reply.dimension, reply.space_id) for reply in replies}) > 1:
            raise malformed_answer("has vectors of several spaces: more than one model serves there")
        return np.concatenate([matrix(reply) for reply in replies]) if len(replies) > 1 else matrix(replies[0])

    return Operation(
        "Embed",
        texts,
        [utf8_bytes(f"texts[{i}]", text) for i, text in enumerate(texts)],
        arguments.request,
        join,
        lambda limits: limits.row_bytes and limits.row_bytes + _LENGTHS_BYTES,
        matrix_problem,
    )


def score_operation(pairs: Sequence[tuple[str, str]], truncate: bool) -> Operation[NDArray[np.float32]]:
    pairs = list(pairs)
    for i, pair in enumerate(pairs):
        if not (isinstance(pair, tuple | list) and len(pair) == 2 and all(isinstance(each, str) for each in pair)):
            raise TypeError(f"pairs[{i}]: expected (query, passage), two str, not {pair!r:.80}")
    sizes = [
        utf8_bytes(f"pairs[{i}].query", query) + utf8_bytes(f"pairs[{i}].passage", passage)
        for i, (query, passage) in enumerate(pairs)
    ]
    return Operation(
        "Score",
        pairs,
        sizes,
        lambda part: pb.ScoreRequest(pairs=[pb.Pair(query=q, passage=p) for q, p in part], truncate=truncate),
        lambda replies, parts: np.concatenate([np.asarray(reply.scores, np.float32) for reply in replies]),
        lambda limits: 0,
        lambda reply, pairs: "" if len(reply.scores) == pairs else f"has {len(reply.scores)} scores for {pairs} pairs",
    )


def rerank_operation(query: str, documents: Sequence[str], top_k: int, truncate: bool) -> Operation[list[Rank]]:
    if not isinstance(query, str):
        raise TypeError(f"query: expected a str, not {query!r:.80}")
    if not 0 <= top_k < 1 << 32:
        raise ValueError(f"top_k: expected a number of documents, or 0 for all, not {top_k}")
    documents = checked_texts("documents", documents)

    def join(replies: Sequence[pb.RerankResponse], parts: Sequence[range]) -> list[Rank]:
        found = [
            Rank(places.start + rank.index, rank.score)
            for reply, places in zip(replies, parts, strict=True)
            for rank in reply.ranks
        ]
        found.sort(key=lambda rank: (-rank.score, rank.index))  # as one server would: equal scores in the given order
        return found[:top_k] if top_k else found

    def problem(reply: pb.RerankResponse, given: int) -> str:
        wanted, found = min(top_k or given, given), {rank.index for rank in reply.ranks}
        if len(reply.ranks) == len(found) == wanted and max(found) < given:
            return ""
        return f"ranks {sorted(found)!s:.80}, and {wanted} of {given} documents were to be ranked"

    around = utf8_bytes("query", query)
    sizes = [utf8_bytes(f"documents[{i}]", text) for i, text in enumerate(documents)]
    return Operation(
        "Rerank",
        documents,
        [sizes[0] + around, *sizes[1:]] if sizes else [],
        lambda part: pb.RerankRequest(query=query, documents=part, top_k=top_k, truncate=truncate),
        join,
        lambda limits: _RANK_BYTES + _LENGTHS_BYTES,
        problem,
    )


def matrix_problem(reply: pb.EmbedResponse, texts: int) -> str:
    if (reply.count, len(reply.embeddings)) == (texts, 4 * reply.count * reply.dimension):
        return ""
    held = f"{len(reply.embeddings)} bytes as {reply.count} vectors of {reply.dimension} numbers"
    return f"has {held} for {texts} texts"


def no_embeddings(info: ServerInfo) -> NDArray[np.float32]:
    """Those of an empty list."""
    if not info.model:
        raise UnavailableError("the model is being loaded", code="UNAVAILABLE", reason="MODEL_LOADING")
    return np.empty((0, info.dimension), np.float32)


def matrix(reply: pb.EmbedResponse) -> NDArray[np.float32]:
    """(count, dimension), writable."""
    return np.frombuffer(reply.embeddings, "<f4").reshape(reply.count, reply.dimension).astype(np.float32)


def checked_texts(name: str, texts: Sequence[str]) -> list[str]:
    """TypeError for a single str, which would be taken for a list of letters, and for what is no text."""
    if isinstance(texts, str | bytes):
        raise TypeError(f"{name} is one text: pass a list of texts")
    found = list(texts)
    for i, text in enumerate(found):
        if not isinstance(text, str):
            raise TypeError(f"{name}[{i}]: expected a str, not {type(text).__name__}")
    return found


def utf8_bytes(name: str, text: str) -> int:
    """The size of a text. InvalidRequestError for half a character, as wrongly decoded files have them."""
    try:
        return len(text.encode())
    except UnicodeEncodeError as error:
        raise not_sent(name, f"no Unicode text: half a character (surrogate) at place {error.start}") from None


def checked_time_s(name: str, time_s: float) -> float:
    """ValueError unless it is a number of seconds that gRPC can count down."""
    if not time_s <= _LONGEST_S:
        raise ValueError(f"{name}: expected seconds, at most {_LONGEST_S:.0f}, not {time_s}")
    return time_s


def checked_count(name: str, number: int) -> int:
    if number < 1:
        raise ValueError(f"{name}: expected 1 or more, not {number}")
    return number


class CutTexts:
    """Says it once in the log when a server cuts texts; `on_reply` and `truncate=False` say it for each call."""

    def __init__(self) -> None:
        self._was_said = False

    def note(self, details: CallDetails) -> None:
        if details.truncated and not self._was_said:
            self._was_said = True
            log.warning(
                "%d of %d texts were longer than the model's limit and were cut; truncate=False refuses them instead "
                "(said once for each client)",
                *(details.truncated, details.texts),
            )
