"""What the model did since the start, summed over all protocols: Triton's statistics of a model."""

from dataclasses import dataclass

from ml_inference_server.metrics.exposition import Series
from ml_inference_server.metrics.table import CLOSED_BY
from ml_inference_server.utils.stages import STAGE_NAMES

# Requests that the tokenizer alone answers.
_WITHOUT_MODEL = ("tei.tokenize", "tei.decode")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFigures:
    """answered, failed: requests. stages_s: the time of the answered ones, by stage; the stages add up to all of it.

    rows: texts and pairs of answered requests. batches: that the model answered, the last one at last_batch_unix_s
    (0 before the first).
    """

    answered: int
    stages_s: dict[str, float]
    failed: int
    failed_s: float
    rows: int
    batches: int
    last_batch_unix_s: float


def model_figures(series: Series, last_batch_unix_s: float) -> ModelFigures:
    numbers, histograms = series.numbers, series.histograms
    stages = {name: histograms["mlis_request_stage_seconds"][(name,)] for name in STAGE_NAMES}
    failed = [
        histogram
        for (method, outcome), histogram in histograms["mlis_request_duration_seconds"].items()
        if outcome == "error" and method not in _WITHOUT_MODEL
    ]
    return ModelFigures(
        answered=sum(stages["engine"].counts),
        stages_s={name: histogram.total for name, histogram in stages.items()},
        failed=sum(sum(histogram.counts) for histogram in failed),
        failed_s=sum(histogram.total for histogram in failed),
        rows=int(sum(numbers["mlis_texts_total"].values()) + sum(numbers["mlis_pairs_total"].values())),
        batches=int(sum(numbers["mlis_batches_total"][reason, "ok"] for reason in CLOSED_BY)),
        last_batch_unix_s=last_batch_unix_s,
    )
