"""Rows G1, G2, G3 and G7: a server that is offered more than it can do."""

import numpy as np

from tests.scoreboard.callers import Job, Style
from tests.scoreboard.load_figures import LoadRun, Machine, arrivals, in_processes, latency_ms, percentile
from tests.scoreboard.load_kit import ENGINE, LoadServer, load_server, run_calm, tries_of
from tests.scoreboard.row import Figure, Row, Scope

_CURVE, _QUICK_CURVE = (0.5, 0.8, 1.0, 1.5, 2.0, 3.0, 5.0), (1.0, 3.0, 5.0)
_JUDGED = (3.0, 5.0)
_SLO_S = 0.5
_TIMEOUT_S = 2 * _SLO_S
_LEAST_OF_PEAK, _MOST_REFUSAL_MS = 0.9, 10.0
_MOST_HEALTH_MS, _MOST_LAG_MS = 50.0, 100.0
_PROBES_PER_S = 20
# Of the capacity: before, during and after the overload of G2.
_USUAL, _OVERLOAD = 0.7, 3.0
_MOST_RECOVERY_S, _MOST_AMPLIFICATION = 5.0, 1.1
_NORMAL = 1.5  # times the highest p99 of a second before the overload
_STEP_S = 0.5
_EMBED_REQUESTS = "mlis_requests_total{method=Embed,"


async def _capacity(server: LoadServer, scope: Scope) -> float:
    """Calls per second of callers who wait for their answers."""
    job = Job(target=server.address, name="capacity", style="once", callers=24, seconds=3.0)
    return (await run_calm(server, job, tries=tries_of(scope))).goodput


def _offered(server: LoadServer, name: str, due_s: list[float], style: Style = "once") -> list[Job]:
    """Two processes share what is due."""
    return [
        Job(target=server.address, name=f"{name}-{part}", style=style, due_s=own, timeout_s=_TIMEOUT_S)
        for part, own in enumerate(in_processes(due_s, 2))
    ]


async def overload_curve(scope: Scope) -> Figure:
    multiples, seconds = (_QUICK_CURVE, 4.0) if scope.is_quick else (_CURVE, 10.0)
    goodput: dict[float, float] = {}
    accepted_ms: dict[float, float] = {}
    refusal_ms: dict[float, float] = {}
    refused = broken = 0
    machine = Machine()
    async with load_server(*ENGINE.settings()) as server:
        capacity = await _capacity(server, scope)
        for number, multiple in enumerate(multiples):
            scope.tell(number, len(multiples))
            due_s = arrivals("poisson", multiple * capacity, seconds, scope.seed + number)
            run = await run_calm(server, *_offered(server, f"curve{multiple}", due_s), tries=tries_of(scope))
            goodput[multiple] = run.goodput
            accepted_ms[multiple] = percentile(_joined(run, "accepted"), 0.99)
            refusal_ms[multiple] = percentile(_joined(run, "refused"), 0.99)
            refused += sum(len(ran.refused) for ran in run.ran)
            broken += run.broken
            machine.saw(run)
    scope.tell(len(multiples), len(multiples))
    peak = max(capacity, *goodput.values())
    shares = {multiple: goodput[multiple] / peak for multiple in _JUDGED}
    late_ms = max(accepted_ms[multiple] for multiple in _JUDGED)
    refusals_ms = max(refusal_ms[multiple] for multiple in _JUDGED)
    passed, note = machine.judge(
        exact=refused > 0 and not broken,
        timed=min(shares.values()) >= _LEAST_OF_PEAK and late_ms <= 2e3 * _SLO_S and refusals_ms < _MOST_REFUSAL_MS,
    )
    told = ", ".join(f"{100 * share:.0f} % at {multiple:g}x" for multiple, share in shares.items())
    return Figure(
        text=f"goodput {told}; p99 accepted {late_ms:.0f} ms, refusals {refusals_ms:.1f} ms",
        passed=passed,
        note=note,
        details={
            "peak_per_s": peak,
            "capacity_per_s": capacity,
            "slo_ms": 1e3 * _SLO_S,
            "refused": refused,
            "broken": broken,
            **machine.details(),
            **{f"goodput_at_{multiple:g}x_of_peak": each / peak for multiple, each in goodput.items()},
            **{f"accepted_p99_ms_at_{multiple:g}x": each for multiple, each in accepted_ms.items()},
            **{f"refusal_p99_ms_at_{multiple:g}x": each for multiple, each in refusal_ms.items() if each == each},
        },
    )


