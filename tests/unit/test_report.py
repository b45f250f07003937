"""What a result says, and how its files reach the disk."""

import json
import os
import re
import resource
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ml_inference_server.benchmark.load.records import as_records, read, record
from ml_inference_server.benchmark.load.schedule import arrivals_s
from ml_inference_server.benchmark.report import finish as finish_module
from ml_inference_server.benchmark.report import report, tables
from ml_inference_server.benchmark.result import aggregate, stored
from ml_inference_server.benchmark.result.document import Document, InProcess, InProcessFailed, Purpose, Run
from ml_inference_server.benchmark.result.figures import figures, latency_summary_ms
from ml_inference_server.benchmark.result.files import (
    Result,
    ResultsNotWritten,
    exit_code,
    keep_partial,
    locked,
    result_files,
    write_results,
)
from ml_inference_server.benchmark.result.stored import to_json
from ml_inference_server.utils.errors import ConfigError
from tests.unit.report_kit import (
    PASSED,
    inside,
    make_document,
    make_info,
    make_run,
    make_server,
    of_server,
    quality,
    repeats,
)


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def table(document: Document) -> list[dict[str, str]]:
    """The table of results, line by line: column -> cell."""
    lines = tables.results(aggregate.rows_of_document(document, {})).splitlines()
    return [dict(zip(cells(lines[0]), cells(line), strict=True)) for line in lines[2:]]


def test_percentiles_are_exact_and_absent_without_a_success() -> None:
    samples = np.random.default_rng(0).exponential(10, 997).tolist()
    summary = latency_summary_ms(samples)
    assert summary is not None
    assert summary.avg == pytest.approx(sum(samples) / len(samples))
    ordered = sorted(samples)
    for percentile in (50, 95, 99):
        position = percentile / 100 * (len(ordered) - 1)
        low = ordered[int(position)]
        assert summary.at(percentile) == pytest.approx(low + (ordered[int(position) + 1] - low) * (position % 1))
    assert latency_summary_ms([]) is None


def test_the_title_is_what_ran_not_what_was_asked() -> None:
    text = report.markdown(make_document([make_run()]), {})
    assert text.splitlines()[0] == "# trial: MiniLM bf16 on cpu"
    assert "Requested: MiniLM, pytorch, device mps, quantization fp16" in text
    assert "Ran: MiniLM, pytorch on cpu (EPYC), bfloat16, AMX" in text


def test_one_column_says_what_the_throughput_counts() -> None:
    assert "pairs/s" in table(make_document([make_run()]))[0]
    embeds = make_run(workload="passages", pairs=0, pairs_per_s=None)
    (row,) = table(make_document([embeds]))
    assert row["texts/s"] == "800"
    assert "pairs/s" not in row
    assert "items/s" in table(make_document([make_run(), embeds]))[0]


@pytest.mark.parametrize(
    ("answered", "p95", "p99"),
    [(199, "n/a (n=199)", "n/a (n=199)"), (200, "15.0", "n/a (n=200)"), (1000, "15.0", "19.0")],
)
def test_a_percentile_is_shown_when_the_sample_has_earned_it(answered: int, p95: str, p99: str) -> None:
    (row,) = table(make_document([make_run(ok=answered, requests=answered)]))
    assert (row["p95 ms"], row["p99 ms"]) == (p95, p99)


def test_repeats_earn_a_percentile_together() -> None:
    runs = [make_run(repeat=n, ok=400) for n in (1, 2, 3)]
    (row,) = table(make_document(runs))
    assert (row["ok"], row["p99 ms"]) == ("1200", "19.0 [19.0, 19.0]")


def test_repeats_are_one_line_with_median_interval_and_extremes() -> None:
    (row,) = table(make_document(repeats(390, 400, 420)))
    assert row["repeats"] == "390-420"
    value, low, high = (
        float(part) for part in row["pairs/s"].replace("[", "").replace("]", "").replace(",", "").split()
    )
    assert value == 400
    assert low < 390 < 420 < high


