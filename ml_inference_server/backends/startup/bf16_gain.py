"""Whether BF16 pays on this processor: some that have its instructions multiply no faster with them."""

import time

_SHAPE = (512, 384, 1536)  # rows, inputs, outputs: of a small encoder
_TIMES = 30


def bf16_gain() -> float:
    """How often a matrix product in BF16 fits into the time of one in FP32, in PyTorch. Takes a moment."""
    import torch

    rows, inputs, outputs = _SHAPE
    seconds: dict[torch.dtype, list[float]] = {torch.float32: [], torch.bfloat16: []}
    with torch.inference_mode():
        pairs = [
            (torch.nn.Linear(inputs, outputs, dtype=kind), torch.ones(rows, inputs, dtype=kind)) for kind in seconds
        ]
        for layer, given in pairs * _TIMES:
            started = time.perf_counter()
            layer(given)
            seconds[given.dtype].append(time.perf_counter() - started)
    # The shortest of each: what it takes while nothing else runs.
    single, half = map(min, seconds.values())
    return single / half
