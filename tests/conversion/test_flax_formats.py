"""What the published Flax classes save: read and written bit for bit, in both containers; damaged files are refused."""

import json
import struct

import ml_dtypes
import msgpack
import numpy as np
import pytest
from checkpoints import VARIANTS, assert_holds, config_of, tensors_of

from conversion import msgpack_file, open_checkpoint, write_checkpoint
from conversion.formats import FORMATS, places
from conversion.recognition import format_of
from opt_core.config import DTYPES
from opt_core.errors import CheckpointError

FLAX = ("flax-msgpack", "flax-safetensors")
HELD = sorted(VARIANTS.keys() - {"no-bias", "non-affine"})


def nested(tensors: dict[str, np.ndarray], task: str = "causal-lm") -> dict:
    """The tree of a Flax model, written out by hand for comparison with the table."""
    tree: dict = {}
    for name, array in tensors.items():
        *parents, last = name.split(".")
        if parents[-1].startswith("embed_"):
            leaf, value = "embedding", array
        elif parents[-1].endswith("norm"):
            leaf, value = {"weight": "scale", "bias": "bias"}[last], array
        else:
            leaf, value = {"weight": "kernel", "bias": "bias"}[last], array.T
        node = tree
        for parent in [*(["model"] if task != "base" and parents[0] == "decoder" else []), *parents]:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return tree


def packed_array(array: np.ndarray) -> msgpack.ExtType:
    return msgpack.ExtType(1, msgpack.packb([array.shape, array.dtype.name, array.tobytes()]))


def packed_tree(tree) -> bytes:
    return msgpack.packb(tree, default=packed_array)


@pytest.mark.parametrize("shard_size", ["5GB", "11KB"])
@pytest.mark.parametrize("format", FLAX)
@pytest.mark.parametrize("variant", HELD)
def test_every_variant_that_flax_has_comes_back_bit_for_bit(tmp_path, variant, format, shard_size):
    for dtype in DTYPES:
        config = config_of(variant, torch_dtype=dtype)
        tensors = tensors_of(config, dtype=dtype)
        files = write_checkpoint(tmp_path / dtype, config, tensors, format=format, max_shard_size=shard_size)
        with open_checkpoint(tmp_path / dtype) as checkpoint:
            checkpoint.check()
            assert (checkpoint.format, checkpoint.task) == (format, "causal-lm")
            assert checkpoint.config == config.replace(architectures=["OPTForCausalLM"])
            assert_holds(checkpoint, tensors)
        assert sorted(files) == sorted((tmp_path / dtype).iterdir())
        assert (len(files) > 3) == (shard_size == "11KB")


@pytest.mark.parametrize("format", FLAX)
def test_a_base_model_and_mixed_dtypes_come_back(tmp_path, format):
    config = config_of("350m-style")
    dtypes = [np.float32, np.float16, ml_dtypes.bfloat16, np.float64]
    tensors = {name: a.astype(dtypes[i % 4]) for i, (name, a) in enumerate(tensors_of(config, "base").items())}
    write_checkpoint(tmp_path, config, tensors, task="base", format=format)
    with open_checkpoint(tmp_path) as checkpoint:
        checkpoint.check()
        assert checkpoint.task == "base"
        assert_holds(checkpoint, tensors)
        arrays = [checkpoint.read(name) for name in checkpoint.shapes]
    assert all(array.flags.writeable and array.flags.c_contiguous and array.flags.aligned for array in arrays)


@pytest.mark.parametrize("task", ["base", "causal-lm"])
@pytest.mark.parametrize("variant", ["350m-style", "untied"])
def test_the_msgpack_tree_is_that_of_the_published_class(tmp_path, variant, task):
    config = config_of(variant)
    tensors = tensors_of(config, task)
    path, *_ = write_checkpoint(tmp_path / "ours", config, tensors, task=task, format="flax-msgpack")
    assert path.read_bytes() == packed_tree(nested(tensors, task))


@pytest.mark.parametrize("format", FLAX)
def test_it_is_known_by_its_content_under_any_name(tmp_path, format):
    config = config_of()
    path, *_ = write_checkpoint(tmp_path, config, tensors_of(config), format=format)
    moved = path.rename(tmp_path / "weights")
    with open_checkpoint(moved, config=config) as checkpoint:
        assert checkpoint.format == format
        assert_holds(checkpoint, tensors_of(config))


def test_a_name_that_the_content_contradicts_is_refused(tmp_path):
    config = config_of()
    path, *_ = write_checkpoint(tmp_path, config, tensors_of(config), format="flax-msgpack")
    moved = path.rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="got msgpack as Flax writes it"):
        open_checkpoint(moved)


