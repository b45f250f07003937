"""Texts to tokens and back, for callers who ask for just that: checked, admitted and timed as all other work."""

import asyncio
from collections.abc import Callable, Sequence
from typing import TypeVar

from ml_inference_server.backends.base import Token
from ml_inference_server.server.call import Call
from ml_inference_server.server.options import Overflow
from ml_inference_server.server.ready_model import ReadyModel
from ml_inference_server.server.roles import check_prompt
from ml_inference_server.server.texts import Texts, embedding_job
from ml_inference_server.utils.config import ServerSettings
from ml_inference_server.utils.errors import DeadlinePassed, InvalidRequest

T = TypeVar("T")

# Up to so many tokens are handled at once; handing them to a thread takes longer.
_INLINE_TOKENS = 512


class TokenService:
    """Of one loaded model. Raises any ServiceError."""

    def __init__(self, model: ReadyModel, limits: ServerSettings) -> None:
        self._tokenizer = model.described.tokenizer
        self._admission = model.admission
        self._texts = Texts(self._tokenizer, limits, is_cross_encoder=model.info.task == "cross_encoder")

    async def tokenize(
        self, texts: Sequence[str], call: Call, *, prompt_name: str | None = None, special: bool = True
    ) -> list[list[Token]]:
        """The tokens of each text, none of them cut. special: with those that the model puts round a text."""
        self._texts.check_count("texts", len(texts))
        check_prompt(prompt_name, self._tokenizer)
        sizes = self._texts.sizes([embedding_job(f"texts[{i}]", text, prompt_name) for i, text in enumerate(texts)])
        tokens = self._texts.estimate_tokens(sizes, Overflow.CHUNK)
        return await self._run(
            tokens, call, lambda: [self._tokenizer.tokens(text, prompt_name, special) for text in texts]
        )

    async def decode(self, rows: Sequence[Sequence[int]], call: Call, *, skip_special: bool = True) -> list[str]:
        """The text of each list of token ids."""
        self._texts.check_count("ids", len(rows))

        def decoded() -> list[str]:
            out = []
            for place, ids in enumerate(rows):
                try:
                    out.append(self._tokenizer.decode(ids, skip_special))
                except ValueError as error:
                    field = f"ids[{place}]"
                    raise InvalidRequest(f"{field}: {error}", violations=[(field, str(error))]) from None
            return out

        return await self._run(sum(map(len, rows)), call, decoded)

    async def _run(self, tokens: int, call: Call, work: Callable[[], T]) -> T:
        with await self._admission.enter(tokens, call.deadline, caller=call.caller):
            if tokens <= _INLINE_TOKENS:
                return work()
            try:
                async with asyncio.timeout_at(call.deadline):
                    return await asyncio.to_thread(work)
            except TimeoutError:
                raise DeadlinePassed("the deadline passed while the texts were tokenised or decoded") from None
