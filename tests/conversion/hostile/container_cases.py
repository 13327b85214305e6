"""Files that are not what their names say, or not whole: every format in one file (rule 1)."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from hostile.bases import BASES, weight_file
from hostile.case import Case, cases

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 331196416\n"
SIGNATURES = {  # the first bytes of what other formats begin with, and enough behind them to look at
    "a zip": b"PK\x03\x04" + bytes(60),
    "HDF5": b"\x89HDF\r\n\x1a\n" + bytes(88),
    "safetensors": (2).to_bytes(8, "little") + b"{}",
    "msgpack": b"\x81\xa5model\x80",
    "GGUF": b"GGUF\x03\0\0\0" + bytes(16),
    "an executable": b"\x7fELF" + bytes(60),
}
SINGLE = {
    "safetensors": "model.safetensors",
    "torch-bin": "pytorch_model.bin",
    "flax-msgpack": "flax_model.msgpack",
    "flax-safetensors": "model.safetensors",
    "tf-h5": "tf_model.h5",
    "tf-safetensors": "model.safetensors",
}
OTHERS = {
    "metaseq resharded": "reshard-model_part-0.pt",
    "metaseq-singleton 350m": "reshard.pt",
    "metaseq-singleton restored": "restored.pt",
    "tf-checkpoint": "ckpt-1.data-00000-of-00001",
    "saved-model": "variables.data-00000-of-00001",
    "keras-hub": "model.weights.h5",
    "ctranslate2": "model.bin",
}
ABSENT = "looked for|missing, expected"


def holding(data: bytes) -> Callable[[Path], None]:
    """Replaces the weights by `data`."""
    return lambda folder: weight_file(folder).write_bytes(data)


def changed(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    """Replaces the bytes of the weights by `change` of them."""

    def damage(folder: Path) -> None:
        path = weight_file(folder)
        path.write_bytes(change(path.read_bytes()))

    return damage


def replaced_by(make: Callable[[Path], object]) -> Callable[[Path], None]:
    """Removes the file of the weights and calls `make` with its path."""

    def damage(folder: Path) -> None:
        path = weight_file(folder)
        path.unlink()
        make(path)

    return damage


def adapter(path: Path) -> None:
    path.with_name("adapter_model.safetensors").write_bytes(b"x")


def _contents(base: str, file: str) -> Iterator[tuple]:
    unknown = ("no weights", "CTranslate2's model") if base == "ctranslate2" else None  # which its content alone tells
    file = "data file 0" if ".data-" in file else file
    noise = np.random.default_rng(11).bytes(5000)
    told_apart = r"expected|truncated|damaged|not valid JSON"
    whole = {
        "an empty file": b"",
        "a web page": b"<!DOCTYPE html><html>",
        "a pointer of Git LFS": POINTER,
        "noise": noise,
        "zeros": bytes(5000),
        "text": b"{}",
    }
    for id, data in whole.items():
        yield id, holding(data), *(unknown or (file, told_apart))
    for id, data in SIGNATURES.items():
        own = {"safetensors": "safetensors", "msgpack": "flax-msgpack"}.get(id) == base  # then it is whole, but empty
        expected = ("decoder.layers.0.fc1.bias", "missing, expected") if own else unknown or (file, told_apart)
        yield f"the signature of {id} alone", holding(data), *expected
    yield "cut after 9 bytes", changed(lambda data: data[:9]), *(unknown or (file, told_apart))
    yield "cut after 1000 bytes", changed(lambda data: data[:1000]), file, "truncated|damaged|expected"
    yield "cut in half", changed(lambda data: data[: len(data) // 2]), file, "truncated|damaged"
    yield "the last byte cut off", changed(lambda data: data[:-1]), file, "truncated|damaged"


NO_FILES = {
    "no weights": replaced_by(lambda path: None),
    "a folder in its place": replaced_by(Path.mkdir),
    "a pipe, at which reading would wait": replaced_by(lambda path: os.mkfifo(path)),
    "an endless device": replaced_by(lambda path: path.symlink_to("/dev/zero")),
    "a link to nothing": replaced_by(lambda path: path.symlink_to("nothing")),
    "a link to itself": replaced_by(lambda path: path.symlink_to(path.name)),
    "the weights of an adapter": replaced_by(adapter),
}


def _absent(base: str, file: str) -> Iterator[tuple]:
    for id, damage in NO_FILES.items():
        says = "a LoRA adapter: merge it" if "adapter" in id and ".data-" not in file else ABSENT
        yield id, damage, file if ".data-" in file else "no weights", says


def _of_another_format(base: str, file: str) -> Iterator[tuple]:
    """A valid file of another container under this name."""
    for other, other_file in SINGLE.items():
        if Path(other_file).suffix != Path(file).suffix and other in (
            "safetensors",
            "torch-bin",
            "flax-msgpack",
            "tf-h5",
        ):
            yield f"{other} under its name", _taken_from(other), file, "by its name, got"


def _taken_from(base: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = weight_file(folder)
        other = folder / "other"
        BASES[base](other)
        weight_file(other).replace(path)
        for rest in other.iterdir():
            rest.unlink()
        other.rmdir()

    return damage


CASES: list[Case] = [
    *(
        case
        for base, file in SINGLE.items()
        if base in ("safetensors", "torch-bin", "flax-msgpack", "tf-h5")  # the others share the first one's container
        for case in cases(base, 1, [*_contents(base, file), *_absent(base, file), *_of_another_format(base, file)])
    ),
    *(case for base, file in OTHERS.items() for case in cases(base, 1, [*_contents(base, file), *_absent(base, file)])),
]
