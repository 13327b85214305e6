"""The result of a benchmark as a table: a row for each cell, a section for each case."""

from collections.abc import Callable
from typing import Any

from rich.markup import escape
from rich.table import Table

# heading, key of a row, and how the number is written
COLUMNS: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("load, s", "load_seconds", "{:.2f}".format),
    ("first token, s", "first_token_seconds", "{:.2f}".format),
    ("prefill, s", "prefill_seconds", "{:.3f}".format),
    ("of matrix rate", "matrix_rate_share", "{:.0%}".format),
    ("step, ms", "step_seconds", lambda seconds: f"{1e3 * seconds:.1f}"),
    ("floor, ms", "floor_seconds", lambda seconds: f"{1e3 * seconds:.1f}"),
    ("of bandwidth", "bandwidth_share", "{:.0%}".format),
    ("tokens/s", "tokens_per_second", "{:.1f}".format),
    ("GB/s", "step_bytes_per_second", lambda rate: f"{rate / 1e9:.1f}"),
    ("peak, MB", "peak_bytes", lambda nbytes: f"{nbytes / 1e6:.0f}"),
    ("GPU, MB", "peak_gpu_bytes", lambda nbytes: f"{nbytes / 1e6:.0f}"),
    ("load avg", "load_average", "{:.1f}".format),
)


def make_table(document: dict[str, Any]) -> Table:
    """Medians. What did not run or failed says so in place of figures."""
    columns = [column for column in COLUMNS if document["device"] == "cuda" or column[0] != "GPU, MB"]
    where = document["gpu"] or f"{document['available_processors']} x {document['processor']}"
    title = f"{document['source']}, {document['new_tokens']} new tokens, {where}, {document['commit']}"
    table = Table(title=escape(title))
    table.add_column("contestant", no_wrap=True)
    for heading, _, _ in columns:
        table.add_column(heading, justify="right")
    case = None
    for row in document["results"]:
        if case != (case := case_of(row)):
            table.add_section()
            table.add_row(f"[bold]{case}[/bold]")
        table.add_row(escape(row["contestant"]), *_figures(row, columns))
    return table


def case_of(row: dict[str, Any]) -> str:
    return f"{row['dtype']}, batch {row['batch']}, prompt {row['prompt_tokens']}"


def _figures(row: dict[str, Any], columns) -> list[str]:
    if row["status"] != "ok":
        return ["[red]failed[/red]" if row["status"] == "failed" else row["status"]]
    values = [(row.get(key), write) for _, key, write in columns]
    return ["" if value is None else write(value) for value, write in values]


def reasons(document: dict[str, Any]) -> list[str]:
    """A line for each cell without figures."""
    return [
        f"{row['contestant']}, {case_of(row)}: {row['status']}: {row['reason']}"
        for row in document["results"]
        if row["status"] != "ok"
    ]
