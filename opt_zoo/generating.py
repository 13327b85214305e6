"""`opt-zoo generate`: the continuation of prompts by any strategy, in one backend or in all of them."""

import argparse
import contextlib
import secrets
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from opt_core.checks import ATTENTION_IMPLEMENTATIONS
from opt_core.config import DTYPES
from opt_core.errors import InputError
from opt_core.streaming import TextStreamer
from opt_zoo.backends import BACKENDS, Backend, installed_backends, load_backend
from opt_zoo.console import counted_progress, print_json, stdout_console
from opt_zoo.generation_arguments import add_generation_options, generation_options
from opt_zoo.parity_cases import load_tokenizer
from opt_zoo.sources import add_source, display_name, find_source

SUMMARY = "continue a text"
DESCRIPTION = """Continues each PROMPT, greedily unless options say otherwise. With --backend all, in every installed
backend, from the same seed, and says whether they wrote the same; `opt-zoo parity` tells whether a difference is
rounding."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_source(parser)
    parser.add_argument("prompts", nargs="*", metavar="PROMPT", help="a text to continue; a lone word is a PROMPT")
    parser.add_argument("--prompt-file", metavar="FILE", help="further prompts, one in each line; - for stdin")
    choices = (*BACKENDS, "all")
    parser.add_argument("--backend", choices=choices, help="default: the first one that is installed")
    parser.add_argument("--assistant", metavar="SOURCE", help="a smaller model that drafts; the text does not change")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="default: float32")
    parser.add_argument("--attn", choices=ATTENTION_IMPLEMENTATIONS, default="sdpa", help="default: sdpa")
    parser.add_argument("--stream", action="store_true", help="print each word of one text as soon as it is known")
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_generation_options(parser)
    parser.set_defaults(wrong_usage=parser.error)


def run(args: argparse.Namespace) -> int:
    """Prints the texts of each backend; returns 0."""
    source, prompts = _source_and_prompts(args)
    backends = [load_backend(name) for name in _backend_names(args.backend)]
    tokenizer = load_tokenizer(source)
    options = generation_options(args)
    loading = {"dtype": args.dtype, "attn_implementation": args.attn}
    texts = []
    with _progress(backends, is_streaming=args.stream) as step:
        for backend in backends:
            step(backend.name)
            model = backend.load(source, **loading).model
            _draw_seed(options, model)
            drafting = {}
            if args.assistant is not None:
                drafting["assistant_model"] = backend.load(find_source(args.assistant, None), **loading).model
            if args.stream:
                drafting["streamer"] = TextStreamer(tokenizer, skip_special_tokens=True)
            texts += _written(backend, model, prompts, tokenizer, {**options, **drafting})
    report = {"source": display_name(source), "prompts": prompts, "dtype": args.dtype, "options": options}
    by_backend = [[text["tokens"] for text in texts if text["backend"] == backend.name] for backend in backends]
    _print({**report, "texts": texts, "equal": all(tokens == by_backend[0] for tokens in by_backend)}, args)
    return 0


def _source_and_prompts(args: argparse.Namespace) -> tuple[str, list[str]]:
    """All words are prompts beside --model; a lone word is one, unless prompts come from a file."""
    source, prompts = args.source, list(args.prompts)
    if source is not None and (args.model is not None or not (prompts or args.prompt_file)):
        source, prompts = None, [source, *prompts]
    if args.prompt_file == "-":
        prompts += sys.stdin.read().splitlines()
    elif args.prompt_file is not None:
        prompts += Path(args.prompt_file).read_text(encoding="utf-8").splitlines()
    if not prompts:
        args.wrong_usage("expected a PROMPT, or a --prompt-file with at least one line")
    if args.stream and args.json:
        raise InputError("opt-zoo generate", ["--stream, --json: expected at most one of them, got both"])
    return find_source(source, args.model), prompts


def _backend_names(asked: str | None) -> tuple[str, ...]:
    if asked in BACKENDS:
        return (asked,)
    names = installed_backends()
    if not names:
        raise InputError("opt-zoo generate", ["--backend: none is installed; pip install opt-zoo[all]"])
    return names if asked == "all" else names[:1]


@contextlib.contextmanager
def _progress(backends: list[Backend], *, is_streaming: bool) -> Iterator[Callable[[str], None]]:
    """A bar; or, where the text itself shows how far it is, a headline for each backend."""
    if is_streaming:
        console = stdout_console()
        yield lambda name: console.print(f"[bold]{name}[/bold]") if len(backends) > 1 else None
        return
    with counted_progress("generating", len(backends)) as step:
        yield lambda name: step(f"generating with {name}")


def _draw_seed(options: dict[str, Any], model) -> None:
    """Where a call samples without a seed: one for all backends, which the report names."""
    samples = options.get("do_sample", getattr(model.generation_config, "do_sample", False))
    if samples and "seed" not in options:
        options["seed"] = secrets.randbits(32)


def _written(backend: Backend, model, prompts: list[str], tokenizer, options: dict[str, Any]) -> list[dict[str, Any]]:
    """The texts of one backend, with the real tokens of each."""
    inputs = tokenizer(prompts, padding=len(prompts) > 1, padding_side="left", return_tensors="np")
    if "stop_strings" in options:
        options["tokenizer"] = tokenizer
    sequences_RS = np.asarray(backend.to_numpy(model.generate(**inputs, **options))).astype(np.int64)
    pad, columns = options.get("pad_token_id", model.config.pad_token_id), inputs["input_ids"].shape[1]
    copies, texts = len(sequences_RS) // len(prompts), []
    for row, sequence_S in enumerate(sequences_RS):
        real_S = np.concatenate([inputs["attention_mask"][row // copies] == 1, sequence_S[columns:] != pad])
        length = int(np.flatnonzero(real_S).max()) + 1  # what a text may hold is not padding, but what follows it is
        tokens = [*sequence_S[:columns][real_S[:columns]].tolist(), *sequence_S[columns:length].tolist()]
        text = tokenizer.decode(tokens, skip_special_tokens=True)
        place = {"backend": backend.name, "prompt": row // copies, "sequence": row % copies}
        texts.append({**place, "text": text, "tokens": tokens, "new_tokens": length - columns})
    return texts


def _print(report: dict[str, Any], args: argparse.Namespace) -> None:
    if args.json:
        print_json(report)
        return
    console = stdout_console()
    several = len({(text["prompt"], text["sequence"]) for text in report["texts"]}) > 1
    for text in report["texts"] if not args.stream else ():
        place = f", prompt {text['prompt'] + 1}, text {text['sequence'] + 1}" if several else ""
        console.print(f"[bold]{text['backend']}[/bold]{place} ({text['new_tokens']} new tokens)")
        console.print(text["text"], markup=False, soft_wrap=True)
        console.print()
    if "seed" in report["options"] and not hasattr(args, "seed"):
        console.print(f"Sampled with --seed {report['options']['seed']}.")
    if len({text["backend"] for text in report["texts"]}) > 1:
        console.print("All backends wrote the same." if report["equal"] else "The backends wrote different texts.")
