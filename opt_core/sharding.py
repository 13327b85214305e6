"""Which device of a mesh holds which part of every weight: rules from the schema's letters to the axes of a mesh.

A rule says that the dimension of a letter is cut over an axis. What becomes of a cut weight follows from `Rules.batch`:
devices along an axis of the batch have other rows each, so weights cut over it are gathered before they are used (FSDP,
Zhao et al., arXiv:2304.11277); along any other axis all have the same rows, and each computes with its own part of the
heads, the feed-forward and the vocabulary (Megatron, Shoeybi et al., arXiv:1909.08053, section 3). Plain numbers and
names: communication and arrays are the engines' business.
"""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from opt_core.config import OPTConfig
from opt_core.errors import InputError, raise_if
from opt_core.schema import AXES, Weight, shapes, weights

Spec = tuple[str | None, ...]  # for each dimension of a weight the axis that cuts it, None where it is whole


@dataclass(frozen=True)
class Mesh:
    """A grid of devices: the name and the size of each axis, the last one varying fastest from rank to rank.

    Raises:
        InputError: lists every name that comes twice and every size below 1.
    """

    names: tuple[str, ...]
    sizes: tuple[int, ...]

    def __post_init__(self):
        object.__setattr__(self, "names", tuple(self.names))
        object.__setattr__(self, "sizes", tuple(self.sizes))
        raise_if(InputError, "mesh", self._problems())

    def _problems(self) -> Iterator[str]:
        if len(self.names) != len(self.sizes):
            yield f"expected a size for each of the axes {self.names}, got {self.sizes}"
        for name in dict.fromkeys(self.names):
            if self.names.count(name) > 1:
                yield f"{name}: expected it once, got it {self.names.count(name)} times"
        for name, size in zip(self.names, self.sizes, strict=False):
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                yield f"{name}: expected a number of devices of at least 1, got {size!r}"

    @classmethod
    def parse(cls, text: str) -> "Mesh":
        """The mesh of a text such as "fsdp=2,tensor=4".

        Raises:
            InputError: lists every part that is not of that form, and what a mesh refuses.
        """
        parts = [re.fullmatch(r"\s*(\w+)\s*=\s*(\d+)\s*", part) for part in text.split(",")]
        bad = [part for part, found in zip(text.split(","), parts, strict=True) if found is None]
        raise_if(InputError, "mesh", [f"expected name=size, as in fsdp=2,tensor=4, got {part!r}" for part in bad])
        return cls(tuple(found[1] for found in parts if found), tuple(int(found[2]) for found in parts if found))

    @property
    def devices(self) -> int:
        return math.prod(self.sizes)

    def size(self, axis: str | None) -> int:
        """Devices along `axis`; 1 for None, and for an axis that this mesh has not."""
        return self.sizes[self.names.index(axis)] if axis in self.names else 1

    def coordinates(self, rank: int) -> tuple[int, ...]:
        """Where device number `rank` is along each axis."""
        places = []
        for size in reversed(self.sizes):
            rank, place = divmod(rank, size)
            places.append(place)
        return tuple(reversed(places))

    def __str__(self) -> str:
        return " x ".join(f"{name} {size}" for name, size in zip(self.names, self.sizes, strict=True))


class Rules(NamedTuple):
    """Letters of the schema to axes. An axis that a mesh has not is passed over.

    Of two dimensions of a weight that an axis may cut, that of the earlier rule is cut; of two axes for a dimension,
    the earlier one that the mesh has cuts it. So no axis comes twice in a weight, and no dimension is cut twice.
    """

    weights: tuple[tuple[str, str], ...]
    batch: tuple[str, ...] = ()  # axes that the rows of a batch are cut over

    @property
    def axes(self) -> set[str]:
        return {axis for _, axis in self.weights} | set(self.batch)


