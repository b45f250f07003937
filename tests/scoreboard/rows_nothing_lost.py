"""Z: nothing is lost. Chaos with a ledger, a soak, the truth of the metrics, batches, and honest benchmarks."""

import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests.scoreboard.row import Figure, Row, Scope
from tests.scoreboard.soak import BOTH, CANCELLED, FAILING, OK, Mix, Soaked, limit_mb_per_100k, soak

_MOST_TOLD = 5
# The mix that has all faults at once in full; the others long enough to tell a slope of 1 MB per 100,000 calls or two.
SOAKS: tuple[tuple[Mix, int], ...] = ((BOTH, 1_000_000), (OK, 400_000), (CANCELLED, 400_000), (FAILING, 400_000))
QUICK_SOAKS: tuple[tuple[Mix, int], ...] = ((BOTH, 8_000),)


async def _soaks(scope: Scope) -> Figure:
    asked = QUICK_SOAKS if scope.is_quick else SOAKS
    total, over = sum(calls for _, calls in asked), 0
    found: list[Soaked] = []
    for number, (mix, calls) in enumerate(asked):

        def tell(done: int, of: int, before: int = over) -> None:
            scope.tell(before + done, total)

        with tempfile.TemporaryDirectory() as folder:
            found.append(await soak(Path(folder), mix, calls, seed=scope.seed + 10 * number, tell=tell))
        over += calls
    return soak_figure(found)


def soak_figure(found: Sequence[Soaked]) -> Figure:
    """The steepest slope of them, and whether all held what they held before."""
    breaches = [f"{soaked.mix.name}: {breach}" for soaked in found for breach in soaked.breaches()]
    worst = max(found, key=lambda soaked: soaked.slope)
    calls = sum(soaked.calls for soaked in found)
    is_base = not any(soaked.after.beyond(soaked.before) for soaked in found)
    notes = [*breaches[:_MOST_TOLD]]
    for soaked in found:
        if (limit := limit_mb_per_100k(soaked.calls)) > 1:
            notes.append(
                f"{soaked.mix.name}: {soaked.calls:,} calls can tell no slope below {limit:.3g} MB per 100,000"
            )
    details: dict[str, float | int | str] = {"calls": calls, "breaches": len(breaches)}
    for soaked in found:
        name = soaked.mix.name
        details |= {
            f"{name}: calls": soaked.calls,
            f"{name}: calls cancelled": soaked.cancelled,
            f"{name}: calls cancelled in the handler": soaked.cancelled_in_handler,
            f"{name}: calls failed": soaked.failed,
            f"{name}: MB per 100,000 calls": round(soaked.slope, 3),
            f"{name}: before": str(soaked.before),
            f"{name}: after": str(soaked.after),
        }
    rest = "descriptors, threads and tasks at the base" if is_base else "not at the base"
    text = f"{worst.slope:+.2f} MB per 100,000 at most in {calls:,} calls; {rest}"
    return Figure(text=text, passed=not breaches, note="; ".join(notes), details=details)


ROWS: tuple[Row, ...] = (
    Row(
        key="Z2",
        title="Soak: all ok, 30 % cancelled, 30 % failing, and both",
        pass_line="memory grows by < 1 MB per 100,000 calls; descriptors, threads, tasks at the base",
        run=_soaks,
    ),
)
