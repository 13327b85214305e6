"""`opt-zoo convert`: a checkpoint to another container, dtype or shard size, one tensor at a time."""

import argparse
import shutil
from pathlib import Path

from conversion import open_checkpoint, resolve, write_checkpoint
from conversion.formats import FORMATS
from opt_core.config import DTYPES
from opt_core.errors import InputError, ProblemsError
from opt_zoo.console import byte_progress, print_json, stdout_console
from opt_zoo.sources import add_source, display_name, find_source

SUMMARY = "write a checkpoint in another format, dtype or shard size"
DESCRIPTION = """Writes config, weights and, where the source has them, tokenizer files into the folder TARGET. Holds
one tensor in memory at a time. The weights are checked against the config first; files get their names when all are
written."""

FORMAT_NAMES = {  # on the command line -> in `conversion`
    "safetensors": "safetensors",
    "bin": "torch-bin",
    "flax-msgpack": "flax-msgpack",
    "flax-safetensors": "flax-safetensors",
    "tf-h5": "tf-h5",
    "tf-safetensors": "tf-safetensors",
}
SIDE_FILES = ("generation_config.json",)  # beside the tokenizer's, copied as they are


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_source(parser)
    parser.add_argument("target", metavar="TARGET", help="folder to write")
    parser.add_argument("--to", choices=FORMAT_NAMES, default="safetensors", help="format (default: safetensors)")
    parser.add_argument("--dtype", choices=DTYPES, help="round the weights to this dtype (default: as stored)")
    parser.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="bytes, or 300MB, 2GiB (default: 5GB)")
    parser.add_argument("--overwrite", action="store_true", help="replace a checkpoint in TARGET")
    parser.add_argument("--json", action="store_true", help="print what was written as JSON")


def run(args: argparse.Namespace) -> int:
    """Converts and prints what was written; returns 0."""
    source, target = find_source(args.source, args.model), Path(args.target)
    opened = resolve(source)
    _check_target(opened, target, args.overwrite)
    with open_checkpoint(opened) as checkpoint, byte_progress(f"writing {target}") as progress:
        checkpoint.check()
        written = write_checkpoint(
            target,
            checkpoint.config,
            checkpoint,
            task=checkpoint.task,
            format=FORMAT_NAMES[args.to],
            dtype=args.dtype,
            max_shard_size=args.max_shard_size,
            overwrite=args.overwrite,
            progress=progress,
        )
    written += copy_side_files(source, target)
    _print_written(display_name(source), target, written, as_json=args.json)
    return 0


def _check_target(opened: Path, target: Path, overwrite: bool) -> None:
    """The two refusals that are worded for this command; `write_checkpoint` has others."""
    folder = opened if opened.is_dir() else opened.parent
    if target.is_dir() and folder.samefile(target):
        raise InputError("opt-zoo convert", [f"TARGET: expected another folder than SOURCE, got {target}"])
    names = sorted(path.name for path in target.iterdir()) if target.is_dir() else []
    found = [name for name in names if name == "config.json" or any(f.owns(name) for f in FORMATS.values())]
    if found and not overwrite:
        text = f"TARGET: {target} holds {', '.join(found[:5])}; --overwrite replaces them"
        raise InputError("opt-zoo convert", [text])


def copy_side_files(source: str, target: Path) -> list[Path]:
    """Copies the tokenizer's files, and `SIDE_FILES`, where the source has them; returns the copies."""
    from opt_core.tokenizer_files import FILES, find_tokenizer_folder

    path = Path(source)
    try:
        folder = path.parent if path.is_file() else find_tokenizer_folder(source)
    except (ProblemsError, OSError):
        return []
    present = [name for name in (*FILES, *SIDE_FILES) if (folder / name).is_file()]
    return [Path(shutil.copyfile(folder / name, target / name)) for name in present]


def _print_written(source: str, target: Path, written: list[Path], *, as_json: bool) -> None:
    files = [{"name": path.name, "bytes": path.stat().st_size} for path in written]
    total = sum(path.stat().st_size for path in written)
    if as_json:
        print_json({"source": source, "target": str(target), "files": files})
        return
    console = stdout_console()
    console.print(f"{source} -> {target}: {len(files)} files, {total:,} bytes", markup=False, soft_wrap=True)
    for file in files:
        console.print(f"  {file['name']}: {file['bytes']:,} bytes", markup=False, soft_wrap=True)
