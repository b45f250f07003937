"""The JSON of a result and of a summary, as types. Written and read in stored.py only.

A measured value is never changed: what is found out later about a server or a row is a copy with that field replaced.
"""

from collections.abc import Mapping
from enum import StrEnum
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Discriminator, Tag

SCHEMA = 3
SUMMARY = "summary"


class Part(BaseModel):
    """Fields that it does not know are left out on reading: a newer version of the same schema may have added them."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False, protected_namespaces=())


class Verbatim(Part):
    """Keeps the fields that it does not know: the server's own words, or settings of another version."""

    model_config = ConfigDict(extra="allow")


class Status(StrEnum):
    """What a row is worth."""

    VALID = "valid"
    FAILURES = "failures"
    INVALID = "invalid"
    INTERRUPTED = "interrupted"


class Cause(StrEnum):
    """Why a row is not valid; its `reason` says it in words."""

    REQUESTS_FAILED = "requests_failed"
    NOTHING_ANSWERED = "nothing_answered"
    CLIENT_LATE = "client_late"
    CLIENT_MISCOUNTED = "client_miscounted"
    CLIENT_PROCESS_FAILED = "client_process_failed"
    SERVER_GONE = "server_gone"
    SERVER_CHANGED = "server_changed"
    INTERRUPTED = "interrupted"


class Purpose(StrEnum):
    """What a row is to the search for the highest rate."""

    PROBE = "probe"
    CONFIRMATION = "confirmation"


class Verdict(StrEnum):
    """How an experiment of a summary ended."""

    OK = "ok"
    REFUSED = "refused"
    REFUSED_IN_PART = "refused in part"
    FAILURES = "FAILURES"
    INTERRUPTED = "interrupted"
    FAILED = "FAILED"


# A row


class LatencyMs(Part):
    avg: float
    p50: float
    p95: float
    p99: float

    def at(self, percentile: int) -> float:
        return {50: self.p50, 95: self.p95, 99: self.p99}[percentile]


class LagMs(Part):
    """How late the sender itself was."""

    p50: float
    p99: float
    max: float


class ServerMs(Part):
    """Means over the answered requests, as the server timed them. outside: client, wire and gRPC."""

    tokenize: float
    queue: float
    compute: float
    total: float
    outside: float


class Figures(Part):
    """What is made from the records of a row. fell_behind: None of a closed loop."""

    ok: int
    errors: dict[str, int]
    unfinished: int
    pairs: int
    texts: int
    seconds: float
    requests_per_s: float
    pairs_per_s: float | None
    texts_per_s: float
    latency_ms: LatencyMs | None
    fell_behind: bool | None = None
    lag_ms: LagMs | None
    server_ms: ServerMs | None


class Batches(Part):
    """From the server's counters over the row. tokens: real ones; None in results of earlier versions.

    shared_texts, cached_texts: that were not computed by themselves, see docs/batching.md.
    """

    padding_share: float | None
    mean_batch: float | None
    tokens: float | None = None
    shared_texts: float = 0
    cached_texts: float = 0


class FirstError(Part):
    after_s: float
    code: str
    message: str


class Warmup(Part):
    requests: int
    ok: int
    errors: dict[str, int]
    rounds: int
    settled: bool


class ClientUse(Part):
    processes: int
    cpu_share: float | None


class MachineConditions(Part):
    """What else went on while a row was measured. Shares are of all CPU time, 0..1; None where it cannot be told."""

    steal_share: float | None
    others_share: float | None
    clock_mhz: tuple[float, float] | None
    throttled: int | None


class SameLoad(NamedTuple):
    """What two rows must share to be compared."""

    workload: str
    streaming: bool
    batch_size: int
    concurrency: int | None
    rate_per_s: float | None
    process: str | None
    is_searched: bool