def test_the_published_layout_is_preferred_to_that_of_flax(tmp_path):
    config = config_of()
    for format, preferred in [
        ("flax-msgpack", "flax-msgpack"),
        ("flax-safetensors", "flax-safetensors"),
        ("torch-bin", "torch-bin"),
        ("safetensors", "safetensors"),
    ]:
        path, *_ = write_checkpoint(tmp_path / format, config, tensors_of(config), format=format)
        (tmp_path / path.name).write_bytes(path.read_bytes())
        config.to_json(tmp_path)
        with open_checkpoint(tmp_path) as checkpoint:
            assert checkpoint.format == preferred


@pytest.mark.parametrize("format", FLAX)
@pytest.mark.parametrize(
    ("variant", "task", "problem"),
    [
        ("no-bias", "causal-lm", "enable_bias: expected True"),
        ("non-affine", "causal-lm", "layer_norm_elementwise_affine: expected True"),
        ("pre-norm", "sequence-classification", "task: expected one of base, causal-lm"),
        ("pre-norm", "question-answering", "task: expected one of base, causal-lm"),
    ],
)
def test_what_the_published_class_cannot_be_is_not_written(tmp_path, format, variant, task, problem):
    config = config_of(variant)
    with pytest.raises(CheckpointError, match=problem):
        write_checkpoint(tmp_path / "new", config, tensors_of(config, task), task=task, format=format)
    assert not (tmp_path / "new").exists()


# -- chunks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [8, 1000, 8887, 8888])
def test_large_arrays_are_written_in_chunks_and_read_back(tmp_path, monkeypatch, limit):
    monkeypatch.setattr(msgpack_file, "MAX_CHUNK_BYTES", limit)
    config = config_of("untied")
    tensors = tensors_of(config)  # the embedding is 101 x 22 x 4 = 8888 bytes
    path, *_ = write_checkpoint(tmp_path, config, tensors, format="flax-msgpack")
    with open_checkpoint(tmp_path) as checkpoint:
        checkpoint.check()
        assert_holds(checkpoint, tensors)
        assert checkpoint.read("decoder.embed_tokens.weight").flags.writeable
    chunked = path.read_bytes().count(b"__msgpack_chunked_array__")
    assert chunked == sum(array.nbytes > limit for array in tensors.values())


def test_flax_restores_the_chunks_and_we_restore_its(tmp_path, monkeypatch):
    serialization = pytest.importorskip("flax.serialization")
    monkeypatch.setattr(msgpack_file, "MAX_CHUNK_BYTES", 1001)
    monkeypatch.setattr(serialization, "MAX_CHUNK_SIZE", 1001)
    config = config_of()
    tensors = tensors_of(config)
    path, *_ = write_checkpoint(tmp_path, config, tensors, format="flax-msgpack")
    restored = serialization.msgpack_restore(path.read_bytes())
    leaves = serialization.msgpack_serialize(restored)
    assert leaves == serialization.msgpack_serialize(nested(tensors))
    path.write_bytes(leaves)
    assert b"__msgpack_chunked_array__" in leaves
    with open_checkpoint(tmp_path) as checkpoint:
        assert_holds(checkpoint, tensors)


# -- damage -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", FLAX)
def test_a_matrix_that_was_not_turned_is_named_with_the_schemas_shape(tmp_path, format):
    config = config_of()
    tensors = tensors_of(config)
    write_checkpoint(tmp_path, config, tensors, format=format)
    config.replace(ffn_dim=29).to_json(tmp_path)
    with open_checkpoint(tmp_path) as checkpoint:
        with pytest.raises(CheckpointError, match=r"layers\.1\.fc1\.weight: expected \(29, 22\), got \(31, 22\)"):
            checkpoint.check()
        with pytest.raises(CheckpointError, match=r"expected \(22, 29\), got \(22, 31\)"):
            checkpoint.read("decoder.layers.1.fc1.weight")


def test_a_tied_head_is_compared_with_the_embedding_as_the_schema_lays_it_out(tmp_path):
    untied, tied = config_of("untied"), config_of()
    tensors = tensors_of(untied)
    tensors["lm_head.weight"] = tensors["decoder.embed_tokens.weight"]
    write_checkpoint(tmp_path / "same", untied, tensors, format="flax-msgpack")
    with open_checkpoint(tmp_path / "same", config=tied) as checkpoint:
        checkpoint.check()
    write_checkpoint(tmp_path / "other", untied, tensors_of(untied), format="flax-msgpack")
    with pytest.raises(CheckpointError, match="to which the config ties it"):
        open_checkpoint(tmp_path / "other", config=tied)


