"""What follows from the tables of the formats: where each weight is stored, which weight a stored name is, refusals.

Reading and writing derive from the same rows. Names of the published layout that no program writes today are
`conversion.names`' business.
"""

import re
from functools import lru_cache
from typing import NamedTuple

from conversion.layout import Layout
from conversion.tables import FORMATS, NUMBERED, PUBLISHED, Format, Rule
from opt_core.config import OPTConfig
from opt_core.schema import AXES, SCHEMA, Weight, dimension_sizes, published_name, weights

__all__ = ["FORMATS", "Format", "Place", "Rule", "losses", "place_of", "places", "published_of", "refusals"]


class Place(NamedTuple):
    """Where a format puts one weight, or one model-parallel part of it."""

    name: str
    layout: Layout
    axis: int | None  # of the schema's shape, along which parts are cut; None: each part holds the whole


def places(format: Format, config: OPTConfig, task: str, parts: int = 1) -> dict[str, Place]:
    """The schema's name of every stored weight to its place in each of so many parts.

    Raises:
        ValueError: a weight without a rule, or two in one place: the table of the format is wrong.
    """
    found = {weight.name: _place(format, weight, config, task, parts) for weight in weights(config, task)}
    if len({(place.name, place.layout.slot) for place in found.values()}) != len(found):
        raise ValueError(f"{format.name}: two weights in one place")
    return found


def _place(format: Format, weight: Weight, config: OPTConfig, task: str, parts: int) -> Place:
    rule, match = _matching_rule(format, weight.name)
    return Place(
        _stored_name(format, rule.stored, match, task), _layout(rule, weight, config, parts), _axis(rule, weight)
    )


def _matching_rule(format: Format, name: str) -> tuple[Rule, re.Match]:
    for rule in format.rules:
        if match := rule.match(name):
            return rule, match
    raise ValueError(f"{format.name}: no rule for {name}")


def _stored_name(format: Format, pattern: str, match: re.Match, task: str) -> str:
    named = {key: format.numbering.spell(text) for key, text in match.groupdict().items()}
    starred = [text for group, text in enumerate(match.groups(), 1) if group not in match.re.groupindex.values()]
    prefix = published_name(match.string, task).removesuffix(match.string)
    stored = pattern.format(*starred, model=prefix, **named)
    return stored.replace(".", format.separator) if format.separator else stored


def _axis(rule: Rule, weight: Weight) -> int | None:
    return weight.dims.index(rule.split) if rule.split and rule.split in weight.dims else None


def _layout(rule: Rule, weight: Weight, config: OPTConfig, parts: int) -> Layout:
    sizes = dimension_sizes(config, weight.layer)
    lengths = {"N": sizes["N"], "H": sizes["H"], **dict(zip(weight.dims, weight.shape(config), strict=True))}
    if rule.split in lengths:
        lengths[rule.split] //= parts
    stored = weight.dims[::-1] if rule.dims == "reversed" else rule.dims or weight.dims
    layout = Layout(weight.dims, stored, lengths, rule.skip_rows, rule.slot)
    if sorted(layout.split_dims) != sorted(stored):
        raise ValueError(
            f"{rule.weights}: {weight.name} has the axes {weight.dims}, which cannot be stored as {stored}"
        )
    return layout


# -- reading: the same rows, from the stored name ---------------------------------------------------------------------


def without_scope(format: Format, stored: str) -> str:
    """A stored name without what may precede a weight in some files."""
    return re.sub(f"^{format.any_scope}", "", stored, count=1) if format.any_scope else stored


def published_of(format: Format, stored: str) -> tuple[str, ...]:
    """The published names of the weights that the format stores under `stored`, in the order of their slots."""
    if format.rules is PUBLISHED and format.separator == ".":
        return (stored,)
    stored = without_scope(format, stored)
    layer = re.search(format.numbering.pattern, stored)
    if layer is None:
        return _published_of_layer_0(format).get(stored, ())
    skeleton = stored[: layer.start()] + format.numbering.first + stored[layer.end() :]
    return tuple(
        re.sub(NUMBERED.pattern, layer[1] or "0", name, count=1)
        for name in _published_of_layer_0(format).get(skeleton, ())
    )


