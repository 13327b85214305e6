"""The formats, each a declaration: what its files are called, how each weight is named and laid out in them.

Reading and writing derive from the same rules. So far the published layout in its two containers; a further format is a
further table. Names met in the wild that no program writes today are `conversion.names`' business.
"""

import re
from pathlib import Path
from typing import NamedTuple

from conversion.layout import Layout
from opt_core.config import OPTConfig
from opt_core.errors import CheckpointError
from opt_core.schema import Weight, published_name, weights


class Rule(NamedTuple):
    """How a format stores the weights of some names; the first rule of a format that matches a weight counts.

    `weights` is a pattern over the schema's names: `*` matches any words, `{layer}` the number of a layer. In `stored`,
    `{0}`, `{1}`, ... are what the stars matched, `{layer}` is the number, and `{model}` is "model." where the class
    that saves puts it before its decoder.
    """

    weights: str
    stored: str
    dims: str | None = None  # letters in stored order, or "reversed"; None: as in the schema
    skip_rows: int = 0  # see `Layout`
    slot: tuple[int, int] | None = None  # see `Layout`
    split: str = ""  # the letter along which model-parallel parts cut it; "": each part holds it whole

    def match(self, name: str) -> re.Match | None:
        pattern = re.escape(self.weights).replace(r"\*", "(.+)").replace(r"\{layer\}", r"(?P<layer>\d+)")
        return re.fullmatch(pattern, name)


class Format(NamedTuple):
    """A container, the names of its files, and its rules."""

    name: str
    stem: str  # of a single file; shards are `<stem>-00001-of-00002<suffix>`, their index `<stem><suffix>.index.json`
    suffix: str
    rules: tuple[Rule, ...]

    @property
    def single_name(self) -> str:
        return f"{self.stem}{self.suffix}"

    @property
    def index_name(self) -> str:
        return f"{self.stem}{self.suffix}.index.json"

    def owns(self, file_name: str) -> bool:
        """True for the names of files that this format writes: single, shard or index."""
        shard = rf"{re.escape(self.stem)}-\d+-of-\d+{re.escape(self.suffix)}"
        return file_name in (self.single_name, self.index_name) or re.fullmatch(shard, file_name) is not None


_PUBLISHED = (Rule("*", "{model}{0}"),)

# In order of preference where a folder holds several.
FORMATS = {
    format.name: format
    for format in (
        Format("safetensors", "model", ".safetensors", _PUBLISHED),
        Format("torch-bin", "pytorch_model", ".bin", _PUBLISHED),
    )
}


class Place(NamedTuple):
    """Where a format puts one weight."""

    name: str
    layout: Layout
    split: str


def places(format: Format, config: OPTConfig, task: str) -> dict[str, Place]:
    """The schema's name of every stored weight to its place.

    Raises:
        ValueError: a weight without a rule, or two in one place: the table of the format is wrong.
    """
    found = {weight.name: _place(format, weight, config, task) for weight in weights(config, task)}
    if len({(place.name, place.layout.slot) for place in found.values()}) != len(found):
        raise ValueError(f"{format.name}: two weights in one place")
    return found


def _place(format: Format, weight: Weight, config: OPTConfig, task: str) -> Place:
    for rule in format.rules:
        if match := rule.match(weight.name):
            return Place(_stored_name(rule, match, task), _layout(rule, weight, config), rule.split)
    raise ValueError(f"{format.name}: no rule for {weight.name}")


def _stored_name(rule: Rule, match: re.Match, task: str) -> str:
    named = match.groupdict()
    starred = [text for group, text in enumerate(match.groups(), 1) if group not in match.re.groupindex.values()]
    prefix = published_name(match.string, task).removesuffix(match.string)
    return rule.stored.format(*starred, model=prefix, **named)


def _layout(rule: Rule, weight: Weight, config: OPTConfig) -> Layout:
    lengths = dict(zip(weight.dims, weight.shape(config), strict=True))
    lengths |= {"N": config.num_attention_heads, "H": config.head_size}
    stored = weight.dims[::-1] if rule.dims == "reversed" else rule.dims or weight.dims
    layout = Layout(weight.dims, stored, lengths, rule.skip_rows, rule.slot)
    if sorted(layout.split_dims) != sorted(stored):
        raise ValueError(
            f"{rule.weights}: {weight.name} has the axes {weight.dims}, which cannot be stored as {stored}"
        )
    return layout


# File of a checkpoint that is not read (yet) -> what it is.
_FOREIGN_FILES = {
    "adapter_model.*": "a LoRA adapter: merge it into its base model first",
    "tf_model*.h5": "TensorFlow weights, which are not read yet",
    "flax_model*.msgpack": "Flax weights, which are not read yet",
    "*.pt": "metaseq weights, which are not read yet",
}


def weight_files(folder: Path) -> tuple[Format, Path]:
    """The preferred format in a folder, and its single file or its index.

    Raises:
        CheckpointError: no weights, shards without an index, or a single file beside an index.
    """
    for format in FORMATS.values():
        single, index = folder / format.single_name, folder / format.index_name
        if single.is_file() and index.is_file():
            text = f"holds both {single.name} and {index.name}: name the one that is meant, or delete the other"
            raise CheckpointError(str(folder), [text])
        if single.is_file() or index.is_file():
            return format, single if single.is_file() else index
    raise CheckpointError(str(folder), _why_there_are_no_weights(folder))


def _why_there_are_no_weights(folder: Path) -> list[str]:
    names = [name for format in FORMATS.values() for name in (format.single_name, format.index_name)]
    problems = [f"no weights: looked for {', '.join(names)}"]
    for format in FORMATS.values():
        if any(format.owns(path.name) for path in folder.iterdir()):
            problems.append(f"{format.index_name}: missing, though shards of it are there")
    for pattern, what in _FOREIGN_FILES.items():
        problems += [f"{path.name}: {what}" for path in sorted(folder.glob(pattern))[:3]]
    return problems
