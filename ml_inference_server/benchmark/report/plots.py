"""The plots of a report, as SVG that is the same for the same figures."""

import io
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ml_inference_server.benchmark.load.records import Records, ok_only
from ml_inference_server.benchmark.report.tables import items_unit
from ml_inference_server.benchmark.result.aggregate import Row

# Okabe and Ito's colours, which colour-blind people can tell apart.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442", "#000000")
_MARKERS = "osD^vP*X"
_MOST_CURVES = 8


class Point(NamedTuple):
    """One configuration in the plot of speed against quality. low, high: interval of the speed."""

    name: str
    speed: float
    low: float
    high: float
    quality: float
    passed: bool
    is_best: bool


class Panel(NamedTuple):
    """Curves over one logarithmic axis; each point as (median, lowest, highest) of its repeats."""

    title: str
    x_label: str
    y_label: str
    xs: Sequence[float]
    curves: Mapping[str, Sequence[tuple[float, float, float]]]
    log_y: bool = False


class Bar(NamedTuple):
    """A bar with a line from `low` to `high`; `stands_out` gives it the colour of what is ours."""

    label: str
    value: float
    low: float
    high: float
    stands_out: bool


def of_bars(groups: Mapping[str, Sequence[Bar]], title: str) -> bytes:
    """One panel for each group, side by side, with the same bars in each."""

    def draw(canvas: Any, _pyplot: Any) -> None:
        canvas.suptitle(title, fontsize=9)
        panels = canvas.subplots(1, len(groups), sharey=True, squeeze=False)[0]
        for axes, (name, bars) in zip(panels, groups.items(), strict=True):
            values = [bar.value for bar in bars]
            reach = [[bar.value - bar.low for bar in bars], [bar.high - bar.value for bar in bars]]
            colours = [_COLOURS[0] if bar.stands_out else "#9aa0a6" for bar in bars]
            drawn = axes.barh([bar.label for bar in bars], values, xerr=reach, color=colours, capsize=2)
            axes.bar_label(drawn, [f"{value:.1f}x" for value in values], label_type="center", color="white", fontsize=8)
            axes.grid(visible=False, axis="y")
            axes.set_title(name, fontsize=9)
        panels[0].invert_yaxis()  # shared by all

    return _svg(draw, 3.4 * len(groups) + 1.6, 0.42 * max(map(len, groups.values())) + 1.2, title.split("\n")[0])


def of_panels(panels: Sequence[Panel], columns: int, title: str) -> bytes:
    """The panels line by line."""

    def draw(canvas: Any, _pyplot: Any) -> None:
        canvas.suptitle(title[:140])
        for place, panel in enumerate(panels, 1):
            axes = canvas.add_subplot(math.ceil(len(panels) / columns), columns, place)
            for number, (name, points) in enumerate(panel.curves.items()):
                middle, low, high = np.array(points).T
                axes.errorbar(panel.xs, middle, [middle - low, high - middle], label=name, capsize=3, **_look(number))
            axes.set_xscale("log")
            axes.set_xticks(panel.xs, [f"{x:.3g}" for x in panel.xs])
            axes.minorticks_off()
            if panel.log_y:
                axes.set_yscale("log")
                _plain_numbers(axes.yaxis)
            else:
                axes.set_ylim(bottom=0)
            axes.set(xlabel=panel.x_label, ylabel=panel.y_label, title=panel.title)
            axes.title.set_fontsize(9)
            axes.legend(fontsize=7)

    return _svg(draw, 4.6 * columns, 3.6 * math.ceil(len(panels) / columns) + 0.3, title)


def _svg(draw: Callable[[Any, Any], None], width: float, height: float, description: str) -> bytes:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    style: Any = {"svg.hashsalt": "ml_inference_server", "font.size": 9, "axes.grid": True, "grid.alpha": 0.3}
    with matplotlib.rc_context(style):
        canvas = pyplot.figure(figsize=(width, height), layout="constrained")
        try:
            draw(canvas, pyplot)
            buffer = io.BytesIO()
            canvas.savefig(buffer, format="svg", metadata={"Date": None, "Description": description})
        finally:
            pyplot.close(canvas)
    return buffer.getvalue()


