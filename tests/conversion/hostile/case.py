"""One damaged or hostile checkpoint: what is done to a valid one, and what the refusal must say. Data only."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

RULES = {
    1: "the container is known by its content, and agrees with the file's name",
    2: "a pickle names nothing but what weights need; a zip agrees with itself",
    3: "a tensor is dense, inside its storage, of a float dtype, and a plain weight",
    4: "an index names plain files beside it, and says of each what is in it",
    5: "model-parallel and FSDP parts are complete, and agree with each other",
    6: "the tensors are those of the config",
    7: "values are finite, and the dtype of the target can hold them",
    8: "HDF5 holds its data in the file, and declares no more than it holds",
    9: "msgpack and its like hold arrays whose sizes add up",
    10: "config.json describes an OPT model of a possible size",
    11: "folders and bundles of several files agree with their metadata, and nothing in them is run",
    12: "what is written is whole, and replaces nothing unless asked",
}


class Case(NamedTuple):
    """A valid checkpoint of `base` after `damage`, which opening, checking, reading or converting must refuse."""

    id: str
    base: str  # a key of `bases.BASES`
    rule: int  # a key of RULES
    damage: Callable[[Path], Any]  # given the folder with the checkpoint
    names: str  # the file, tensor or field that the error must name
    says: str  # a regular expression: what it must say was expected or found
    opening: Mapping[str, Any] = MappingProxyType({})  # arguments of `open_checkpoint`
    writing: Mapping[str, Any] = MappingProxyType({})  # arguments of `write_checkpoint`
    open_fault: str = ""  # why it is not refused as it should be; must be empty once it is

    @property
    def format(self) -> str:
        return self.base.partition(" ")[0]

    def __str__(self) -> str:
        return f"{self.base}: {self.id}"


def cases(base: str, rule: int, rows: Iterable[tuple], **fields) -> list[Case]:
    """Cases of one base and rule from rows of (id, damage, names, says)."""
    return [Case(id, base, rule, damage, names, says, **fields) for id, damage, names, says in rows]