def _joined(run: LoadRun, which: str) -> list[float]:
    """Latencies in ms of all jobs: of what was let in, from when it was due; or of refusals, from when it was sent."""
    found: list[float] = []
    for ran in run.ran:
        if which == "refused":
            found += latency_ms(ran.refused, since="sent_s").tolist()
        else:
            let_in = ran.records[~np.isin(ran.records["code"], ran.refused["code"])]
            found += latency_ms(let_in).tolist()
    return found


async def recovery(scope: Scope) -> Figure:
    before_s, during_s, after_s = (3.0, 4.0, 6.0) if scope.is_quick else (10.0, 10.0, 15.0)
    styles: tuple[Style, ...] = ("naive", "our client")
    details: dict[str, float] = {}
    exact: list[bool] = []
    recovered_s: dict[str, float] = {}
    amplification: dict[str, float] = {}
    machine = Machine()
    for number, style in enumerate(styles):
        scope.tell(number, len(styles))
        async with load_server(*ENGINE.settings()) as server:
            capacity = await _capacity(server, scope)
            due_s = [
                *arrivals("poisson", _USUAL * capacity, before_s, scope.seed),
                *arrivals("poisson", _OVERLOAD * capacity, during_s, scope.seed + 1, after_s=before_s),
                *arrivals("poisson", _USUAL * capacity, after_s, scope.seed + 2, after_s=before_s + during_s),
            ]
            run = await run_calm(server, *_offered(server, style.replace(" ", ""), due_s, style), tries=tries_of(scope))
            asked = sum(value for name, value in run.counted.items() if name.startswith(_EMBED_REQUESTS))
            recovered_s[style] = _seconds_to_normal(run, before_s, before_s + during_s)
            amplification[style] = asked / len(due_s)
            machine.saw(run)
            refused = sum(len(ran.refused) for ran in run.ran)
            exact += [refused > 0, run.broken == 0]
            name = style.replace(" ", "_")
            details[f"{name}_recovery_s"] = recovered_s[style]
            details[f"{name}_requests_per_call"] = amplification[style]
            details[f"{name}_refused"] = refused
    scope.tell(len(styles), len(styles))
    exact.append(amplification["our client"] < _MOST_AMPLIFICATION)
    passed, note = machine.judge(all(exact), max(recovered_s.values()) < _MOST_RECOVERY_S)
    told = ", ".join(f"{recovered_s[style]:.1f} s ({amplification[style]:.2f}x, {style})" for style in styles)
    return Figure(
        text=f"normal p99 after {told}",
        passed=passed,
        note=note,
        details={**details, **machine.details()},
    )


def _seconds_to_normal(run: LoadRun, overload_s: float, end_s: float) -> float:
    """From the end of the overload until every second has an p99 as before, and all its calls are answered."""
    records = np.concatenate([ran.records for ran in run.ran])
    ok = np.isin(records["code"], [0])
    late_ms = np.where(ok, latency_ms(records), np.inf)

    def p99_ms(from_s: float) -> float:
        return percentile(late_ms[(records["due_s"] >= from_s) & (records["due_s"] < from_s + 1)], 0.99)

    normal_ms = _NORMAL * max(p99_ms(second) for second in np.arange(1.0, overload_s - 1, _STEP_S))
    ends = np.arange(end_s, run.seconds - 1, _STEP_S)
    bad = [start for start in ends if not p99_ms(start) <= normal_ms]
    return float(bad[-1] + _STEP_S - end_s) if bad else 0.0