def test_a_run_without_success_has_no_figures() -> None:
    run = make_run(ok=0, errors={"INTERNAL": 200}, latency_ms=None, requests_per_s=0.0, pairs_per_s=0.0,
                   status="failures", reason="200 of 200 requests failed")  # fmt: skip
    (row,) = table(make_document([run]))
    assert [row[name] for name in ("pairs/s", "p50 ms", "errors", "status")] == ["-", "-", "200 INTERNAL", "FAILURES"]
    assert "No row is valid" in report.markdown(make_document([run]), {})


def test_only_valid_rows_can_be_the_best() -> None:
    slow = make_run(batch_size=1)
    fast_but_failing = make_run(
        pairs_per_s=9e9,
        latency_ms=dict.fromkeys(("avg", "p50", "p95", "p99"), 0.1),
        status="failures",
        reason="1 failed",
    )
    document = make_document([fast_but_failing, slow])
    found = aggregate.best(aggregate.rows_of_document(document, {}))
    assert found is not None
    assert [row.first for row in found] == [slow, slow]
    assert exit_code(document) == 5
    assert exit_code(make_document([slow])) == 0
    assert exit_code(make_document([slow], planned_rows=2)) == 5
    assert (
        exit_code(make_document([slow, fast_but_failing.model_copy(update={"slo": Purpose.PROBE})], planned_rows=1))
        == 0
    )


def test_an_offered_rate_is_no_throughput_that_was_reached() -> None:
    closed = make_run(pairs_per_s=300.0)
    offered = make_run(
        concurrency=None, rate_per_s=500.0, process="poisson", pairs_per_s=900.0, requests_per_s=499, fell_behind=False
    )
    best = aggregate.best(aggregate.rows_of_document(make_document([closed, offered]), {}))
    assert best is not None
    assert best[0].first == closed
    assert "which is what was offered" in report.markdown(make_document([offered]), {})


def served_in_turn(due_s: Any, service_s: float) -> Any:
    """Records of requests that one server answers one after the other."""
    free_s, rows = 0.0, []
    for due in due_s:
        free_s = max(due, free_s) + service_s
        rows.append(record(due, due, free_s, "OK", (1, 2, 3, 6)))
    return as_records(rows)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("load", "behind"), [(0.3, False), (0.7, False), (1.2, True), (60 / 41.5, True), (3.0, True)])
def test_a_row_that_is_offered_more_than_is_answered_fell_behind(load: float, behind: bool, seed: int) -> None:
    due_s = arrivals_s("poisson", 60.0, requests=1000, duration_s=0.0, seed=seed, repeat=1)
    found = figures(served_in_turn(due_s, load / 60), batch_size=1, scores=False, is_open=True)
    assert found.fell_behind is behind


def test_a_short_row_whose_last_answer_takes_its_time_kept_up() -> None:
    """The answers end a latency after the requests, here a third of the row: that is no backlog."""
    records = as_records([record(n / 60, n / 60, n / 60 + 0.5, "OK", (1, 2, 3, 6)) for n in range(60)])
    found = figures(records, batch_size=1, scores=False, is_open=True)
    assert found.requests_per_s < 0.7 * 60
    assert found.fell_behind is False
    assert figures(records, batch_size=1, scores=False, is_open=False).fell_behind is None


def test_a_server_that_refuses_what_is_too_much_fell_behind() -> None:
    codes = ["OK", "RESOURCE_EXHAUSTED", "OK"]
    records = as_records([record(n / 60, n / 60, n / 60 + 0.01, codes[n % 3], (1, 2, 3, 6)) for n in range(60)])
    assert figures(records, batch_size=1, scores=False, is_open=True).fell_behind is True


OFFERED = {"concurrency": None, "rate_per_s": 60.0, "process": "poisson"}


def test_a_row_that_fell_behind_says_so_wherever_it_stands() -> None:
    """60 requests/s offered and 41.5 answered is not "60 requests/s, which is what was offered"."""
    behind = make_run(**OFFERED, requests_per_s=41.5, pairs_per_s=166.0, fell_behind=True)
    document = make_document([behind])
    (row,) = table(document)
    assert row["load"] == "60 requests/s offered, 41.5 answered (fell behind)"
    text = report.markdown(document, {})
    assert (
        "**Best throughput:** 166 pairs/s at batch size 4, 60 requests/s offered, 41.5 answered (fell behind)" in text
    )
    assert "which is what was offered" not in text
    assert "A row that fell behind was answered more slowly than it was offered" in text
    kept_up = make_document([make_run(**OFFERED, requests_per_s=59.6, fell_behind=False)])
    assert table(kept_up)[0]["load"] == "60 requests/s offered, 59.6 answered"
    assert "fell behind" not in report.markdown(kept_up, {})