class Run(Figures):
    """One row, measured once. concurrency: of a closed loop, rate_per_s and process: of an open one.

    lost: the server was gone or another one afterwards. raw: the name of its records. by_time: measured for a time, so
    `requests` are those that were sent.
    """

    variant: str
    batch_size: int
    concurrency: int | None
    rate_per_s: float | None
    process: str | None
    streaming: bool
    workload: Literal["queries", "passages", "pairs"]
    repeat: int
    slo: Purpose | None
    status: Status
    cause: Cause | None
    reason: str
    lost: bool
    requests: int
    by_time: bool
    started: int
    distinct_texts: int
    batches: Batches | None
    first_error: FirstError | None
    warmup: Warmup
    client: ClientUse
    conditions: MachineConditions | None
    raw: str

    @property
    def is_open(self) -> bool:
        return bool(self.rate_per_s)

    @property
    def scores(self) -> bool:
        return self.workload == "pairs"

    @property
    def is_probe(self) -> bool:
        """It was meant to find a limit, so it is no row of the result."""
        return self.slo is Purpose.PROBE

    @property
    def same_load(self) -> SameLoad:
        return SameLoad(
            self.workload,
            self.streaming,
            self.batch_size,
            self.concurrency,
            self.rate_per_s,
            self.process,
            self.slo is not None,
        )


# A server


class Requested(Verbatim):
    model: str
    backend: str
    device: str
    quantization: str


class Resolved(Verbatim):
    """What runs. Empty or False where the server is of a version that did not tell."""

    model: str
    backend: str
    task: str
    device: str
    device_name: str
    dtype: str
    instruction_set: str
    threads: int
    concurrency: int
    max_tokens: int
    execution_provider: str
    weights_file: str
    source: str
    weights_sha256: str
    random_weights: bool
    model_sha256: str = ""
    compiled: bool = False


class ServerFacts(Verbatim):
    """What a server says of itself."""

    server_version: str
    experiment: str
    variant: str
    requested: Requested
    resolved: Resolved
    fallbacks: list[str]
    title: str
    settings: dict[str, Any]
    max_texts: int
    instance_id: str
    pid: int


class Arrival(Verbatim):
    process: str
    rates: list[float]


class Load(Verbatim):
    """The experiment's settings that a report tells."""

    benchmark_requests: int
    duration_s: float
    concurrency_levels: list[int]
    arrival: Arrival
    streaming: bool
    repeats: int
    warmup_iterations: int
    workload: str
    seed: int
    request_timeout_ms: int


class SliceFacts(Part):
    """The labelled texts of a quality."""

    name: str
    sha256: str
    queries: int
    pairs: int


class Gate(Part):
    passed: bool
    reasons: list[str]


class Difference(Part):
    """Less FP32, with a 95 % interval."""

    value: float
    low: float
    high: float


class ReferenceFacts(Part):
    """What the answers were compared with."""

    title: str
    weights_sha256: str


class PerQuery(Part):
    qid: list[str]
    ndcg10: list[float]
    mrr10: list[float]


class QualityFigures(Part):
    """How well a server ranks, and how alike FP32 it answers; None where FP32 or the kind of model does not give it."""

    slice: SliceFacts
    # Versions that did not write it took this one.
    ndcg_gain: str = "2^grade - 1"
    ndcg10: float
    mrr10: float
    per_query: PerQuery | None = None
    cosine_mean: float | None
    cosine_min: float | None
    correlation: float | None
    overlap10: float | None
    ndcg10_difference: Difference | None
    mrr10_difference: Difference | None

    @property
    def likeness(self) -> float | None:
        """Mean cosine to FP32, of a cross-encoder the correlation."""
        return self.cosine_mean if self.cosine_mean is not None else self.correlation


class Quality(QualityFigures):
    reference: ReferenceFacts | None = None
    gate: Gate


class QualityNotMeasured(Part):
    """The gate says why; that is no pass."""

    slice: SliceFacts
    gate: Gate


class InProcess(Part):
    """The same backend without a server. batch_size and what follows: None in results of versions with other texts."""

    title: str
    texts_per_s: float
    lowest: float
    highest: float
    workload: str | None = None
    batch_size: int | None = None
    tokens_per_text: float | None = None
    roofline_texts_per_s: float | None = None


class InProcessFailed(Part):
    error: str


def _either(key: str, there: str, absent: str) -> Discriminator:
    """Which of two types a mapping is, by whether it has `key`."""

    def tag(value: Any) -> str:
        has = key in value if isinstance(value, Mapping) else hasattr(value, key)
        return there if has else absent

    return Discriminator(tag)


