"""Z: nothing is lost. Chaos with a ledger, a soak, the truth of the metrics, batches, and honest benchmarks."""

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests.scoreboard.bare_grpc import BareGrpc, bare_grpc
from tests.scoreboard.batch_independence import PATHS, Independence, independence
from tests.scoreboard.by_tests import tests_pass
from tests.scoreboard.chaos import Chaos, Extent, chaos
from tests.scoreboard.honesty import CHECKS
from tests.scoreboard.metrics_truth import Ledger, metrics_truth
from tests.scoreboard.row import Figure, Row, Scope
from tests.scoreboard.soak import BOTH, CANCELLED, FAILING, OK, Mix, Soaked, limit_mb_per_100k, soak

_MOST_TOLD = 5
# The mix that has all faults at once in full; the others long enough to tell a slope of 1 MB per 100,000 calls or two.
SOAKS: tuple[tuple[Mix, int], ...] = ((BOTH, 1_000_000), (OK, 400_000), (CANCELLED, 400_000), (FAILING, 400_000))
BARE_CALLS = 300_000
QUICK_SOAKS: tuple[tuple[Mix, int], ...] = ((BOTH, 8_000),)

CHAOS = Extent(calls=500_000, faults=1_000, segment_calls=20_000, most_s=3_300)
QUICK_CHAOS = Extent(calls=1_200, faults=4, segment_calls=300, most_s=90)
TRUTH_REQUESTS, QUICK_TRUTH_REQUESTS = 20_000, 1_500
# Of the figures that a load of all protocols has: without them it was another load.
_LEAST_KINDS = 25
LEAST_COSINE = 0.9999


async def _chaos(scope: Scope) -> Figure:
    extent = QUICK_CHAOS if scope.is_quick else CHAOS
    with tempfile.TemporaryDirectory() as folder:
        found = await chaos(Path(folder), extent, seed=str(scope.seed), tell=scope.tell)
    return chaos_figure(found, extent)


def chaos_figure(found: Chaos, extent: Extent) -> Figure:
    """Calls, faults and breaches; each breach is printed with the seed and how to try it again."""
    again = (
        f"python -m tests.scoreboard.chaos --seed {found.seed} --calls {extent.calls} --faults {extent.faults} "
        f"--segment-calls {extent.segment_calls}"
    )
    for breach in found.breaches:
        print(f"seed {found.seed}: {breach}; again: {again}", file=sys.stderr)
    calls, faults, breaches = found.calls.total(), found.faults.total(), len(found.breaches)
    notes = [str(breach) for breach in found.breaches[:_MOST_TOLD]]
    if breaches:
        notes.append(f"again: {again}")
    if calls < extent.calls or faults < extent.faults:
        notes.append(f"only {calls:,} of {extent.calls:,} calls and {faults:,} of {extent.faults:,} faults in time")
    by_code: dict[str, int] = {}
    for (_, code), count in found.calls.items():
        by_code[code] = by_code.get(code, 0) + count
    details: dict[str, float | int | str] = {
        "calls": calls,
        "faults": faults,
        "breaches": breaches,
        "seconds": round(found.seconds),
        "plain calls that a shared fault harmed": found.harmed,
        "engines started again": found.restarts,
        "rests at which the ledgers were compared": found.quiet_points,
        "scrapes": found.scrapes,
        **{f"calls that ended with {code}": count for code, count in sorted(by_code.items())},
        **{f"faults: {kind}": count for kind, count in sorted(found.faults.items())},
        **{f"breaches of {name}": count for name, count in sorted(found.broken.items())},
    }
    return Figure(
        text=f"{calls:,} calls, {faults:,} faults, {breaches} breaches",
        passed=_is_enough(found, extent),
        note="; ".join(notes),
        details=details,
    )


def _is_enough(found: Chaos, extent: Extent) -> bool | None:
    """None where nothing was broken, and the machine was too slow for all that was to be tried."""
    if found.breaches or not found.faults or not found.calls:
        return False
    return True if found.calls.total() >= extent.calls and found.faults.total() >= extent.faults else None


async def _metrics_truth(scope: Scope) -> Figure:
    requests = QUICK_TRUTH_REQUESTS if scope.is_quick else TRUTH_REQUESTS
    with tempfile.TemporaryDirectory() as folder:
        ledger, found = await metrics_truth(Path(folder), requests, scope.seed, scope.tell)
    return truth_figure(ledger, found)


def truth_figure(ledger: Ledger, found: Sequence[tuple[str, int]]) -> Figure:
    """The largest difference. found: where /metrics differs from the ledger, and by how much."""
    largest = max((abs(off) for _, off in found), default=0)
    kinds = len(ledger.requests)
    notes = [f"{series}: {off:+d}" for series, off in found[:_MOST_TOLD]] + ledger.wrong[:_MOST_TOLD]
    if kinds < _LEAST_KINDS:
        notes.append(f"only {kinds} kinds of ends, by method and code")
    details: dict[str, float | int | str] = {
        "requests": ledger.requests.total(),
        "methods and codes": kinds,
        "series that differ": len(found),
        **{f"{method} {code}": count for (method, code), count in sorted(ledger.requests.items())},
    }
    text = f"{largest} ({ledger.requests.total():,} requests of {kinds} methods and codes)"
    return Figure(text=text, passed=not notes, note="; ".join(notes), details=details)


