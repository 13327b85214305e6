"""The formats, each a declaration: what its files are called, how each weight is named and laid out in them.

Reading and writing derive from the same rows: the published layout in two containers, and what the published Flax and
TensorFlow classes save. Names of the published layout that no program writes today are `conversion.names`' business;
which format a file is in, `conversion.recognition`'s. Source of the tables of Flax and TensorFlow: what transformers
4.57.6 writes.
"""

import re
from functools import lru_cache
from typing import NamedTuple

from conversion.layout import Layout
from conversion.stored import DTYPES
from opt_core.config import OPTConfig
from opt_core.schema import SCHEMA, TASKS, Weight, published_name, weights


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
    older: str | None = None  # the stored name in older files, which is read but not written

    def match(self, name: str) -> re.Match | None:
        pattern = re.escape(self.weights).replace(r"\*", "(.+)").replace(r"\{layer\}", r"(?P<layer>\d+)")
        return re.fullmatch(pattern, name)


class Format(NamedTuple):
    """A container, the names of its files, its rules, and what it cannot hold."""

    name: str
    stem: str  # of a single file; shards are `<stem>-00001-of-00002<suffix>`, their index `<stem><suffix>.index.json`
    suffix: str
    rules: tuple[Rule, ...]
    container: str = "safetensors"  # or "torch-zip", "msgpack", "h5"
    framework: str = "pt"  # the word for it in the metadata of safetensors
    separator: str = "."  # in stored names, instead of the dots of the rules; "": the rules have the names as stored
    tasks: tuple[str, ...] = TASKS  # those whose published classes exist in this framework
    requires: tuple[tuple[str, bool], ...] = ()  # switches of the config that those classes do not have, as they act
    dtypes: tuple[str, ...] = tuple(DTYPES)
    scope: str = ""  # of TensorFlow: before the names in single h5 files and in every index; on reading, any

    @property
    def names_tell_the_class(self) -> bool:
        """False where the base class stores the same names as the others."""
        return any("{model}" in rule.stored for rule in self.rules)

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
_FLAX = (
    Rule("*.embed_*.weight", "{model}{0}.embed_{1}.embedding"),
    Rule("*norm.weight", "{model}{0}norm.scale"),
    Rule("*.bias", "{model}{0}.bias"),
    Rule("*.weight", "{model}{0}.kernel", dims="reversed"),
)
_TF = (
    Rule("decoder.embed_tokens.weight", "model/decoder/embed_tokens/weight:0",
         older="model/decoder/embed_tokens/embeddings:0"),
    Rule("decoder.embed_positions.weight", "model/decoder/embed_positions/embeddings:0"),
    Rule("decoder.layers.{layer}.self_attn.*.weight", "model/decoder/layers.{layer}/self_attn/{0}/kernel:0",
         dims="reversed"),
    Rule("decoder.layers.{layer}.self_attn.*.bias", "model/decoder/layers.{layer}/self_attn/{0}/bias:0"),
    Rule("decoder.layers.{layer}.fc*.weight", "model/decoder/layers.{layer}/fc{0}/kernel:0", dims="reversed"),
    Rule("decoder.layers.{layer}.fc*.bias", "model/decoder/layers.{layer}/fc{0}/bias:0"),
    Rule("decoder.layers.{layer}.*norm.weight", "model/decoder/layers.{layer}/{0}norm/gamma:0"),
    Rule("decoder.layers.{layer}.*norm.bias", "model/decoder/layers.{layer}/{0}norm/beta:0"),
    Rule("decoder.final_layer_norm.weight", "model/decoder/final_layer_norm/gamma:0"),
    Rule("decoder.final_layer_norm.bias", "model/decoder/final_layer_norm/beta:0"),
    Rule("decoder.*.weight", "model/decoder/{0}/kernel:0", dims="reversed"),
    Rule("*.weight", "{0}/kernel:0", dims="reversed"),
    Rule("*.bias", "{0}/bias:0"),
)  # fmt: skip
_TWO_CLASSES = ("base", "causal-lm")  # of which the published Flax and TensorFlow code has the OPT model
_ALWAYS_ON = (("enable_bias", True), ("layer_norm_elementwise_affine", True))
_TIED = (*_ALWAYS_ON, ("tie_word_embeddings", True))
_SCOPE = "tfopt_for_causal_lm"
_H5_DTYPES = ("float64", "float32", "float16")

