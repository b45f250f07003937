"""The comparison of all experiments: what it recommends, and what it refuses to recommend."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ml_inference_server.benchmark.measure.rate_search import meets
from ml_inference_server.benchmark.report import advice
from ml_inference_server.benchmark.report.contenders import Comparison
from ml_inference_server.benchmark.report.regression import compare, unlike
from ml_inference_server.benchmark.result import aggregate
from ml_inference_server.benchmark.result.document import (
    Document,
    Entry,
    InProcess,
    MachineConditions,
    Memory,
    Start,
    Summary,
)
from ml_inference_server.benchmark.result.files import ResultFiles
from tests.unit.report_kit import PASSED, inside, make_document, make_info, make_server, of_server, quality, repeats


def entry(name: str, speeds: tuple[float, ...], *, cosine: float = 1.0, passed: bool = True, ms: float = 10.0,
          dtype: str = "int8", without: Sequence[str] = (), in_process: InProcess | None = None,
          starts: Sequence[Start] = (), **changes: Any,
          ) -> Entry:  # fmt: skip
    """An experiment with two loads, of which `speeds` are the repeats of the heavier one."""
    latency = dict.fromkeys(("avg", "p50", "p95", "p99"), ms)
    runs = [
        *repeats(10, 10, 10, batch_size=1, concurrency=1, latency_ms=latency),
        *repeats(*speeds, batch_size=8, concurrency=16),
    ]
    verdict = {"passed": passed, "reasons": [] if passed else ["too far from FP32"]}
    change = {"value": cosine - 1, "low": cosine - 1, "high": cosine - 1}
    found = quality(cosine_mean=cosine, gate=verdict, ndcg10_difference=change, without=without)
    server = make_server(info=make_info({"dtype": dtype}), quality=found, in_process=in_process, starts=list(starts))
    return Entry.model_validate({
        "experiment": name, "variant": "", "verdict": "ok", "exit_code": 0, "message": "", "title": f"{name} ran",
        "settings_sha256": "", "result": f"{name}_results.md", "commit": "abc", "fingerprint": "f", "dataset": "sample",
        "server": server, "warnings": [], "runs": runs,
    } | changes)  # fmt: skip


def summary(*entries: Entry, **changes: Any) -> Summary:
    machine = make_document([]).machine
    return Summary.model_validate({
        "command": "run all", "quick": False, "started_at": "a",
        "finished_at": "b", "finished": True, "machine": machine, "versions": {},
        "git": {"commit": "abc", "modified": False}, "not_run": [], "experiments": list(entries),
    } | changes)  # fmt: skip


BASE = entry("minilm_baseline", (99, 100, 101), dtype="float32")
INT8 = entry("int8", (198, 200, 202), cosine=0.99, ms=8)
BROKEN = entry("broken", (900, 900, 900), cosine=0.5, passed=False, ms=1)


def advised(*entries: Entry) -> str:
    text = advice.markdown(summary(*entries), [])
    return text[text.index("## Which one to run") : text.index("## All that ran")]


def test_the_fastest_within_its_gate_is_recommended_with_what_it_loses() -> None:
    said = advised(BASE, INT8, BROKEN)
    assert "**Fastest: `int8`** (int8 ran): 2.00x [" in said
    assert "mean cosine to FP32 0.99000" in said
    assert "nDCG@10 -0.0100 [-0.0100, -0.0100], a significant change" in said
    assert "**If nothing may be lost: `minilm_baseline`**" in said
    assert "Do not run `broken`: the quality gate failed." in said


def test_a_row_that_failed_its_gate_is_struck_through_and_on_no_front() -> None:
    text = advice.markdown(summary(BASE, INT8, BROKEN), [])
    line = next(line for line in text.splitlines() if line.startswith("| ~~broken~~"))
    assert "~~FAIL~~" in line
    found = Comparison(summary(BASE, INT8, BROKEN))
    assert found.front == {"minilm_baseline", "int8"}


def test_a_machine_that_was_busy_spoils_the_advice() -> None:
    """A baseline that ran beside something else would make all others look fast."""
    busy = entry("minilm_baseline", (20, 22, 24))
    conditions = MachineConditions(steal_share=0, others_share=0.7, clock_mhz=None, throttled=None)
    last = busy.runs[-1].model_copy(update={"conditions": conditions})
    busy = busy.model_copy(update={"runs": [*busy.runs[:-1], last]})
    said = advised(busy, INT8)
    assert said.index("**Do not rely on these ratios:**") < said.index("**Fastest")
    assert "while `minilm_baseline` ran" in said
    assert "pass, disturbed" in advice.markdown(summary(busy, INT8), [])
    assert "Do not rely" not in advised(BASE, INT8)


def test_no_winner_where_there_is_no_significant_difference() -> None:
    said = advised(BASE, INT8, entry("twin", (150, 200, 240), cosine=0.999))
    assert "No significant difference in throughput to it: `twin`" in said
    assert "**Closest to FP32 among these: `twin`**" in said


def test_other_loads_have_a_table_of_their_own_and_no_ratio() -> None:
    other = entry("other", (500, 500, 500))
    other = other.model_copy(update={"runs": [run.model_copy(update={"concurrency": 64}) for run in other.runs]})
    text = advice.markdown(summary(BASE, other), [])
    assert "### other" in text
    assert "Fastest: `minilm_baseline`" in text


def test_what_did_not_run_says_why() -> None:
    refused = entry("gone", (1,), verdict="refused", exit_code=3, message="no such model", server=None, runs=[])
    document = summary(BASE, refused, not_run=["later"], finished=False, quick=True)
    text = advice.markdown(document, [])
    told = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    assert ["gone", "refused", "no such model"] in told
    assert ["later", "not run", "the run was interrupted before it"] in told
    assert "`--resume` goes on with it" in text
    assert "a quick run" in text
    assert "nothing to recommend" in advice.markdown(summary(refused), [])


def test_unlike_machines_and_commits_are_told() -> None:
    text = advice.markdown(summary(BASE, entry("int8", (200, 200), commit="def", fingerprint="g")), [])
    assert "measured at different commits: abc, def" in text
    assert "measured on different machines" in text


def test_the_plots_are_there_and_the_same_each_time(tmp_path: Path) -> None:
    files = ResultFiles(tmp_path / "summary.md", tmp_path / "summary.json")
    first, again = (advice.contents(summary(BASE, INT8, BROKEN), files) for _ in range(2))
    assert {path.name for path in first} == {"summary.md", "summary.json", "summary.svg", "summary_latency.svg"}
    assert first == again
    assert bytes(first[files.plot]).count(b"broken") >= 1  # type: ignore[arg-type]


def test_nothing_that_is_beaten_in_both_is_on_the_front() -> None:
    points = {"a": (1.0, 1.0), "b": (2.0, 0.9), "c": (1.5, 0.8), "d": (2.0, 0.9)}
    assert aggregate.pareto(points) == {"a", "b", "d"}


def cells(text: str, name: str) -> dict[str, str]:
    """The line of the first table with an experiment, or else a server, of this name: column -> cell."""
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    at, line = next((at, line) for at, line in enumerate(lines) if line[0] == name)
    header = next(line for line in reversed(lines[:at]) if line[0] in ("experiment", "server"))
    return dict(zip(header, line, strict=True))


def start(ready_s: float, *, filled_cache: bool = False, pss_mib: int | None = None, rss_mib: int = 900) -> Start:
    pss_bytes = None if pss_mib is None else pss_mib << 20
    memory = Memory(processes=3, rss_bytes=rss_mib << 20, pss_bytes=pss_bytes, peak_rss_bytes=(rss_mib + 7) << 20)
    return Start(ready_s=ready_s, filled_cache=filled_cache, memory=memory)


def test_each_experiment_says_how_long_it_starts_and_what_it_holds() -> None:
    cold, ended = start(90, filled_cache=True, pss_mib=801), Start(ready_s=1, filled_cache=True, memory=None)
    warm = [cold, start(4, pss_mib=800), start(6, pss_mib=790)]
    text = advice.markdown(
        summary(BASE, entry("warm", (9, 9), starts=warm), entry("cold", (8, 8), starts=[cold]),
                entry("no_pss", (7, 7), starts=[start(5)]), entry("ended", (6, 6), starts=[ended])), [])  # fmt: skip
    told = {name: (cells(text, name)["ready s"], cells(text, name)["memory MiB"])
            for name in ("minilm_baseline", "warm", "cold", "no_pss", "ended")}  # fmt: skip
    assert told == {
        "minilm_baseline": ("-", "-"),  # of an earlier version
        "warm": ("5.0", "800 PSS"),
        "cold": ("90.0 (filled the cache)", "801 PSS"),
        "no_pss": ("5.0", "900 RSS"),
        "ended": ("1.0 (filled the cache)", "-"),
    }


def test_an_experiment_with_a_load_of_its_own_says_so_too() -> None:
    other = entry("other", (500, 500), variant="on", starts=[start(90, filled_cache=True), start(4, pss_mib=800)])
    other = other.model_copy(update={"runs": [run.model_copy(update={"concurrency": 64}) for run in other.runs]})
    found = cells(advice.markdown(summary(BASE, other), []), "on")
    assert found == {"server": "on", "starts": "2", "ready s": "4.0", "ready s, filled the cache": "90.0",
                     "memory MiB": "900 RSS", "highest RSS MiB": "907", "processes": "3"}  # fmt: skip


# Two results of one experiment


def searched(rate: float | None) -> Document:
    found = {"variant": "", "batch_size": 1, "p99_ms": 50.0, "rate_per_s": rate, "probes": [], "requests": 1000}
    rows = repeats(9, 9, 9, concurrency=None, rate_per_s=rate, process="poisson", slo="confirmation") if rate else []
    return make_document([*repeats(100, 100, 101), *rows], slo=[found])


def test_a_lower_highest_rate_is_a_regression_and_its_rows_are_not_missed() -> None:
    found = compare(searched(100), searched(80), ({}, {}), 0.05)
    assert list(found.regressions) == ["batch size 1, p99 <= 50 ms: highest rate 100 before, 80 requests/s now"]
    assert compare(searched(100), searched(97), ({}, {}), 0.01).regressions == [], "within the search's precision"
    assert compare(searched(100), searched(None), ({}, {}), 0.05).regressions != []


def test_a_row_that_is_gone_or_no_longer_sound_is_a_regression() -> None:
    both = make_document([*repeats(100, 100, 101), *repeats(100, 100, 101, batch_size=9)])
    assert compare(both, make_document(repeats(100, 100, 101)), ({}, {}), 0.05).regressions == [
        "batch size 9, concurrency 2: was measured before and is missing now"
    ]
    broken = make_document([*repeats(100, 100, 101), *repeats(100, 100, 101, batch_size=9, status="failures")])
    assert compare(both, broken, ({}, {}), 0.05).regressions == [
        "batch size 9, concurrency 2: was sound before and is FAILURES now"
    ]


def test_noise_is_no_regression_however_low_the_figure() -> None:
    noisy = make_document(repeats(50, 80, 120))
    assert compare(make_document(repeats(95, 100, 105)), noisy, ({}, {}), 0.05).regressions == []
    steady = make_document(repeats(79, 80, 81))
    assert len(compare(make_document(repeats(99, 100, 101)), steady, ({}, {}), 0.05).regressions) == 1
    assert compare(make_document(repeats(99, 100, 101)), steady, ({}, {}), 0.25).regressions == []


def test_the_share_of_the_in_process_speed_is_of_the_same_requests() -> None:
    """At the baseline's heaviest load, 8 pairs a request; texts/s of the rows are 800."""
    shares = []
    for in_process in (inside(batch_size=8), inside(batch_size=8, texts_per_s=500.0), inside(batch_size=4)):
        int8 = entry("int8", (198, 200, 202), in_process=in_process)
        text = advice.markdown(summary(BASE, int8), [])
        (line,) = (line for line in text.splitlines() if line.startswith("| int8"))
        shares.append([cell.strip() for cell in line.split("|")][9])
    assert shares == ["80%", "160% (more than all: an error of the measurement)", "-"]