def test_the_latency_of_a_row_that_fell_behind_is_not_the_best() -> None:
    quick = dict.fromkeys(("avg", "p50", "p95", "p99"), 1.0)
    behind = make_run(**OFFERED, requests_per_s=41.5, fell_behind=True, latency_ms=quick)
    closed = make_run()
    best = aggregate.best(aggregate.rows_of_document(make_document([behind, closed]), {}))
    assert best is not None
    assert best[1].first == closed


@pytest.mark.parametrize(
    ("p50", "p95", "said"),
    [
        (370.0, 700.0, " (fell behind)"),  # a queue that grew for 0.74 s
        (15.0, 30.0, ""),  # by chance, few requests were due
        (740.0, 745.0, ""),  # the last answer takes its time, like all of them
    ],
)
def test_a_summary_of_an_earlier_version_is_judged_by_what_it_has(p50: float, p95: float, said: str) -> None:
    latency = {"avg": p50, "p50": p50, "p95": p95, "p99": p95}
    # make_run leaves `fell_behind` as a result has it that did not write it.
    run = make_run(**OFFERED, requests=100, ok=100, seconds=2.41, requests_per_s=41.5, latency_ms=latency)
    assert run.fell_behind is None
    document = make_document([run])
    assert table(document)[0]["load"] == f"60 requests/s offered, 41.5 answered{said}"
    assert ("which is what was offered: its schedule was drawn sparser" in report.markdown(document, {})) is (
        said == ""
    )


def test_one_bad_repeat_spoils_the_row() -> None:
    first, _, third = repeats(400, 400, 400)
    runs = [first, make_run(repeat=2, status="invalid", cause="client_late", reason="late"), third]
    assert table(make_document(runs))[0]["status"] == "INVALID"
    assert aggregate.best(aggregate.rows_of_document(make_document(runs), {})) is None


def test_a_row_that_fails_its_gate_is_struck_through_and_never_the_best() -> None:
    servers = [make_server(variant="good", quality=quality(gate=PASSED)), make_server(variant="bad", quality=quality())]
    runs = [make_run(variant="good"), make_run(variant="bad", pairs_per_s=9e9)]
    document = make_document(runs, servers=servers)
    good, bad = table(document)
    assert bad["pairs/s"].startswith("~~")
    assert bad["status"] == "~~QUALITY~~"
    assert "~~" not in "".join(good.values())
    assert good["nDCG@10 change"] == "-0.0300 [-0.0500, -0.0100]"
    best = aggregate.best(aggregate.rows_of_document(document, {}))
    assert best is not None
    assert {row.variant for row in best} == {"good"}
    text = report.markdown(document, {})
    assert "bad: QUALITY GATE FAILED" in text
    assert "nothing to compare" in text, "a ratio to a wrong answer is no ratio"


def test_a_report_says_which_gain_its_ndcg_has() -> None:
    text = report.markdown(of_server([make_run()], quality=quality(gate=PASSED)), {})
    assert "The gain of nDCG is the grade, as trec_eval has it." in text
    assert "2^grade" not in text
    # An earlier version took 2^grade - 1 as the gain, and did not say so.
    document = of_server([make_run()], quality=quality(gate=PASSED, without=["ndcg_gain"]))
    text = report.markdown(document, {})
    assert "The gain of nDCG is 2^grade - 1, as earlier versions had it: compare it neither with published" in text
    assert "0.5500 (gain 2^grade - 1)" in text
    assert table(document)[0]["nDCG@10 change"] == "-0.0300 [-0.0500, -0.0100] (gain 2^grade - 1)"


