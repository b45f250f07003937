"""A nasty input, and what must come of it: the exact status, and for an answer the right content."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import grpc
import numpy as np

from ml_inference_server.backends.fake import fake_embedding
from ml_inference_server.proto import inference_pb2 as pb
from tests.integration.http_kit import HttpReply

OWN = "ml_inference_server.v1.InferenceService"
# No answer is as slow as that, so what comes later hangs.
LIMIT_S = 20.0
# Instead of a status: the server ends the connection and says nothing.
HANGS_UP = 0


@dataclass(frozen=True, kw_only=True)
class Case:
    """server: which of servers.SETTINGS it is for. Cases of one group and name are one input over two protocols."""

    group: str
    name: str
    server: str = "plain"


@dataclass(frozen=True, kw_only=True)
class GrpcCase(Case):
    """path: service/method. is_stream: of messages to it. reason, fields: as the error details tell them.

    has_sentence: False where the library that answers sends a status and nothing else.
    right: AssertionError unless the answers are those to this input; for OK only.
    """

    path: str
    messages: tuple[bytes, ...]
    code: grpc.StatusCode
    is_stream: bool = False
    reason: str = ""
    fields: tuple[str, ...] = ()
    has_sentence: bool = True
    metadata: tuple[tuple[str, str | bytes], ...] = ()
    timeout_s: float | None = None
    compression: grpc.Compression | None = None
    right: Callable[[Sequence[bytes]], None] | None = None

    @property
    def size(self) -> int:
        """Bytes to send."""
        return sum(map(len, self.messages))


@dataclass(frozen=True, kw_only=True)
class HttpCase(Case):
    """request: all bytes. ends: the sender closes its side behind them. says: stands in the sentence of the refusal."""

    request: bytes
    status: int
    ends: bool = False
    says: str = ""
    right: Callable[[HttpReply], None] | None = None

    @property
    def size(self) -> int:
        """Bytes to send."""
        return len(self.request)


def vectors_of(*texts: str) -> Callable[[Sequence[bytes]], None]:
    """The one answer of Embed holds the vectors of these texts, in this order."""

    def check(answers: Sequence[bytes]) -> None:
        reply = pb.EmbedResponse.FromString(answers[0])
        found = np.frombuffer(reply.embeddings, "<f4").reshape(reply.count, reply.dimension)
        np.testing.assert_array_equal(found, np.stack([fake_embedding(text) for text in texts]))

    return check
