"""What the model-parallel parts of a metaseq checkpoint are called and agree in, wherever their tensors lie.

Parts are alike in everything but values: a weight that is split is split evenly, and one that is not is there whole in
each. Sources: metaseq f7ffa5f (2023), `model_parallel/`, `modules/`, and `scripts/reshard_mp.py`.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from conversion.stored import DTYPES, MappedFile, StoredTensor
from opt_core.errors import CheckpointError, raise_if

EMBEDDING = "decoder.embed_tokens.weight"
HEAD = "decoder.output_projection.weight"
_LISTED = 20
_COMPARED_ROWS = 1024
_LAYER_WEIGHT = r"(self_attn\.(qkv|k|v|q|out)_proj|fc1|fc2|self_attn_layer_norm|final_layer_norm)\.(weight|bias)"
_WEIGHT = re.compile(
    r"decoder\.(embed_tokens\.weight|embed_positions\.weight|output_projection\.weight|project_(in|out)_dim\.weight"
    rf"|layer_norm\.(weight|bias)|layers\.(0|[1-9]\d{{0,4}})\.{_LAYER_WEIGHT})"
)
_NESTED = re.compile(r"decoder\.layers\.(0|[1-9]\d{0,4})\.layers\.(0|[1-9]\d{0,4})\.(.+)")


def without_nested_layers(part: MappedFile) -> MappedFile:
    """With the layers of groups, which were wrapped together in training, counted through."""
    nested = {name: match for name in part.tensors if (match := _NESTED.fullmatch(name))}
    if not nested:
        return part
    inner: dict[int, set[int]] = {}
    for match in nested.values():
        inner.setdefault(int(match[1]), set()).add(int(match[2]))
    width = len(inner.get(0, ()))
    is_regular = set(inner) == set(range(len(inner))) and all(of == set(range(width)) for of in inner.values())
    if not is_regular or any(name.startswith("decoder.layers.") for name in part.tensors.keys() - nested.keys()):
        raise CheckpointError(str(part.path), ["decoder.layers: expected groups of equally many layers"])
    names = {name: f"decoder.layers.{int(m[1]) * width + int(m[2])}.{m[3]}" for name, m in nested.items()}
    return _Renamed(part, {names.get(name, name): name for name in part.tensors})


class _Renamed(MappedFile):
    def __init__(self, file: MappedFile, names: dict[str, str]):
        super().__init__(file.path, {name: file.tensors[old] for name, old in names.items()})
        self._file, self._names = file, names

    def view(self, name: str) -> np.ndarray:
        return self._file.view(self._names[name])

    def close(self) -> None:
        self._file.close()


def check_parts(parts: list[MappedFile], path: Path) -> None:
    problems = []
    for name, tensor in parts[0].tensors.items():
        if not _WEIGHT.fullmatch(name):
            problems.append(f"{parts[0].path.name}: {name[:200]}: not a weight of OPT in metaseq")
        elif tensor.dtype not in DTYPES:
            text = f"expected a dtype of {', '.join(DTYPES)}, got {tensor.dtype}"
            problems.append(f"{parts[0].path.name}: {name}: {text}")
    if not parts[0].tensors:
        problems.append(f"{parts[0].path.name}: expected the weights of a model, got none")
    for part in parts[1:]:
        problems += [f"{part.path.name}: {text}" for text in _differences(parts[0].tensors, part.tensors)][:_LISTED]
    raise_if(CheckpointError, str(path), [*problems[:_LISTED], *_missing_parts(parts)])


def _differences(first: Mapping[str, StoredTensor], other: Mapping[str, StoredTensor]) -> Iterator[str]:
    """Parts are equal in everything but values: what is not split is there whole in each."""
    yield from (f"{name[:200]}: missing, though part 0 has it" for name in first.keys() - other.keys())
    yield from (f"{name[:200]}: there, though part 0 lacks it" for name in other.keys() - first.keys())
    for name in first.keys() & other.keys():
        if first[name][:2] != other[name][:2]:
            expected, got = (f"{tensor.dtype} {tensor.shape}" for tensor in (first[name], other[name]))
            yield f"{name[:200]}: expected {expected}, as in part 0, got {got}"


def _missing_parts(parts: list[MappedFile]) -> Iterator[str]:
    """Names cannot tell that the last parts are missing, but widths can."""
    found = parts[0].tensors.get("decoder.layers.0.self_attn.out_proj.weight")
    width, columns = found.shape if found and len(found.shape) == 2 else (1, 1)
    if columns * len(parts) < width:
        text = f"expected the {width} columns of self_attn.out_proj.weight in all parts together"
        yield f"{text}, got {columns} in each of {len(parts)}: parts are missing"


def without_leftover_head(parts: list[MappedFile], path: Path) -> list[MappedFile]:
    """Without a head of other rows than the embedding, which must be the embedding's first.

    `reshard_mp` copies the head of the first part it read to every part that it writes.
    """
    head, embedding = parts[0].tensors.get(HEAD), parts[0].tensors.get(EMBEDDING)
    if head is None or embedding is None or head.shape == embedding.shape:
        return parts
    if not all(_starts_with(parts, part.read(HEAD)) for part in parts):
        text = f"expected the shape {embedding.shape} of {EMBEDDING}, or its first rows, got {head.shape}"
        raise CheckpointError(str(path), [f"{parts[0].path.name}: {HEAD}: {text}"])
    return [_Renamed(part, {name: name for name in part.tensors if name != HEAD}) for part in parts]


def _starts_with(parts: list[MappedFile], head: np.ndarray) -> bool:
    """True where the rows of the embedding, through all parts, begin with those of `head`, bit for bit."""
    for part in parts:
        if not len(head):
            break
        rows = part.read(EMBEDDING)
        if rows.shape[1:] != head.shape[1:] or rows.dtype != head.dtype:
            return False
        for start in range(0, min(len(rows), len(head)), _COMPARED_ROWS):
            first, other = rows[start : start + _COMPARED_ROWS], head[start : start + _COMPARED_ROWS]
            count = min(len(first), len(other))
            if first[:count].tobytes() != other[:count].tobytes():
                return False
        head = head[len(rows) :]
    return not len(head)