# In order of preference where a folder holds several.
FORMATS = {
    format.name: format
    for format in (
        Format("safetensors", "model", ".safetensors", _PUBLISHED),
        Format("torch-bin", "pytorch_model", ".bin", _PUBLISHED, "torch-zip"),
        Format(
            "flax-safetensors", "model", ".safetensors", _FLAX, "safetensors", "flax", ".", _TWO_CLASSES, _ALWAYS_ON
        ),
        Format("flax-msgpack", "flax_model", ".msgpack", _FLAX, "msgpack", "flax", "/", _TWO_CLASSES, _ALWAYS_ON),
        Format(
            "tf-safetensors", "model", ".safetensors", _TF, "safetensors", "tf", "", _TWO_CLASSES, _TIED, scope=_SCOPE
        ),
        Format("tf-h5", "tf_model", ".h5", _TF, "h5", "tf", "", _TWO_CLASSES, _TIED, _H5_DTYPES, _SCOPE),
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
    rule, match = _matching_rule(format, weight.name)
    return Place(_stored_name(format, rule.stored, match, task), _layout(rule, weight, config), rule.split)


def _matching_rule(format: Format, name: str) -> tuple[Rule, re.Match]:
    for rule in format.rules:
        if match := rule.match(name):
            return rule, match
    raise ValueError(f"{format.name}: no rule for {name}")


def _stored_name(format: Format, pattern: str, match: re.Match, task: str) -> str:
    named = match.groupdict()
    starred = [text for group, text in enumerate(match.groups(), 1) if group not in match.re.groupindex.values()]
    prefix = published_name(match.string, task).removesuffix(match.string)
    stored = pattern.format(*starred, model=prefix, **named)
    return stored.replace(".", format.separator) if format.separator else stored


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


# -- reading: the same rows, from the stored name ---------------------------------------------------------------------

_LAYER = re.compile(r"(?<=layers[./])(0|[1-9][0-9]{0,5})(?=[./])")


def without_scope(format: Format, stored: str) -> str:
    """A stored name without what precedes a weight in some files; it varies with class and process."""
    return stored[match.start(1) :] if format.scope and (match := _SCOPED.match(stored)) else stored


_SCOPED = re.compile(r"[^/]+/(model/decoder/)")


def published_of(format: Format, stored: str) -> str | None:
    """The published name of the weight that the format stores under `stored`; None where it stores none there."""
    if format.rules is _PUBLISHED:
        return stored
    stored = without_scope(format, stored)
    layer = _LAYER.search(stored)
    published = _published_of_layer_0(format).get(_LAYER.sub("0", stored, count=1))
    return _LAYER.sub(layer[1], published, count=1) if layer and published else published


@lru_cache
def _published_of_layer_0(format: Format) -> dict[str, str]:
    inverse: dict[str, str] = {}
    for row in SCHEMA:
        name = row.name.format(layer=0)
        rule, match = _matching_rule(format, name)
        for task in reversed(row.tasks):  # the base class comes last: it may store the same names as the others
            for pattern in (rule.stored, rule.older):
                if pattern:
                    inverse.setdefault(_stored_name(format, pattern, match, task), published_name(name, task))
    return inverse


def layout_of(format: Format, name: str, config: OPTConfig) -> Layout:
    """How the format stores the weight with the schema's `name`, whether or not the config has it."""
    row = _rows()[_LAYER.sub("{layer}", name, count=1)]
    return _layout(_matching_rule(format, name)[0], row._replace(name=name), config)


@lru_cache
def _rows() -> dict[str, Weight]:
    return {row.name: row for row in SCHEMA}


# -- writing: what a format cannot hold -------------------------------------------------------------------------------


def refusals(format: Format, config: OPTConfig, task: str) -> list[str]:
    """Why a model cannot be written in a format such that the published classes of its framework load it as it is."""
    problems = [
        f"{field}: expected {value} for {format.name}, got {getattr(config, field)}: {_REASONS[field]}"
        for field, value in format.requires
        if getattr(config, field) != value and not (field == "tie_word_embeddings" and task == "base")
    ]
    if task not in format.tasks:
        text = "there is no published class for it in that framework"
        problems.append(f"task: expected one of {', '.join(format.tasks)} for {format.name}, got {task}: {text}")
    return problems


_REASONS = {
    "enable_bias": "the published class always has biases",
    "layer_norm_elementwise_affine": "the published class always has weights in its norms",
    "tie_word_embeddings": "the format has no place for a head, and the published class would use the embedding",
}
