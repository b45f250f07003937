"""F6: servers that are restarted under traffic, and connections that grow old under it."""

import tempfile
from collections import Counter
from pathlib import Path

from tests.faults.restarts import restarts
from tests.scoreboard.row import Figure, Row, Scope

RESTARTS, MAX_AGE_S = 200, 2
_QUICK = 2
_SERVERS = 2
SETTINGS = ("--set", f"server.max_connection_age_s={MAX_AGE_S}", "--set", "server.max_connection_age_grace_s=5")


async def _run(scope: Scope) -> Figure:
    count = _QUICK if scope.is_quick else RESTARTS
    done = 0

    def restarted() -> None:
        nonlocal done
        done += 1
        scope.tell(done, count)

    with tempfile.TemporaryDirectory() as folder:
        ends, exit_codes = await restarts(
            Path(folder), count=count, servers=_SERVERS, settings=SETTINGS, restarted=restarted
        )
    lost = ends.total() - ends["OK"]
    wrong = exit_codes - Counter({0: count + _SERVERS})
    return Figure(
        text=f"{lost} of {ends.total()} calls lost in {count} restarts",
        passed=not lost and not wrong and exit_codes[0] == count + _SERVERS,
        note=f"ends {dict(ends)}, exit codes {dict(exit_codes)}" if lost or wrong else "",
        details={"restarts": count, "calls": ends.total(), "max_connection_age_s": MAX_AGE_S},
    )


ROW = Row(
    key="F6",
    title=f"Two servers restarted in turn under traffic, 200 times; connections live {MAX_AGE_S} s",
    pass_line="0 calls lost, of clients that repeat what is UNAVAILABLE",
    run=_run,
)
