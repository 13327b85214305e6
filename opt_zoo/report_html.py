"""The parity report as one HTML page that loads nothing from elsewhere."""

import html
from collections.abc import Iterable, Sequence
from typing import Any

from opt_core.small_files import write_whole
from opt_zoo.parity import agreement_in_words, failures_in_words, numbers_in_words

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem; color: #1b1b1b; }
table { border-collapse: collapse; margin: 1rem 0; width: 100%; }
th, td { padding: .3rem .6rem; border-bottom: 1px solid #ddd; text-align: left; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
td.bar { background: linear-gradient(90deg, #bcd7ee var(--share), transparent var(--share)); }
.ok { color: #17693a; } .fail { color: #b3261e; font-weight: 600; }
pre { background: #f5f5f5; padding: .8rem; overflow-x: auto; }
@media (prefers-color-scheme: dark) {
  body { background: #16181b; color: #e6e6e6; } th, td { border-color: #383b40; } pre { background: #22252a; }
  td.bar { background: linear-gradient(90deg, #2c4f70 var(--share), transparent var(--share)); }
  .ok { color: #6fcf97; } .fail { color: #ff8a80; }
}
"""
NAMES = ("backend", "dtype", "attention")
FORWARD = (*NAMES, "padding", "worst row, u", "bound, u", "max abs", "top-1", "loss error", "verdict")
GREEDY = (*NAMES, "greedy tokens", "ties", "verdict")


def write_html(report: dict[str, Any], path: str) -> None:
    write_whole(path, html_page(report))


def html_page(report: dict[str, Any]) -> str:
    """The page: verdict, failures, both tables, bounds and environment."""
    title = html.escape(f"Parity of {report['source']}")
    body = [
        f"<h1>{title}</h1>",
        f"<p>{_verdict(report)}: {len(report['forward'])} forward passes and {len(report['greedy'])} greedy texts, on "
        f"{html.escape(report['tokens_from'])}, compared with a float64 reference on the same rounded weights "
        f"({report['model']['parameters']:,} parameters).</p>",
        _failures(list(failures_in_words(report))),
        _table(FORWARD, map(_forward_row, report["forward"])),
        _table(GREEDY, map(_greedy_row, report["greedy"])) if report["greedy"] else "",
        f"<pre>{html.escape(agreement_in_words(report['agreements']))}</pre>" if report["greedy"] else "",
        _bounds(report["bounds"]),
        _environment(report["environment"]),
    ]
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>'
    return f'<!doctype html>\n<html lang="en"><head>{head}<style>{STYLE}</style></head>\n<body>\n' + "\n".join(
        [*body, "</body></html>\n"]
    )


def _verdict(cell: dict[str, Any]) -> str:
    return '<span class="ok">passed</span>' if cell["passed"] else '<span class="fail">FAILED</span>'


def _failures(failures: Sequence[str]) -> str:
    items = "".join(f'<li class="fail">{html.escape(text)}</li>' for text in failures)
    return f"<ul>{items}</ul>" if items else ""


def _table(headings: Sequence[str], rows: Iterable[str]) -> str:
    head = "".join(f"<th>{heading}</th>" for heading in headings)
    return f"<table><thead><tr>{head}</tr></thead><tbody>\n" + "\n".join(rows) + "</tbody></table>"


def _forward_row(cell: dict[str, Any]) -> str:
    worst = cell["worst_row_u"]
    share = 100 if worst is None else min(100, 100 * worst / cell["bound_u"])
    names = _names(cell) + f"<td>{cell['padding']}</td>"
    first, *others = numbers_in_words(cell)
    bar = f'<td class="number bar" style="--share:{share:.0f}%">{first}</td>'
    numbers = "".join(f'<td class="number">{number}</td>' for number in others)
    return f"<tr>{names}{bar}{numbers}<td>{_verdict(cell)}</td></tr>"


def _greedy_row(text: dict[str, Any]) -> str:
    numbers = "".join(f'<td class="number">{text[key]}</td>' for key in ("judged", "ties"))
    return f"<tr>{_names(text)}{numbers}<td>{_verdict(text)}</td></tr>"


def _names(cell: dict[str, Any]) -> str:
    return "".join(f"<td>{html.escape(cell[key])}</td>" for key in ("backend", "dtype", "attn_implementation"))


def _bounds(bounds: dict[str, dict[str, float]]) -> str:
    rows = [
        f'<tr><td>{dtype}</td><td class="number">{b["roundoff"]:.3g}</td><td class="number">{b["row"]:g} u</td>'
        f'<td class="number">{b["entry"]:g} u</td></tr>'
        for dtype, b in bounds.items()
    ]
    headings = ("dtype", "roundoff u", "relative error of a row", "tie: error of a logit / rms of its row")
    return "<h2>Bounds</h2>" + _table(headings, rows)


def _environment(environment: dict[str, Any]) -> str:
    versions = [f"{name} {version}" for name, version in environment["versions"].items()]
    settings = [f"{name}={value}" for name, value in environment["settings"].items()]
    machine = [environment["date"], environment["platform"], f"{environment['processors']} processors"]
    return f"<h2>Environment</h2><pre>{html.escape(chr(10).join([*machine, *versions, *settings]))}</pre>"
