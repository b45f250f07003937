"""What the figures say could be done, in words, and only when they carry it."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

# In the window, before anything is concluded from it.
LEAST_REQUESTS = 20
LEAST_BATCHES = 20
# From here on a figure is worth a sentence.
HIGH_PADDING_SHARE = 0.25
HIGH_TRUNCATED_SHARE = 0.05
HIGH_BUSY_SHARE = 0.8
HIGH_LAG_MS = 50.0
HIGH_MACHINE_CPU_PERCENT = 90.0


def hints(figures: Mapping[str, Any], settings: Callable[[], Mapping[str, Any]]) -> list[str]:
    """Sentences, the most urgent first. figures: a snapshot. settings: the tree in force, asked for when needed."""
    return [*_refusals(figures), *_truncation(figures), *_batches(figures, settings), *_stages(figures), *_cpu(figures)]


def _refusals(figures: Mapping[str, Any]) -> Iterator[str]:
    errors, period = figures["errors_by_reason"], f"in the last {figures['window_s']} s"
    busy = figures["batch"]["busy_share"] or 0.0
    faster = (
        f"The model is the limit ({_percent(busy)} busy): a faster backend or precision (model.backend: auto) "
        "or another replica helps"
    )
    if refused := errors.get("QUEUE_FULL"):
        if busy >= HIGH_BUSY_SHARE:
            cause = f"{faster}, a longer queue only adds waiting."
        else:
            cause = (
                f"The model is only {_percent(busy)} busy: batching.max_queue_requests and batching.max_queue_tokens "
                "refuse bursts that it could work off."
            )
        yield f"The queue is full: {_count(refused, 'request was', 'requests were')} refused {period}. {cause}"
    if refused := errors.get("WAIT_TOO_LONG"):
        uneven = f"The model was {_percent(busy)} busy: spread out, or given more time, more would fit."
        cause = f"{faster}." if busy >= HIGH_BUSY_SHARE else uneven
        yield (
            f"{_count(refused, 'request was', 'requests were')} refused {period}, because waiting would have taken "
            f"most of the time that their callers allow. {cause}"
        )
    if refused := errors.get("CALLER_LIMIT"):
        yield (
            f"{_count(refused, 'request was', 'requests were')} refused {period}, because their callers may ask for no "
            "more (server.limits, or the limits of a key)."
        )
    if late := errors.get("DEADLINE_EXCEEDED"):
        yield (
            f"{_count(late, 'request', 'requests')} ran out of time {period}: the callers' deadlines are shorter than "
            "the latency under this load."
        )
    if failed := sum(errors.get(each, 0) for each in ("BACKEND_ERROR", "NON_FINITE_OUTPUT", "OUT_OF_MEMORY")):
        yield f"The model failed on {_count(failed, 'request', 'requests')} {period}: the server's log has the cause."


def _truncation(figures: Mapping[str, Any]) -> Iterator[str]:
    cut, computed = figures["truncated_texts"], sum(figures["distributions"]["text_tokens"]["counts"])
    if computed >= LEAST_REQUESTS and cut > HIGH_TRUNCATED_SHARE * computed:
        yield (
            f"{_count(cut, 'text was', 'texts were')} cut at the model's limit in the last {figures['window_s']} s: "
            "what lies behind it has no part in the answers. Split long texts, or use a model that takes longer ones."
        )


def _batches(figures: Mapping[str, Any], settings: Callable[[], Mapping[str, Any]]) -> Iterator[str]:
    batch = figures["batch"]
    count = sum(batch["closed_by"].values())
    if count < LEAST_BATCHES:
        return
    if batch["padding_share"] >= HIGH_PADDING_SHARE:
        if settings().get("batching", {}).get("length_grouping", True):
            remedy = "the texts that wait together differ in length; more requests in flight let like lengths meet"
        else:
            remedy = "batching.length_grouping is off; turned on, it puts texts of like length together"
        yield (
            f"{_percent(batch['padding_share'])} of the work is padding, about {batch['mean_padding_ms']:.1f} ms of "
            f"each {batch['mean_compute_ms']:.1f} ms batch: {remedy}."
        )
    timers, idle = batch["closed_by"]["timer"] / count, 1 - (batch["busy_share"] or 0.0)
    if timers >= 0.5 and idle >= 0.5:
        yield (
            f"{_percent(timers)} of the batches waited for batching.timeout_ms while the model was idle "
            f"{_percent(idle)} of the time: a lower one answers sooner."
        )


def _stages(figures: Mapping[str, Any]) -> Iterator[str]:
    stages, busy = figures["stages_ms"], figures["batch"]["busy_share"] or 0.0
    if stages is None or figures["requests_per_s"] * figures["window_s"] < LEAST_REQUESTS or not stages["total"]:
        return
    queue, tokenize = stages["queue"] / stages["total"], stages["tokenize"] / stages["total"]
    if queue >= 0.5 and busy >= HIGH_BUSY_SHARE:
        yield (
            f"Requests spend {_percent(queue)} of their time in the queue, and the model is {_percent(busy)} busy: "
            "more comes in than it can do at once. A faster backend or precision (model.backend: auto) shortens both."
        )
    if tokenize >= 0.3 and stages["tokenize"] >= 1:
        yield f"Turning text into tokens takes {_percent(tokenize)} of the mean request ({stages['tokenize']:.1f} ms)."


def _cpu(figures: Mapping[str, Any]) -> Iterator[str]:
    lag = figures["loop_lag_ms"]
    if lag is not None and lag["p99"] >= HIGH_LAG_MS:
        yield (
            f"The event loop runs up to {lag['p99']:.0f} ms late (p99), and every answer with it: the CPUs are "
            "overloaded, or something blocks the loop."
        )
    machine = figures["machine_cpu_percent"]
    others = machine - figures["cpu_percent"] / figures["cpu_count"]
    if machine >= HIGH_MACHINE_CPU_PERCENT and others >= 30:
        yield (
            f"Other processes use {others:.0f}\u00a0% of this machine's CPU, a load generator among them if it runs "
            "here: this server could give more if it were alone."
        )


def _percent(share: float) -> str:
    return f"{100 * share:.0f}\u00a0%"


def _count(number: int, one: str, many: str) -> str:
    return f"{number:,} {one if number == 1 else many}"
