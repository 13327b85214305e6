"""Rules of sharding: every part is held, none twice, no size is cut that does not divide, and the parts compute the
whole."""

import itertools
import math
import time

import numpy as np
import pytest
from harness import VARIANTS, config_of, token_ids

from opt_core import OPTConfig
from opt_core.errors import InputError
from opt_core.presets import PRESETS
from opt_core.reference import Reference
from opt_core.schema import TASKS, parameter_count, shapes
from opt_core.sharding import (
    LAYOUTS,
    RULES,
    TENSOR_PARALLEL,
    Mesh,
    Rules,
    batch_rows,
    computing_mesh,
    local_batch,
    local_shapes,
    mesh_of,
    meshes,
    partition,
    shard_bytes,
    shard_slices,
    spec_of,
)
from opt_core.synthetic import random_tensors

# What 2, 3 and 6 devices divide: six heads of size 5, and no two sizes alike.
DIVISIBLE = dict(hidden_size=30, num_attention_heads=6, ffn_dim=42, vocab_size=102, max_position_embeddings=41)
EVEN_VARIANTS = {name: dict(config) for name, config in VARIANTS.items() if name != "one head"}
for _variant in EVEN_VARIANTS.values():
    if "word_embed_proj_dim" in _variant:
        _variant["word_embed_proj_dim"] = 18
MESHES = [
    Mesh(("tensor",), (3,)),
    Mesh(("fsdp",), (6,)),
    Mesh(("data",), (5,)),
    Mesh(("fsdp", "tensor"), (3, 2)),
    Mesh(("data", "fsdp", "tensor"), (2, 3, 2)),
    Mesh((), ()),
]
PRUNED = {0: [1, 4], 2: [0, 2, 3, 5]}  # leaves 4, 6 and 2 heads


def divisible(variant: str = "pre-norm", **changes) -> OPTConfig:
    return config_of(**{**DIVISIBLE, **EVEN_VARIANTS[variant], **changes})


def every_device(mesh: Mesh) -> list[tuple[int, ...]]:
    return [mesh.coordinates(rank) for rank in range(mesh.devices)]


# -- the parts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize("variant", EVEN_VARIANTS)
def test_the_parts_of_all_devices_tile_each_weight_as_often_as_it_is_replicated(variant, mesh):
    check_tiling(divisible(variant), mesh)


@pytest.mark.parametrize("mesh", [Mesh(("tensor",), (2,)), Mesh(("fsdp", "tensor"), (5, 2))], ids=str)
def test_so_do_the_parts_of_layers_with_different_numbers_of_heads(mesh):
    check_tiling(divisible(pruned_heads=PRUNED), mesh)


