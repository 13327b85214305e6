"""`opt-zoo convert`: a checkpoint to another format, dtype or shard size, in bounded memory."""

import argparse
import importlib
import itertools
import shutil
from collections import Counter
from pathlib import Path

from conversion import open_checkpoint, resolve, write_checkpoint
from conversion.containers import CONTAINERS
from conversion.difference import differing_fields
from conversion.formats import FORMATS, losses
from conversion.write import CLASSES, entries_of_a_checkpoint, is_of_a_checkpoint
from opt_core.config import DTYPES
from opt_core.errors import InputError, ProblemsError, raise_if
from opt_core.small_files import find_folder
from opt_zoo.console import byte_progress, print_json, stdout_console
from opt_zoo.sources import add_source, display_name, find_source

SUMMARY = "write a checkpoint in another format, dtype or shard size"
DESCRIPTION = """Writes config, weights, a manifest with a hash for each weight and, where the source has them, files of
the tokenizer into the folder TARGET. Holds one tensor in memory at a time. The weights are checked against the config
first; files get their names when all are written, read again and found to be right."""

ALIASES = {"bin": "torch-bin"}
SAVED_MODEL = "saved-model"  # which has the program in it too, and is TensorFlow's to write
TARGET_FORMATS = (*(name for name, format in FORMATS.items() if format.is_written), *ALIASES, SAVED_MODEL)
SIDE_FILES = ("generation_config.json",)  # beside the tokenizer's, copied as they are


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_source(parser)
    parser.add_argument("target", metavar="TARGET", help="folder to write")
    parser.add_argument(
        "--to", metavar="FORMAT", choices=TARGET_FORMATS, default="safetensors",
        help=f"one of {', '.join(TARGET_FORMATS)} (default: safetensors)",
    )  # fmt: skip
    parser.add_argument("--dtype", choices=DTYPES, help="round the weights to this dtype (default: as stored)")
    parser.add_argument(
        "--max-shard-size", metavar="SIZE", help="bytes, or 300MB, 2GiB (default: 5GB, where a format has shards)"
    )
    parser.add_argument(
        "--parts", type=int, default=1, metavar="N", help="model-parallel parts, of metaseq (default: 1)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a checkpoint in TARGET")
    parser.add_argument("--no-verify", dest="verify", action="store_false", help="do not read again what was written")
    parser.add_argument(
        "--allow-nonfinite", action="store_true", help="keep NaN and infinities, which are refused else"
    )
    parser.add_argument("--json", action="store_true", help="print what was written as JSON")


def run(args: argparse.Namespace) -> int:
    """Converts and prints what was written; returns 0."""
    source, target = find_source(args.source, args.model), Path(args.target)
    opened = resolve(source)
    _check_target(opened, target, args.overwrite)
    write = _write_saved_model if args.to == SAVED_MODEL else _write
    written, notes = write(source, opened, target, args)
    if args.overwrite:
        _delete_older_side_files(target, {path.name for path in written})
    _print_written(display_name(source), target, written, notes, as_json=args.json)
    return 0


def _write(source: str, opened: Path, target: Path, args: argparse.Namespace) -> tuple[list[Path], list[str]]:
    """The files written, and what changes on the way."""
    from opt_core.tokenizer_files import bpe_files

    format = FORMATS[ALIASES.get(args.to, args.to)]
    folder = _side_folder(source)
    with open_checkpoint(opened) as checkpoint, byte_progress(f"writing {target}") as progress:
        checkpoint.check()
        notes = losses(format, checkpoint.config, checkpoint.task)
        written = write_checkpoint(
            target,
            checkpoint.config,
            checkpoint,
            task=checkpoint.task,
            format=format.name,
            dtype=args.dtype,
            parts=args.parts,
            max_shard_size=args.max_shard_size,
            tokenizer_folder=folder if folder and bpe_files(folder) else None,
            overwrite=args.overwrite,
            verify=args.verify,
            allow_nonfinite=args.allow_nonfinite,
            progress=progress,
        )
        with open_checkpoint(target) as read_back:
            changed = differing_fields(checkpoint.config, read_back.config)
    notes += [f"{name}: {was} reads back as {now}" for name, (was, now) in changed.items()]
    has_own_tokenizer = CONTAINERS[format.container].files_beside is not None
    if folder:
        written += copy_side_files(folder, target, with_tokenizer=not has_own_tokenizer)
    return written, notes


