"""What the published TensorFlow classes save: read and written bit for bit, in both containers; damage is refused."""

import json
import os

import h5py
import numpy as np
import pytest
from checkpoints import VARIANTS, assert_holds, config_of, tensors_of

from conversion import open_checkpoint, write_checkpoint
from conversion.keras import h5_file
from conversion.keras.h5_file import write_file
from conversion.safetensors_file import PlannedTensor
from opt_core.errors import CheckpointError

TF = ("tf-h5", "tf-safetensors")
DTYPES = {"tf-h5": ("float32", "float16"), "tf-safetensors": ("float32", "float16", "bfloat16")}
HELD = sorted(VARIANTS.keys() - {"no-bias", "non-affine", "untied"})
CONFIG = config_of()
KERNEL = "model/tfopt_for_causal_lm/model/decoder/layers.1/fc1/kernel:0"


def as_keras(name: str, array: np.ndarray) -> tuple[str, np.ndarray]:
    """A weight as Keras 2 names and turns it, written out by hand for comparison with the table."""
    *parents, last = name.replace("decoder.layers.", "decoder/layers|").split(".")
    if parents[-1] == "decoder/embed_tokens" or name == "decoder.embed_tokens.weight":
        leaf, value = "weight", array
    elif name == "decoder.embed_positions.weight":
        leaf, value = "embeddings", array
    elif parents[-1].endswith("norm"):
        leaf, value = {"weight": "gamma", "bias": "beta"}[last], array
    else:
        leaf, value = {"weight": "kernel", "bias": "bias"}[last], array.T
    path = "/".join(parents).replace("|", ".", 1)
    return f"model/{path}/{leaf}:0", value


