"""The result of a benchmark as a picture: for each dtype a roofline, and the seconds of a step against the batch.

Roofline: Williams, Waterman and Patterson, "Roofline: An Insightful Visual Performance Model for Multicore
Architectures" (CACM 52, 2009). The roof is what this machine was measured to do, bytes on the slope, operations on top.
"""

import statistics
from typing import Any

import numpy as np

MARKERS = "osD^vP*X"


def write_plot(document: dict[str, Any], path: str) -> None:
    """Draws a PNG, whatever the ending of `path`. matplotlib is imported here, without a display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    dtypes = list(dict.fromkeys(row["dtype"] for row in document["results"]))
    figure = Figure(figsize=(12, 4.6 * len(dtypes)), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(dtypes), 2, squeeze=False)
    contestants = list(dict.fromkeys(row["contestant"] for row in document["results"]))
    styles = {name: (f"C{i}", MARKERS[i % len(MARKERS)]) for i, name in enumerate(contestants)}
    for dtype, (left, right) in zip(dtypes, grid, strict=True):
        rows = [row for row in document["results"] if row["dtype"] == dtype and row["status"] == "ok"]
        if rows:
            _draw_roofline(left, rows, styles)
            _draw_latency(right, rows, styles)
        left.set_title(f"{dtype}: hollow: step, filled: prefill")
        right.set_title(f"{dtype}: a step of the whole batch")
    figure.suptitle(f"{document['source']}, {document['gpu'] or document['processor']}, {document['commit']}")
    figure.savefig(path, format="png", dpi=120)


def roof(rows: list[dict[str, Any]]) -> tuple[float, float] | None:
    """The machine's bytes and operations per second, medians over all samples; None where one was not measured."""
    names = ("bytes_per_second", "flops_per_second")
    bandwidth, rate = ([row[name] for row in rows if row.get(name)] for name in names)
    return (statistics.median(bandwidth), statistics.median(rate)) if bandwidth and rate else None


def points(row: dict[str, Any]) -> list[tuple[str, float, float]]:
    """What was done, operations per byte, operations per second; of the step and of the prefill."""
    return [
        (name, row[f"{name}_flops"] / row[f"{name}_bytes"], row[f"{name}_flops"] / row[f"{name}_seconds"])
        for name in ("step", "prefill")
        if row[f"{name}_seconds"]
    ]


def floors_of(rows: list[dict[str, Any]]) -> dict[int, float]:
    """Batch to the seconds in which memory gives what a step needs, the median of the contestants' minutes."""
    known = [(row["batch"], row["floor_seconds"]) for row in rows if row["floor_seconds"]]
    batches = sorted({batch for batch, _ in known})
    return {batch: statistics.median(seconds for own, seconds in known if own == batch) for batch in batches}


def _draw_roofline(axes, rows: list[dict[str, Any]], styles: dict[str, tuple[str, str]]) -> None:
    for row in rows:
        color, marker = styles[row["contestant"]]
        for name, intensity, speed in points(row):
            face = color if name == "prefill" else "none"
            axes.scatter(intensity, speed / 1e9, edgecolors=color, facecolors=face, marker=marker)
    if ceilings := roof(rows):
        bandwidth, rate = ceilings
        low, high = axes.get_xlim()
        intensities = np.geomspace(max(low, 0.1), max(high, 4 * rate / bandwidth), 100)
        axes.plot(intensities, np.minimum(intensities * bandwidth, rate) / 1e9, color="black", label="this machine")
        axes.legend(fontsize=8, title=f"{bandwidth / 1e9:.0f} GB/s, {rate / 1e9:.0f} Gflop/s", title_fontsize=8)
    axes.set(xscale="log", yscale="log", xlabel="operations per byte", ylabel="Gflop/s")


def _draw_latency(axes, rows: list[dict[str, Any]], styles: dict[str, tuple[str, str]]) -> None:
    prompts = sorted({row["prompt_tokens"] for row in rows})
    for line, prompt in zip(("-", "--", ":", "-.") * len(prompts), prompts, strict=False):
        of_prompt = [row for row in rows if row["prompt_tokens"] == prompt]
        names = dict.fromkeys(row["contestant"] for row in of_prompt)
        for name in names:
            own = sorted((row["batch"], row["step_seconds"]) for row in of_prompt if row["contestant"] == name)
            color, marker = styles[name]
            label = name if len(prompts) == 1 else f"{name}, prompt {prompt}"
            values = [1e3 * seconds if seconds else np.nan for _, seconds in own]
            axes.plot([batch for batch, _ in own], values, line, color=color, marker=marker, label=label)
        floors = floors_of(of_prompt)
        axes.plot(list(floors), [1e3 * seconds for seconds in floors.values()], line, color="black", label="floor")
    axes.set(yscale="log", xlabel="batch", ylabel="ms", xticks=sorted({row["batch"] for row in rows}))
    axes.legend(fontsize=8)