def test_everything_doubtful_is_said() -> None:
    conditions = {"steal_share": 0.3, "others_share": 0.4, "clock_mhz": [3000.0, 1500.0], "throttled": 2}
    bad = make_run(
        status="invalid",
        reason="the server no longer answers",
        first_error={"after_s": 1.5, "code": "UNAVAILABLE", "message": "Socket\nclosed | x"},
        conditions=conditions,
        client={"processes": 1, "cpu_share": 0.99},
        warmup={"requests": 5, "ok": 5, "errors": {}, "rounds": 5, "settled": False},
    )
    info = make_info({"random_weights": True}, fallbacks=["device mps is not available"], experiment="other")
    document = make_document(
        [bad],
        interrupted=True,
        planned_rows=3,
        servers=[make_server(info=info, died="killed by SIGKILL")],
        dataset={
            "name": "d",
            "sha256": "cd",
            "rows": 1,
            "queries": 1,
            "passages": 1,
            "note": "the bundled sample is used",
        },
        not_started=[{"variant": "v2", "exit_code": 3, "message": "no such device"}],
    )
    text = "\n".join(warned.text for warned in report.warnings(document))
    for said in (
        "interrupted",
        "2 of 3 rows were not run",
        "INVALID: the server no longer answers (first after 1.50 s: UNAVAILABLE Socket closed \\| x)",
        "not as requested: device mps",
        "weights are random",
        "runs the experiment other, not trial",
        "killed by SIGKILL",
        "bundled sample",
        "variant v2 did not run (exit code 3): no such device",
        "the host took 30% of the CPU time away (steal)",
        "other programs used 40% of the machine",
        "clock fell from 3000 to 1500 MHz",
        "throttled for heat 2 times",
        "the client computed for 99% of the time",
        "the warm-up still got faster",
    ):
        assert said in text
    assert all(warning.text in report.markdown(document, {}) for warning in report.warnings(document))
    assert report.warnings(make_document([make_run()])) == []


def test_a_report_says_which_rows_did_not_compute_every_text() -> None:
    counted = {"padding_share": 0.1, "mean_batch": 8.0, "tokens": 9000}
    runs = [
        make_run(batches=counted),  # of a server that has neither
        make_run(batches=counted | {"shared_texts": 0, "cached_texts": 0}),
        make_run(batches=counted | {"shared_texts": 12, "cached_texts": 0}),
        make_run(batches=counted | {"shared_texts": 0, "cached_texts": 34}, repeat=2),
        make_run(batches=counted | {"shared_texts": 5, "cached_texts": 6}, repeat=3),
    ]
    row = "in the row batch size 4, concurrency 2"
    assert [text for _, text in report.warnings(make_document(runs))] == [
        f"{row}, not every text was computed: 12 shared the computation of an equal text in flight",
        f"{row}, repeat 2, not every text was computed: 34 came out of the cache",
        f"{row}, repeat 3, not every text was computed: 5 shared the computation of an equal text in flight and 6 came"
        " out of the cache",
    ]


def test_variants_are_compared_under_the_same_load() -> None:
    half = dict.fromkeys(("avg", "p50", "p95", "p99"), 5.0)
    runs = [
        *repeats(398, 400, 402, variant="off", concurrency=1),
        *repeats(400, 400, 400, variant="off", concurrency=8),
        *repeats(790, 800, 810, variant="on", concurrency=1, latency_ms=half),
        *repeats(800, 800, 800, variant="on", concurrency=8, status="failures"),
        *repeats(300, 400, 500, variant="same", concurrency=1),
    ]
    text = tables.variants(aggregate.rows_of_document(make_document(runs), {}))
    assert re.search(r"\*\*on\*\* gives 2\.00x \[1\.9\d, 2\.0\d\] the pairs/s of off", text)
    assert "**same** and off: no significant difference in pairs/s" in text
    row = next(cells(line) for line in text.splitlines() if line.startswith("| on"))
    assert row[:3] == ["on", "4", "concurrency 1"]
    assert row[6] == "0.56x [0.56, 0.56]"
    assert tables.variants(aggregate.rows_of_document(make_document(runs[:2]), {})) == ""
    alone = make_document([runs[3], runs[9]])
    assert "nothing to compare" in tables.variants(aggregate.rows_of_document(alone, {}))


