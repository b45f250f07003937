"""How every request begins, whatever protocol it came by: its id, its deadline, and its place in the metrics."""

import asyncio
import functools
import ipaddress
import itertools
import re
import urllib.parse
from collections.abc import Callable

from ml_inference_server.door.door import Door
from ml_inference_server.door.rights import Right
from ml_inference_server.metrics.registry import Metrics
from ml_inference_server.server.call import Call
from ml_inference_server.server.observation import Observation

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_MOST_HEADER_CHARACTERS = 256
_LOOK_AGAIN_S = 0.005


class Calls:
    """Makes a `Call` of what a caller sent. `prefix` makes request ids unique among processes.

    door: has let the request in that a call is made of; None where everybody comes in.
    """

    def __init__(self, metrics: Metrics, *, default_timeout_s: float, prefix: str, door: Door | None = None) -> None:
        self._door = door
        self._metrics = metrics
        self._prefix = prefix
        self._ids = itertools.count(1)
        self.default_timeout_s = default_timeout_s
        self._numbers = itertools.count()
        self._open: set[int] = set()
        self.last_call_at = 0.0  # on the event loop's clock

    def begin(
        self,
        *,
        request_id: object = None,
        traceparent: object = None,
        expect_space_id: object = None,
        priority: object = None,
        peer: str = "",
        timeout_s: float | None = None,
        limit_s: float | None = None,
    ) -> Call:
        """A call that has just come in. What its headers hold may be anything; an id that is no good gets another.

        peer: the address that the connection comes from. timeout_s: what the caller asks for. limit_s: the most that
        it gets; None: server.default_timeout_ms.
        """
        limit_s = self.default_timeout_s if limit_s is None else limit_s
        if not isinstance(request_id, str) or not _REQUEST_ID.fullmatch(request_id):
            request_id = f"{self._prefix}-{next(self._ids)}"
        now = self.last_call_at = asyncio.get_running_loop().time()
        return Call(
            request_id,
            received_at=now,
            deadline=now + (limit_s if timeout_s is None else min(timeout_s, limit_s)),
            traceparent=_header(traceparent),
            expect_space_id=_header(expect_space_id),
            caller=caller_at(peer) if self._door is None else self._door.caller(),
            priority=_header(priority),
        )

    def opened(self) -> Callable[[object], None]:
        """A gRPC call begins; what is returned is to be called, with anything, once its last byte is sent."""
        number = next(self._numbers)
        self._open.add(number)
        return lambda _: self._open.discard(number)

    async def until_sent(self, limit_s: float) -> None:
        """Until the answers to all calls that are open now are sent, at most `limit_s`; later ones do not count."""
        loop = asyncio.get_running_loop()
        give_up_at = loop.time() + limit_s
        open_now = set(self._open)
        while open_now & self._open and loop.time() < give_up_at:  # noqa: ASYNC110 - no event for each call is worth it
            await asyncio.sleep(_LOOK_AGAIN_S)

    def of_message(self, stream: Call) -> Call:
        """A message that has just come in on a stream, as a request of its own.

        Unauthenticated where the key that opened the stream has been taken back.
        """
        if self._door is not None:
            self._door.check_still(stream.caller, Right.INFER)
        now = asyncio.get_running_loop().time()
        return stream._replace(received_at=now, deadline=min(stream.deadline, now + self.default_timeout_s))

    def observe(self, method: str, call: Call) -> Observation:
        """One request that is counted under `method`."""
        return Observation(self._metrics, method, call)


@functools.lru_cache(maxsize=4096)  # asked for with each request, and a connection has many
def caller_at(peer: str) -> str:
    """The address in `peer`, which is one, or gRPC's form of one with its port (ipv4:192.0.2.1:50000).

    An IPv4 address is the same whether or not it came over an IPv6 socket. What is no address stays as it is.
    """
    return _address(peer.rpartition(":")[0] if peer.startswith(("ipv4:", "ipv6:")) else peer)


def _address(text: str) -> str:
    bare = urllib.parse.unquote(text.removeprefix("ipv4:").removeprefix("ipv6:")).strip("[]").partition("%")[0]
    try:
        address = ipaddress.ip_address(bare)
    except ValueError:
        return text[:_MOST_HEADER_CHARACTERS]
    return str(getattr(address, "ipv4_mapped", None) or address)


def _header(value: object) -> str:
    return value[:_MOST_HEADER_CHARACTERS] if isinstance(value, str) else ""