async def health_under_load(scope: Scope) -> Figure:
    seconds = 5.0 if scope.is_quick else 30.0
    async with load_server(*ENGINE.settings()) as server:
        capacity = await _capacity(server, scope)
        scope.tell(1, 2)
        due_s = arrivals("poisson", 5 * capacity, seconds, scope.seed)
        probes = arrivals("constant", _PROBES_PER_S, seconds, 0)
        health = Job(target=server.address, name="health", style="health", due_s=probes, timeout_s=10)
        readyz = Job(target=f"127.0.0.1:{server.http_port}", name="readyz", style="readyz", due_s=probes, timeout_s=10)
        run = await run_calm(server, *_offered(server, "health5x", due_s), health, readyz, tries=tries_of(scope))
    scope.tell(2, 2)
    *load, checked, ready = run.ran
    health_ms = percentile(latency_ms(checked.records, since="sent_s"), 0.99)
    ready_ms = percentile(latency_ms(ready.records, since="sent_s"), 0.99)
    false = len(checked.records) - len(checked.ok) + len(ready.records) - len(ready.ok) + checked.not_serving
    refused = sum(len(ran.refused) for ran in load)
    machine = Machine()
    machine.saw(run)
    passed, note = machine.judge(
        exact=false == 0 and refused > 0, timed=health_ms < _MOST_HEALTH_MS and ready_ms < _MOST_HEALTH_MS
    )
    return Figure(
        text=f"health p99 {health_ms:.1f} ms, /readyz {ready_ms:.1f} ms; {false} false NOT_SERVING",
        passed=passed,
        note=note,
        details={
            "checks": len(checked.records),
            "watchers": 64,
            "offered_per_s": len(due_s) / seconds,
            "refused": refused,
            **machine.details(),
        },
    )


async def loop_lag(scope: Scope) -> Figure:
    """Its own loads, of every shape that the other rows have."""
    seconds = 5.0 if scope.is_quick else 20.0
    worst: dict[str, float] = {}
    machine = Machine()
    broken = 0
    shapes = ("5x, one text per call", "calls of 1,024 long texts", "200 callers who come back at once")
    for number, shape in enumerate(shapes):
        scope.tell(number, len(shapes))
        async with load_server(*(ENGINE.settings() if number != 1 else [])) as server:
            if number == 0:
                jobs = _offered(server, "lag", arrivals("poisson", 5 * ENGINE.texts_per_s, seconds, scope.seed))
            elif number == 1:
                jobs = [
                    Job(
                        target=server.address,
                        name="large",
                        style="once",
                        callers=4,
                        seconds=seconds,
                        texts=1024,
                        words=60,
                    )
                ]
            else:
                jobs = [
                    Job(target=server.address, name="again", style="once", callers=200, channels=200, seconds=seconds)
                ]
            run = await run_calm(server, *jobs, tries=tries_of(scope))
            worst[shape] = run.worst_lag_ms
            machine.saw(run)
            broken += run.broken
    scope.tell(len(shapes), len(shapes))
    shape = max(worst, key=lambda each: worst[each])
    passed, note = machine.judge(exact=not broken, timed=worst[shape] < _MOST_LAG_MS)
    return Figure(
        text=f"{worst[shape]:.0f} ms ({shape})",
        passed=passed,
        note=note,
        details={**{f"worst_loop_lag_ms, {each}": value for each, value in worst.items()}, **machine.details()},
    )


ROWS: tuple[Row, ...] = (
    Row(
        key="G1",
        title="Overload curve, 0.5x to 5x, open loop",
        pass_line="at 3x and 5x: goodput >= 90 % of the peak, p99 of accepted <= 2x SLO, p99 of refusals < 10 ms",
        run=overload_curve,
    ),
    Row(
        key="G2",
        title="Recovery after 10 s at 3x, naive callers and our client",
        pass_line="normal p99 in < 5 s; our client sends < 1.1 requests for a call",
        run=recovery,
    ),
    Row(
        key="G3",
        title="Health under 5x load, 64 watchers",
        pass_line="p99 < 50 ms; no false NOT_SERVING",
        run=health_under_load,
    ),
    Row(key="G7", title="Event loop's lag under load", pass_line="highest < 100 ms", run=loop_lag),
)