def test_a_rate_that_is_no_longer_kept_up_with_is_a_regression() -> None:
    load = {"concurrency": None, "rate_per_s": 60.0, "process": "poisson"}
    before = make_document(repeats(59, 60, 61, **load, requests_per_s=60.0, fell_behind=False))
    after = make_document(repeats(59, 60, 61, **load, requests_per_s=50.0, fell_behind=True))
    (said,) = compare(before, after, ({}, {}), 0.05).regressions
    assert said.endswith("50 answered (fell behind): kept up with what was offered before")
    assert compare(after, after, ({}, {}), 0.05).regressions == []
    assert not meets(after.runs[0], p99_ms=1000.0), "a rate is not borne by falling behind within the bound"
    assert meets(before.runs[0], p99_ms=1000.0)


def test_ndcg_of_two_definitions_is_never_compared_silently() -> None:
    """A summary can hold experiments of an earlier version (--resume), which took 2^grade - 1 as the gain."""
    old = entry("old", (198, 200, 202), cosine=0.99, without=["ndcg_gain"])
    text = advice.markdown(summary(BASE, old), [])
    assert "nDCG@10 was computed with different gains" in text
    assert "grade for minilm_baseline; 2^grade - 1 for old" in text
    assert "nDCG@10 -0.0100 [-0.0100, -0.0100] (gain 2^grade - 1), a significant change" in text
    assert "different gains" not in advice.markdown(summary(BASE, INT8), [])

    runs = repeats(99, 100, 101)
    before, after = of_server(runs, quality=quality()), of_server(runs, quality=quality())
    assert compare(before, after, ({}, {}), 0.05).notes == []
    before = of_server(runs, quality=quality(without=["ndcg_gain"]))
    (note,) = compare(before, after, ({}, {}), 0.05).notes
    assert note.startswith("nDCG@10 has the gain 2^grade - 1 before and grade now")


def test_a_gate_that_fails_now_is_a_regression() -> None:
    runs = repeats(99, 100, 101)
    before, after = of_server(runs, quality=quality(gate=PASSED)), of_server(runs, quality=quality())
    said = compare(before, after, ({}, {}), 0.05).regressions
    assert any("is QUALITY now" in line for line in said)
    assert any("fails its quality gate: mean cosine" in line for line in said)


def test_models_that_share_their_weights_and_differ_in_other_files_are_told() -> None:
    """Another pooling or prompt gives other vectors from the same weights."""
    runs = repeats(100.0)
    before, after = (of_server(runs, info=make_info({"model_sha256": digit * 64})) for digit in "12")
    assert any("differ in other files than their weights: 1111" in line for line in unlike(before, after))
    earlier = make_document(runs)  # it did not tell
    assert not any("other files" in line for line in unlike(earlier, after))