# One line is Megatron: q, k, v and fc1 by rows of the published (out, in), which is their outputs, with their biases;
# out_proj and fc2 by their inputs; embeddings and the head by the vocabulary.
TENSOR_PARALLEL = (("A", "tensor"), ("F", "tensor"), ("V", "tensor"))
# The width is in every weight but biases of wider ones, and every published one is a multiple of 256.
FULLY_SHARDED = (("D", "fsdp"), ("E", "fsdp"), ("A", "fsdp"), ("F", "fsdp"))
RULES = Rules((*TENSOR_PARALLEL, *FULLY_SHARDED), batch=("data", "fsdp"))

# The axes of a mesh, under these rules: neighbours are those that talk most.
LAYOUTS = {"tensor": ("tensor",), "fsdp": ("fsdp",), "tensor+fsdp": ("fsdp", "tensor"), "data": ("data",)}

_FIELDS = {"V": "vocab_size", "D": "hidden_size", "E": "word_embed_proj_dim", "F": "ffn_dim", "K": "num_labels"}


def meshes(layout: str, devices: int) -> list[Mesh]:
    """Every mesh of a named layout for so many devices, each axis with 2 or more of them where there are several.

    Raises:
        InputError: an unknown layout, or a number of devices that does not factor into its axes.
    """
    if layout not in LAYOUTS:
        raise InputError("layout", [f"expected one of {', '.join(LAYOUTS)}, got {layout!r}"])
    names = LAYOUTS[layout]
    if len(names) == 1:
        return [Mesh(names, (devices,))]
    found = [Mesh(names, (devices // n, n)) for n in range(2, devices // 2 + 1) if devices % n == 0]
    if not found:
        raise InputError("layout", [f"{layout}: expected a product of two numbers above 1, got {devices} devices"])
    return found


def mesh_of(layout: str, devices: int) -> Mesh:
    """The mesh of a named layout whose axes are most alike; of two such the one with more `fsdp`."""
    return min(meshes(layout, devices), key=lambda mesh: abs(mesh.sizes[0] - mesh.sizes[-1]))


# -- weights ----------------------------------------------------------------------------------------------------------


def partition(config: OPTConfig, mesh: Mesh, rules: Rules = RULES, task: str = "causal-lm") -> dict[str, Spec]:
    """Name to the axis of each dimension, for every stored weight.

    Raises:
        InputError: lists every size that its axis does not divide: heads where they are computed apart (in each layer
            those it has left), vocabulary, widths. Nothing is padded.
    """
    raise_if(InputError, f"{mesh}", dict.fromkeys(_problems(config, mesh, rules, task)))
    return {weight.name: spec_of(weight.dims, mesh, rules) for weight in weights(config, task)}


def spec_of(dims: str, mesh: Mesh, rules: Rules = RULES) -> Spec:
    """The axis of each of the dimensions `dims`, letters of the schema."""
    axes: dict[str, str] = {}
    for letter, axis in rules.weights:
        if letter in dims and letter not in axes and axis in mesh.names and axis not in axes.values():
            axes[letter] = axis
    return tuple(axes.get(letter) for letter in dims)


def _problems(config: OPTConfig, mesh: Mesh, rules: Rules, task: str) -> Iterator[str]:
    yield from (f"rules: expected letters of the schema, got {x!r}" for x, _ in rules.weights if x not in AXES)
    known = ", ".join(sorted(rules.axes))
    yield from (f"axis {x!r}: expected one of the rules', {known}" for x in mesh.names if x not in rules.axes)
    for weight in weights(config, task):
        for dim, axis in enumerate(spec_of(weight.dims, mesh, rules)):
            if axis is not None:
                yield from _division_problems(config, weight, dim, axis, mesh.size(axis), axis in rules.batch)


def _division_problems(
    config: OPTConfig, weight: Weight, dim: int, axis: str, parts: int, is_gathered: bool
) -> Iterator[str]:
    """What keeps a dimension from being cut; heads that are computed apart stay whole."""
    letter, length = weight.dims[dim], weight.shape(config)[dim]
    name = _FIELDS.get(letter, "joined heads")
    if letter == "A":
        if not is_gathered:
            name, length = "num_attention_heads", length // config.head_size
        name += "" if config.has_all_heads else f" in layer {weight.layer}"
    if length % parts:
        more = ""
        if letter == "V":
            padded = -(-length // parts) * parts
            more = f"; resize_token_embeddings(..., pad_to_multiple_of={parts}) would make it {padded}"
        yield f"{name}: expected a multiple of {parts}, the devices along {axis!r}, got {length}{more}"


def shard_slices(shape: Sequence[int], spec: Spec, mesh: Mesh, coordinates: Sequence[int]) -> tuple[slice, ...]:
    """The part of a weight that the device at `coordinates` of the mesh holds."""
    place = dict(zip(mesh.names, coordinates, strict=True))
    lengths = local_shape(shape, spec, mesh)
    starts = [0 if axis is None else place[axis] * n for n, axis in zip(lengths, spec, strict=True)]
    return tuple(slice(start, start + n) for start, n in zip(starts, lengths, strict=True))


def local_shape(shape: Sequence[int], spec: Spec, mesh: Mesh) -> tuple[int, ...]:
    """The shape of the part that every device holds.

    Raises:
        InputError: a length that its axis does not divide.
    """
    pairs = [(length, mesh.size(axis)) for length, axis in zip(shape, spec, strict=True)]
    if problems := [f"expected a multiple of {n}, got {length}" for length, n in pairs if length % n]:
        raise InputError(f"{tuple(shape)} cut over {mesh}", problems)
    return tuple(length // n for length, n in pairs)


def local_shapes(
    config: OPTConfig, mesh: Mesh, rules: Rules = RULES, task: str = "causal-lm"
) -> dict[str, tuple[int, ...]]:
    """Name to the shape that every device holds, for every stored weight; raises as `partition`."""
    specs = partition(config, mesh, rules, task)
    return {name: local_shape(shape, specs[name], mesh) for name, shape in shapes(config, task).items()}


def shard_bytes(config: OPTConfig, mesh: Mesh, item_bytes: int, rules: Rules = RULES, task: str = "causal-lm") -> int:
    """Bytes of weights on every device, `item_bytes` for each number."""
    return item_bytes * sum(map(math.prod, local_shapes(config, mesh, rules, task).values()))


def computing_mesh(mesh: Mesh, rules: Rules = RULES) -> Mesh:
    """The axes along which all devices have the same rows: how weights are cut while they are used."""
    kept = [(name, size) for name, size in zip(mesh.names, mesh.sizes, strict=True) if name not in rules.batch]
    return Mesh(tuple(name for name, _ in kept), tuple(size for _, size in kept))


# -- batches ----------------------------------------------------------------------------------------------------------


def batch_axes(mesh: Mesh, rules: Rules = RULES) -> tuple[str, ...]:
    """The axes of the mesh that cut the rows of a batch, the outermost first."""
    return tuple(name for name in mesh.names if name in rules.batch)


def batch_rows(batch: int, mesh: Mesh, coordinates: Sequence[int], rules: Rules = RULES) -> slice:
    """The rows of a batch that the device at `coordinates` has."""
    place, number = dict(zip(mesh.names, coordinates, strict=True)), 0
    for axis in batch_axes(mesh, rules):
        number = number * mesh.size(axis) + place[axis]
    rows = local_batch(batch, mesh, rules)
    return slice(number * rows, (number + 1) * rows)


def local_batch(batch: int, mesh: Mesh, rules: Rules = RULES) -> int:
    """How many rows of a batch every device has.

    Raises:
        InputError: rows that the axes of the batch do not divide.
    """
    parts = math.prod(mesh.size(axis) for axis in batch_axes(mesh, rules))
    if batch < 1 or batch % parts:
        raise InputError(f"{mesh}", [f"batch: expected a multiple of {parts} rows, got {batch}"])
    return batch // parts
