"""The arguments that all training scripts have."""

import argparse
from pathlib import Path

from opt_zoo.backends import BACKENDS


def training_parser(
    doc: str, *, folder: str, steps: int, batch_size: int, rate: float, files: str, every: int = 100, source="opt-tiny"
) -> argparse.ArgumentParser:
    """`doc` begins with what the script does, `files` says what --train and --validation are; the rest are defaults."""
    parser = argparse.ArgumentParser(description=doc.partition("\n")[0])
    parser.add_argument("--backend", choices=BACKENDS, required=True)
    which = f"a checkpoint to go on from; default: {source or 'none'}"
    parser.add_argument("--from", dest="source", metavar="SOURCE", default=source, help=which)
    parser.add_argument("--train", type=Path, metavar="FILE", help=files)
    parser.add_argument("--validation", type=Path, metavar="FILE", help="held-out ones, with --train")
    parser.add_argument("--folder", type=Path, default=Path(folder), help=f"of the run; default: {folder}")
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--every", type=int, default=every, help="steps between validations and checkpoints")
    parser.add_argument("--batch-size", type=int, default=batch_size)
    parser.add_argument("--rate", type=float, default=rate, help="the highest learning rate")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def parse_arguments(parser: argparse.ArgumentParser) -> argparse.Namespace:
    args = parser.parse_args()
    if (args.train is None) != (args.validation is None):
        parser.error("expected --train and --validation, or neither")
    return args
