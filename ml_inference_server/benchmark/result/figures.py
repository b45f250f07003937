"""One measured row: every figure is made from its records, now or when a report is built again."""

from typing import Any, NamedTuple

import numpy as np

from ml_inference_server.benchmark.load.records import UNFINISHED, Records, counts, ok_only
from ml_inference_server.benchmark.result.document import Batches, Cause, Figures, LagMs, LatencyMs, ServerMs, Status

# The sender is late when a request leaves later than this, or than this share of the median latency.
LATE_MS = 10.0
LATE_SHARE = 0.1
# So many late requests are an accident; more void an open-loop row.
LATE_REQUESTS_SHARE = 0.01
# A server keeps up while it answers this share of the requests, and as many of them as come meanwhile.
KEPT_UP_SHARE = 0.95


def figures(records: Records, *, batch_size: int, scores: bool, is_open: bool) -> Figures:
    """Counts, rates, latencies of the answered requests (from the moment when each was due), and the server's share.

    latency_ms, lag_ms, server_ms: None where there is nothing to tell. fell_behind: None of a closed loop.
    """
    by_code = counts(records)
    ok = by_code.pop("OK", 0)
    unfinished = by_code.pop(UNFINISHED, 0)
    answered = ok_only(records)
    ends = records["done_s"][np.isfinite(records["done_s"])]
    seconds = float(ends.max()) if len(ends) else 0.0
    pairs, texts = (ok * batch_size, 2 * ok * batch_size) if scores else (0, ok * batch_size)

    def per_s(amount: int) -> float:
        return amount / seconds if seconds else 0.0

    return Figures(
        ok=ok,
        errors=by_code,
        unfinished=unfinished,
        pairs=pairs,
        texts=texts,
        seconds=round(seconds, 6),
        requests_per_s=per_s(ok),
        pairs_per_s=per_s(pairs) if scores else None,
        texts_per_s=per_s(texts),
        latency_ms=latency_summary_ms((answered["done_s"] - answered["due_s"]) * 1e3),
        fell_behind=fell_behind(records) if is_open else None,
        lag_ms=_lag_ms(records) if is_open else None,
        server_ms=_server_ms(answered),
    )


def latency_summary_ms(latencies_ms: Any) -> LatencyMs | None:
    """avg, p50, p95, p99 over all samples (linear interpolation); None without a sample."""
    if not len(latencies_ms):
        return None
    p50, p95, p99 = np.percentile(latencies_ms, (50, 95, 99))
    return LatencyMs(avg=float(np.mean(latencies_ms)), p50=float(p50), p95=float(p95), p99=float(p99))


def fell_behind(records: Records) -> bool:
    """Whether an open loop was answered more slowly than it was offered, so that its queue grew all the time.

    Then latency grows from the first fifth of the requests to the last. The end of the row alone does not tell: the
    last answer comes a latency after the last request, also from a server that keeps up.
    """
    answered = ok_only(records)
    if len(answered) < KEPT_UP_SHARE * len(records):
        return True
    if not len(answered):
        return False
    edge = max(1, len(answered) // 5)
    due_s, latency_s = answered["due_s"], answered["done_s"] - answered["due_s"]
    lasted_s, grown_s = (float(np.median(x[-edge:]) - np.median(x[:edge])) for x in (due_s, latency_s))
    return lasted_s < KEPT_UP_SHARE * (lasted_s + grown_s)


def _lags_ms(records: Records) -> Any:
    sent = records[np.isfinite(records["sent_s"])]
    return (sent["sent_s"] - sent["due_s"]) * 1e3


def _lag_ms(records: Records) -> LagMs | None:
    lags = _lags_ms(records)
    if not len(lags):
        return None
    p50, p99 = np.percentile(lags, (50, 99))
    return LagMs(p50=float(p50), p99=float(p99), max=float(lags.max()))


def lag_reason(records: Records) -> str:
    """Why the sender's own lag voids an open-loop row; "" if it does not."""
    answered = ok_only(records)
    lags = _lags_ms(records)
    if not len(lags):
        return ""
    median_ms = float(np.median((answered["done_s"] - answered["due_s"]) * 1e3)) if len(answered) else 0.0
    limit_ms = max(LATE_MS, LATE_SHARE * median_ms)
    late = int((lags > limit_ms).sum())
    if late <= max(1, LATE_REQUESTS_SHARE * len(lags)):
        return ""
    return (
        f"the client itself was late: {late} of {len(lags)} requests left more than {limit_ms:.1f} ms after they were"
        " due; give it more experiment.client_processes, a lower rate, or a machine of its own"
    )


def _server_ms(answered: Records) -> ServerMs | None:
    """Means over the answered requests. `outside`: client, wire and gRPC, from the sending on."""
    if not len(answered) or not answered["total_us"].any():
        return None
    part = {name: float(answered[f"{name}_us"].mean()) / 1e3 for name in ("tokenize", "queue", "compute", "total")}
    took_ms = float((answered["done_s"] - answered["sent_s"]).mean()) * 1e3
    return ServerMs(**part, outside=took_ms - part["total"])


def batch_figures(counters: dict[str, float] | None) -> Batches | None:
    """What the server's counters say of the row."""
    if counters is None:
        return None
    tokens, padding = counters["mlis_tokens_total"], counters["mlis_padding_tokens_total"]
    batches = counters["mlis_batch_texts_count"]
    return Batches(
        padding_share=padding / (tokens + padding) if tokens + padding else None,
        mean_batch=counters["mlis_batch_texts_sum"] / batches if batches else None,
        tokens=tokens,
        shared_texts=counters["mlis_shared_texts_total"],
        cached_texts=counters["mlis_cache_hits_total"],
    )


class RowVerdict(NamedTuple):
    """What a row is worth; cause and reason say why it is not valid."""

    status: Status
    cause: Cause | None = None
    reason: str = ""


def verdict(found: Figures, planned: int | None) -> RowVerdict:
    """Of a row that was not cut short. planned: how many requests it was to send; None: by time."""
    failed = sum(found.errors.values())
    started = found.ok + failed + found.unfinished
    total = started if planned is None else planned
    missing = total - found.ok - failed
    if failed or missing:
        unfinished = f", {missing} were not finished" if missing else ""
        reason = f"{failed} of {total} requests failed{unfinished}"
        return RowVerdict(Status.FAILURES, Cause.REQUESTS_FAILED, reason)
    if not found.ok:
        return RowVerdict(Status.FAILURES, Cause.NOTHING_ANSWERED, "no request was answered")
    return RowVerdict(Status.VALID)