@pytest.mark.parametrize(("late", "said"), [(True, "**at least 40 requests/s**"), (False, "**40 requests/s**")])
def test_a_rate_that_the_client_could_not_exceed_is_a_lower_bound(late: bool, said: str) -> None:
    probes = [
        {"rate_per_s": 40.0, "p99_ms": 20.0, "met": True, "reason": "", "client_late": False},
        {"rate_per_s": 80.0, "p99_ms": 30.0, "met": False, "reason": "...", "client_late": late},
    ]
    found = {"variant": "", "batch_size": 1, "p99_ms": 50.0, "rate_per_s": 40.0, "requests": 1000, "probes": probes}
    text = report.markdown(make_document([make_run()], slo=[found]), {})
    assert said in text
    assert f"80 ({'client late' if late else 'not met'}, p99 30.0 ms)" in text


def test_tables_are_square() -> None:
    document = make_document([make_run(errors={"INTERNAL": 3}, unfinished=2), make_run(batch_size=128)])
    lines = tables.results(aggregate.rows_of_document(document, {})).splitlines()
    assert len({len(line) for line in lines}) == 1


def test_the_json_reads_back_and_keeps_a_run_on_a_line(tmp_path: Path) -> None:
    for runs in ([], [make_run()], [make_run(), make_run(variant="ü")]):
        document = make_document(runs)
        (tmp_path / "r.json").write_text(text := to_json(document))
        assert stored.read(tmp_path / "r.json") == document
        assert sum('"batch_size"' in line for line in text.splitlines()) == len(runs)


def test_an_earlier_result_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    markdown, data = tmp_path / "r.md", tmp_path / "r.json"
    for text in ("one", "two", "three"):
        write_results({markdown: text, data: text})
        for path in (markdown, data):
            os.utime(path, (0, 0))  # three runs in one second are kept apart too
    assert markdown.read_text() == data.read_text() == "three"
    kept = sorted(path.name for path in tmp_path.iterdir())
    assert kept == [
        "r.19700101T000000Z-2.json", "r.19700101T000000Z-2.md", "r.19700101T000000Z.json", "r.19700101T000000Z.md",
        "r.json", "r.md",
    ]  # fmt: skip
    assert (tmp_path / "r.19700101T000000Z.md").read_text() == "one"
    assert "kept as" in capsys.readouterr().err


def test_a_full_disk_leaves_the_earlier_result_alone(tmp_path: Path) -> None:
    markdown, data = tmp_path / "r.md", tmp_path / "r.json"
    write_results({markdown: "old", data: "old"})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))  # Python ignores SIGXFSZ, so writing fails with an OSError
    try:
        with pytest.raises(ResultsNotWritten, match=r"cannot be written: File too large: .*r\.json"):
            write_results({markdown: "new", data: "x" * 10_000})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r.json", "r.md"]
    assert markdown.read_text() == data.read_text() == "old"


def test_outputs_are_checked_before_anything_is_measured(tmp_path: Path) -> None:
    default = tmp_path / "new" / "d.md"
    files = result_files(None, None, default)
    assert (files.markdown, files.data) == (default, default.with_suffix(".json"))
    assert default.parent.is_dir()
    assert result_files(str(tmp_path / "a.md"), None, default).data == tmp_path / "a.json"
    with pytest.raises(ConfigError, match="both"):
        result_files(str(tmp_path / "a.json"), str(tmp_path / "a.json"), default)
    with pytest.raises(ConfigError, match="ordinary file"):
        result_files("/dev/null", None, default)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be made"):
        result_files(str(tmp_path / "file" / "a.md"), None, default)


def test_the_links_of_a_kept_report_follow_its_files(tmp_path: Path) -> None:
    markdown, plot = tmp_path / "r.md", tmp_path / "r.svg"
    for _ in range(2):
        write_results({markdown: "![plot](r.svg)", plot: b"<svg/>"})
        os.utime(markdown, (0, 0))
        os.utime(plot, (0, 0))
    assert (tmp_path / "r.19700101T000000Z.md").read_text() == "![plot](r.19700101T000000Z.svg)"
    assert (tmp_path / "r.19700101T000000Z.svg").exists()


