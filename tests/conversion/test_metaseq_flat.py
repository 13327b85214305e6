"""Cutting flat tensors into weights undoes joining and sharding, whatever the shapes and the number of shards."""

import math
import tempfile
from pathlib import Path

import metaseq_files as files
import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conversion.metaseq.metaseq_flat import Group, Shard, cut, groups_of_config, groups_of_metadata, is_flat, padded
from conversion.stored import StoredTensor
from opt_core import OPTConfig
from opt_core.schema import parameter_count

SHAPES = st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=3).map(tuple), min_size=1, max_size=6)


def save(folder: Path, flats: dict[str, torch.Tensor], shards: int) -> tuple[list[Shard], dict[str, list[int]]]:
    """Raw bytes, a file per shard, and the paddings of each flat tensor."""
    saved, paddings = [Shard(folder / str(number), {}) for number in range(shards)], {}
    content = [bytearray(b"\xff" * 6) for _ in range(shards)]
    for key, flat in flats.items():
        pieces = files.shards_of(flat, shards)
        paddings[key] = [padding for _, padding in pieces]
        for (piece, _), shard, data in zip(pieces, saved, content, strict=True):
            shard.tensors[key] = StoredTensor("float16", tuple(piece.shape), len(data))
            data += piece.numpy().tobytes() + b"\xff" * 4
    for shard, data in zip(saved, content, strict=True):
        shard.path.write_bytes(data)
    return saved, paddings


@settings(max_examples=150, deadline=None)
@given(groups=st.lists(SHAPES, min_size=1, max_size=3), shards=st.integers(1, 9), implied=st.booleans())
def test_weights_come_back_from_any_shards(groups, shards, implied):
    generator = torch.Generator().manual_seed(3)
    truth = {
        f"g{number}": {f"g{number}.w{i}": torch.randn(shape, generator=generator).half() for i, shape in enumerate(of)}
        for number, of in enumerate(groups)
    }
    flats = {key: torch.cat([tensor.reshape(-1) for tensor in of.values()]) for key, of in truth.items()}
    with tempfile.TemporaryDirectory() as folder:
        saved, paddings = save(Path(folder), flats, shards)
        shapes = {key: {name: tuple(tensor.shape) for name, tensor in of.items()} for key, of in truth.items()}
        described = [Group(key, of, (0,) if implied else tuple(paddings[key])) for key, of in shapes.items()]
        described = padded(described, saved) if implied else described
        assert [group.paddings for group in described] == [tuple(of) for of in paddings.values()]
        part = cut(saved, described, "x")
        assert len(set(part.tensors.values())) == len(part.tensors)
        for name, tensor in (item for of in truth.values() for item in of.items()):
            assert np.array_equal(part.read(name), tensor.numpy())


@settings(max_examples=50, deadline=None)
@given(parts=st.integers(1, 4), layers=st.integers(0, 3), is_one=st.booleans(), joint=st.booleans())
def test_the_groups_of_all_parts_have_the_elements_of_the_model(parts, layers, is_one, joint):
    """V/N x D + P x D + 2D in the root and (4D^2 + 2DF)/N + (3D + F)/N + 6D in each layer of a part."""
    width, inner, rows, positions = 12 * 5, 12 * 7, 12 * 11, 19
    config = OPTConfig(
        vocab_size=rows, hidden_size=width, ffn_dim=inner, num_hidden_layers=layers, num_attention_heads=12,
        max_position_embeddings=positions - 2,
    )  # fmt: skip
    keys = {"flat_param_0"} if is_one else {"flat_param_0", "decoder.layers.0.flat_param_0"}
    groups = groups_of_config(keys, config, parts, joint=joint)
    root = rows // parts * width + positions * width + 2 * width
    layer = (4 * width**2 + 2 * width * inner) // parts + (3 * width + inner) // parts + 6 * width
    assert [group.size for group in groups] == ([root + layers * layer] if is_one else [root] + [layer] * layers)
    if parts == 1:
        assert sum(group.size for group in groups) == parameter_count(config)
    names = [name for group in groups for name in group.shapes]
    assert len(set(names)) == len(names)
    assert any("qkv" in name for name in names) == (joint and layers > 0)


def test_the_published_metadata_of_the_175b_model_has_the_elements_of_the_config():
    """Names and shapes of two groups as metaseq's pull request 197 lists them."""
    config = OPTConfig.preset("opt-175b")
    root, first, *_ = groups_of_config({"flat_param_0", "decoder.layers.0.flat_param_0"}, config, 8, joint=True)
    assert list(root.shapes.items())[:3] == [
        ("decoder.embed_tokens.weight", (6284, 12288)),
        ("decoder.embed_positions.weight", (2050, 12288)),
        ("decoder.layer_norm.weight", (12288,)),
    ]
    published = {
        "self_attn.qkv_proj.weight": (4608, 12288),
        "self_attn.qkv_proj.bias": (4608,),
        "self_attn.out_proj.weight": (12288, 1536),
        "self_attn.out_proj.bias": (12288,),
        "self_attn_layer_norm.weight": (12288,),
        "self_attn_layer_norm.bias": (12288,),
        "fc1.weight": (6144, 12288),
        "fc1.bias": (6144,),
        "fc2.weight": (12288, 6144),
        "fc2.bias": (12288,),
        "final_layer_norm.weight": (12288,),
        "final_layer_norm.bias": (12288,),
    }
    assert list(first.shapes.items()) == [(f"decoder.layers.0.{name}", shape) for name, shape in published.items()]
    entry = {
        "fsdp_path": "decoder.layers.0",
        "params": {
            "flat_param_0": {
                "names": list(published),
                "shapes": [list(shape) for shape in published.values()],
                "numels": [math.prod(shape) for shape in published.values()],
                "padding": 0,
            }
        },
    }
    assert groups_of_metadata([{"param_metadata": [entry]}], "x") == [first]


def test_flat_tensors_are_told_by_their_names():
    assert is_flat(["decoder.version", "decoder.layers.3.flat_param_0"])
    assert is_flat(["flat_param_0"])
    assert not is_flat(["decoder.layers.0.fc1.weight", "decoder.flat_param.weight"])
