"""What each caller holds of the queue, and what follows: who still comes in, as what, and after how long. Pure."""

import math
from dataclasses import dataclass

from ml_inference_server.server.options import Priority

# Beyond its bounds the queue takes so much more, of callers who hold little of it: one who fills it keeps nobody out.
_RESERVE = 4  # a fourth


@dataclass(slots=True)
class Held:
    """What one caller holds. requests: not answered. The rest are tokens that no batch has taken yet.

    unnamed: those of `interactive` whose request named no priority. overflow: those of `bulk` that are bulk only
    because he had a batch and more of these in line.
    """

    requests: int = 0
    interactive: int = 0
    unnamed: int = 0
    bulk: int = 0
    overflow: int = 0

    @property
    def tokens(self) -> int:
        return self.interactive + self.bulk


_NOTHING = Held()


class QueueShares:
    """Bounds of the queue, and who holds how much of it. batch_tokens, batch_texts: of one batch, at most."""

    def __init__(self, *, max_requests: int, max_tokens: int, batch_tokens: int, batch_texts: int) -> None:
        self.change_bounds(
            max_requests=max_requests, max_tokens=max_tokens, batch_tokens=batch_tokens, batch_texts=batch_texts
        )
        self._held: dict[str, Held] = {}
        self.requests = self.interactive = self.bulk = self.texts = 0

    @property
    def tokens(self) -> int:
        """That wait, or will."""
        return self.interactive + self.bulk

    def change_bounds(self, *, max_requests: int, max_tokens: int, batch_tokens: int, batch_texts: int) -> None:
        """For requests from now on; whoever is in stays."""
        self._max_requests, self._max_tokens = max_requests, max_tokens
        self._batch_tokens, self._batch_texts = batch_tokens, batch_texts

    def of(self, caller: str) -> Held:
        """What he holds now."""
        return self._held.get(caller, _NOTHING)

    def priority(self, caller: str, tokens: int, texts: int, asked: Priority | None) -> tuple[Priority, bool]:
        """As what a request is served, and whether that is for what its caller has in line already.

        asked: by the request; None: bulk where it has more than a batch of such texts holds, or where its caller would
        have that in line, of requests that named none either. The latter goes on until nothing of that kind waits: his
        requests keep their order.
        """
        if asked is not None:
            return asked, False
        batch_tokens = self._batch_of(tokens, texts)
        if tokens > batch_tokens:
            return Priority.BULK, False
        held = self.of(caller)
        is_overflow = held.overflow > 0 or held.unnamed + tokens > batch_tokens
        return (Priority.BULK if is_overflow else Priority.INTERACTIVE), is_overflow

    def full(self, caller: str, tokens: int) -> str:
        """Which bound a request of that caller would break; empty if it may come in."""
        if self.requests < self._max_requests and self.tokens + tokens <= self._max_tokens:
            return ""
        held = self.of(caller)
        callers = len(self._held) + (held is _NOTHING)
        if _is_full(self.requests, held.requests, 1, self._max_requests, callers):
            return f"{self._max_requests} requests"
        if _is_full(self.tokens, held.tokens, tokens, self._max_tokens, callers):
            return f"{self._max_tokens} tokens"
        return ""

    def beyond(self, caller: str, tokens: int, share: float) -> int:
        """How many tokens of his have to be done before a request keeps to that share of the queue; 0: it does.

        Where he has too many requests, those of one of them.
        """
        held = self.of(caller)
        if held.requests and held.requests + 1 > share * self._max_requests:
            return max(1, held.tokens // held.requests)
        return max(0, math.ceil(held.tokens + tokens - share * self._max_tokens))

    def tokens_ahead(self, caller: str, priority: Priority) -> float:
        """What is computed before a request that comes now, at most: of its own caller all that is in line.

        Others get a turn each for every turn of his, and one before the first.
        """
        own = self.of(caller)
        if self.requests == own.requests:
            return own.interactive if priority is Priority.INTERACTIVE else own.tokens
        batch_tokens = self._batch_of(self.tokens, self.texts)
        if priority is Priority.INTERACTIVE:
            most = own.interactive + batch_tokens
            others = sum(min(each.interactive, most) for each in self._held.values() if each is not own)
            return own.interactive + others
        most = own.bulk + batch_tokens
        return (
            self.interactive + own.bulk + sum(min(each.bulk, most) for each in self._held.values() if each is not own)
        )

    def enter(self, caller: str) -> Held:
        """One more request; what its caller holds now, which changes from then on."""
        if (held := self._held.get(caller)) is None:
            held = self._held[caller] = Held()
        held.requests += 1
        self.requests += 1
        return held

    def change(self, held: Held, tokens: int, texts: int, *, is_bulk: bool, is_overflow: bool, is_named: bool) -> None:
        """So many tokens and texts more of a request that is in; less where they are negative."""
        self.texts += texts
        if is_bulk:
            held.bulk += tokens
            self.bulk += tokens
            held.overflow += tokens * is_overflow
        else:
            held.interactive += tokens
            held.unnamed += tokens * (not is_named)
            self.interactive += tokens

    def leave(self, caller: str) -> None:
        """One request less; its tokens are given back."""
        held = self._held[caller]
        held.requests -= 1
        self.requests -= 1
        if not held.requests:
            del self._held[caller]

    def _batch_of(self, tokens: int, texts: int) -> float:
        """Tokens of a batch at most, where `texts` texts have `tokens`: short ones fill it by their number."""
        return min(self._batch_tokens, self._batch_texts * tokens / texts) if texts else self._batch_tokens


def _is_full(total: int, own: int, more: int, bound: int, callers: int) -> bool:
    if total + more <= bound:
        return False
    reserve = bound // _RESERVE
    return total + more > bound + reserve or own + more > reserve // callers
