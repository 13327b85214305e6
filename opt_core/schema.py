"""Every weight of an OPT model: published name, dimensions, kind, when it exists, what it is tied to.

This table is the one truth about weights. Shapes, counts, checkpoint checks, layouts of formats, random initialisation
and sharding are all derived from it. Names are the published ones without the leading `model.`, which depends on the
class that saved them (`published_name`).
"""

import itertools
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from opt_core.config import POSITION_OFFSET, OPTConfig
from opt_core.errors import CheckpointError, raise_if

# The legend of axis letters, for tensor names in the whole project (`hidden_BTD`) and for the rows below.
AXES = {
    "B": "batch",
    "T": "query positions of this call",
    "S": "key and value positions",
    "N": "heads",
    "H": "size of a head",
    "L": "layers",
    "D": "model width, hidden_size",
    "A": "joined heads, N x H: equal to D in number where no head is pruned, not in meaning",
    "F": "feed-forward width, ffn_dim",
    "E": "word-embedding width, word_embed_proj_dim",
    "V": "vocabulary, vocab_size",
    "P": "rows of the position table, max_position_embeddings + 2",
    "K": "outputs of a task head: labels, or start and end",
}

_LAYER_NUMBER = re.compile(r"(?<=\.layers\.)\d+(?=\.)")

TASKS = ("base", "causal-lm", "sequence-classification", "question-answering")


class Weight(NamedTuple):
    """One row: a weight, or with `{layer}` in its name one per layer."""

    name: str
    dims: str  # one letter per dimension, in published order: a linear weight is (out, in)
    kind: str  # "linear" | "embedding" | "scale" | "bias"
    present: tuple[str, ...] = ()  # switches of the config, all of which must hold; see `_holds`
    tasks: tuple[str, ...] = TASKS  # classes that have it
    tied_to: str | None = None  # the weight it shares its values with when `tie_word_embeddings`

    @property
    def layer(self) -> int | None:
        """The number of its layer; None where it has none, or `{layer}` is not filled in."""
        found = _LAYER_NUMBER.search(self.name)
        return int(found[0]) if found else None

    def shape(self, config: OPTConfig) -> tuple[int, ...]:
        """Its shape in its own layer, which may have fewer heads than others."""
        sizes = dimension_sizes(config, self.layer)
        if self.name.startswith("qa_outputs"):
            sizes["K"] = 2  # start and end, whatever the number of labels
        return tuple(sizes[letter] for letter in self.dims)


def _linear(name: str, dims: str, *present: str) -> tuple[Weight, Weight]:
    return (
        Weight(f"{name}.weight", dims, "linear", present),
        Weight(f"{name}.bias", dims[0], "bias", (*present, "enable_bias")),
    )


def _norm(name: str, *present: str) -> tuple[Weight, Weight]:
    return (
        Weight(f"{name}.weight", "D", "scale", (*present, "layer_norm_elementwise_affine")),
        Weight(f"{name}.bias", "D", "bias", (*present, "layer_norm_elementwise_affine")),
    )


_LAYER = "decoder.layers.{layer}"

SCHEMA: tuple[Weight, ...] = (
    Weight("decoder.embed_tokens.weight", "VE", "embedding"),
    Weight("decoder.embed_positions.weight", "PD", "embedding"),
    Weight("decoder.project_in.weight", "DE", "linear", ("has_projections",)),
    *_linear(f"{_LAYER}.self_attn.k_proj", "AD"),
    *_linear(f"{_LAYER}.self_attn.v_proj", "AD"),
    *_linear(f"{_LAYER}.self_attn.q_proj", "AD"),
    *_linear(f"{_LAYER}.self_attn.out_proj", "DA"),
    *_norm(f"{_LAYER}.self_attn_layer_norm"),
    *_linear(f"{_LAYER}.fc1", "FD"),
    *_linear(f"{_LAYER}.fc2", "DF"),
    *_norm(f"{_LAYER}.final_layer_norm"),
    *_norm("decoder.final_layer_norm", "has_final_layer_norm"),
    Weight("decoder.project_out.weight", "ED", "linear", ("has_projections",)),
    Weight("lm_head.weight", "VE", "linear", (), ("causal-lm",), tied_to="decoder.embed_tokens.weight"),
    Weight("score.weight", "KE", "linear", (), ("sequence-classification",)),
    Weight("qa_outputs.weight", "KE", "linear", (), ("question-answering",)),
    Weight("qa_outputs.bias", "K", "bias", (), ("question-answering",)),
)


