"""Row K3: what can be asked of any server over HTTP, asked of ours and of another."""

import tempfile
from pathlib import Path

from tests.scoreboard.peer.contender import Contender, ours, peer
from tests.scoreboard.peer.trials import FULL, QUICK, Score, go_through
from tests.scoreboard.row import Figure, Scope

_MOST_EXAMPLES = 20


async def run(scope: Scope) -> Figure:
    """It passes if ours has no fault; how the other fares is reported, and is no condition."""
    contenders = (ours(), peer())
    extent = QUICK if scope.is_quick else FULL
    scores: list[Score] = []
    for number, contender in enumerate(contenders):
        scope.tell(number, len(contenders))
        with tempfile.TemporaryDirectory() as folder:
            scores.append(await go_through(contender, Path(folder), extent, scope.seed))
    return compared(contenders, scores)


def compared(contenders: tuple[Contender, Contender], scores: list[Score]) -> Figure:
    """Every count of both, side by side."""
    own, other = scores
    names = [contender.name for contender in contenders]
    counts = [f"{what} {own.counts[what]} / {other.counts[what]}" for what in own.counts]
    details: dict[str, float | int | str] = {}
    for contender, score in zip(contenders, scores, strict=True):
        details[f"{contender.name}: command"] = contender.shown
        details |= {f"{contender.name}: {what}": value for what, value in (score.counts | score.figures).items()}
        details |= {f"{contender.name}: example {n}": each for n, each in enumerate(score.examples[:_MOST_EXAMPLES])}
    faults = [what for what, count in own.counts.items() if count]
    return Figure(
        text=f"{names[0]} / {names[1]}: {'; '.join(counts)}",
        passed=not faults,
        note=f"ours: {'; '.join(faults)}" if faults else "",
        details=details,
    )
