"""The rows of bad inputs: X1 to X7."""

import asyncio
from collections.abc import Callable

from tests.scoreboard.by_tests import TestCount, run_pytest
from tests.scoreboard.inputs.attacks import attack
from tests.scoreboard.inputs.canaries import put_in_and_look
from tests.scoreboard.inputs.guided_runs import run_all
from tests.scoreboard.inputs.tried import all_cases, try_all
from tests.scoreboard.row import Figure, Row, Scope

# The long form, in factors of tests/fuzz/budget.py: of 20,000 changed messages and bodies, and of 2,500 requests.
_LONG_CHANGES, _LONG_REQUESTS = 10.0, 10.0
_SHORT = 0.1
_MOST_QUICK_BYTES = 200_000
_LEAST_INPUTS, _LEAST_EXAMPLES, _LEAST_EXECUTIONS = 300, 200_000, 10_000_000
# Of each target of coverage-guided fuzzing; two run at once.
_QUICK_GUIDED_S, _LONG_GUIDED_S = 3, 600


async def nasty_inputs(scope: Scope) -> Figure:
    """X1."""
    cases = all_cases()
    if scope.is_quick:
        cases = [case for case in cases if case.size <= _MOST_QUICK_BYTES]
    tally = await try_all(cases, scope.tell)
    kinds = {kind: tally.count(kind) for kind in ("UNKNOWN", "500", "hang", "crash", "wrong", "after", "log")}
    told = ", ".join(f"{kinds[kind]} {kind}" for kind in ("UNKNOWN", "500", "hang", "crash"))
    others = kinds["wrong"] + kinds["after"] + kinds["log"]
    return Figure(
        text=f"{len(tally.inputs)} inputs; {told}; {others} answered otherwise than written down",
        passed=not tally.faults and len(tally.inputs) >= _LEAST_INPUTS,
        note="; ".join(f"{kind}: {what}" for kind, what in tally.faults[:3]),
        details={
            "inputs": len(tally.inputs),
            "grpc_calls": tally.sent["GrpcCase"],
            "http_requests": tally.sent["HttpCase"],
            "slowest_ms": round(tally.slowest_ms),
            "slowest": tally.slowest,
            **{f"faults_{kind}": count for kind, count in kinds.items()},
        },
    )


async def _fuzzed(scope: Scope, factor: float, *selectors: str, tell: Callable[[int, int], None]) -> TestCount:
    """Tests under Hypothesis; whoever passes the same seed gets the same examples."""
    return await run_pytest(
        selectors,
        tell=tell,
        environment={"FUZZ_FACTOR": f"{factor:g}"},
        extra=[f"--hypothesis-seed={scope.seed}", "--timeout=0"],
    )


async def changed_messages(scope: Scope) -> Figure:
    """X2: over both protocols at once, each in a process of its own."""
    factor = _SHORT if scope.is_quick else _LONG_CHANGES
    both = await asyncio.gather(
        _fuzzed(scope, factor, "tests/fuzz/test_grpc_properties.py::test_changed_messages", tell=lambda *_: None),
        _fuzzed(scope, factor, "tests/fuzz/test_http_properties.py::test_changed_bodies", tell=scope.tell),
    )
    over_grpc, over_http = (count.recorded.get("requests", 0) for count in both)
    failures = [failure for count in both for failure in count.failures]
    skipped = sum(count.skipped for count in both)
    enough = scope.is_quick or over_grpc + over_http >= _LEAST_EXAMPLES
    return Figure(
        text=f"{over_grpc + over_http:,} examples; {len(failures)} violations",
        passed=not failures and not skipped and over_grpc > 0 < over_http and enough,
        note="; ".join(failures),
        details={"grpc_examples": over_grpc, "http_examples": over_http, "violations": len(failures)},
    )


async def guided(scope: Scope) -> Figure:
    """X3: for a time, as the speed of targets differs a hundredfold. NotRun where atheris is not installed."""
    seconds = _QUICK_GUIDED_S if scope.is_quick else _LONG_GUIDED_S
    runs = await run_all(seconds, scope.seed, scope.tell)
    executions = sum(run.executions for run in runs)
    crashes = [run.crash for run in runs if run.crash]
    is_enough = scope.is_quick or executions >= _LEAST_EXECUTIONS
    passed: bool | None = not crashes and all(run.executions for run in runs)
    note = " ".join(crashes)
    if passed and not is_enough:
        passed, note = None, f"this machine did fewer than {_LEAST_EXECUTIONS:,} in {seconds} s for each target"
    return Figure(
        text=f"{executions:,} executions; {len(crashes)} new crashes",
        passed=passed,
        note=note,
        details={
            "seconds_for_each": seconds,
            **{f"{run.target}_executions": run.executions for run in runs},
            **{f"{run.target}_features": run.features for run in runs},
        },
    )