def test_a_shard_in_another_layout_is_refused(tmp_path):
    config = config_of()
    tensors = tensors_of(config)
    write_checkpoint(tmp_path, config, tensors, format="flax-safetensors", max_shard_size="11KB")
    first = sorted(tmp_path.glob("model-00002-*"))[0]
    data = first.read_bytes()
    first.write_bytes(data.replace(b'{"format":"flax"}', b'{"format":"pt"}  '))
    with pytest.raises(CheckpointError, match="expected metadata with format 'flax', got 'pt'"):
        open_checkpoint(tmp_path)
    assert format_of(tmp_path / "model.safetensors.index.json").name == "flax-safetensors"


def test_an_empty_first_shard_as_transformers_writes_it_is_read(tmp_path):
    config = config_of()
    tensors = tensors_of(config)
    path, *_ = write_checkpoint(tmp_path, config, tensors, format="flax-msgpack")
    path.rename(tmp_path / "flax_model-00002-of-00002.msgpack")
    (tmp_path / "flax_model-00001-of-00002.msgpack").write_bytes(b"\x80")
    names = [place.name for place in places(FORMATS["flax-msgpack"], config, "causal-lm").values()]
    weight_map = dict.fromkeys(names, "flax_model-00002-of-00002.msgpack")
    index = tmp_path / "flax_model.msgpack.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    with open_checkpoint(tmp_path) as checkpoint:
        assert_holds(checkpoint, tensors)
    (tmp_path / "flax_model-00002-of-00002.msgpack").rename(tmp_path / "flax_model-00001-of-00002.msgpack")
    index.write_text(json.dumps({"weight_map": dict.fromkeys(names, "flax_model-00001-of-00002.msgpack")}))
    with pytest.raises(CheckpointError, match="expected 2 shards, the index names 1"):
        open_checkpoint(tmp_path)


# -- other programs ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def transformers():
    module = pytest.importorskip("transformers")
    if not hasattr(module, "FlaxOPTForCausalLM") or not module.is_flax_available():
        pytest.skip("transformers without its Flax classes")
    return module


IDS = np.array([[2, 5, 17, 33, 71, 4], [2, 9, 8, 61, 100, 3]], np.int32)


def our_logits(config, tensors) -> np.ndarray:
    from opt_core.reference import Reference

    reference = Reference(config, tensors)
    return reference.logits(reference(IDS).last_hidden_state)


@pytest.mark.parametrize(
    "variant", ["350m-style", *(pytest.param(it, marks=pytest.mark.slow) for it in ("untied", "no-final-norm"))]
)
def test_the_published_class_loads_what_is_written_and_we_what_it_saves(tmp_path, transformers, variant):
    config = config_of(variant, dropout=0.0)
    tensors = tensors_of(config)
    expected = our_logits(config, tensors)
    for number, (format, shard_size) in enumerate([("flax-msgpack", "5GB"), ("flax-msgpack", "9KB"), (FLAX[1], "5GB")]):
        ours, theirs = tmp_path / f"ours-{number}", tmp_path / f"theirs-{number}"
        write_checkpoint(ours, config, tensors, format=format, max_shard_size=shard_size)
        model = transformers.FlaxOPTForCausalLM.from_pretrained(ours)
        np.testing.assert_allclose(np.asarray(model(IDS).logits), expected, rtol=0, atol=1e-5 * np.abs(expected).max())
        model.save_pretrained(theirs, safe_serialization=format == FLAX[1], max_shard_size=shard_size)
        with open_checkpoint(theirs) as checkpoint:
            checkpoint.check()
            assert (checkpoint.format, checkpoint.task) == (format, "causal-lm")
            assert_holds(checkpoint, tensors)


@pytest.mark.parametrize("format", FLAX)
def test_every_backend_loads_it(tmp_path, backend, format):
    config = config_of("350m-style", dropout=0.0)
    tensors = tensors_of(config)
    write_checkpoint(tmp_path, config, tensors, format=format)
    model = backend.model_class().from_pretrained(tmp_path)
    for name, array in tensors.items():
        np.testing.assert_array_equal(backend.numpy(model.weight(name)), array.astype(np.float64), err_msg=name)


def test_a_pickle_is_not_taken_for_a_map(tmp_path):
    path = tmp_path / "weights"
    path.write_bytes(b"\x80\x02}q\x00." + struct.pack("<Q", 7))
    with pytest.raises(CheckpointError, match="expected a file that ends in one of"):
        open_checkpoint(path, config=config_of())