AnyQuality = Annotated[
    Annotated[Quality, Tag("Quality")] | Annotated[QualityNotMeasured, Tag("QualityNotMeasured")],
    _either("ndcg10", "Quality", "QualityNotMeasured"),
]
AnyInProcess = Annotated[
    Annotated[InProcessFailed, Tag("InProcessFailed")] | Annotated[InProcess, Tag("InProcess")],
    _either("error", "InProcessFailed", "InProcess"),
]
TAGS = {"Quality", "QualityNotMeasured", "InProcess", "InProcessFailed"}


class Memory(Part):
    """Of all processes of a server together.

    rss_bytes: pages that several of them share count in each. pss_bytes: they count once; None where the system does
    not tell (it is Linux that does). peak_rss_bytes: the sum of what each held at most, whenever that was.
    """

    processes: int
    rss_bytes: int
    pss_bytes: int | None
    peak_rss_bytes: int | None


class Start(Part):
    """One start of a server by the benchmark.

    ready_s: from the start of its process until it served. filled_cache: it made what later starts find in the cache.
    memory: at rest, after its load; None if it had ended, or was not measured to the end.
    """

    ready_s: float
    filled_cache: bool
    memory: Memory | None


class MeasuredServer(Part):
    """One server that was measured. died: how it ended by itself, "" if it did not.

    starts: none of a server that somebody else started, and in results of earlier versions.
    """

    variant: str
    info: ServerFacts
    load: Load
    starts: list[Start] = []
    quality: AnyQuality | None = None
    in_process: AnyInProcess | None = None
    died: str = ""

    @property
    def figures(self) -> Quality | None:
        """Its quality, where that was measured."""
        return self.quality if isinstance(self.quality, Quality) else None


# Documents


class NotStarted(Part):
    """A variant whose server did not run."""

    variant: str
    exit_code: int
    message: str


class Probe(Part):
    """One rate that a search tried."""

    rate_per_s: float
    p99_ms: float | None
    met: bool
    reason: str
    client_late: bool


class HighestRate(Part):
    """What a search found for one batch size; rate_per_s is None while none is confirmed."""

    variant: str
    batch_size: int
    p99_ms: float
    rate_per_s: float | None
    probes: list[Probe]
    requests: int


class ClientFacts(Part):
    settings: dict[str, Any]
    channel_options: dict[str, Any]


class DatasetFacts(Part):
    name: str
    sha256: str
    rows: int
    queries: int
    passages: int
    note: str


class Machine(Part):
    cpu: str
    instruction_set: str
    cpus: int
    cpu_quota: float | None
    memory_gib: float
    os: str
    fingerprint: str
    load_average_1min: float


class Git(Part):
    """Both None outside a checkout."""

    commit: str | None
    modified: bool | None


class Document(Part):
    """One result. planned_rows: how many rows there are if all goes well."""

    kind: Literal["single", "suite"]
    name: str
    description: str
    command: str
    started_at: str
    finished_at: str | None
    interrupted: bool
    planned_rows: int
    client: ClientFacts
    dataset: DatasetFacts
    machine: Machine
    versions: dict[str, str]
    git: Git
    servers: list[MeasuredServer]
    not_started: list[NotStarted]
    slo: list[HighestRate]
    runs: list[Run]

    @property
    def rows(self) -> list[Run]:
        """All runs but the probes of a search."""
        return [run for run in self.runs if not run.is_probe]


class Entry(Part):
    """One variant of one experiment in a summary; `result` names the experiment's own report."""

    experiment: str
    variant: str
    verdict: Verdict
    exit_code: int
    message: str
    title: str
    settings_sha256: str
    result: str | None
    commit: str | None
    fingerprint: str | None
    dataset: str | None
    server: MeasuredServer | None
    warnings: list[str]
    runs: list[Run]

    @property
    def name(self) -> str:
        return self.experiment + (f" / {self.variant}" if self.variant else "")


class Summary(Part):
    """All experiments beside each other."""

    kind: Literal["summary"] = "summary"
    command: str
    quick: bool
    started_at: str
    finished_at: str
    finished: bool
    machine: Machine
    versions: dict[str, str]
    git: Git
    not_run: list[str]
    experiments: list[Entry]
