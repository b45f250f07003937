"""Questions and words between a supervisor and one worker, either way, over a pair of sockets that only they have."""

import asyncio
import itertools
import logging
import pickle
import socket
import struct
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from ml_inference_server.utils.errors import Unavailable

_HEADER = struct.Struct(">IBI")  # bytes that follow, what they are, number of the question
_ASK, _ANSWER, _REFUSAL, _FAULT, _WORD = range(5)

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Asked:
    future: "asyncio.Future[Any]"
    then: Callable[[Any], None] | None


class Link:
    """answer: gives the answer to a question of the other side; a ValueError goes back to who asked.

    told: takes a word that wants no answer. Both get what the other side sent: anything that can be pickled, which is
    safe here because the other side is a process of ours that was started with its end of the pair.
    """

    def __init__(self, answer: Callable[[Any], Awaitable[Any]], told: Callable[[Any], None]) -> None:
        self._answer = answer
        self._told = told
        self._writer: asyncio.StreamWriter | None = None
        self._connected = asyncio.Event()
        self._asked: dict[int, _Asked] = {}
        self._numbers = itertools.count()
        self._answering: set[asyncio.Task[None]] = set()

    @property
    def waiting(self) -> int:
        """Questions of this side that have no answer yet."""
        return len(self._asked)

    async def run(self, end: socket.socket) -> None:
        """Until the other side has closed its end."""
        reader, self._writer = await asyncio.open_connection(sock=end)
        self._connected.set()
        try:
            while True:
                size, kind, number = _HEADER.unpack(await reader.readexactly(_HEADER.size))
                self._take(kind, number, pickle.loads(await reader.readexactly(size)))  # noqa: S301
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self._writer.close()
            self._writer = None
            unanswered, self._asked = list(self._asked.values()), {}
            for asked in unanswered:
                if not asked.future.done():
                    asked.future.set_exception(_ended())
            for task in self._answering:
                task.cancel()

    async def ready(self) -> None:
        """Once `run` has begun."""
        await self._connected.wait()

    async def ask(self, question: Any, timeout_s: float, then: Callable[[Any], None] | None = None) -> Any:
        """The answer. Unavailable where the other side has ended or takes too long; ValueError where it refuses.

        then: gets the answer in its order among the words of the other side, however late it comes.
        """
        number = next(self._numbers) & 0xFFFFFFFF
        self._send(_ASK, number, question)
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        answer.add_done_callback(_seen)
        self._asked[number] = _Asked(answer, then)
        try:
            async with asyncio.timeout(timeout_s):
                return await asyncio.shield(answer)
        except TimeoutError:
            raise Unavailable(f"another process of this server has not answered for {timeout_s:g} s") from None

    def tell(self, word: Any) -> None:
        """Unavailable where the other side has ended."""
        self._send(_WORD, 0, word)

    async def sent(self) -> None:
        """Wait until what was said has been handed to the system."""
        if self._writer is not None:
            await self._writer.drain()

    def _send(self, kind: int, number: int, content: Any) -> None:
        if self._writer is None:
            raise _ended()
        body = pickle.dumps(content, pickle.HIGHEST_PROTOCOL)
        self._writer.write(_HEADER.pack(len(body), kind, number) + body)

    def _take(self, kind: int, number: int, content: Any) -> None:
        if kind == _WORD:
            self._told(content)
        elif kind == _ASK:
            task = asyncio.create_task(self._give_answer(number, content))
            self._answering.add(task)
            task.add_done_callback(self._answering.discard)
        elif (asked := self._asked.pop(number, None)) is not None:
            if kind != _ANSWER:
                asked.future.set_exception(ValueError(content) if kind == _REFUSAL else RuntimeError(content))
                return
            if asked.then is not None:
                asked.then(content)
            asked.future.set_result(content)

    async def _give_answer(self, number: int, question: Any) -> None:
        try:
            try:
                kind, content = _ANSWER, await self._answer(question)
            except ValueError as error:
                kind, content = _REFUSAL, str(error)
            except Exception:
                log.exception("a question of another process of this server could not be answered")
                kind, content = _FAULT, "the process that was asked has failed: its log has the cause"
            self._send(kind, number, content)
        except Unavailable:  # who asked has ended
            log.debug("nobody waits for the answer any more")


def _seen(answer: "asyncio.Future[Any]") -> None:
    """Nobody may be waiting for it any more; asyncio would complain of an error that was not looked at."""
    if not answer.cancelled():
        answer.exception()


def _ended() -> Unavailable:
    return Unavailable("another process of this server has ended; retry")
