"""How long a server takes until it serves, and what it holds in memory afterwards."""

import statistics
from collections.abc import Iterable

from ml_inference_server.benchmark.report import tables
from ml_inference_server.benchmark.result.document import MeasuredServer, Memory, Start

_MIB = 1 << 20
NOTE = (
    "*ready*: seconds from the start of the server's process until it served, the median of its starts; a start that"
    " *filled the cache* also made what later starts find there: exports, INT8 weights, compiled code. *memory*: of all"
    " processes of the server, at rest after the load, without GPU memory; in PSS, shared pages count once, in RSS once"
    " for each process. *highest RSS*: the sum of what each process held at most, at its start or later."
)


def ready(server: MeasuredServer | None) -> str:
    """With what it needs in the cache; where no start found it there, as it was, and the cell says so."""
    starts = server.starts if server else []
    found, filled = (_seconds(start for start in starts if start.filled_cache is did) for did in (False, True))
    return f"{filled} (filled the cache)" if found == "-" != filled else found


def memory(server: MeasuredServer | None) -> str:
    known = _memories(server.starts if server else [])
    if not known:
        return "-"
    pss = [one.pss_bytes for one in known if one.pss_bytes is not None]
    if len(pss) == len(known):
        return f"{_mib(pss)} PSS"
    return f"{_mib([one.rss_bytes for one in known])} RSS"


def table(servers: Iterable[tuple[str, MeasuredServer]]) -> str:
    """A line for each server under its name; "" if the benchmark has started none of them."""
    lines = []
    for name, server in servers:
        starts, known = server.starts, _memories(server.starts)
        peaks = [one.peak_rss_bytes for one in known if one.peak_rss_bytes is not None]
        lines.append(
            [
                tables.plain(name) or "-",
                str(len(starts)) if starts else "-",
                _seconds(start for start in starts if not start.filled_cache),
                _seconds(start for start in starts if start.filled_cache),
                memory(server),
                _mib(peaks) if peaks else "-",
                str(max(one.processes for one in known)) if known else "-",
            ]
        )
    header = ["server", "starts", "ready s", "ready s, filled the cache", "memory MiB", "highest RSS MiB", "processes"]
    return tables.grid(header, lines) if any(line[1] != "-" for line in lines) else ""


def _seconds(starts: Iterable[Start]) -> str:
    values = [start.ready_s for start in starts]
    return f"{statistics.median(values):.1f}" if values else "-"


def _memories(starts: Iterable[Start]) -> list[Memory]:
    return [start.memory for start in starts if start.memory]


def _mib(values: Iterable[int]) -> str:
    return f"{statistics.median(values) / _MIB:.0f}"
