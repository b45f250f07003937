"""The client for programs without an event loop."""

import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, CancelledError, ThreadPoolExecutor, wait
from types import TracebackType
from typing import Any, TypeVar

import grpc
import numpy as np
from numpy.typing import NDArray

from ml_inference_server.api.access import sent_metadata
from ml_inference_server.api.errors import ServerError, error_of_call
from ml_inference_server.api.operations import (
    CHANNEL_OPTIONS,
    Attempts,
    CallDetails,
    CutTexts,
    EmbedArguments,
    Operation,
    Overflow,
    Rank,
    RequestLimits,
    RetryBudget,
    ServerInfo,
    checked_count,
    checked_time_s,
    embed_operation,
    no_embeddings,
    rerank_operation,
    score_operation,
)
from ml_inference_server.api.stream import AnswerStream
from ml_inference_server.api.stream_state import StreamAnswer, StreamOptions, StreamState
from ml_inference_server.proto import inference_pb2 as pb
from ml_inference_server.proto import inference_pb2_grpc as rpc

Result = TypeVar("Result")
# Parts of one call that are asked for at a time: enough to keep a server busy, too few to fill its queue.
PARTS_IN_FLIGHT = 4


class Client:
    """Calls a server. Use it as a context manager, or `close` it. Safe to share between threads, not across `fork`.

    target: "host:port", or "dns:///name:port" whose addresses then take their turn. timeout_s: of one call with all
    its attempts, unless the call names another. max_attempts: of each request, where the server can be asked again.
    credentials: for TLS, as `tls_credentials` makes them. metadata: sent with every call. api_key: one that the server
    lets in. Every method raises a `ServerError`.
    """

    def __init__(
        self,
        target: str = "localhost:50051",
        *,
        timeout_s: float = 60.0,
        max_attempts: int = 5,
        credentials: grpc.ChannelCredentials | None = None,
        metadata: Sequence[tuple[str, str]] = (),
        api_key: str | None = None,
    ) -> None:
        if credentials is None:
            self._channel = grpc.insecure_channel(target, options=CHANNEL_OPTIONS)
        else:
            self._channel = grpc.secure_channel(target, credentials, options=CHANNEL_OPTIONS)
        self._stub = rpc.InferenceServiceStub(self._channel)
        self._timeout_s = checked_time_s("timeout_s", timeout_s)
        self._metadata = sent_metadata(metadata, api_key)
        self._max_attempts = checked_count("max_attempts", max_attempts)
        self._limits = RequestLimits()
        self._budget = RetryBudget()
        self._cut = CutTexts()

    def embed(
        self,
        texts: Sequence[str],
        *,
        prompt_name: str | None = None,
        input_type: str | None = None,
        truncate: bool = True,
        overflow: Overflow | None = None,
        dimensions: int | None = None,
        expect_space_id: str = "",
        timeout_s: float | None = None,
        on_reply: Callable[[CallDetails], None] | None = None,
    ) -> NDArray[np.float32]:
        """(texts, dimension) float32, in the order of the texts; any number of them.

        prompt_name: one of the model's own prompts, "query" say; None: its default. input_type: query or document, or
        another word of docs/options.md, in place of a prompt's name. truncate: cut what is longer than the model's
        limit; False refuses it. overflow: what happens to it instead: cut, cut_left (its end is kept), refuse, chunk
        (the mean of its windows). dimensions: keep so many numbers of each vector. expect_space_id: SpaceMismatchError
        where the vectors would be of another space. on_reply: called for each message of the answer.
        """
        arguments = EmbedArguments(
            prompt_name=prompt_name,
            input_type=input_type,
            truncate=truncate,
            overflow=overflow,
            dimensions=dimensions,
            expect_space_id=expect_space_id,
        )
        operation = embed_operation(texts, arguments)
        if not operation.items:
            return no_embeddings(self.info(timeout_s=timeout_s))
        return self._run(operation, timeout_s, on_reply)

    def score(
        self,
        pairs: Sequence[tuple[str, str]],
        *,
        truncate: bool = True,
        timeout_s: float | None = None,
        on_reply: Callable[[CallDetails], None] | None = None,
    ) -> NDArray[np.float32]:
        """(pairs,) float32: of each (query, passage), as `info().similarity` says; more is more alike."""
        operation = score_operation(pairs, truncate)
        return self._run(operation, timeout_s, on_reply) if operation.items else np.empty(0, np.float32)

    def rerank(
        self,
        query: str,
        documents: Sequence[str],
        *,
        top_k: int = 0,
        truncate: bool = True,
        timeout_s: float | None = None,
        on_reply: Callable[[CallDetails], None] | None = None,
    ) -> list[Rank]:
        """The documents by their score against the query, best first; the `top_k` best, or with 0 all of them."""
        operation = rerank_operation(query, documents, top_k, truncate)
        return self._run(operation, timeout_s, on_reply) if operation.items else []

    def info(self, *, timeout_s: float | None = None) -> ServerInfo:
        """What runs there."""
        attempts = self._attempts(timeout_s)
        return ServerInfo.of(self._ask("GetServerInfo", pb.GetServerInfoRequest(), attempts)[0])

    def stream(
        self,
        items: Iterable[Any],
        *,
        prompt_name: str | None = None,
        input_type: str | None = None,
        truncate: bool = True,
        overflow: Overflow | None = None,
        dimensions: int | None = None,
        expect_space_id: str = "",
        max_in_flight: int = 32,
        timeout_s: float | None = None,
    ) -> Generator[StreamAnswer, None, None]:
        """Answers in the order of completion, over one stream; made for items without end.

        items: each a text, a list of texts, or (key, texts); the key comes back with the answer, and is the item's
        place where there is none. They are read in another thread, at most `max_in_flight` ahead of the answers. An
        item that fails is answered with its error. When the connection ends, it is opened again and what was not
        answered is sent again. timeout_s: the longest wait for an answer to any of the items, over all connections;
        `ServerError` after it. What a server refuses `max_attempts` times is answered with that refusal.
        """
        arguments = EmbedArguments(
            prompt_name=prompt_name,
            input_type=input_type,
            truncate=truncate,
            overflow=overflow,
            dimensions=dimensions,
            expect_space_id=expect_space_id,
        )
        options = StreamOptions(
            arguments,
            checked_count("max_in_flight", max_in_flight),
            self._max_attempts,
            self._timeout_s if timeout_s is None else checked_time_s("timeout_s", timeout_s),
        )
        return self._stream(items, options)

    def _stream(self, items: Iterable[Any], options: StreamOptions) -> Generator[StreamAnswer, None, None]:
        def connect(messages: Iterator[pb.EmbedStreamRequest]) -> Any:
            return self._stub.EmbedStream(messages, metadata=self._metadata)

        with AnswerStream(items, StreamState(options), connect, lambda: RequestLimits.of(self.info())) as answers:
            while (answer := answers.next_answer()) is not None:
                yield answer

    def close(self) -> None:
        """End all calls."""
        self._channel.close()

    def __enter__(self) -> "Client":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _attempts(self, timeout_s: float | None) -> Attempts:
        limit_s = self._timeout_s if timeout_s is None else checked_time_s("timeout_s", timeout_s)
        return Attempts(time.monotonic() + limit_s, self._max_attempts, self._budget)

    def _run(
        self, operation: Operation[Result], timeout_s: float | None, on_reply: Callable[[CallDetails], None] | None
    ) -> Result:
        """All parts of an operation; they are cut again, once, where the server's limits are other than thought."""
        limit_s = self._timeout_s if timeout_s is None else checked_time_s("timeout_s", timeout_s)
        ends_at = time.monotonic() + limit_s
        parts = operation.parts(self._limits)
        try:
            return self._run_parts(operation, parts, ends_at, on_reply)
        except ServerError as error:
            if not error.is_about_size:
                raise
            self._limits = RequestLimits.of(self.info(timeout_s=max(0.0, ends_at - time.monotonic())))
            smaller = operation.parts(self._limits)
            if smaller == parts:
                raise
        return self._run_parts(operation, smaller, ends_at, on_reply)

    def _run_parts(
        self,
        operation: Operation[Result],
        parts: Sequence[range],
        ends_at: float,
        on_reply: Callable[[CallDetails], None] | None,
    ) -> Result:
        together = _Together()

        def ask(places: range) -> tuple[Any, CallDetails]:
            attempts = Attempts(ends_at, self._max_attempts, self._budget)
            try:
                reply, request_id = self._ask(
                    operation.method, operation.part(places), attempts, together if len(parts) > 1 else None
                )
            except ServerError as error:
                error.moved_by(places.start)
                raise
            return reply, operation.details(reply, places, request_id)

        if len(parts) == 1:
            answers = [ask(parts[0])]
        else:
            with ThreadPoolExecutor(min(PARTS_IN_FLIGHT, len(parts))) as pool:
                waiting = [pool.submit(ask, places) for places in parts]
                try:
                    wait(waiting, return_when=FIRST_EXCEPTION)
                    failed = next((each for each in waiting if each.done() and each.exception()), None)
                    answers = [each.result() for each in ([failed] if failed else waiting)]
                except BaseException:
                    pool.shutdown(wait=False, cancel_futures=True)
                    together.end()
                    raise
        for _, details in answers:
            self._cut.note(details)
            if on_reply is not None:
                on_reply(details)
        return operation.join([reply for reply, _ in answers], parts)

    def _ask(
        self, method: str, request: Any, attempts: Attempts, together: "_Together | None" = None
    ) -> tuple[Any, str]:
        """(the reply, its request id). ServerError once no further attempt may help."""
        ask = getattr(self._stub, method)
        while True:
            try:
                if together is None:  # a fifth faster than a call that can be cancelled
                    reply, call = ask.with_call(request, timeout=attempts.remaining_s, metadata=self._metadata)
                else:
                    call = together.begin(
                        lambda: ask.future(request, timeout=attempts.remaining_s, metadata=self._metadata)
                    )
                    reply = call.result()
            except grpc.RpcError as error:
                failure = error_of_call(error)
                pause_s = attempts.pause_s(failure)
                if pause_s is None:
                    raise failure from error
                if together is None:
                    time.sleep(pause_s)
                else:
                    together.ended.wait(pause_s)
            else:
                trailers = dict(call.trailing_metadata() or ())
                return reply, str(trailers.get("request-id", ""))


class _Together:
    """The calls for the parts of one list: when one fails for good, nobody waits for the others."""

    def __init__(self) -> None:
        self.ended = threading.Event()
        self._lock = threading.Lock()
        self._calls: list[Any] = []

    def begin(self, call: Callable[[], Any]) -> Any:
        with self._lock:
            if self.ended.is_set():
                raise CancelledError
            self._calls.append(call())
            return self._calls[-1]

    def end(self) -> None:
        with self._lock:
            self.ended.set()
            for call in self._calls:
                call.cancel()