def dimension_sizes(config: OPTConfig, layer: int | None = None) -> dict[str, int]:
    """The length of every dimension letter in the table, and of N and H; heads are those that `layer` has left."""
    heads = config.num_attention_heads if layer is None else config.heads_of(layer)
    return dict(
        V=config.vocab_size,
        E=config.word_embed_proj_dim,
        P=config.max_position_embeddings + POSITION_OFFSET,
        D=config.hidden_size,
        A=heads * config.head_size,
        N=heads,
        H=config.head_size,
        F=config.ffn_dim,
        K=config.num_labels,
    )


def weights(config: OPTConfig, task: str = "causal-lm") -> Iterator[Weight]:
    """Every stored weight of a model, `{layer}` filled in, in the order of the published modules.

    A tied head is not stored, so it is not among them.
    """
    if task not in TASKS:
        raise ValueError(f"task: expected one of {', '.join(TASKS)}, got {task!r}")
    rows = [row for row in SCHEMA if task in row.tasks and _holds(row, config)]
    for per_layer, group in itertools.groupby(rows, key=lambda row: "{layer}" in row.name):
        if not per_layer:
            yield from group
            continue
        of_one_layer = list(group)
        for layer in range(config.num_hidden_layers):
            yield from (row._replace(name=row.name.format(layer=layer)) for row in of_one_layer)


def _holds(row: Weight, config: OPTConfig) -> bool:
    if row.tied_to and config.tie_word_embeddings:
        return False
    return all(getattr(config, switch) for switch in row.present)


def shapes(config: OPTConfig, task: str = "causal-lm") -> dict[str, tuple[int, ...]]:
    """Name to shape, for every stored weight."""
    return {row.name: row.shape(config) for row in weights(config, task)}


def parameter_count(config: OPTConfig, task: str = "causal-lm") -> int:
    """The number of parameters, a tied head counted once."""
    return sum(math.prod(shape) for shape in shapes(config, task).values())


def tensor_count(config: OPTConfig, task: str = "causal-lm") -> int:
    return len(shapes(config, task))


def kept_by_pruning(weight: Weight, before: OPTConfig, after: OPTConfig) -> tuple[int, list[int]] | None:
    """The axis of a layer's weight that pruning shortens, and the indices along it that stay; None where all stay.

    Args:
        before, after: configs that differ in `pruned_heads`, of which `after` has all that `before` has.
    """
    if weight.layer is None or "A" not in weight.dims or before.heads_of(weight.layer) == after.heads_of(weight.layer):
        return None
    there, size = before.remaining_heads(weight.layer), before.head_size
    starts = [there.index(head) * size for head in after.remaining_heads(weight.layer)]
    return weight.dims.index("A"), [start + i for start in starts for i in range(size)]


def published_name(name: str, task: str = "causal-lm") -> str:
    """The name in a file saved by the class of `task`: only the base class has no `model.` before `decoder.`."""
    return f"model.{name}" if task != "base" and name.startswith("decoder.") else name


def head_names(task: str) -> tuple[str, ...]:
    """The weights that a base checkpoint lacks and fine-tuning starts anew."""
    return tuple(row.name for row in SCHEMA if row.tasks == (task,) and not row.tied_to)


def check_shapes(
    found: Mapping[str, tuple[int, ...]],
    config: OPTConfig,
    task: str = "causal-lm",
    *,
    source: str,
    may_lack: Iterable[str] = (),
) -> None:
    """Raises one CheckpointError that lists missing, unexpected and mis-shaped tensors.

    Args:
        found: name (without `model.`) to shape of every tensor in the checkpoint.
        source: the file or folder, for the message.
        may_lack: names that may be absent.
    """
    expected, may_lack = shapes(config, task), set(may_lack)
    missing = [name for name in expected if name not in found and name not in may_lack]
    problems = [f"{name}: missing, expected {_text(expected[name])}" for name in missing]
    problems += [f"{name}: unexpected, got {_text(shape)}" for name, shape in found.items() if name not in expected]
    problems += [
        f"{name}: expected {_text(expected[name])}, got {_text(shape)}"
        for name, shape in found.items()
        if name in expected and tuple(shape) != expected[name]
    ]
    raise_if(CheckpointError, source, problems)


def _text(shape: Iterable[int]) -> str:
    return "(" + ", ".join(map(str, shape)) + ("," if len(tuple(shape)) == 1 else "") + ")"
