"""The benchmark measures on a clock that nobody sets: the wall clock only dates its results."""

import ast
from pathlib import Path

import ml_inference_server

BENCHMARK = Path(ml_inference_server.__file__).parent / "benchmark"
WALL_CLOCK = {"time", "time_ns", "now", "utcnow", "today", "localtime", "gmtime", "strftime", "ctime"}
MODULES = {"time", "datetime", "date"}


def looks(source: str) -> list[int]:
    """Lines that look at the wall clock, by whatever of its names."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if node.value.id in MODULES and node.attr in WALL_CLOCK:
                found.append(node.lineno)
        elif isinstance(node, ast.ImportFrom) and node.module == "time":
            found += [node.lineno for alias in node.names if alias.name in WALL_CLOCK]
    return found


def test_only_the_date_of_a_result_is_of_the_wall_clock() -> None:
    places = {path: looks(path.read_text(encoding="utf-8")) for path in sorted(BENCHMARK.rglob("*.py"))}
    found = {path.relative_to(BENCHMARK).as_posix(): len(lines) for path, lines in places.items() if lines}
    assert found == {"result/files.py": 1}


def test_a_look_is_found() -> None:
    source = "import time\nfrom time import time_ns\nfrom datetime import datetime\ntime.time()\ndatetime.now()\n"
    assert looks(source) == [2, 4, 5]
    assert looks("import time\ntime.monotonic()\ntime.perf_counter()\n") == []
