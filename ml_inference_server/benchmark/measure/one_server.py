"""All that is measured of one server: its rows, the search for a rate, its quality."""

from collections.abc import Sequence
from dataclasses import dataclass

from ml_inference_server.benchmark.load.channel import Address, Target
from ml_inference_server.benchmark.load.dataset import Dataset
from ml_inference_server.benchmark.measure.progress import Progress, search_work
from ml_inference_server.benchmark.measure.quality import Slice
from ml_inference_server.benchmark.measure.rate_search import search
from ml_inference_server.benchmark.measure.reference import QualityCheck
from ml_inference_server.benchmark.measure.suite import Bench, refuse_oversized, run_suite
from ml_inference_server.benchmark.result.document import Load, MeasuredServer, ServerFacts
from ml_inference_server.benchmark.result.files import Result
from ml_inference_server.benchmark.target.counters import ServerCounters
from ml_inference_server.benchmark.target.interrupt import Stop
from ml_inference_server.utils.experiment import ExperimentSettings


@dataclass(frozen=True)
class Measurement:
    """What is asked of one server. labelled: what quality is measured on; None: it is not.

    repeats: the numbers of the repeats that are measured now. start_timeout_s: of a server in FP32 for the quality.
    """

    load: ExperimentSettings
    dataset: Dataset
    labelled: Slice | None
    repeats: Sequence[int]
    start_timeout_s: float


async def measure(
    address: Address, http: Address, what: Measurement, result: Result, stop: Stop, progress: Progress
) -> None:
    """Add the rows of one server to `result`, once for each of `what.repeats`; with the first one, its quality, too.

    http: the server's HTTP port, 0 where it is not known. ConfigError before any load if a row cannot be run as asked.
    """
    async with Target(*address) as target, ServerCounters(*http) as sidecar:
        info = ServerFacts.model_validate(await stop.race(target.server_info()))
        refuse_oversized(what.load.batch_sizes, info)
        is_first = result.server(info.variant) is None
        if is_first:
            as_asked = Load.model_validate(what.load.model_dump())
            result.add_server(MeasuredServer(variant=info.variant, info=info, load=as_asked))
        workload = what.dataset.workload(what.load.workload, what.load.seed)
        bench = Bench(target, address, sidecar, info, what.load, workload, stop, progress, result)
        progress.sidecar = sidecar
        try:
            is_there = await run_suite(bench, what.repeats)
            if what.load.slo.p99_ms is not None and is_first:
                for batch_size in what.load.batch_sizes:
                    is_there = is_there and await search(bench, batch_size, search_work(batch_size, what.load))
            if what.labelled is not None and is_first and is_there:
                log = result.files.server_log
                check = QualityCheck(info, what.load, what.labelled, log, what.start_timeout_s, stop, progress)
                result.about_server(info.variant, quality=await check.run(target))
        finally:
            await progress.leave()