def test_a_second_benchmark_may_not_write_the_same_results(tmp_path: Path) -> None:
    files = result_files(None, None, tmp_path / "r.md")
    with locked(files):
        with pytest.raises(ConfigError, match=rf"process {os.getpid()}\) is writing .*r\.json"), locked(files):
            pass
        with locked(result_files(None, None, tmp_path / "other.md")):
            pass
    with locked(files):
        pass
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_benchmark_had_measured_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = result_files(None, None, tmp_path / "r.md")
    run = make_run()
    Result(make_document([]), files).add(run, as_records([record(0, 0, 1, "OK", (1, 2, 3, 6))]))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r.partial.json", "r.partial.npz"]
    saved = json.loads(files.partial.data.read_text())
    assert saved["interrupted"] is True
    (kept_run,) = saved["runs"]
    assert kept_run == run.model_dump(mode="json")
    assert len(read(files.partial.raw)[run.raw]) == 1
    keep_partial(files)
    kept = sorted(path.suffixes[-2:] for path in tmp_path.iterdir())
    assert [suffixes[-1] for suffixes in kept] == [".json", ".npz"]
    assert not files.partial.data.exists()
    assert "when it was killed" in capsys.readouterr().err


def test_results_that_find_no_room_are_written_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    room = tmp_path / "room"
    room.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(room))
    files = result_files(None, None, tmp_path / "r.md")
    result = Result(make_document([make_run()]), files, raw={"run_0001": as_records([])})

    def full(contents: object) -> None:
        raise ResultsNotWritten("the results cannot be written: No space left on device: r.json")

    monkeypatch.setattr(finish_module, "write_results", full)
    with pytest.raises(ResultsNotWritten, match=rf"No space left on device.*they are in {room}"):
        finish_module.finish(result)
    (folder,) = room.iterdir()
    assert {path.name for path in folder.iterdir()} >= {"r.md", "r.json", "r.npz"}
    assert "Best throughput" in capsys.readouterr().out, "the table is shown before anything is written"


def tax(runs: Sequence[Run], in_process: InProcess | InProcessFailed) -> str:
    document = of_server(runs, in_process=in_process)
    return "".join(report.summary(document, aggregate.rows_of_document(document, {})))


def test_the_servers_tax_is_told() -> None:
    runs = [make_run(texts_per_s=800.0), make_run(batch_size=1, texts_per_s=100.0)]
    said = tax(runs, inside())
    assert "without a server runs 1000.0 texts/s (990.0-1010.0); the server's best row of the same requests" in said
    assert "(batch size 4, concurrency 2) reaches 80% of it" in said
    assert "there ran another thing" in tax(runs, inside(title="another thing"))
    assert "not measured: no such program" in tax(runs, InProcessFailed(error="no such program"))


def test_a_row_is_set_against_the_same_requests_only() -> None:
    """Equal texts of a request are computed once, and pairs are half queries: other requests are other work."""
    other = make_run(batch_size=8, texts_per_s=1260.0)
    said = tax([other, make_run(texts_per_s=800.0)], inside())
    assert "(batch size 4, concurrency 2) reaches 80% of it" in said
    assert "no row can be set against it: it ran requests of batch size 4" in tax([other], inside())
    assert "no row can be set against it" in tax([make_run(workload="passages", pairs_per_s=None)], inside())


@pytest.mark.parametrize(("tokens", "is_same"), [(80_000, True), (77_000, True), (70_000, False), (92_000, False)])
def test_other_tokens_than_the_servers_are_other_work(tokens: int, is_same: bool) -> None:
    batches = {"padding_share": 0.1, "mean_batch": 9.0}
    run = make_run(batches=batches | {"tokens": tokens}, texts=1600)
    said = "reaches 80% of it" if is_same else f"it ran other work, 50.0 tokens a text for {tokens / 1600:.1f}"
    assert said in tax([run], inside())
    assert "reaches 80% of it" in tax([make_run(batches=batches, texts=1600)], inside()), (
        "what the server did not tell is no difference"
    )


def test_a_server_that_is_faster_than_its_engine_is_an_error_of_the_measurement() -> None:
    said = tax([make_run(texts_per_s=1260.0)], inside())
    assert "reaches 126% (more than all: an error of the measurement) of it" in said


def test_an_earlier_result_without_the_requests_gets_no_share() -> None:
    earlier = inside(without=["workload", "batch_size", "tokens_per_text"])
    said = tax([make_run(texts_per_s=1260.0)], earlier)
    assert "no row can be set against it: it ran other texts, as earlier versions did" in said
    assert "126%" not in said