def _write_saved_model(
    source: str, opened: Path, target: Path, args: argparse.Namespace
) -> tuple[list[Path], list[str]]:
    """As `_write`; the model is built in TensorFlow, hence wholly in memory."""
    from opt_zoo.backends import load_backend

    given = {"--parts": args.parts != 1, "--max-shard-size": args.max_shard_size is not None}
    problems = [f"{option}: not an option of {SAVED_MODEL}" for option, is_given in given.items() if is_given]
    raise_if(InputError, "opt-zoo convert", problems)
    package = importlib.import_module(load_backend("tf").package)
    exporter = importlib.import_module(f"{package.__name__}.saved_model")
    with open_checkpoint(opened) as checkpoint:
        model_class, stored = getattr(package, f"TF{CLASSES[checkpoint.task]}"), Counter(checkpoint.dtypes.values())
    model = model_class.from_pretrained(opened, dtype=args.dtype or "auto")
    options = {"overwrite": args.overwrite, "verify": args.verify, "allow_nonfinite": args.allow_nonfinite}
    written, folder = exporter.save_saved_model(model, target, **options), _side_folder(source)
    written += copy_side_files(folder, target, with_tokenizer=True) if folder else []
    rounded = stored.items() if args.dtype is None else ()
    return written, [f"{count} weights: {was} becomes {model.dtype}" for was, count in rounded if was != model.dtype]


def _check_target(opened: Path, target: Path, overwrite: bool) -> None:
    """The two refusals that are worded for this command; `write_checkpoint` has others."""
    if target.is_dir() and _would_be_replaced(opened, target):
        raise InputError("opt-zoo convert", [f"TARGET: expected another folder than SOURCE, got {target}"])
    found = entries_of_a_checkpoint(target) if target.is_dir() else []
    if found and not overwrite:
        text = f"TARGET: {target} holds {', '.join(found[:5])}; --overwrite replaces them"
        raise InputError("opt-zoo convert", [text])


def _would_be_replaced(opened: Path, target: Path) -> bool:
    """True where SOURCE is in TARGET, or in a folder there that belongs to a checkpoint, as Orbax's does."""
    folder = (opened if opened.is_dir() else opened.parent).absolute()
    within = itertools.pairwise([folder, *folder.parents])
    return folder.samefile(target) or any(
        is_of_a_checkpoint(inner) and outer.samefile(target) for inner, outer in within
    )


def _side_folder(source: str) -> Path | None:
    """Where the tokenizer's files would be."""
    from opt_core.tokenizer_files import FILES, PRESET_FILES

    path = Path(source)
    try:
        return path.parent if path.is_file() else find_folder(source, (*FILES, *PRESET_FILES), error=InputError)
    except (ProblemsError, OSError):
        return None


def copy_side_files(folder: Path, target: Path, *, with_tokenizer: bool) -> list[Path]:
    """Copies `SIDE_FILES`, and those of the tokenizer, where the folder has them; returns the copies.

    The tokenizer of a KerasHub preset gets the published names.
    """
    from opt_core.tokenizer_files import FILES, MERGES, PRESET_FILES, VOCAB, is_preset

    if not with_tokenizer:
        names = {name: name for name in SIDE_FILES}
    elif is_preset(folder):
        names = {**dict(zip(PRESET_FILES, (VOCAB, MERGES), strict=True)), **{name: name for name in SIDE_FILES}}
    else:
        names = {name: name for name in (*FILES, *SIDE_FILES)}
    found = {name: copy for name, copy in names.items() if (folder / name).is_file()}
    return [Path(shutil.copyfile(folder / name, target / copy)) for name, copy in found.items()]


def _delete_older_side_files(target: Path, kept: set[str]) -> None:
    """What a replaced checkpoint had beside it, where the new one would be read with it: `tokenizer.json` wins."""
    from opt_core.tokenizer_files import FILES, TOKENIZER, VOCAB

    names = {*SIDE_FILES, *(FILES if kept & {TOKENIZER, VOCAB} else ())}
    for name in names - kept:
        (target / name).unlink(missing_ok=True)


def _print_written(source: str, target: Path, written: list[Path], notes: list[str], *, as_json: bool) -> None:
    sizes = {path.name: _size(path) for path in written}
    if as_json:
        files = [{"name": name, "bytes": nbytes} for name, nbytes in sizes.items()]
        print_json({"source": source, "target": str(target), "files": files, "notes": notes})
        return
    console = stdout_console()
    total = f"{source} -> {target}: {len(sizes)} files, {sum(sizes.values()):,} bytes"
    for line in [total, *(f"  {name}: {nbytes:,} bytes" for name, nbytes in sizes.items())]:
        console.print(line, markup=False, soft_wrap=True)
    for note in notes:
        console.print(f"what changes: {note}", markup=False, soft_wrap=True)


def _size(path: Path) -> int:
    """Of a file, or of all files in a folder."""
    return (
        sum(inner.stat().st_size for inner in path.rglob("*") if inner.is_file())
        if path.is_dir()
        else path.stat().st_size
    )