async def random_requests(scope: Scope) -> Figure:
    """X4."""
    factor = _SHORT if scope.is_quick else _LONG_REQUESTS
    selectors = ("tests/fuzz/test_http_schema.py", "tests/fuzz/test_http_raw_bytes.py")
    both = await asyncio.gather(
        *(_fuzzed(scope, factor, selector, tell=lambda *_: None) for selector in selectors),
    )
    by_schema, raw = (count.recorded.get("requests", 0) for count in both)
    errors = sum(count.recorded.get("server_errors", 0) for count in both)
    failures = [failure for count in both for failure in count.failures]
    skipped = sum(count.skipped for count in both)
    return Figure(
        text=f"{by_schema:,} requests by the description, {raw:,} of damaged bytes; {errors} of 5xx",
        passed=not failures and not errors and not skipped and by_schema > 0 < raw,
        note="; ".join(failures),
        details={"described_requests": by_schema, "damaged_requests": raw, "answers_5xx": errors},
    )


async def auth_matrix(scope: Scope) -> Figure:
    """X5: both scopes are the same, as a matrix has no parts. A test ends at its first wrong cell."""
    matrices = ("tests/integration/test_door_matrix.py", "tests/integration/test_door_matrix_tls.py")
    count = await run_pytest(matrices, tell=scope.tell)
    cells = count.recorded.get("cells", 0)
    return Figure(
        text=f"{cells:,} cells; {count.failed} wrong",
        passed=not count.failed and not count.skipped and cells > 0,
        note="; ".join(count.failures),
        details={"cells": cells, "wrong": count.failed, "tests": count.tried},
    )


async def payloads(scope: Scope) -> Figure:
    """X6: both scopes are the same."""
    found = await attack(scope.tell)
    return Figure(
        text=f"{found.payloads.total():,} payloads; {len(found.through)} passed through",
        passed=not found.through,
        note="; ".join(found.through[:3]),
        details={
            **{f"{kind}_payloads": count for kind, count in found.payloads.items()},
            "through": len(found.through),
        },
    )


async def canaries(scope: Scope) -> Figure:
    """X7: a log in either form, and an engine in threads or in a process of its own, whose errors come over a pipe."""
    kinds: list[tuple[tuple[str, ...], tuple[str, ...]]] = [((), ())]
    if not scope.is_quick:
        kinds.append((("model.process_per_stream=true",), ("--log-format", "json")))
    looked = []
    for place, (settings, flags) in enumerate(kinds):
        looked.append(await put_in_and_look(settings, *flags))
        scope.tell(place + 1, len(kinds))
    found = [sentence for each in looked for sentence in each.found()]
    put_in = sum(len(each.words) + len(each.secrets) for each in looked)
    outputs = sum(len(each.outputs) for each in looked)
    return Figure(
        text=f"{put_in} canaries in {outputs} outputs; {len(found)} found",
        passed=not found,
        note="; ".join(found[:3]),
        details={
            "canaries": put_in,
            "outputs": outputs,
            "searched_bytes": sum(each.searched_bytes for each in looked),
            "found": len(found),
        },
    )


ROWS: tuple[Row, ...] = (
    Row(
        key="X1",
        title="Bad requests written by hand, over gRPC and HTTP",
        pass_line=f">= {_LEAST_INPUTS} tried; no UNKNOWN, 500, hang or crash",
        run=nasty_inputs,
    ),
    Row(
        key="X2",
        title="Random messages and random bytes",
        pass_line=f">= {_LEAST_EXAMPLES:,} examples; 0 violations",
        run=changed_messages,
    ),
    Row(
        key="X3",
        title="Coverage-guided fuzzing of the parsers",
        pass_line=f">= {_LEAST_EXECUTIONS:,} executions; 0 new crashes",
        run=guided,
    ),
    Row(
        key="X4",
        title="Random requests by the OpenAPI description, and random bytes over HTTP",
        pass_line="no 5xx",
        run=random_requests,
    ),
    Row(key="X5", title="Every method and route with every kind of credential", pass_line="0 wrong", run=auth_matrix),
    Row(
        key="X6",
        title="Path traversal, script, Host, CORS and smuggling payloads",
        pass_line="0 passed through",
        run=payloads,
    ),
    Row(key="X7", title="Secrets and texts in all that the server puts out", pass_line="0 found", run=canaries),
)
