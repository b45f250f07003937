"""Row K2: whether the soak sees a server that keeps some bytes of each call that was cancelled."""

import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests.scoreboard.leaky_server import LEAK_BYTES
from tests.scoreboard.real_server import SERVER
from tests.scoreboard.row import Figure, Scope
from tests.scoreboard.soak import CANCELLED, Soaked, limit_mb_per_100k, soak

LEAKY = "tests.scoreboard.leaky_server"
# Calls, and bytes of each cancelled one. A short run tells no small leak, as allocators take memory in steps.
_FULL, _QUICK = (200_000, 1024), (6_000, 64 * 1024)


async def run(scope: Scope) -> Figure:
    """The same soak of the server as it is, and of the one that leaks; only the second may be found out."""
    calls, leak_bytes = _QUICK if scope.is_quick else _FULL
    leak = {LEAK_BYTES: str(leak_bytes)}
    found: list[Soaked] = []
    for number, module in enumerate((SERVER, LEAKY)):

        def tell(done: int, of: int, before: int = number * calls) -> None:
            scope.tell(before + done, 2 * of)

        with tempfile.TemporaryDirectory() as folder:
            soaked = soak(Path(folder), CANCELLED, calls, seed=scope.seed, module=module, variables=leak, tell=tell)
            found.append(await soaked)
    return leak_figure(found, leak_bytes)


def leak_figure(found: Sequence[Soaked], leak_bytes: int) -> Figure:
    """Of (the server as it is, the one that leaks). Its leak has to be seen in the slope, and in nothing else."""
    sound, leaky = found
    limit = limit_mb_per_100k(leaky.calls)
    planted = 0.1 * leak_bytes * leaky.cancelled_in_handler / leaky.calls
    notes = [f"without the leak: {breach}" for breach in sound.breaches()]
    if planted <= limit:
        notes.append(f"only {planted:.1f} MB per 100,000 calls were leaked, and {limit:.1f} are the limit of this run")
    is_seen = leaky.slope >= limit
    return Figure(
        text=f"{'yes' if is_seen else 'no'}: {leaky.slope:+.1f} MB per 100,000 calls, {sound.slope:+.1f} without it",
        passed=is_seen and not notes,
        note="; ".join(notes),
        details={
            "leaked of each cancelled call, bytes": leak_bytes,
            "calls of each run": leaky.calls,
            "leaked, MB per 100,000 calls": round(planted, 2),
            "seen, MB per 100,000 calls": round(leaky.slope, 2),
            "without the leak, MB per 100,000 calls": round(sound.slope, 2),
            "limit, MB per 100,000 calls": round(limit, 2),
        },
    )