async def _independence(scope: Scope) -> Figure:
    paths = {"PyTorch": PATHS["PyTorch"]} if scope.is_quick else PATHS
    texts, queries, rounds = (40, 4, 1) if scope.is_quick else (160, 10, 3)
    found: dict[str, Independence] = {}
    for name, compiled in paths.items():
        with tempfile.TemporaryDirectory() as folder:
            found[name] = await independence(
                Path(folder),
                compiled=compiled,
                texts=texts,
                queries=queries,
                rounds=rounds,
                seed=scope.seed,
                tell=scope.tell,
            )
    worst, swaps = min(each.cosine for each in found.values()), sum(each.swaps for each in found.values())
    notes = [f"{name}: {breach}" for name, each in found.items() for breach in each.breaches()]
    details: dict[str, float | int | str] = {}
    for name, each in found.items():
        details |= {
            f"{name}: vectors compared": each.compared,
            f"{name}: lowest cosine": each.cosine,
            f"{name}: pairs of documents": each.pairs,
            f"{name}: pairs that swapped": each.swaps,
            f"{name}: texts in a batch, mean": round(each.batch_texts[1], 2),
        }
    return Figure(
        text=f"{worst:.7f} at worst; {swaps} rank swaps",
        passed=worst >= LEAST_COSINE and not swaps and not notes,
        note="; ".join(notes),
        details=details,
    )


async def _honesty(scope: Scope) -> Figure:
    """Each check by the tests that hold it; in the quick form those that need no server process."""
    asked = {
        key: [test for test in tests if not scope.is_quick or test.startswith("tests/unit/")]
        for key, (_, tests) in CHECKS.items()
    }
    asked = {key: tests for key, tests in asked.items() if tests}
    count = await tests_pass(*(test for tests in asked.values() for test in tests), tell=scope.tell)
    broken = {
        key: found
        for key, tests in asked.items()
        if (found := [failure for failure in count.failures if any(_is_of(failure, test) for test in tests)])
    }
    notes = [f"{key}: {'; '.join(found)}" for key, found in broken.items()]
    if count.skipped:
        notes.append(f"{count.skipped} cases were skipped")
    is_held = not count.failed and not count.skipped
    if scope.is_quick:
        notes.append(f"the part of {', '.join(asked)} that needs no server")
    return Figure(
        text=f"{len(asked) - len(broken)} of {len(asked)} checks hold ({count.passed} cases)",
        passed=is_held,
        note="; ".join(notes),
        details={f"{key}: {CHECKS[key][0]}": ", ".join(tests) for key, tests in asked.items()},
    )


def _is_of(failure: str, test: str) -> bool:
    """failure: "module::name[case]: why", as pytest's report names them."""
    path, _, name = test.partition("::")
    module, _, rest = failure.partition("::")
    return module == path.removesuffix(".py").replace("/", ".") and rest.partition(": ")[0].partition("[")[0] == name


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
    bare = None if scope.is_quick else await bare_grpc(BARE_CALLS, BOTH.cancelled)
    return soak_figure(found, bare)


def soak_figure(found: Sequence[Soaked], bare: BareGrpc | None = None) -> Figure:
    """The steepest slope of them, and whether all held what they held before. bare: beside them, for the cause."""
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
    if bare is not None:
        details |= {
            "grpc.aio alone: calls": bare.calls,
            "grpc.aio alone: calls cancelled": bare.cancelled,
            "grpc.aio alone: MB per 100,000 calls": round(bare.mb_per_100k, 3),
        }
        notes.append(
            f"a server of grpc.aio alone, {bare.cancelled / bare.calls:.0%} cancelled: {bare.mb_per_100k:+.2f} MB per "
            f"100,000 (grpc issue 43360)"
        )
    rest = "descriptors, threads and tasks at the base" if is_base else "not at the base"
    text = f"{worst.slope:+.2f} MB per 100,000 at most in {calls:,} calls; {rest}"
    return Figure(text=text, passed=not breaches, note="; ".join(notes), details=details)


ROWS: tuple[Row, ...] = (
    Row(
        key="Z1",
        title="Chaos: random calls and faults of all kinds, with a ledger of every call",
        pass_line=">= 500,000 calls, >= 1,000 faults, 0 breaches of V1, V3 to V8, V10 to V14",
        run=_chaos,
    ),
    Row(
        key="Z2",
        title="Soak: all ok, 30 % cancelled, 30 % failing, and both",
        pass_line="memory grows by < 1 MB per 100,000 calls; descriptors, threads, tasks at the base",
        run=_soaks,
    ),
    Row(
        key="Z3",
        title="Metrics against the ledger of their callers, all protocols",
        pass_line="largest difference 0",
        run=_metrics_truth,
    ),
    Row(
        key="Z4",
        title="Vectors alone and in a batch, real model in FP32",
        pass_line=f"lowest cosine >= {LEAST_COSINE}, 0 rank swaps",
        run=_independence,
    ),
    Row(
        key="Z5",
        title="Honesty of the benchmark: E1 to E10, by the tests that hold them",
        pass_line="all checks hold",
        run=_honesty,
    ),
)