def all_as_keras(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return dict(as_keras(name, array) for name, array in tensors.items())


@pytest.fixture
def h5_folder(tmp_path):
    write_checkpoint(tmp_path, CONFIG, tensors_of(CONFIG), format="tf-h5")
    return tmp_path


@pytest.mark.parametrize("shard_size", ["5GB", "11KB"])
@pytest.mark.parametrize("format", TF)
@pytest.mark.parametrize("variant", HELD)
def test_every_variant_that_tensorflow_has_comes_back_bit_for_bit(tmp_path, variant, format, shard_size):
    for dtype in DTYPES[format]:
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


@pytest.mark.parametrize("format", TF)
def test_a_base_model_and_mixed_dtypes_come_back(tmp_path, format):
    config = config_of("350m-style", tie_word_embeddings=True)
    dtypes = [np.float32, np.float16, np.float64]
    tensors = {name: a.astype(dtypes[i % 3]) for i, (name, a) in enumerate(tensors_of(config, "base").items())}
    write_checkpoint(tmp_path, config, tensors, task="base", format=format)
    with open_checkpoint(tmp_path) as checkpoint:
        checkpoint.check()
        assert checkpoint.task == "base"
        assert_holds(checkpoint, tensors)
        arrays = [checkpoint.read(name) for name in checkpoint.shapes]
    assert all(array.flags.writeable and array.flags.c_contiguous and array.flags.aligned for array in arrays)


def test_an_untied_base_model_has_no_head_that_could_be_lost(tmp_path):
    config = config_of("untied")
    write_checkpoint(tmp_path, config, tensors_of(config, "base"), task="base", format="tf-h5")
    with open_checkpoint(tmp_path) as checkpoint:
        checkpoint.check()
        assert_holds(checkpoint, tensors_of(config, "base"))


def test_the_datasets_and_attributes_are_those_of_keras(tmp_path):
    config = config_of("350m-style")
    path, *_ = write_checkpoint(tmp_path, config, tensors_of(config), format="tf-h5")
    expected = all_as_keras(tensors_of(config))
    with h5py.File(path) as file:
        assert list(file.attrs["layer_names"]) == [b"model"]
        names = [name.decode() for name in file["model"].attrs["weight_names"]]
        assert names == [f"tfopt_for_causal_lm/{name}" for name in expected]
        for name, array in zip(names, expected.values(), strict=True):
            assert np.array_equal(file[f"model/{name}"][()], array), name
            assert file[f"model/{name}"].dtype == array.dtype
        assert len(file["top_level_model_weights"].attrs["weight_names"]) == 0


def test_weights_start_at_multiples_of_64_bytes_and_are_views(h5_folder):
    with open_checkpoint(h5_folder) as checkpoint:
        assert not checkpoint.read("decoder.embed_tokens.weight").flags.owndata
    with h5py.File(h5_folder / "tf_model.h5") as file:
        assert file[KERNEL].id.get_offset() % 64 == 0


def test_equal_weights_give_equal_files(tmp_path):
    first, second = (
        write_checkpoint(tmp_path / name, CONFIG, tensors_of(CONFIG), format="tf-h5")[0] for name in ("a", "b")
    )
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize("format", TF)
def test_it_is_known_by_its_content_under_any_name(tmp_path, format):
    path, *_ = write_checkpoint(tmp_path, CONFIG, tensors_of(CONFIG), format=format)
    with open_checkpoint(path.rename(tmp_path / "weights"), config=CONFIG) as checkpoint:
        assert checkpoint.format == format
        assert_holds(checkpoint, tensors_of(CONFIG))


@pytest.mark.parametrize(
    ("size", "group", "attribute"), [("5GB", "model", "weight_names"), ("11KB", "/", "layer_names")]
)
def test_long_lists_of_names_are_split_as_keras_splits_them(tmp_path, monkeypatch, size, group, attribute):
    with monkeypatch.context() as patch:
        patch.setattr(h5_file, "_MAX_ATTRIBUTE_BYTES", 500)
        files = write_checkpoint(tmp_path, CONFIG, tensors_of(CONFIG), format="tf-h5", max_shard_size=size)
    with h5py.File(max(files[:-2] or files[:1], key=os.path.getsize)) as file:
        assert attribute not in file[group].attrs
        assert f"{attribute}1" in file[group].attrs
    with open_checkpoint(tmp_path) as checkpoint:
        assert_holds(checkpoint, tensors_of(CONFIG))


@pytest.mark.parametrize(
    ("variant", "task", "problem"),
    [
        ("no-bias", "causal-lm", "enable_bias: expected True"),
        ("non-affine", "causal-lm", "layer_norm_elementwise_affine: expected True"),
        ("untied", "causal-lm", "tie_word_embeddings: expected True"),
        ("pre-norm", "sequence-classification", "task: expected one of base, causal-lm"),
    ],
)
@pytest.mark.parametrize("format", TF)
def test_what_the_published_class_cannot_be_is_not_written(tmp_path, format, variant, task, problem):
    config = config_of(variant)
    with pytest.raises(CheckpointError, match=problem):
        write_checkpoint(tmp_path / "new", config, tensors_of(config, task), task=task, format=format)
    assert not (tmp_path / "new").exists()


def test_h5_holds_no_bfloat16(tmp_path):
    text = r"expected a dtype of float64, float32, float16 for tf-h5, got bfloat16 in (\d+) of \1 weights"
    with pytest.raises(CheckpointError, match=text):
        write_checkpoint(tmp_path / "new", CONFIG, tensors_of(CONFIG, dtype="bfloat16"), format="tf-h5")
    assert not (tmp_path / "new").exists()


# -- other writers' files ---------------------------------------------------------------------------------------------


def rewrite(path, change=lambda name, array: dict(name=name, data=array), scope="tfopt_for_causal_lm_3", names=None):
    """Writes the tiny model's weights through h5py; `change` gives the arguments of each dataset."""
    stored = {f"{scope}/{name}": array for name, array in all_as_keras(tensors_of(CONFIG)).items()}
    with h5py.File(path, "w") as file:
        file.attrs["layer_names"] = ["model"]
        group = file.create_group("model")
        group.attrs["weight_names"] = names or list(stored)
        for name, array in stored.items():
            group.create_dataset(**change(name, array))
    CONFIG.to_json(path.parent)


@pytest.mark.parametrize("scope", ["tfopt_for_causal_lm", "tfopt_for_causal_lm_12", "tfopt_model_1"])
@pytest.mark.parametrize("options", [{}, dict(chunks=True), dict(compression="gzip", shuffle=True)])
def test_any_scope_chunks_and_gzip_are_read(tmp_path, scope, options):
    rewrite(tmp_path / "tf_model.h5", lambda name, array: dict(name=name, data=array, **options), scope)
    with open_checkpoint(tmp_path) as checkpoint:
        checkpoint.check()
        assert_holds(checkpoint, tensors_of(CONFIG))


def test_the_older_name_of_the_embedding_is_read_but_not_both(tmp_path):
    path = tmp_path / "tf_model.h5"
    rewrite(path)
    new = "tfopt_for_causal_lm_3/model/decoder/embed_tokens/weight:0"
    old = new.replace("weight:0", "embeddings:0")
    with h5py.File(path, "r+") as file:
        group = file["model"]
        names = list(group.attrs["weight_names"])
        group[old] = group[new][()]
        group.attrs["weight_names"] = [*names, old]
    with pytest.raises(CheckpointError, match=r"embed_tokens\.weight: stored twice"):
        open_checkpoint(tmp_path)
    with h5py.File(path, "r+") as file:
        del file["model"][new]
        file["model"].attrs["weight_names"] = [name for name in [*names, old] if name != new]
    with open_checkpoint(tmp_path) as checkpoint:
        assert_holds(checkpoint, tensors_of(CONFIG))


def test_an_empty_first_shard_and_an_index_with_scopes_are_read(tmp_path):
    names = all_as_keras(tensors_of(CONFIG))
    with h5py.File(tmp_path / "tf_model-00001-of-00002.h5", "w") as file:
        file.attrs["layer_names"] = np.zeros(0)
    with h5py.File(tmp_path / "tf_model-00002-of-00002.h5", "w") as file:
        file.attrs["layer_names"] = list(names)
        for name, array in names.items():
            file[name] = array
    weight_map = {f"tfopt_for_causal_lm_2/{name}": "tf_model-00002-of-00002.h5" for name in names}
    (tmp_path / "tf_model.h5.index.json").write_text(json.dumps({"weight_map": weight_map}))
    CONFIG.to_json(tmp_path)
    with open_checkpoint(tmp_path) as checkpoint:
        checkpoint.check()
        assert_holds(checkpoint, tensors_of(CONFIG))


# -- damage -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", TF)
def test_a_matrix_that_was_not_turned_is_named_with_the_schemas_shape(tmp_path, format):
    write_checkpoint(tmp_path, CONFIG, tensors_of(CONFIG), format=format)
    with (
        open_checkpoint(tmp_path, config=CONFIG.replace(ffn_dim=29)) as checkpoint,
        pytest.raises(CheckpointError, match=r"layers\.1\.fc1\.weight: expected \(29, 22\), got \(31, 22\)"),
    ):
        checkpoint.check()


def test_a_sparse_file_of_many_gigabytes_opens_at_once(tmp_path):
    planned = [PlannedTensor("model/decoder/embed_tokens/weight:0", "float32", (10**6, 10**4))]

    def skip(file, tensor):
        file.seek(tensor.nbytes, os.SEEK_CUR)

    with open(tmp_path / "tf_model.h5", "wb") as file:
        write_file(file, planned, skip, "tfopt_for_causal_lm")
    with open_checkpoint(tmp_path / "tf_model.h5", config=config_of()) as checkpoint:
        assert checkpoint.shapes == {"decoder.embed_tokens.weight": (10**6, 10**4)}
        assert not checkpoint.read("decoder.embed_tokens.weight")[-1].any()


# -- other programs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", TF)
def test_every_backend_loads_it(tmp_path, backend, format):
    config = config_of("350m-style", dropout=0.0)
    tensors = tensors_of(config)
    write_checkpoint(tmp_path, config, tensors, format=format)
    model = backend.model_class().from_pretrained(tmp_path)
    for name, array in tensors.items():
        np.testing.assert_array_equal(backend.numpy(model.weight(name)), array.astype(np.float64), err_msg=name)


IDS = np.array([[2, 5, 17, 33, 71, 4], [2, 9, 8, 61, 100, 3]], np.int32)


@pytest.mark.parametrize(
    ("variant", "format", "shard_size"),
    [
        ("350m-style", "tf-h5", "5GB"),
        ("pre-norm", "tf-h5", "9KB"),
        ("no-final-norm", "tf-safetensors", "5GB"),
        ("350m-style", "tf-safetensors", "9KB"),
    ],
)
def test_the_published_class_loads_what_is_written_and_we_what_it_saves(tmp_path, variant, format, shard_size):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("tf_keras")
    from opt_core.reference import Reference

    config = config_of(variant, dropout=0.0)
    tensors, ours, theirs = tensors_of(config), tmp_path / "ours", tmp_path / "theirs"
    reference = Reference(config, tensors)
    expected = reference.logits(reference(IDS).last_hidden_state)
    write_checkpoint(ours, config, tensors, format=format, max_shard_size=shard_size)
    model = transformers.TFOPTForCausalLM.from_pretrained(ours)
    np.testing.assert_allclose(np.asarray(model(IDS).logits), expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    model.save_pretrained(theirs, safe_serialization=format == "tf-safetensors", max_shard_size=shard_size)
    with open_checkpoint(theirs) as checkpoint:
        checkpoint.check()
        assert (checkpoint.format, checkpoint.task) == (format, "causal-lm")
        assert_holds(checkpoint, tensors)
