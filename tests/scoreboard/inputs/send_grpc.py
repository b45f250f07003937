"""Sends a case over gRPC and holds what comes back against what is written down."""

import asyncio
import itertools
from typing import Any

import grpc

from ml_inference_server.backends.fake import fake_logit
from ml_inference_server.proto import inference_pb2 as pb
from tests.conftest import raw
from tests.fuzz.grpc_wire import Outcome
from tests.integration.foreign_kit import told
from tests.scoreboard.inputs.case import LIMIT_S, OWN, GrpcCase, vectors_of

# Never an answer of this server, whatever comes in.
NEVER = {grpc.StatusCode.UNKNOWN, grpc.StatusCode.ABORTED, grpc.StatusCode.DATA_LOSS}
_MOST_SENTENCE = 512
# Signs of the inside: a traceback, a class, a file, an address in memory.
INSIDE = ("Traceback", "Error(", "Error:", "Exception", ".py", "/ml_inference_server/", " at 0x", "<class ")


class GrpcSender:
    """blocking: a channel for streams, as grpc.aio's client loses the status of a server that refuses one early."""

    def __init__(self, port: int) -> None:
        address = f"127.0.0.1:{port}"
        options = [("grpc.max_receive_message_length", 64 << 20)]
        self._aio = grpc.aio.insecure_channel(address, options)
        self._blocking = grpc.insecure_channel(address, options)
        self._numbers = itertools.count()

    async def close(self) -> None:
        await self._aio.close()
        self._blocking.close()

    async def send(self, case: GrpcCase) -> Outcome:
        """TimeoutError where no end comes."""
        async with asyncio.timeout(LIMIT_S):
            if case.is_stream:
                return await asyncio.to_thread(self._stream, case)
            try:
                answer = await raw(self._aio).unary_unary(f"/{case.path}")(
                    case.messages[0], timeout=case.timeout_s, metadata=case.metadata, compression=case.compression
                )
            except grpc.RpcError as error:
                return Outcome(error, [])
            return Outcome(None, [answer])

    def _stream(self, case: GrpcCase) -> Outcome:
        channel: Any = self._blocking
        answers: list[bytes] = []
        try:
            answers += channel.stream_stream(f"/{case.path}")(iter(case.messages), timeout=LIMIT_S - 1)
        except grpc.RpcError as error:
            return Outcome(error, answers)
        return Outcome(None, answers)

    async def check_well(self, is_cross_encoder: bool) -> None:
        """AssertionError unless a right call is answered rightly."""
        text = f"are you well {next(self._numbers)}"
        async with asyncio.timeout(LIMIT_S):
            if is_cross_encoder:
                request: Any = pb.ScoreRequest(pairs=[pb.Pair(query="q", passage=text)])
                answer = await raw(self._aio).unary_unary(f"/{OWN}/Score")(request.SerializeToString())
                [score] = pb.ScoreResponse.FromString(answer).scores
                assert abs(score - fake_logit("q", text)) < 1e-6
                return
            request = pb.EmbedRequest(texts=[text])
            vectors_of(text)([await raw(self._aio).unary_unary(f"/{OWN}/Embed")(request.SerializeToString())])


def check(case: GrpcCase, outcome: Outcome) -> None:
    """AssertionError unless it is what the case says."""
    if outcome.error is None:
        assert case.code is grpc.StatusCode.OK, f"answered, {case.code.name} expected"
    else:
        details = outcome.error.details() or ""
        assert outcome.code is case.code, f"{outcome.code.name} ({details}), {case.code.name} expected"
        if case.has_sentence:
            check_sentence(details)
        if case.reason:
            found = told(outcome.error)
            assert found == (case.reason, list(case.fields)), f"{found} ({details})"
    if case.right is not None:
        case.right(outcome.answers)


def check_sentence(text: str, most: int = _MOST_SENTENCE) -> None:
    """AssertionError unless it is something that a person can read, and tells nothing of the inside."""
    assert text.strip(), "no sentence"
    assert len(text) <= most, f"a sentence of {len(text)} characters"
    assert text.isascii(), f"not ASCII: {text!a}"
    assert text.isprintable(), f"does not print: {text!a}"
    assert not [sign for sign in INSIDE if sign in text], text
