"""THE table of metrics: what exists, what it is called, what its labels may say."""

from dataclasses import dataclass
from itertools import product
from typing import Literal

from ml_inference_server.utils.stages import STAGE_NAMES

METHODS = (
    "Embed",
    "EmbedStream",
    "Score",
    "Rerank",
    # What other protocols call for, named after them.
    "openai.embeddings",
    "cohere.embed",
    "cohere.rerank",
    "tei.embed",
    "tei.rerank",
    "tei.similarity",
    "tei.predict",
    "tei.tokenize",
    "tei.decode",
    "kserve.infer",
    "other",
)
CODES = (
    "OK",
    "CANCELLED",
    "UNKNOWN",
    "INVALID_ARGUMENT",
    "DEADLINE_EXCEEDED",
    "NOT_FOUND",
    "ALREADY_EXISTS",
    "PERMISSION_DENIED",
    "RESOURCE_EXHAUSTED",
    "FAILED_PRECONDITION",
    "ABORTED",
    "OUT_OF_RANGE",
    "UNIMPLEMENTED",
    "INTERNAL",
    "UNAVAILABLE",
    "DATA_LOSS",
    "UNAUTHENTICATED",
)
CLOSED_BY = ("full", "tokens", "timer", "idle", "single", "retry")
OUTCOMES = ("ok", "error")
REASONS = (
    "EMPTY_REQUEST",
    "EMPTY_TEXT",
    "TEXT_TOO_LONG",
    "TOO_MANY_TEXTS",
    "REPLY_TOO_LARGE",
    "INVALID_FIELD",
    "MALFORMED_REQUEST",
    "BODY_TOO_SLOW",
    "BODY_TOO_LONG",
    "BODY_TYPE",
    "WRONG_TASK",
    "MODEL_NOT_FOUND",
    "SPACE_MISMATCH",
    "QUEUE_FULL",
    "WAIT_TOO_LONG",
    "CALLER_LIMIT",
    "DEADLINE_EXCEEDED",
    "CANCELLED",
    "MODEL_LOADING",
    "DRAINING",
    "BACKEND_ERROR",
    "ENGINE_STUCK",
    "NON_FINITE_OUTPUT",
    "OUT_OF_MEMORY",
    "INTERNAL_BUG",
    "other",
)

OTHER_CALLER = "other"
MOST_CALLERS = 32
"""Names of keys that are values of the label `caller`; what an address is never becomes one."""

LABEL_VALUES = {
    "method": METHODS,
    "code": CODES,
    "closed_by": CLOSED_BY,
    "outcome": OUTCOMES,
    "stage": STAGE_NAMES,
    "reason": REASONS,
    "caller": (OTHER_CALLER,),
}
"""Every value that a label can have: whatever arrives, the number of series stays what it is at the start.

For each key that the server has, up to MOST_CALLERS, `caller` has one more (Metrics.name_callers).
"""

# Ratio 2 from 1.6 us to 13 s, then a minute: decoding a query and a request that waited out its deadline both fit.
_SECONDS = (*(50e-6 * 2**step for step in range(-5, 19)), 30.0, 60.0)
_TEXTS = tuple(float(2**step) for step in range(11))
_TOKENS = tuple(float(2**step) for step in range(4, 18))
_LENGTHS = (
    4.0,
    8.0,
    12.0,
    16.0,
    24.0,
    32.0,
    48.0,
    64.0,
    96.0,
    128.0,
    192.0,
    256.0,
    384.0,
    512.0,
    1024.0,
    2048.0,
    8192.0,
)


