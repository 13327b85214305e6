"""`opt-zoo generate`: the greedy continuation of a prompt, in one backend or in all of them."""

import argparse
from typing import Any

import numpy as np

from opt_core.checks import ATTENTION_IMPLEMENTATIONS
from opt_core.config import DTYPES
from opt_core.errors import InputError
from opt_zoo.backends import BACKENDS, installed_backends, load_backend
from opt_zoo.console import counted_progress, print_json, stdout_console
from opt_zoo.parity_cases import load_tokenizer
from opt_zoo.sources import add_source, display_name, find_source

SUMMARY = "continue a text"
DESCRIPTION = """Continues PROMPT greedily. With --backend all, in every installed backend, and says whether they wrote
the same; `opt-zoo parity` tells whether a difference is rounding."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_source(parser)
    parser.add_argument("prompt", metavar="PROMPT", help="the text to continue")
    choices = (*BACKENDS, "all")
    parser.add_argument("--backend", choices=choices, help="default: the first one that is installed")
    parser.add_argument("--max-new-tokens", type=int, default=40, metavar="N", help="default: 40")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="default: float32")
    parser.add_argument("--attn", choices=ATTENTION_IMPLEMENTATIONS, default="sdpa", help="default: sdpa")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Prints the text of each backend; returns 0."""
    source = find_source(args.source, args.model)
    backends = [load_backend(name) for name in _backend_names(args.backend)]
    tokenizer = load_tokenizer(source)
    ids_BT = np.array([tokenizer.encode(args.prompt)], np.int64).reshape(1, -1)
    if ids_BT.shape[1] == 0:
        raise InputError("opt-zoo generate", ["PROMPT: expected at least one token, got none"])
    texts = []
    with counted_progress("generating", len(backends)) as step:
        for backend in backends:
            step(f"generating with {backend.name}")
            model = backend.load(source, dtype=args.dtype, attn_implementation=args.attn)
            tokens_S = model.generate(ids_BT, np.ones_like(ids_BT), args.max_new_tokens)[0]
            texts.append(_text(backend.name, tokens_S, ids_BT.shape[1], tokenizer))
    report = {"source": display_name(source), "prompt": args.prompt, "dtype": args.dtype, "texts": texts}
    _print_texts({**report, "equal": all(text["tokens"] == texts[0]["tokens"] for text in texts)}, as_json=args.json)
    return 0


def _backend_names(asked: str | None) -> tuple[str, ...]:
    if asked in BACKENDS:
        return (asked,)
    names = installed_backends()
    if not names:
        raise InputError("opt-zoo generate", ["--backend: none is installed; pip install opt-zoo[all]"])
    return names if asked == "all" else names[:1]


def _text(backend: str, tokens_S: np.ndarray, prompt_tokens: int, tokenizer) -> dict[str, Any]:
    return {
        "backend": backend,
        "text": tokenizer.decode(tokens_S.tolist(), skip_special_tokens=True),
        "tokens": tokens_S.tolist(),
        "new_tokens": len(tokens_S) - prompt_tokens,
    }


def _print_texts(report: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        print_json(report)
        return
    console = stdout_console()
    for text in report["texts"]:
        console.print(f"[bold]{text['backend']}[/bold] ({text['new_tokens']} new tokens)")
        console.print(text["text"], markup=False, soft_wrap=True)
        console.print()
    if len(report["texts"]) > 1:
        console.print("All backends wrote the same." if report["equal"] else "The backends wrote different texts.")
