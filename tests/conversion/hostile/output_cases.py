"""Targets in which something is already there: it stays as it is (rule 12)."""

from collections.abc import Callable
from pathlib import Path

from hostile.bases import BASES
from hostile.case import Case, cases


def target_with(name: str) -> Callable[[Path], None]:
    """A target that holds one file of this name."""

    def damage(folder: Path) -> None:
        path = folder.parent / "target" / name
        path.parent.mkdir(parents=True)
        path.write_bytes(b"of somebody")

    return damage


def file_as_target(folder: Path) -> None:
    (folder.parent / "target").write_bytes(b"of somebody")


def link_as_target(folder: Path) -> None:
    """A link to a folder that holds a checkpoint."""
    BASES["torch-bin"](folder.parent / "older")
    (folder.parent / "target").symlink_to("older")


def link_to_nothing(folder: Path) -> None:
    (folder.parent / "target").symlink_to("nothing")


def target_is_source(folder: Path) -> None:
    (folder.parent / "target").symlink_to(folder.name)


CASES: list[Case] = cases(
    "safetensors",
    12,
    [
        ("a target that is a file", file_as_target, "target", "expected a folder, got a file"),
        *(
            (f"a target that holds {name}", target_with(name), name, "holds .*overwrite=True")
            for name in (
                "config.json",
                "model.safetensors",
                "model-00002-of-00005.safetensors",
                "pytorch_model.bin.index.json",
                "flax_model.msgpack",
                "tf_model-00001-of-00001.h5",
            )
        ),
        ("a target that is a link to a checkpoint", link_as_target, "pytorch_model.bin", "holds .*overwrite=True"),
        ("a target that is the source", target_is_source, "model.safetensors", "holds .*overwrite=True"),
        ("a target that is a link to nothing", link_to_nothing, "target", "exists|Not a directory"),
    ],
)