@dataclass(frozen=True)
class MetricRow:
    """One metric. `name` ends with `unit`, counters with `_total` behind it; `buckets`: upper bounds."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    unit: str
    labels: tuple[str, ...]
    help: str
    buckets: tuple[float, ...] = ()

    def label_sets(self) -> list[tuple[str, ...]]:
        """Every combination of label values, in the order of `labels`."""
        return list(product(*(LABEL_VALUES[label] for label in self.labels)))


TABLE = (
    MetricRow("mlis_requests_total", "counter", "requests", ("method", "code"), "Requests that ended, by gRPC status."),
    MetricRow("mlis_in_flight_requests", "gauge", "requests", ("method",), "Requests that began and have not ended."),
    MetricRow(
        "mlis_request_duration_seconds",
        "histogram",
        "seconds",
        ("method", "outcome"),
        "From the received message to its encoded answer; outcome is ok for status OK, else error.",
        _SECONDS,
    ),
    MetricRow("mlis_request_errors_total", "counter", "errors", ("reason",), "Requests that failed, by reason."),
    MetricRow(
        "mlis_caller_requests_total",
        "counter",
        "requests",
        ("caller",),
        "Requests that ended, by the name of their key; other: without one, or beyond the first 32.",
    ),
    MetricRow(
        "mlis_caller_tokens_total", "counter", "tokens", ("caller",), "Tokens of the texts that each caller sent."
    ),
    MetricRow(
        "mlis_caller_limited_requests_total",
        "counter",
        "requests",
        ("caller",),
        "Requests refused because their caller may ask for no more (CALLER_LIMIT).",
    ),
    MetricRow(
        "mlis_request_stage_seconds",
        "histogram",
        "seconds",
        ("stage",),
        "Time that an answered request spent in each stage; the stages follow each other without a gap.",
        _SECONDS,
    ),
    MetricRow("mlis_texts_total", "counter", "texts", ("method",), "Texts in answered Embed and EmbedStream requests."),
    MetricRow(
        "mlis_pairs_total", "counter", "pairs", ("method",), "Pairs scored in answered Score and Rerank requests."
    ),
    MetricRow(
        "mlis_truncated_texts_total",
        "counter",
        "texts",
        (),
        "Texts of answered requests that were cut at the model's limit.",
    ),
    MetricRow("mlis_tokenized_texts_total", "counter", "texts", (), "Texts turned into tokens."),
    MetricRow("mlis_tokenized_tokens_total", "counter", "tokens", (), "Tokens that the tokenizer made."),
    MetricRow(
        "mlis_tokenize_duration_seconds",
        "histogram",
        "seconds",
        (),
        "Turning one request's texts into tokens.",
        _SECONDS,
    ),
    MetricRow("mlis_queue_wait_seconds", "histogram", "seconds", (), "A text's wait from queue to batch.", _SECONDS),
    MetricRow("mlis_queue_texts", "gauge", "texts", (), "Texts that wait for a batch."),
    MetricRow("mlis_queue_tokens", "gauge", "tokens", (), "Tokens of the texts that wait for a batch."),
    MetricRow(
        "mlis_batches_total",
        "counter",
        "batches",
        ("closed_by", "outcome"),
        "Batches that the model ended, by what closed them; outcome error: the model raised.",
    ),
    MetricRow("mlis_in_flight_batches", "gauge", "batches", (), "Batches that the model works on."),
    MetricRow("mlis_batch_texts", "histogram", "texts", (), "Texts in an answered batch.", _TEXTS),
    MetricRow(
        "mlis_batch_tokens", "histogram", "tokens", (), "Tokens in an answered batch, padding included.", _TOKENS
    ),
    MetricRow("mlis_text_tokens", "histogram", "tokens", (), "Length of a text in an answered batch.", _LENGTHS),
    MetricRow(
        "mlis_batch_compute_seconds", "histogram", "seconds", (), "The model's time for an answered batch.", _SECONDS
    ),
    MetricRow(
        "mlis_tokens_total", "counter", "tokens", (), "Tokens of texts in answered batches, padding not included."
    ),
    MetricRow("mlis_padding_tokens_total", "counter", "tokens", (), "Padding in answered batches."),
    MetricRow(
        "mlis_shared_texts_total",
        "counter",
        "texts",
        (),
        "Texts answered by the computation of an equal one of another request in flight.",
    ),
    MetricRow("mlis_cache_hits_total", "counter", "hits", (), "Texts answered out of the cache of finished rows."),
    MetricRow(
        "mlis_cache_misses_total", "counter", "misses", (), "Texts that the cache did not have; none while it is off."
    ),
    MetricRow("mlis_cache_bytes", "gauge", "bytes", (), "What the cache holds, of cache.max_mb."),
    MetricRow(
        "mlis_event_loop_lag_seconds", "histogram", "seconds", (), "How late the event loop ran what was due.", _SECONDS
    ),
    MetricRow(
        "mlis_batch_slots", "gauge", "slots", (), "Batches that the model can work on at a time; 0 before it is loaded."
    ),
    MetricRow(
        "mlis_engine_restarts_total",
        "counter",
        "restarts",
        (),
        "Processes of the model that ended and were replaced (model.process_per_stream).",
    ),
    MetricRow("mlis_event_loop_tasks", "gauge", "tasks", (), "Tasks of the event loop that have not ended."),
    MetricRow(
        "mlis_workers", "gauge", "workers", (), "Processes that serve; with server.workers, those that are ready."
    ),
    MetricRow(
        "mlis_worker_restarts_total",
        "counter",
        "restarts",
        (),
        "Workers that ended and were started again (server.workers).",
    ),
    MetricRow("mlis_uptime_seconds", "gauge", "seconds", (), "Time since the metrics began."),
    MetricRow("mlis_gpu_memory_bytes", "gauge", "bytes", (), "GPU memory that tensors hold; 0 where no GPU is in use."),
    # The last two carry the names that every Prometheus client library gives them.
    MetricRow(
        "process_cpu_seconds_total", "counter", "seconds", (), "CPU time of the server's processes, user and system."
    ),
    MetricRow("process_resident_memory_bytes", "gauge", "bytes", (), "Resident memory of the server's processes."),
)


def buckets_of(name: str) -> tuple[float, ...]:
    """The upper bounds of a histogram."""
    return next(row.buckets for row in TABLE if row.name == name)
