"""The result of benchmarks/attention.py as Markdown tables, in the form of the published page of OPT, and as a picture.

Form: the tables of huggingface.co/docs/transformers/model_doc/opt, "Using Scaled Dot Product Attention". Speed-up is
eager / fused - 1 of the times, as there; saving is 1 - fused / eager of the memory.
"""

from collections.abc import Callable, Iterator
from typing import Any

TITLES = {
    "attention": "Attention alone",
    "decoding": "Attention of one token to a cache",
    "training": "Training",
    "inference": "Inference",
}
CONTESTANTS = {"torch": "PyTorch", "tf": "TensorFlow", "flax": "JAX/Flax", "transformers": "transformers, PyTorch"}
FIGURES = {"attention": ("forward", "both"), "decoding": ("forward",)}  # of attention without a model
MARKERS = "osD^"


def to_markdown(document: dict[str, Any]) -> str:
    """All tables, under a paragraph of what was measured where."""
    groups = dict.fromkeys((row["part"], row["dtype"], row["contestant"]) for row in document["results"])
    lines = [conditions(document), ""]
    for part, dtype, contestant in groups:
        rows = [
            row
            for row in document["results"]
            if (row["part"], row["dtype"], row["contestant"]) == (part, dtype, contestant)
        ]
        lines += [f"### {TITLES[part]}, {CONTESTANTS[contestant]}, {dtype}", "", *table(part, rows, document), ""]
    return "\n".join(lines)


def conditions(document: dict[str, Any]) -> str:
    hardware = document["gpu"] or f"{document['available_processors']} processors of {document['processor']}"
    versions = {**document["versions"], **{name: v for name, v in document["peers"].items() if v}}
    rates = (
        f"{dtype} {found['flops_per_second'] / 1e9:.0f} Gflop/s"
        for dtype, found in document.get("ceilings", {}).items()
        if found["flops_per_second"]
    )
    kept = "".join(
        f"; other cells from commit {it['commit']}, {it['date']}, `{it['command']}`" for it in document.get("kept", [])
    )
    return (
        f"{document['size']}, random weights, {hardware}; {', '.join(f'{name} {v}' for name, v in versions.items())}; "
        f"measured matrix rate: {', '.join(rates) or 'unknown'}; commit {document['commit']}, {document['date']}. "
        f"`{document['command']}`{kept}"
    )


def table(part: str, rows: list[dict[str, Any]], document: dict[str, Any]) -> list[str]:
    if part in FIGURES:
        return attention_table(FIGURES[part], rows, document)
    return pair_table(part, rows, document["fused"])


def pair_table(part: str, rows: list[dict[str, Any]], fused: str) -> list[str]:
    """Eager beside fused, a line for each batch and length; of inference the prompt as well."""
    what = "per batch, s" if part == "training" else "per token, ms"
    scale = 1 if part == "training" else 1e3
    heading = ["batch", "length", f"{what}: eager", fused, "speed-up, %", "memory, MB: eager", fused, "saving, %"]
    shares = part == "training" and any("matrix_rate_share" in r for row in rows for r in row["results"].values())
    heading += [f"of matrix rate, %: eager, {fused}"] if shares else []
    prefills = part == "inference"
    heading += ["prompt, ms: eager", fused, "speed-up, %"] if prefills else []
    heading.append("")
    lines = [line(heading), line(["---"] * len(heading))]
    for row in sorted(rows, key=lambda row: (row["batch"], row["length"])):
        pair = [row["results"].get(name, {}) for name in ("eager", fused)]
        seconds, nbytes = ([result.get(f"step_{unit}") for result in pair] for unit in ("seconds", "bytes"))
        cells = [row["batch"], row["length"], *(number(value, scale, 3 if scale == 1 else 1) for value in seconds)]
        cells += [percent(seconds, lambda eager, fast: eager / fast - 1)]
        cells += [*(number(value, 1e-6, 0) for value in nbytes), percent(nbytes, lambda eager, less: 1 - less / eager)]
        if prefills:
            prompts = [result.get("prefill_seconds") for result in pair]
            cells += [
                *(number(value, 1e3, 1) for value in prompts),
                percent(prompts, lambda eager, fast: eager / fast - 1),
            ]
        if shares:
            cells.append(", ".join(filter(None, (number(r.get("matrix_rate_share"), 100, 0) for r in pair))))
        lines.append(line([*cells, reason(row)]))
    return lines