def of_rows(rows: Sequence[Row], raw: Mapping[str, Records], title: str) -> bytes | None:
    """Throughput and latency against concurrency and rate, and the latency distribution; None without a sound row."""
    sound = [row for row in rows if row.is_sound]
    closed = [row for row in sound if row.first.concurrency]
    paced = [row for row in sound if row.first.rate_per_s]
    panels: list[Callable[[Any], None]] = []
    unit = items_unit(sound)
    for chosen, what in ((closed, "concurrency"), (paced, "rate_per_s")):
        if chosen:
            panels.append(_throughput(chosen, what, unit))
            panels.append(_latency(chosen, what))
    if any(run.raw in raw for row in sound for run in row.runs):
        panels.append(_distribution(sound, raw))
    if not panels:
        return None
    columns = min(len(panels), 3)
    lines = math.ceil(len(panels) / columns)

    def draw(canvas: Any, _pyplot: Any) -> None:
        canvas.suptitle(title[:140])
        for number, panel in enumerate(panels, 1):
            panel(canvas.add_subplot(lines, columns, number))

    return _svg(draw, 4.6 * columns, 3.6 * lines + 0.3, title)


def _curves(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows that differ in load only, under a name that says what they share."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        variant = f"{row.variant}, " if row.variant else ""
        found.setdefault(f"{variant}batch {row.first.batch_size}", []).append(row)
    return found


def _axis(what: str) -> str:
    return "requests in flight" if what == "concurrency" else "offered requests/s"


def _load_of(row: Row, what: str) -> float:
    return (row.first.concurrency if what == "concurrency" else row.first.rate_per_s) or 0.0


def _throughput(rows: Sequence[Row], what: str, unit: str) -> Callable[[Any], None]:
    def panel(axes: Any) -> None:
        for number, (name, curve) in enumerate(_curves(rows).items()):
            xs = [_load_of(row, what) for row in curve]
            figures = [row.speed for row in curve if row.speed]
            bars = [
                [0 if math.isnan(f.low) else max(f.value - f.low, 0) for f in figures],
                [0 if math.isnan(f.high) else max(f.high - f.value, 0) for f in figures],
            ]
            axes.errorbar(xs, [f.value for f in figures], bars, label=name, capsize=3, **_look(number))
        _ticks(axes, rows, what)
        axes.set_ylim(bottom=0)
        axes.set(xlabel=_axis(what), ylabel=f"{unit}/s", title=f"Throughput, {unit}/s (95 % intervals)")
        axes.legend(fontsize=7)

    return panel


def _latency(rows: Sequence[Row], what: str) -> Callable[[Any], None]:
    def panel(axes: Any) -> None:
        for number, (name, curve) in enumerate(_curves(rows).items()):
            for percentile, line in ((50, "-"), (95, "--"), (99, ":")):
                known = [(_load_of(row, what), f.value) for row in curve if (f := row.latency_ms[percentile])]
                if known:
                    label = name if line == "-" else None
                    axes.plot(*zip(*known, strict=True), line, label=label, **_look(number))
        _ticks(axes, rows, what)
        axes.set_yscale("log")
        _plain_numbers(axes.yaxis)
        axes.set(xlabel=_axis(what), ylabel="ms", title="Latency: p50 solid, p95 dashed, p99 dotted (where earned)")
        axes.title.set_fontsize(8)
        if axes.get_legend_handles_labels()[1]:
            axes.legend(fontsize=7)

    return panel


def _distribution(rows: Sequence[Row], raw: Mapping[str, Records]) -> Callable[[Any], None]:
    def panel(axes: Any) -> None:
        for number, row in enumerate(_chosen(rows)):
            done = [ok_only(raw[run.raw]) for run in row.runs if run.raw in raw]
            if not done:
                continue
            latencies = np.sort(np.concatenate([(d["done_s"] - d["due_s"]) * 1e3 for d in done]))
            beyond = 1 - np.arange(len(latencies)) / len(latencies)
            axes.step(latencies, beyond, where="post", label=str(row), color=_COLOURS[number % len(_COLOURS)])
        axes.set(xscale="log", yscale="log", xlabel="ms", ylabel="share of requests that took longer")
        _plain_numbers(axes.xaxis, axes.yaxis)
        axes.set_title("Latency distribution")
        axes.legend(fontsize=6)

    return panel


def _chosen(rows: Sequence[Row]) -> Sequence[Row]:
    """The most curves that an eye can tell apart, spread over all rows."""
    if len(rows) <= _MOST_CURVES:
        return rows
    return [rows[round(i * (len(rows) - 1) / (_MOST_CURVES - 1))] for i in range(_MOST_CURVES)]


def _ticks(axes: Any, rows: Sequence[Row], what: str) -> None:
    values = sorted({_load_of(row, what) for row in rows})
    axes.set_xscale("log")
    axes.set_xticks(values, [f"{value:g}" for value in values])
    axes.minorticks_off()


def _plain_numbers(*log_axes: Any) -> None:
    """1, 2, 5, 10, ... where matplotlib writes powers of ten."""
    from matplotlib import ticker

    for axis in log_axes:
        for set_formatter in (axis.set_major_formatter, axis.set_minor_formatter):
            set_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "125" else ""))