@lru_cache
def _published_of_layer_0(format: Format) -> dict[str, tuple[str, ...]]:
    inverse: dict[str, dict[int, str]] = {}
    for row in SCHEMA:
        name = row.name.format(layer=0)
        if not any(rule.match(name) for rule in format.rules):
            continue  # no model that the format can hold has it
        rule, match = _matching_rule(format, name)
        slot = rule.slot[0] if rule.slot else 0
        for task in reversed(row.tasks):  # the base class comes last: it may store the same names as the others
            for pattern in (rule.stored, rule.older):
                if pattern:
                    stored = without_scope(format, _stored_name(format, pattern, match, task))
                    inverse.setdefault(stored, {}).setdefault(slot, published_name(name, task))
    return {stored: tuple(slots[number] for number in sorted(slots)) for stored, slots in inverse.items()}


def place_of(format: Format, name: str, config: OPTConfig, task: str = "causal-lm", parts: int = 1) -> Place:
    """Where the format stores the weight with the schema's `name`, whether or not the config has it."""
    row = _rows()[re.sub(NUMBERED.pattern, "{layer}", name, count=1)]
    return _place(format, row._replace(name=name), config, task, parts)


@lru_cache
def _rows() -> dict[str, Weight]:
    return {row.name: row for row in SCHEMA}


# -- writing: what a format cannot hold -------------------------------------------------------------------------------


def refusals(format: Format, config: OPTConfig, task: str, parts: int = 1) -> list[str]:
    """Why a model cannot be written in a format such that the programs of that format load it as it is."""
    problems = [
        f"{field}: expected {value} for {format.name}, got {getattr(config, field)}: {_REASONS[field]}"
        for field, value in format.requires
        if getattr(config, field) != value and not (field == "tie_word_embeddings" and task == "base")
    ]
    if task not in format.tasks:
        text = "there is no published class for it in that framework"
        problems.append(f"task: expected one of {', '.join(format.tasks)} for {format.name}, got {task}: {text}")
    return problems + _parts_problems(format, config, task, parts)


def _parts_problems(format: Format, config: OPTConfig, task: str, parts: int) -> list[str]:
    if parts == 1:
        return []
    if not format.is_written_in_parts:
        return [f"parts: expected 1 for {format.name}, got {parts}"]
    lengths = {"number of heads": config.num_attention_heads}
    for weight in weights(config, task):
        rule, _ = _matching_rule(format, weight.name)
        if (axis := _axis(rule, weight)) is not None:
            lengths[AXES[rule.split]] = weight.shape(config)[axis]
    return [
        f"{what}: expected a multiple of {parts}, to be cut into as many parts, got {length}"
        for what, length in lengths.items()
        if length % parts
    ]


def losses(format: Format, config: OPTConfig, task: str) -> list[str]:
    """What a model loses in a format without any effect on what it computes."""
    return [
        f"{weight.name}: {format.name} has no place for rows 0 to {rule.skip_rows - 1}, which no real token uses; "
        "they read back as zeros"
        for weight in weights(config, task)
        for rule in format.rules
        if rule.skip_rows and rule.match(weight.name)
    ]


_REASONS = {
    "enable_bias": "the published class always has biases",
    "layer_norm_elementwise_affine": "the published class always has weights in its norms",
    "tie_word_embeddings": "the format has no place for a head, and the published class would use the embedding",
    "has_projections": "the published class has no projections between two widths",
    "do_layer_norm_before": "the published class normalises before each block",
    "_remove_final_layer_norm": "models with norms before have a final one there",
    "has_final_layer_norm": "the published class always has a final norm",
    "activation_function": "no other activation is the same there",
    "has_all_heads": "heads are pruned, and the published class has as many in every layer",
}
