"""The parity report as a heat map: worst-row error as a share of its bound, a row per backend, a column per case."""

from typing import Any

import numpy as np


def write_heatmap(report: dict[str, Any], path: str) -> None:
    """Draws a PNG, whatever the ending of `path`. matplotlib is imported here, without a display."""
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows, columns, shares = error_shares(report["forward"])
    figure = Figure(figsize=(2.5 + 0.62 * len(columns), 2.2 + 0.45 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    colors = colormaps["viridis"].with_extremes(over="#c62828")  # beyond the bound
    image = axes.imshow(np.minimum(shares, 2), vmin=0, vmax=1, cmap=colors, aspect="auto")
    axes.set_xticks(range(len(columns)), columns, rotation=45, ha="right")
    axes.set_yticks(range(len(rows)), rows)
    for (row, column), share in np.ndenumerate(shares):
        text, color = _label(share)
        axes.text(column, row, text, ha="center", va="center", color=color, fontsize=8)
    axes.set_title(f"{report['source']}: worst-row error of the logits, share of the bound")
    figure.colorbar(image, ax=axes, label="error / bound", extend="max")
    figure.savefig(path, format="png", dpi=150)


def error_shares(cells: list[dict[str, Any]]) -> tuple[list[str], list[str], np.ndarray]:
    """Names of the rows and columns, and error / bound [rows, columns]: infinite for NaN, itself NaN where not run."""
    row_of = {cell_row: i for i, cell_row in enumerate(dict.fromkeys(map(_row, cells)))}
    column_of = {cell_column: i for i, cell_column in enumerate(dict.fromkeys(map(_column, cells)))}
    shares = np.full((len(row_of), len(column_of)), np.nan)
    for cell in cells:
        worst = np.inf if cell["worst_row_u"] is None else cell["worst_row_u"]
        shares[row_of[_row(cell)], column_of[_column(cell)]] = worst / cell["bound_u"]
    return list(row_of), list(column_of), shares


def _row(cell: dict[str, Any]) -> str:
    return f"{cell['backend']} {cell['attn_implementation']}"


def _column(cell: dict[str, Any]) -> str:
    return f"{cell['dtype']} {cell['padding']}"


def _label(share: float) -> tuple[str, str]:
    if np.isnan(share):
        return "", "black"
    if not share <= 1:
        return ("NaN" if np.isinf(share) else f"{share:.1f}" if share < 100 else ">100"), "white"
    return f"{share:.2f}", "white" if share < 0.6 else "black"