def attention_table(figures: tuple[str, ...], rows: list[dict[str, Any]], document: dict[str, Any]) -> list[str]:
    """A line for each implementation; what does not run here is named once below."""
    headings = {"forward": "forward, ms", "both": "and backward, ms"}
    heading = ["B x N x T x H" if "both" in figures else "B x N x filled slots x H", "implementation"]
    heading += [cell for what in figures for cell in (headings[what], "eager is x times", "MB")] + [""]
    lines, refused = [line(heading), line(["---"] * len(heading))], {}
    for row in sorted(rows, key=lambda row: (row["batch"], row["length"])):
        shape = f"{row['batch']} x {document['heads']} x {row['length']} x {document['head_size']}"
        if not row["results"]:
            lines.append(line([shape, *[""] * (3 * len(figures) + 1), reason(row)]))
        for name, result in row["results"].items():
            if why := result.get("not_run") or result.get("failed"):
                refused[name] = ("not run: " if "not_run" in result else "failed: ") + why
            else:
                found = attention_figures(figures, result, row["results"].get("eager", {}))
                lines.append(line([shape, name, *found, ""]))
    return lines + [""] * bool(refused) + [f"- {name}: {why}" for name, why in refused.items()]


def attention_figures(figures: tuple[str, ...], result: dict[str, Any], eager: dict[str, Any]) -> Iterator[str]:
    for what in figures:
        seconds, of_eager = result[f"{what}_seconds"], eager.get(f"{what}_seconds")
        yield number(seconds, 1e3, 2)
        yield number(of_eager / seconds if of_eager else None, 1, 2)
        yield number(result[f"{what}_bytes"], 1e-6, 1)


def line(cells: list[Any]) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def reason(row: dict[str, Any]) -> str:
    """The last cell: why there are no figures."""
    why = [row["reason"]] if row["reason"] else []
    why += [
        f"{name} {key}: {result[key]}"
        for name, result in row["results"].items()
        for key in ("not_run", "failed")
        if key in result
    ]
    return " ".join(filter(None, [row["status"] if row["reason"] else "", "; ".join(why)])) if why else ""


def number(value: float | None, scale: float, digits: int) -> str:
    return "" if value is None else f"{value * scale:.{digits}f}"


def percent(pair: list[float | None], share: Callable[[float, float], float]) -> str:
    return "" if None in pair or 0 in pair else f"{100 * share(*pair):.0f}"  # type: ignore[arg-type]


# -- the picture ------------------------------------------------------------------------------------------------------


def write_plot(document: dict[str, Any], path: str) -> None:
    """A PNG: for each part eager / fused of time and of memory, against the length. matplotlib is imported here."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    parts = list(dict.fromkeys(row["part"] for row in document["results"]))
    figure = Figure(figsize=(12, 4.2 * len(parts)), layout="constrained")
    FigureCanvasAgg(figure)
    for part, panels in zip(parts, figure.subplots(len(parts), 2, squeeze=False), strict=True):
        key = FIGURES.get(part, ("step",))[-1]
        for panel, unit, title in zip(panels, ("seconds", "bytes"), ("speed-up", "memory"), strict=True):
            draw(panel, part, f"{key}_{unit}", document)
            panel.set_title(f"{TITLES[part]}: {title}, eager / {document['fused']}")
        if panels[-1].get_legend_handles_labels()[0]:  # one for both, where it hides nothing
            panels[-1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1.02, 0.5))
    figure.suptitle(f"{document['size']}, {document['gpu'] or document['processor']}, {document['commit']}")
    figure.savefig(path, format="png", dpi=120)


def draw(panel, part: str, key: str, document: dict[str, Any]) -> None:
    lines: dict[tuple[str, str, int], list[tuple[int, float]]] = {}
    for row in document["results"]:
        eager, fused = (row["results"].get(name, {}).get(key) for name in ("eager", document["fused"]))
        if row["part"] == part and eager and fused:
            lines.setdefault((row["contestant"], row["dtype"], row["batch"]), []).append((row["length"], eager / fused))
    for (contestant, dtype, batch), points in lines.items():
        style = list(CONTESTANTS).index(contestant)
        label = f"{CONTESTANTS[contestant]}, {dtype}, batch {batch}"
        panel.plot(
            *zip(*sorted(points), strict=True),
            MARKERS[style] + "-",
            color=f"C{style}",
            alpha=1 / (1 + batch / 8),
            label=label,
        )
    panel.axhline(1, color="black", linewidth=0.8)
    lengths = sorted({length for points in lines.values() for length, _ in points})
    panel.set(xscale="log", xlabel="tokens")
    panel.set_xticks(lengths, map(str, lengths), minor=False)
    panel.minorticks_off()
