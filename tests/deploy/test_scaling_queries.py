"""What the autoscalers ask Prometheus: it is there, it means what it should, and silence is no load."""

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from ml_inference_server.metrics.table import TABLE
from tests.deploy.manifests import FOLDER

KEDA = yaml.safe_load((FOLDER / "components/keda/scaled_object.yaml").read_text(encoding="utf-8"))
RULES = yaml.safe_load((FOLDER / "components/hpa/adapter_rules.yaml").read_text(encoding="utf-8"))["rules"]["custom"]
HPA = yaml.safe_load((FOLDER / "components/hpa/autoscaler.yaml").read_text(encoding="utf-8"))
LABELS = 'job="ml-inference-server", namespace="inference", pod="a"'


def keda_queries() -> dict[str, str]:
    return {each["name"]: each["metadata"]["query"] for each in KEDA["spec"]["triggers"]}


def adapter_queries() -> dict[str, str]:
    """As prometheus-adapter fills them in for all pods."""
    made = {}
    for rule in RULES:
        words = {
            "Series": rule["seriesQuery"].partition("{")[0],
            "LabelMatchers": 'namespace="inference"',
            "GroupBy": "pod",
        }
        query = rule["metricsQuery"]
        for word, value in words.items():
            query = query.replace(f"<<.{word}>>", value)
        made[rule["name"]["as"]] = query
    return made


def busy(waiting: bool) -> list[dict[str, str]]:
    """One pod for ten minutes: two slots that work 1.6 s in a second together, and waits of 25 to 51 ms, or none."""
    count = "0+100x40" if waiting else "0x40"
    below = "0x40"
    return [
        {"series": f'mlis_queue_wait_seconds_bucket{{{LABELS}, le="0.0256"}}', "values": below},
        {"series": f'mlis_queue_wait_seconds_bucket{{{LABELS}, le="0.0512"}}', "values": count},
        {"series": f'mlis_queue_wait_seconds_bucket{{{LABELS}, le="+Inf"}}', "values": count},
        {"series": f"mlis_batch_compute_seconds_sum{{{LABELS}}}", "values": "0+24x40" if waiting else "0x40"},
        {"series": f"mlis_batch_slots{{{LABELS}}}", "values": "2x40"},
    ]


def asked(query: str, series: list[dict[str, str]], expected: list[dict[str, Any]], scratch: Path) -> None:
    """AssertionError where the query has another answer at the end of ten minutes."""
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is missing: apt-get install prometheus")
    test = {
        "interval": "15s",
        "input_series": series,
        "promql_expr_test": [{"expr": query, "eval_time": "9m", "exp_samples": expected}],
    }
    (scratch / "test.yml").write_text(yaml.safe_dump({"rule_files": [], "tests": [test]}))
    done = subprocess.run(
        [promtool, "test", "rules", "test.yml"], cwd=scratch, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_queries_name_only_metrics_of_the_server() -> None:
    known = {row.name for row in TABLE}
    known |= {f"{row.name}_{part}" for row in TABLE if row.kind == "histogram" for part in ("bucket", "sum", "count")}
    queries = [*keda_queries().values(), *adapter_queries().values()]
    named = {name for query in queries for name in re.findall(r"\bmlis_\w+", query)}
    assert len(named) == 3
    assert named <= known


def test_the_autoscaler_asks_for_what_the_adapter_has() -> None:
    wanted = {each["pods"]["metric"]["name"] for each in HPA["spec"]["metrics"]}
    assert wanted == set(adapter_queries())


def test_both_autoscalers_have_the_same_targets() -> None:
    keda = [float(each["metadata"]["threshold"]) for each in KEDA["spec"]["triggers"]]
    targets = [each["pods"]["target"]["averageValue"] for each in HPA["spec"]["metrics"]]
    assert [int(each.removesuffix("m")) / 1000 for each in targets] == keda
    behavior = KEDA["spec"]["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]
    assert behavior == HPA["spec"]["behavior"]


# 0.9 of the way from 0.0256 to 0.0512, within the bucket.
WAIT, SHARE = 0.0486400, 0.8


def test_keda_sees_the_wait_and_the_engines(tmp_path: Path) -> None:
    queries = keda_queries()
    asked(queries["queue-wait"], busy(waiting=True), [{"labels": "{}", "value": WAIT}], tmp_path)
    asked(queries["engines-busy"], busy(waiting=True), [{"labels": "{}", "value": SHARE}], tmp_path)


@pytest.mark.parametrize("name", keda_queries())
@pytest.mark.parametrize("series", [busy(waiting=False), []], ids=["idle", "nothing"])
def test_for_keda_silence_is_no_load(name: str, series: list[dict[str, str]], tmp_path: Path) -> None:
    """And never NaN, which idle histograms give."""
    asked(keda_queries()[name], series, [{"labels": "{}", "value": 0}], tmp_path)


def test_the_adapter_sees_the_wait_and_the_engines_of_each_pod(tmp_path: Path) -> None:
    queries = adapter_queries()
    label = '{pod="a"}'
    asked(queries["mlis_queue_wait_p90_seconds"], busy(waiting=True), [{"labels": label, "value": WAIT}], tmp_path)
    asked(queries["mlis_engines_busy_ratio"], busy(waiting=True), [{"labels": label, "value": SHARE}], tmp_path)
    for query in queries.values():
        asked(query, busy(waiting=False), [{"labels": label, "value": 0}], tmp_path)


def test_an_answer_that_is_not_expected_is_noticed(tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        asked(keda_queries()["queue-wait"], busy(waiting=True), [{"labels": "{}", "value": 1}], tmp_path)
