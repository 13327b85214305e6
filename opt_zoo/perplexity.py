"""`opt-zoo perplexity`: how well a checkpoint predicts a text, by the protocol of the published figures.

The whole text is encoded at once, so it begins with one `</s>`; its tokens are cut into segments of --length that do
not overlap and know nothing of each other, the remainder is dropped; each segment predicts its length - 1 tokens behind
the first. The perplexity is exp of the mean over segments of their mean cross entropies: that of Frantar et al., GPTQ,
arXiv:2210.17323, whose WikiText-2 figures (27.65 for OPT-125M, 22.00 for 350M) are of 2,048 tokens, float16, and the
test split of wikitext-2-raw-v1 joined by blank lines, "\\n\\n".join(...). That text is to be in the file already.
"""

import argparse
import math
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.table import Table

from opt_core.checks import ATTENTION_IMPLEMENTATIONS
from opt_core.config import DTYPES, OPTConfig
from opt_core.errors import InputError, raise_if
from opt_core.text_sources import read_text
from opt_zoo.backends import BACKENDS, Backend, installed_backends, load_backend
from opt_zoo.bench.checkpoints import config_of
from opt_zoo.console import counted_progress, print_json, stdout_console
from opt_zoo.parity_cases import load_tokenizer
from opt_zoo.sources import add_source, display_name, find_source

SUMMARY = "measure the perplexity of a text"
DESCRIPTION = """Measures the perplexity of a text file by the protocol of the published figures: one token </s>, then
segments of --length tokens without overlap; the remainder is dropped. With --backend all, in every installed
backend."""

LENGTH = 2048
NO_TEXTS = (".csv", ".json", ".jsonl", ".parquet")


class Measured(NamedTuple):
    """One backend's result. The standard error is that of a mean over segments, or over batches of them."""

    backend: str
    perplexity: float
    loss: float  # nats per token
    loss_standard_error: float | None  # None: of a single batch there is none
    perplexity_standard_error: float | None  # to first order: perplexity x that of the loss
    seconds: float  # of the second and all later batches; of the first where there is one
    tokens_per_second: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_source(parser)
    parser.add_argument("text", metavar="TEXT", help="a text file in UTF-8")
    choices = (*BACKENDS, "all")
    parser.add_argument("--backend", choices=choices, help="default: the first one that is installed")
    parser.add_argument("--length", type=int, metavar="N", help=f"tokens of a segment (default: {LENGTH}, if it fits)")
    parser.add_argument("--batch-size", type=int, default=1, metavar="N", help="segments at a time (default: 1)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="default: float32")
    parser.add_argument("--attn", choices=ATTENTION_IMPLEMENTATIONS, default="sdpa", help="default: sdpa")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Measures and prints; returns 0."""
    source = find_source(args.source, args.model)
    length = checked_length(args, config_of(source))
    backends = [load_backend(name) for name in backend_names(args.backend)]
    tokens = load_tokenizer(source)(checked_text(args.text), return_tensors="np")["input_ids"][0]
    segments_BT = cut_segments(tokens, length, args.text)
    batches = np.split(segments_BT, range(args.batch_size, len(segments_BT), args.batch_size))
    with counted_progress("loading", len(backends) * len(batches)) as step:
        measured = [
            measure(backend, source, batches, step, dtype=args.dtype, attn_implementation=args.attn)
            for backend in backends
        ]
    report = {
        "source": display_name(source),
        "text": args.text,
        "dtype": args.dtype,
        "length": length,
        "tokens": len(tokens),
        "segments": len(segments_BT),
        "dropped_tokens": len(tokens) - segments_BT.size,
        "results": [result._asdict() for result in measured],
    }
    print_json(report) if args.json else print_report(report)
    return 0


def checked_length(args: argparse.Namespace, config: OPTConfig) -> int:
    """--length, or its default for this model; raises InputError with everything that is wrong."""
    most, problems = config.max_position_embeddings, []
    length = min(LENGTH, most) if args.length is None else args.length
    if not 2 <= length <= most:
        problems.append(f"--length: expected 2 to {most}, the positions of the model, got {length}")
    if args.batch_size < 1:
        problems.append(f"--batch-size: expected 1 or more, got {args.batch_size}")
    raise_if(InputError, "opt-zoo perplexity", problems)
    return length


def checked_text(path: str) -> str:
    if Path(path).suffix.lower() in NO_TEXTS:
        raise InputError("opt-zoo perplexity", [f"TEXT: expected a file of plain text, got {path}"])
    return read_text(path)


def cut_segments(tokens: np.ndarray, length: int, name: str = "the text") -> np.ndarray:
    """[segments, `length`], the remainder dropped.

    Raises:
        InputError: the text is shorter than one segment.
    """
    count = len(tokens) // length
    if not count:
        problem = f"TEXT: expected at least --length = {length} tokens, {name} has {len(tokens)}"
        raise InputError("opt-zoo perplexity", [problem])
    return tokens[: count * length].reshape(count, length)


def backend_names(asked: str | None) -> tuple[str, ...]:
    if asked in BACKENDS:
        return (asked,)
    names = installed_backends()
    if not names:
        raise InputError("opt-zoo perplexity", ["--backend: none is installed; pip install opt-zoo[all]"])
    return names if asked == "all" else names[:1]


def measure(backend: Backend, source: str, batches: list[np.ndarray], step, **loading: Any) -> Measured:
    """The result of one backend; `step` is told of each batch before it is run."""
    model = backend.load(source, **loading)
    losses, seconds = [], []
    for number, ids_BT in enumerate(batches, 1):
        step(f"{backend.name}, batch {number} of {len(batches)}")
        start = time.perf_counter()
        losses.append(model.loss(ids_BT))
        seconds.append(time.perf_counter() - start)
    timed = slice(1 if len(batches) > 1 else 0, None)  # the first compiles
    tokens = sum(ids_BT.size for ids_BT in batches[timed])
    loss, error = mean_and_error(losses, [len(ids_BT) for ids_BT in batches])
    perplexity = math.exp(loss)
    errors = (error, None if error is None else perplexity * error)
    return Measured(backend.name, perplexity, loss, *errors, sum(seconds[timed]), tokens / sum(seconds[timed]))


def mean_and_error(losses: list[float], counts: list[int]) -> tuple[float, float | None]:
    """The mean of batches of `counts` segments, and its standard error; None for a single batch."""
    weights = np.array(counts) / sum(counts)
    mean = float(weights @ losses)
    if len(losses) < 2:
        return mean, None
    variance = float(weights @ (np.array(losses) - mean) ** 2) * len(losses) / (len(losses) - 1)
    return mean, math.sqrt(variance / len(losses))


def print_report(report: dict[str, Any]) -> None:
    console = stdout_console()
    dropped = f", {report['dropped_tokens']} dropped" if report["dropped_tokens"] else ""
    console.print(
        f"{report['source']} on {report['text']}: {report['tokens']} tokens in {report['segments']} segments of "
        f"{report['length']}{dropped}; {report['dtype']}",
        markup=False,
    )
    table = Table("backend", "perplexity", "standard error", "nats per token", "tokens/s")
    for row in report["results"]:
        error = row["perplexity_standard_error"]
        table.add_row(
            row["backend"],
            f"{row['perplexity']:.4f}",
            "" if error is None else f"{error:.4f}",
            f"{row['loss']:.6f}",
            f"{row['tokens_per_second']:,.0f}",
        )
    console.print(table)
