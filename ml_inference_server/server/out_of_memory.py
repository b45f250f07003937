"""Engines that run out of memory: what they say then, and how large batches may be from then on."""

from ml_inference_server.server.engine_process import EngineDied

# Of PyTorch on CUDA and on the CPU, of ONNX Runtime, of OpenVINO, of C++, and of Python; lower case.
_SAID = (
    "out of memory", "outofmemory", "can't allocate memory", "cannot allocate memory", "failed to allocate memory",
    "not enough memory", "available memory of", "bad_alloc", "bad allocation", "memoryerror",
)  # fmt: skip
_LEAST_TOKENS = 64
_BATCHES_UNTIL_MORE = 500


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether the engine said so; one in a process of its own says it in words only."""
    said = f"{type(error).__name__}: {error}".lower()
    return isinstance(error, MemoryError) or any(each in said for each in _SAID)


def may_have_run_out(error: BaseException) -> bool:
    """Whether it said so, or was killed as the kernel does it."""
    return ran_out_of_memory(error) or (isinstance(error, EngineDied) and error.is_killed)


class BatchRoom:
    """The most padded tokens in one batch: as configured, and less where memory did not suffice for as many."""

    def __init__(self, most_tokens: int) -> None:
        self._most_tokens = most_tokens
        self._sound = 0
        self.tokens = most_tokens

    def change_most(self, tokens: int) -> None:
        """The most that is configured from now on. What did not fit into memory is not tried again for that."""
        fits = self.tokens == self._most_tokens
        self._most_tokens = tokens
        self.tokens = tokens if fits else min(self.tokens, tokens)

    def ran_out(self, tokens: int) -> None:
        """A batch of several texts with so many padded tokens found too little memory."""
        self._sound = 0
        self.tokens = min(self.tokens, max(_LEAST_TOKENS, tokens // 2))

    def succeeded(self) -> None:
        """A batch did. After many of them, twice as much is tried again."""
        self._sound += 1
        if self._sound >= _BATCHES_UNTIL_MORE:
            self._sound = 0
            self.tokens = min(self._most_tokens, 2 * self.tokens)