def _look(number: int) -> dict[str, Any]:
    return {"color": _COLOURS[number % len(_COLOURS)], "marker": _MARKERS[number % len(_MARKERS)], "markersize": 4}


def speed_against_quality(points: Sequence[Point], unit: str, quality: str) -> bytes | None:
    """One point for each configuration; those that nobody beats are joined. None without points."""
    if not points:
        return None

    def draw(canvas: Any, _pyplot: Any) -> None:
        axes = canvas.add_subplot()
        front = sorted((p for p in points if p.is_best), key=lambda p: p.speed)
        axes.plot([p.speed for p in front], [p.quality for p in front], color="#999999", zorder=1, label="Pareto front")
        for number, point in enumerate(sorted(points, key=lambda p: -p.speed)):
            known = not math.isnan(point.low)
            reach = [[point.speed - point.low], [point.high - point.speed]] if known else None
            look = {"color": _COLOURS[number % len(_COLOURS)], "marker": "o" if point.passed else "x"}
            label = point.name + ("" if point.passed else " (fails its gate)")
            axes.errorbar([point.speed], [point.quality], xerr=reach, fmt=" ", capsize=3, label=label, **look)
        axes.set(xlabel=f"{unit}, against the baseline (right is faster)", ylabel=quality)
        axes.ticklabel_format(axis="y", useOffset=False)
        axes.set_title("Speed against quality")
        axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5))

    return _svg(draw, 8.5, 4.2, "Speed against quality")


def throughput_against_latency(curves: Mapping[str, Sequence[tuple[float, float]]], unit: str) -> bytes | None:
    """For each configuration its best loads as (items per second, median latency in ms); None without any."""
    if not curves:
        return None

    def draw(canvas: Any, _pyplot: Any) -> None:
        axes = canvas.add_subplot()
        for number, (name, points) in enumerate(curves.items()):
            axes.plot(*zip(*sorted(points), strict=True), label=name, linewidth=1, **_look(number))
        axes.set(xscale="log", yscale="log", xlabel=f"{unit}/s (right is better)", ylabel="p50 ms (down is better)")
        _plain_numbers(axes.xaxis, axes.yaxis)
        axes.set_title("Latency against throughput: the loads of each configuration that no other of its loads beats")
        axes.title.set_fontsize(9)
        axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5))

    return _svg(draw, 8.5, 4.2, "Latency against throughput")
