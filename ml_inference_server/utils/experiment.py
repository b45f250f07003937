"""The settings of the benchmark: what load is sent, how often, and what quality a result must have.

What two keys mean together is checked by the benchmark when it uses them: a server may run with any of them.
"""

from typing import Annotated, Literal

from pydantic import Field

from ml_inference_server.utils.section import Section


class ArrivalSettings(Section):
    process: Literal["poisson", "constant"] = Field(
        "poisson", description="How the requests of an open-loop row are spread over time."
    )
    rates: list[Annotated[float, Field(gt=0, le=1e6)]] = Field(
        [], description="Open loop: requests per second that are sent whether or not answers come, one table row each."
    )


class SloSettings(Section):
    p99_ms: float | None = Field(
        None, gt=0, description="Search the highest rate whose 99th percentile stays within this; unset: no search."
    )


class QualitySettings(Section):
    enabled: bool = Field(True, description="Measure quality through the server, beside its speed.")
    pairs: str = Field(
        "", description="Labelled file (qid, pid, query, passage), ranked query by query; empty: the bundled sample."
    )
    qrels: str = Field("", description="TREC judgements of `pairs`; empty: those of the bundled sample.")
    reference: str = Field(
        "", description="Model whose FP32 answers are the yardstick; empty: FP32 of the same weights."
    )
    min_cosine: float = Field(0.97, ge=-1, le=1, description="Gate: least mean cosine to FP32.")
    max_ndcg_loss: float = Field(0.02, ge=0, le=1, description="Gate: most nDCG@10 that may be lost against FP32.")
    min_ndcg: float = Field(0.0, ge=0, le=1, description="Gate: least nDCG@10, whatever FP32 reaches.")


class ExperimentSettings(Section):
    batch_sizes: list[Annotated[int, Field(ge=1, le=65536)]] = Field(
        [1, 4, 8], min_length=1, description="Texts (or pairs) per request, one table row each."
    )
    concurrency_levels: list[Annotated[int, Field(ge=1, le=4096)]] = Field(
        [1, 4, 16], description="Closed loop: requests in flight, one table row each; [] with an open loop only."
    )
    benchmark_requests: int = Field(100, ge=1, le=10_000_000, description="Measured requests per row.")
    duration_s: float = Field(
        0.0, ge=0, le=86_400, description="Measure each row for so long, instead of `benchmark_requests`; 0: by count."
    )
    warmup_iterations: int = Field(
        10,
        ge=0,
        le=1_000_000,
        description="Requests of one warm-up round, not measured; rounds go on until they no longer get faster.",
    )
    repeats: int = Field(
        3, ge=1, le=100, description="How often each row is measured: all rows in turn, then all of them again."
    )
    workload: Literal["queries", "passages", "pairs"] = Field(
        "pairs", description="queries and passages are embedded, pairs are scored."
    )
    streaming: bool = Field(False, description="Send over one EmbedStream for each client process, not unary calls.")
    dataset: str = Field(
        "auto", min_length=1, description="auto (ms_marco, else sample), ms_marco, sample, or a file of MS MARCO text."
    )
    seed: int = Field(0, ge=0, description="Order in which the texts are sent, and the times of an open loop.")
    request_timeout_ms: int = Field(60_000, ge=1, le=86_400_000, description="Deadline of each benchmark request.")
    client_processes: int = Field(
        0, ge=0, le=64, description="Processes that send; 0: one for each 500 requests/s of an open loop, else one."
    )
    in_process_s: float = Field(
        3.0,
        ge=0,
        le=600,
        description="Time the same backend without a server for at least so long, beside a suite; 0: do not.",
    )
    arrival: ArrivalSettings = Field(default_factory=ArrivalSettings, description="The open loop.")
    slo: SloSettings = Field(default_factory=SloSettings, description="The search for the highest rate.")
    quality: QualitySettings = Field(default_factory=QualitySettings, description="The quality gate.")