def check_tiling(config: OPTConfig, mesh: Mesh) -> None:
    specs = partition(config, mesh)
    assert specs.keys() == shapes(config).keys()
    for name, shape in shapes(config).items():
        times = np.zeros(shape, int)
        for coordinates in every_device(mesh):
            times[shard_slices(shape, specs[name], mesh, coordinates)] += 1
        cut = math.prod(mesh.size(axis) for axis in specs[name])
        assert (times == mesh.devices // cut).all(), name


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_a_device_holds_its_share_of_what_is_cut_and_all_of_the_rest(mesh):
    config = divisible("350m style")
    specs, whole = partition(config, mesh), shapes(config)
    held = sum(math.prod(whole[name]) / math.prod(map(mesh.size, spec)) for name, spec in specs.items())
    assert shard_bytes(config, mesh, 2) == 2 * held
    for coordinates in every_device(mesh):
        parts = {name: shard_slices(whole[name], spec, mesh, coordinates) for name, spec in specs.items()}
        local = {name: tuple(s.stop - s.start for s in slices) for name, slices in parts.items()}
        assert local == local_shapes(config, mesh)


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_the_rows_of_a_batch_are_shared_out_in_order(mesh):
    batch = 60
    rows = [tuple(range(batch))[batch_rows(batch, mesh, coordinates)] for coordinates in every_device(mesh)]
    distinct = list(dict.fromkeys(rows))
    assert [row for part in distinct for row in part] == list(range(batch))
    assert {len(part) for part in rows} == {local_batch(batch, mesh)}
    assert len(distinct) == mesh.devices // computing_mesh(mesh).devices


def test_ranks_count_along_the_last_axis_first():
    mesh = Mesh(("fsdp", "tensor"), (2, 3))
    assert every_device(mesh) == list(itertools.product(range(2), range(3)))


# -- the rules --------------------------------------------------------------------------------------------------------


def test_one_line_of_rules_is_the_megatron_layout():
    config, mesh = divisible("350m style"), Mesh(("tensor",), (2,))
    specs = partition(config, mesh, Rules(TENSOR_PARALLEL))
    row, column = ("tensor", None), (None, "tensor")
    expected = {
        "decoder.embed_tokens.weight": row,
        "decoder.embed_positions.weight": (None, None),
        "decoder.project_in.weight": (None, None),
        "decoder.project_out.weight": (None, None),
        **{f"decoder.layers.1.self_attn.{n}_proj.weight": row for n in "qkv"},
        **{f"decoder.layers.1.self_attn.{n}_proj.bias": row[:1] for n in "qkv"},
        "decoder.layers.1.self_attn.out_proj.weight": column,
        "decoder.layers.1.self_attn.out_proj.bias": (None,),
        "decoder.layers.1.fc1.weight": row,
        "decoder.layers.1.fc1.bias": row[:1],
        "decoder.layers.1.fc2.weight": column,
        "decoder.layers.1.fc2.bias": (None,),
        "decoder.layers.1.final_layer_norm.weight": (None,),
    }
    assert {name: specs[name] for name in expected} == expected
    assert partition(config, mesh) == specs


def test_an_untied_head_is_cut_as_the_embeddings_are():
    specs = partition(divisible("untied head"), Mesh(("fsdp", "tensor"), (3, 2)))
    assert specs["lm_head.weight"] == specs["decoder.embed_tokens.weight"] == ("tensor", "fsdp")


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_no_axis_cuts_a_weight_twice(mesh, task):
    config = divisible("350m style")
    specs = partition(config, mesh, task=task)
    assert specs.keys() == shapes(config, task).keys()
    for spec in specs.values():
        axes = [axis for axis in spec if axis is not None]
        assert len(set(axes)) == len(axes)


def test_fully_sharded_leaves_nothing_whole_in_the_language_model():
    specs = partition(divisible("350m style"), Mesh(("fsdp",), (2,)))
    assert [name for name, spec in specs.items() if "fsdp" not in spec] == []


def test_of_two_dimensions_that_an_axis_may_cut_the_earlier_rule_decides():
    mesh = Mesh(("x",), (2,))
    assert spec_of("FD", mesh, Rules((("F", "x"), ("D", "x")))) == ("x", None)
    assert spec_of("FD", mesh, Rules((("D", "x"), ("F", "x")))) == (None, "x")
    assert spec_of("F", mesh, Rules((("D", "x"), ("F", "x")))) == ("x",)


def test_a_dimension_takes_the_first_axis_that_the_mesh_has():
    rules = Rules((("F", "x"), ("F", "y")))
    assert spec_of("FD", Mesh(("x", "y"), (2, 2)), rules) == ("x", None)
    assert spec_of("FD", Mesh(("y",), (2,)), rules) == ("y", None)
    assert spec_of("FD", Mesh((), ()), rules) == (None, None)


# -- refusals ---------------------------------------------------------------------------------------------------------


def problems_of(config: OPTConfig, mesh: Mesh, rules: Rules = RULES) -> list[str]:
    with pytest.raises(InputError) as caught:
        partition(config, mesh, rules)
    return list(caught.value.problems)


def test_everything_that_does_not_divide_comes_in_one_error():
    assert problems_of(config_of(), Mesh(("tensor",), (2,))) == [
        "vocab_size: expected a multiple of 2, the devices along 'tensor', got 97; "
        "resize_token_embeddings(..., pad_to_multiple_of=2) would make it 98",
        "num_attention_heads: expected a multiple of 2, the devices along 'tensor', got 5",
        "ffn_dim: expected a multiple of 2, the devices along 'tensor', got 53",
    ]
    assert problems_of(config_of("350m style"), Mesh(("fsdp",), (3,))) == [
        "word_embed_proj_dim: expected a multiple of 3, the devices along 'fsdp', got 19",
        "hidden_size: expected a multiple of 3, the devices along 'fsdp', got 35",
        "joined heads: expected a multiple of 3, the devices along 'fsdp', got 35",
        "ffn_dim: expected a multiple of 3, the devices along 'fsdp', got 53",
    ]


def test_heads_are_not_cut_through_where_they_are_computed_apart():
    config = config_of(**DIVISIBLE)  # 6 heads of size 5 are 30 rows, which 5 devices divide
    five = dict(ffn_dim=45, vocab_size=105)
    assert problems_of(config.replace(**five), Mesh(("tensor",), (5,))) == [
        "num_attention_heads: expected a multiple of 5, the devices along 'tensor', got 6"
    ]
    partition(config.replace(**five), Mesh(("fsdp",), (5,)))  # gathered before they are used


def test_the_heads_that_a_pruned_layer_has_left_must_divide():
    config = divisible(pruned_heads={1: [0], 2: [3, 4]})
    assert problems_of(config, Mesh(("tensor",), (2,))) == [
        "num_attention_heads in layer 1: expected a multiple of 2, the devices along 'tensor', got 5"
    ]


def test_the_published_vocabulary_is_cut_by_powers_of_two_up_to_32_and_never_padded():
    config = OPTConfig.preset("opt-175b")
    rules = Rules((("V", "tensor"),))
    assert [n for n in range(1, 1571) if not _refuses(config, n, rules)] == [1, 2, 4, 8, 16, 32]
    (problem,) = problems_of(config, Mesh(("tensor",), (64,)), rules)
    assert "got 50272; resize_token_embeddings(..., pad_to_multiple_of=64) would make it 50304" in problem


def _refuses(config: OPTConfig, devices: int, rules: Rules) -> bool:
    try:
        partition(config.replace(num_hidden_layers=0), Mesh(("tensor",), (devices,)), rules)
    except InputError:
        return True
    return False


def test_an_axis_that_no_rule_knows_is_refused_and_not_replicated_over():
    assert problems_of(divisible(), Mesh(("tensro", "fsdp"), (2, 3))) == [
        "axis 'tensro': expected one of the rules', data, fsdp, tensor"
    ]


def test_a_rule_for_a_letter_that_the_schema_has_not_is_refused():
    assert problems_of(divisible(), Mesh(("tensor",), (2,)), Rules((("heads", "tensor"),))) == [
        "rules: expected letters of the schema, got 'heads'"
    ]


def test_a_mesh_lists_all_that_is_wrong_with_it():
    with pytest.raises(InputError) as caught:
        Mesh(("a", "a", "b"), (2, 0, True))
    assert caught.value.problems == (
        "a: expected it once, got it 2 times",
        "a: expected a number of devices of at least 1, got 0",
        "b: expected a number of devices of at least 1, got True",
    )
    with pytest.raises(InputError, match="expected a size for each of the axes"):
        Mesh(("a", "b"), (2,))


def test_rows_that_do_not_divide_and_a_part_of_what_does_not_divide_are_refused():
    mesh = Mesh(("data", "tensor"), (4, 2))
    with pytest.raises(InputError, match="batch: expected a multiple of 4 rows, got 6"):
        local_batch(6, mesh)
    with pytest.raises(InputError, match="expected a multiple of 2, got 5"):
        shard_slices((5, 4), ("tensor", None), mesh, (0, 0))


# -- layouts ----------------------------------------------------------------------------------------------------------


def test_the_meshes_of_a_layout_are_all_its_factorizations():
    assert [str(mesh) for mesh in meshes("tensor+fsdp", 8)] == ["fsdp 4 x tensor 2", "fsdp 2 x tensor 4"]
    assert meshes("tensor", 8) == [Mesh(("tensor",), (8,))]
    assert str(mesh_of("tensor+fsdp", 8)) == "fsdp 4 x tensor 2"
    assert str(mesh_of("tensor+fsdp", 36)) == "fsdp 6 x tensor 6"
    with pytest.raises(InputError, match=r"tensor\+fsdp: expected a product of two numbers above 1, got 7 devices"):
        mesh_of("tensor+fsdp", 7)
    with pytest.raises(InputError, match="expected one of tensor, fsdp"):
        meshes("pipeline", 8)


def test_every_published_size_is_partitioned_for_eight_devices_in_seconds():
    start = time.process_time()
    for name in PRESETS:
        config, whole = OPTConfig.preset(name), parameter_count(OPTConfig.preset(name))
        for layout in LAYOUTS:
            for mesh in meshes(layout, 8):
                if config.num_attention_heads % mesh.size("tensor"):
                    continue  # 12 heads over 8 devices
                held, cut = shard_bytes(config, mesh, 1), math.prod(map(mesh.size, ("tensor", "fsdp")))
                assert whole / cut <= held <= whole / cut * 1.02 + _replicated(config, mesh), (name, layout)
    assert time.process_time() - start < 5


def _replicated(config: OPTConfig, mesh: Mesh) -> float:
    """Numbers in weights that the tensor axis leaves whole: positions, norms, biases of the width, projections."""
    D, layers = config.hidden_size, config.num_hidden_layers
    whole = shapes(config)["decoder.embed_positions.weight"][0] * D + layers * 6 * D + 2 * D
    whole += 2 * D * config.word_embed_proj_dim * config.has_projections
    return whole / mesh.size("fsdp")


# -- the proof: what devices compute with their parts alone adds up to the whole --------------------------------------


class TensorParallel:
    """The model on the parts of the weights that each device along `tensor` holds; the only two exchanges are sums
    over the devices, `sum`, and the joining of logits."""

    def __init__(self, config: OPTConfig, tensors: dict[str, np.ndarray], devices: int):
        mesh = Mesh(("tensor",), (devices,))
        specs = partition(config, mesh)
        self.config, self.specs = config, specs
        self.parts = [
            Reference(config, {n: w[shard_slices(w.shape, specs[n], mesh, place)] for n, w in tensors.items()})
            for place in every_device(mesh)
        ]
        self.whole = self.parts[0]  # for weights that every device has

    def logits(self, ids_BT: np.ndarray) -> np.ndarray:
        x_BTD = self.whole.linear("decoder.project_in", self.embed(ids_BT))
        x_BTD = x_BTD + self.whole.weights["decoder.embed_positions.weight"][2 : 2 + ids_BT.shape[1]]
        for layer in range(self.config.num_hidden_layers):
            name = f"decoder.layers.{layer}"
            x_BTD = self.block(f"{name}.self_attn_layer_norm", x_BTD, lambda x, name=name: self.attention(name, x))
            x_BTD = self.block(f"{name}.final_layer_norm", x_BTD, lambda x, name=name: self.feed_forward(name, x))
        if self.config.has_final_layer_norm:
            x_BTD = self.whole.layer_norm("decoder.final_layer_norm", x_BTD)
        x_BTE = self.whole.linear("decoder.project_out", x_BTD)
        return np.concatenate([part.logits(x_BTE) for part in self.parts], axis=-1)

    def block(self, norm: str, x_BTD, compute):
        if self.config.do_layer_norm_before:
            return x_BTD + compute(self.whole.layer_norm(norm, x_BTD))
        return self.whole.layer_norm(norm, x_BTD + compute(x_BTD))

    def embed(self, ids_BT):
        """Each device looks up the tokens that it has, and has zeros for the others."""
        partial = []
        for rank, part in enumerate(self.parts):
            table_VE = part.weights["decoder.embed_tokens.weight"]
            local_BT = ids_BT - rank * len(table_VE)
            here_BT = (local_BT >= 0) & (local_BT < len(table_VE))
            partial.append(np.where(here_BT[..., None], table_VE[np.where(here_BT, local_BT, 0)], 0))
        return sum(partial)

    def attention(self, name: str, x_BTD):
        T = x_BTD.shape[1]
        causal_1TT = np.tri(T, dtype=bool)[None]
        partial = [
            self.without_bias(part, f"{name}.self_attn.out_proj").attention(
                f"{name}.self_attn", x_BTD, causal_1TT, np.ones(self.heads_of(part, name))
            )[0]
            for part in self.parts
        ]
        return sum(partial) + self.whole.weights.get(f"{name}.self_attn.out_proj.bias", 0)

    def heads_of(self, part: Reference, name: str) -> int:
        return len(part.weights[f"{name}.self_attn.q_proj.weight"]) // self.config.head_size

    def feed_forward(self, name: str, x_BTD):
        partial = [
            self.without_bias(part, f"{name}.fc2").linear(
                f"{name}.fc2", part.activation(part.linear(f"{name}.fc1", x_BTD))
            )
            for part in self.parts
        ]
        return sum(partial) + self.whole.weights.get(f"{name}.fc2.bias", 0)

    @staticmethod
    def without_bias(part: Reference, linear: str) -> Reference:
        """The bias of a sum over devices is added once, after it."""
        return Reference(part.config, {n: w for n, w in part.weights.items() if n != f"{linear}.bias"})


@pytest.mark.parametrize("devices", [2, 3, 6])
@pytest.mark.parametrize("variant", EVEN_VARIANTS)
def test_devices_with_their_parts_alone_compute_the_logits_of_the_whole(variant, devices):
    config = divisible(variant)
    tensors, ids_BT = dict(random_tensors(config)), token_ids(config, 2, 11)
    whole = Reference(config, tensors)
    expected = whole.logits(whole(ids_BT).last_hidden_state)
    assert np.abs(TensorParallel(config, tensors, devices).logits(ids_BT) - expected).max() < 1e-12


def test_so_do_they_with_layers_of_different_numbers_of_heads():
    config = divisible(pruned_heads=PRUNED)
    tensors, ids_BT = dict(random_tensors(config)), token_ids(config, 2, 11)
    whole = Reference(config, tensors)
    expected = whole.logits(whole(ids_BT).last_hidden_state)
    assert np.abs(TensorParallel(config, tensors, 2).logits(ids_BT) - expected).max() < 1e-12


def test_a_mesh_is_read_from_text():
    assert Mesh.parse("fsdp=2, tensor=4") == Mesh(("fsdp", "tensor"), (2, 4))


def test_a_text_that_is_no_mesh_is_refused_with_each_bad_part():
    with pytest.raises(InputError) as error:
        Mesh.parse("fsdp:2,tensor=4,=3")
    assert [problem.split("got ")[1] for problem in error.value.problems] == ["'fsdp:2'", "'=3'"]
    with pytest.raises(InputError, match="2 times"):
        Mesh.parse("fsdp=2,fsdp=4")
