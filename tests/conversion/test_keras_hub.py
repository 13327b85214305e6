"""KerasHub's presets: what it saves is read, what is written it loads with the same logits; damage is refused."""

import json
import os
import shutil
import struct
import zipfile

import h5py
import numpy as np
import pytest
from checkpoints import NUMPY_DTYPES, assert_holds, config_of, tensors_of
from keras_hub.models import OPTBackbone, OPTCausalLM

from conversion import open_checkpoint, write_checkpoint
from conversion.keras import keras_hub_weights
from conversion.keras.keras_hub import FIELDS, preset_files
from conversion.keras.keras_hub import config_of as preset_config
from conversion.keras.keras_hub_weights import INDEX_NAME, open_file, open_shards, write_file, write_folder
from conversion.safetensors_file import PlannedTensor
from opt_core import OPTConfig
from opt_core.errors import CheckpointError, ConfigError
from opt_core.reference import Reference

CONFIG = config_of(dropout=0.3, attention_dropout=0.3)
EMBEDDINGS = "layers/token_and_position_embedding"
QUERY = "layers/transformer_decoder_1/_self_attention_layer/query_dense/vars/0"
MERGES = ["Ġ q", "u i", "c k", "ui ck", "Ġq uick"]
MODULES = {
    "self_attn.q_proj": "_self_attention_layer/query_dense",
    "self_attn.k_proj": "_self_attention_layer/key_dense",
    "self_attn.v_proj": "_self_attention_layer/value_dense",
    "self_attn.out_proj": "_self_attention_layer/output_dense",
    "self_attn_layer_norm": "_self_attention_layer_norm",
    "fc1": "_feedforward_intermediate_dense",
    "fc2": "_feedforward_output_dense",
    "final_layer_norm": "_feedforward_layer_norm",
}


def as_keras_hub(tensors: dict[str, np.ndarray], config=CONFIG) -> dict[str, np.ndarray]:
    """The weights as OPTBackbone names and turns them, written out by hand for comparison with the table."""
    heads, size, width = config.num_attention_heads, config.head_size, config.hidden_size
    shapes = dict.fromkeys(("query_dense", "key_dense", "value_dense"), (width, heads, size))
    shapes["output_dense"] = (heads, size, width)
    stored = {
        f"{EMBEDDINGS}/token_embedding/vars/0": tensors["decoder.embed_tokens.weight"],
        f"{EMBEDDINGS}/position_embedding/vars/0": tensors["decoder.embed_positions.weight"][2:],
        "layers/layer_normalization/vars/0": tensors["decoder.final_layer_norm.weight"],
        "layers/layer_normalization/vars/1": tensors["decoder.final_layer_norm.bias"],
    }
    for layer in range(config.num_hidden_layers):
        path = f"layers/transformer_decoder{f'_{layer}' if layer else ''}"
        for module, group in MODULES.items():
            weight, bias = (tensors[f"decoder.layers.{layer}.{module}.{leaf}"] for leaf in ("weight", "bias"))
            shape = shapes.get(group.rpartition("/")[2], weight.T.shape)
            stored[f"{path}/{group}/vars/0"] = weight.T.reshape(shape)
            stored[f"{path}/{group}/vars/1"] = bias.reshape(shape[1:] if len(shape) == 3 and "out" not in group else -1)
    return stored


def planned(stored: dict[str, np.ndarray]) -> list[PlannedTensor]:
    return [PlannedTensor(name, str(array.dtype), array.shape) for name, array in stored.items()]


def write_values(file, array: np.ndarray) -> None:
    file.write(np.ascontiguousarray(array).tobytes())


def write_weights(path, stored: dict[str, np.ndarray]) -> None:
    with open(path, "wb") as file:
        write_file(file, planned(stored), lambda file, tensor: write_values(file, stored[tensor.name]))


@pytest.fixture
def small_files(monkeypatch):
    monkeypatch.setattr(keras_hub_weights, "_LARGEST_FILE", 11_000)


def write_preset(folder, config=CONFIG, dtype="float32", **options):
    """A preset of the tiny model; returns its weights as they are stored."""
    folder.mkdir(exist_ok=True)
    stored = as_keras_hub(tensors_of(config, "base", dtype), config)
    write_folder(folder, planned(stored), lambda file, tensor: write_values(file, stored[tensor.name]))
    for name, content in preset_files(config, dtype, **options).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return stored


def tokenizer_folder(folder):
    """A vocabulary whose bytes are its first tokens, as files of the published tokenizer."""
    folder.mkdir()
    bytes_ = [chr(code) for code in [*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324)]]
    tokens = ["<s>", "<pad>", "</s>", "<unk>", *bytes_, *(merge.replace(" ", "") for merge in MERGES)]
    (folder / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *MERGES, ""]), encoding="utf-8")
    return folder


def reference_logits(config, tensors, token_ids):
    weights = {name: array.astype(np.float64) for name, array in tensors.items()}
    return Reference(config, weights)(token_ids).last_hidden_state @ weights["decoder.embed_tokens.weight"].T


def inputs_of(config, length=13):
    token_ids = np.random.default_rng(3).integers(4, config.vocab_size, (2, length))
    return {"token_ids": token_ids, "padding_mask": np.ones_like(token_ids)}


def assert_same(file, expected: dict[str, np.ndarray]) -> None:
    assert set(file.tensors) == set(expected)
    for name, array in expected.items():
        got = file.read(name)
        assert (str(got.dtype), got.shape) == (str(array.dtype), array.shape), name
        assert got.tobytes() == np.ascontiguousarray(array).tobytes(), name


# -- KerasHub reads what is written -----------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 6])
def test_keras_hub_loads_a_preset_with_the_same_logits(tmp_path, count, request):
    if count > 1:
        request.getfixturevalue("small_files")
    write_preset(tmp_path)
    assert len(list(tmp_path.glob("*.weights.h5"))) == count
    model, inputs = OPTCausalLM.from_preset(str(tmp_path)), inputs_of(CONFIG)
    logits = np.asarray(model(inputs))
    expected = reference_logits(CONFIG, tensors_of(CONFIG), inputs["token_ids"])
    assert np.abs(logits - expected).max() < 1e-5 * max(1, np.abs(expected).max())
    hidden = np.asarray(OPTBackbone.from_preset(str(tmp_path))(inputs))
    assert np.array_equal(hidden @ np.asarray(model.backbone.token_embedding.embeddings).T > 0, logits > 0)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_keras_hub_loads_half_precision_exactly(tmp_path, dtype):
    stored = write_preset(tmp_path, dtype=dtype)
    backbone = OPTBackbone.from_preset(str(tmp_path), dtype=dtype)
    assert np.asarray(backbone.token_embedding.embeddings).dtype == NUMPY_DTYPES[dtype]
    backbone.save_weights(tmp_path / "again.weights.h5")
    assert_same(open_file(tmp_path / "again.weights.h5"), stored)


def test_a_preset_with_a_tokenizer_takes_text(tmp_path):
    config = config_of(vocab_size=307)
    write_preset(tmp_path / "preset", config, tokenizer_folder=tokenizer_folder(tmp_path / "tokenizer"))
    model = OPTCausalLM.from_preset(str(tmp_path / "preset"))
    vocabulary = json.loads((tmp_path / "tokenizer/vocab.json").read_text())
    token_ids = np.asarray(model.preprocessor.tokenizer("a quick</s>"))
    assert token_ids.tolist() == [vocabulary[token] for token in ("a", "Ġquick", "</s>")]
    assert model.preprocessor.sequence_length == config.max_position_embeddings
    assert isinstance(model.generate("a quick", max_length=5), str)


def test_the_files_beside_the_weights_are_those_of_keras_hub(tmp_path):
    config = config_of(vocab_size=307, dropout=0.3, attention_dropout=0.3)
    write_preset(tmp_path / "ours", config, tokenizer_folder=tokenizer_folder(tmp_path / "tokenizer"))
    model = OPTCausalLM.from_preset(str(tmp_path / "ours"))
    model.save_to_preset(str(tmp_path / "theirs"))
    ours, theirs = (
        {path.relative_to(root).as_posix(): path for path in root.rglob("*") if path.is_file()}
        for root in (tmp_path / "ours", tmp_path / "theirs")
    )
    assert ours.keys() == theirs.keys()
    for name in ours.keys() - {"metadata.json", "model.weights.h5"}:
        assert ours[name].read_text() == theirs[name].read_text(), name
    counts = [json.loads(files["metadata.json"].read_text())["parameter_count"] for files in (ours, theirs)]
    assert counts == [model.backbone.count_params()] * 2


def test_equal_weights_give_equal_files_in_place_of_64_bytes(tmp_path):
    for name in ("a", "b"):
        write_preset(tmp_path / name)
    assert (tmp_path / "a/model.weights.h5").read_bytes() == (tmp_path / "b/model.weights.h5").read_bytes()
    file = open_file(tmp_path / "a/model.weights.h5")
    assert {tensor.offset % 64 for tensor in file.tensors.values()} == {0}
    assert not file.read(QUERY).flags.owndata


def test_groups_have_the_names_that_keras_gives_them(tmp_path):
    write_preset(tmp_path)
    backbone = OPTBackbone.from_preset(str(tmp_path))
    backbone.save_weights(tmp_path / "theirs.weights.h5")
    with h5py.File(tmp_path / "model.weights.h5") as ours, h5py.File(tmp_path / "theirs.weights.h5") as theirs:
        for group in {name.rpartition("/")[0] for name in as_keras_hub(tensors_of(CONFIG))}:
            assert ours[group].attrs["name"] == theirs[group].attrs["name"]


# -- what KerasHub saves ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("preset")
    write_preset(folder)
    return OPTBackbone.from_preset(str(folder))


STORED = as_keras_hub(tensors_of(CONFIG, "base"))


def test_a_preset_that_keras_hub_saved_is_read(tmp_path, backbone):
    backbone.save_to_preset(str(tmp_path))
    assert_same(open_file(tmp_path / "model.weights.h5"), STORED)
    assert preset_config(tmp_path) == preset_config(tmp_path / "model.weights.h5") == CONFIG


def test_a_sharded_preset_that_keras_hub_saved_is_read(tmp_path, backbone):
    backbone.save_to_preset(str(tmp_path), max_shard_size=11e3 / 1024**3)
    files = open_shards(tmp_path / INDEX_NAME)
    assert len(files) == len(list(tmp_path.glob("model_*.weights.h5"))) > 3
    assert {name: file.read(name).tobytes() for file in files for name in file.tensors} == {
        name: array.tobytes() for name, array in STORED.items()
    }


def test_the_weights_of_a_whole_model_are_read(tmp_path, backbone):
    OPTCausalLM(backbone, name="mine").save_weights(tmp_path / "whole.weights.h5")
    assert_same(open_file(tmp_path / "whole.weights.h5"), STORED)


@pytest.mark.parametrize("whole", [True, False])
def test_a_keras_archive_is_read(tmp_path, backbone, whole):
    path = tmp_path / "model.keras"
    (OPTCausalLM(backbone) if whole else backbone).save(path)
    file = open_file(path)
    assert_same(file, STORED)
    assert preset_config(path) == CONFIG
    with open_checkpoint(path) as checkpoint:
        checkpoint.check(CONFIG)
        assert checkpoint.format == "keras-hub"


def test_an_index_is_opened_by_its_name(tmp_path, backbone):
    backbone.save_to_preset(str(tmp_path), max_shard_size=11e3 / 1024**3)
    with open_checkpoint(tmp_path / INDEX_NAME) as checkpoint:
        checkpoint.check(CONFIG)


def test_what_training_keeps_is_left_out(tmp_path):
    write_preset(tmp_path)
    model = OPTCausalLM.from_preset(str(tmp_path))
    model.compile(optimizer="adam", loss="sparse_categorical_crossentropy", run_eagerly=True)
    inputs = inputs_of(CONFIG)
    model.fit(inputs, inputs["token_ids"], verbose=0)
    model.save_weights(tmp_path / "trained.weights.h5")
    with h5py.File(tmp_path / "trained.weights.h5") as file:
        assert len(file["optimizer/vars"]) > 2 * len(STORED)
    model.save_to_preset(str(tmp_path / "again"))
    trained = open_file(tmp_path / "again/model.weights.h5")
    assert_same(open_file(tmp_path / "trained.weights.h5"), {name: trained.read(name) for name in STORED})


@pytest.mark.parametrize("root", ["", "layers/opt_backbone/", "_layer_checkpoint_dependencies/opt_backbone/"])
def test_the_metrics_that_keras_2_keeps_are_left_out(tmp_path, root):
    renamed(tmp_path / "old.weights.h5", lambda name: name)
    with h5py.File(tmp_path / "old.weights.h5", "r+") as file:
        file[f"{root}metrics/mean/vars/0"] = np.float32(3)
        file[f"{root}optimizer/vars/0"] = np.int64(7)
    assert_same(open_file(tmp_path / "old.weights.h5"), STORED)


def renamed(path, change) -> None:
    with h5py.File(path, "w") as file:
        for name, array in STORED.items():
            file[change(name)] = array


@pytest.mark.parametrize(
    "change",
    [
        lambda name: name.replace("layers/", "_layer_checkpoint_dependencies/"),
        lambda name: (
            name.replace("query_dense", "_query_dense").replace("output_dense", "_output_dense")
            if "_self_attention_layer/" in name
            else name
        ),
        lambda name: f"_layer_checkpoint_dependencies/opt_backbone/{name}".replace(
            "/layers/", "/_layer_checkpoint_dependencies/"
        ),
    ],
    ids=["root of Keras 2", "private attributes", "whole model of Keras 2"],
)
def test_names_of_older_versions_are_read(tmp_path, change):
    renamed(tmp_path / "old.weights.h5", change)
    assert_same(open_file(tmp_path / "old.weights.h5"), STORED)


@pytest.mark.parametrize("options", [dict(chunks=True), dict(compression="gzip", shuffle=True)])
@pytest.mark.parametrize("dtype", NUMPY_DTYPES)
def test_chunks_and_gzip_are_read_in_every_dtype(tmp_path, dtype, options):
    stored = as_keras_hub(tensors_of(CONFIG, "base", dtype))
    with h5py.File(tmp_path / "w.weights.h5", "w") as file:
        for name, array in stored.items():
            dataset = file.create_dataset(name, data=array, **options)
            if dtype == "bfloat16":
                dataset.attrs["dtype"] = dtype
    assert_same(open_file(tmp_path / "w.weights.h5"), stored)


# -- config.json ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["125m", "1.3b", "2.7b", "6.7b"])
def test_the_config_of_a_published_size_survives(tmp_path, preset):
    config = OPTConfig.preset(preset, attention_dropout=0.1)
    (tmp_path / "config.json").write_bytes(preset_files(config, "float16")["config.json"])
    back, sizes = preset_config(tmp_path), {field for _, field in FIELDS}
    assert {name: getattr(back, name) for name in sizes} == {name: getattr(config, name) for name in sizes}


def test_the_one_dropout_of_keras_hub_is_that_of_attention_too(tmp_path):
    config = config_of(dropout=0.3, attention_dropout=0.2)
    (tmp_path / "config.json").write_bytes(preset_files(config, "float32")["config.json"])
    assert preset_config(tmp_path) == config.replace(attention_dropout=0.3)


def test_the_ids_of_special_tokens_come_from_the_vocabulary(tmp_path):
    write_preset(tmp_path)
    (tmp_path / "assets/tokenizer").mkdir(parents=True)
    (tmp_path / "assets/tokenizer/vocabulary.json").write_text('{"</s>": 11, "<pad>": 7, "<s>": 0}')
    assert preset_config(tmp_path) == CONFIG.replace(pad_token_id=7, bos_token_id=11, eos_token_id=11)


def edited(**changes):
    def change(fields):
        fields["config"].update(changes)
        for name in [name for name, value in changes.items() if value is None]:
            del fields["config"][name]

    return change


@pytest.mark.parametrize(
    "change",
    [
        lambda fields: fields.update(class_name="keras_nlp>OPTBackbone", registered_name="keras_nlp>OPTBackbone"),
        lambda fields: fields.update(assets=[], weights="model.weights.h5"),
        lambda fields: fields["config"].update(dtype="bfloat16"),
        lambda fields: fields["config"]["dtype"]["config"].update(name="mixed_float16"),
        lambda fields: fields["config"].pop("dtype"),
    ],
)
def test_configs_of_older_versions_are_read(tmp_path, change):
    fields = json.loads(preset_files(CONFIG, "float32")["config.json"])
    change(fields)
    (tmp_path / "config.json").write_text(json.dumps(fields))
    assert preset_config(tmp_path) == CONFIG


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda fields: fields.update(class_name="GPT2Backbone"), "expected OPTBackbone of KerasHub, got GPT2Backbone"),
        (lambda fields: fields.update(class_name=7), "expected OPTBackbone of KerasHub"),
        (lambda fields: fields.update(config=[]), "expected OPTBackbone of KerasHub"),
        (lambda fields: fields.update(class_name="OPTCausalLM"), "expected OPTBackbone of KerasHub"),
        (edited(rotary=True), "rotary: not an argument of OPTBackbone"),
        (edited(num_heads=None), "num_heads: missing"),
        (edited(num_heads="2"), "num_attention_heads: expected an integer"),
        (edited(num_heads=3), "hidden_size: expected a multiple of num_attention_heads"),
        (edited(hidden_dim=10**12), "hidden_size: expected an integer from 1 to"),
        (edited(num_layers=True), "num_hidden_layers: expected an integer"),
        (edited(dropout=[0.1]), "dropout: expected a probability"),
        (edited(dtype={"config": {"name": "int8_from_float32"}}), "got int8_from_float32: quantised weights"),
        (edited(dtype={"class_name": "DTypePolicyMap", "config": {"default_policy": None}}), "quantised weights"),
    ],
)
def test_a_config_of_another_model_is_refused(tmp_path, change, problem):
    fields = json.loads(preset_files(CONFIG, "float32")["config.json"])
    change(fields)
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ConfigError) as raised:
        preset_config(tmp_path)
    assert problem in str(raised.value)
    assert str(tmp_path / "config.json") in str(raised.value)


def test_a_missing_config_is_named(tmp_path):
    write_weights(tmp_path / "model.weights.h5", STORED)
    for source in (tmp_path, tmp_path / "model.weights.h5"):
        with pytest.raises(CheckpointError, match=r"config\.json: missing; put it beside the weights"):
            preset_config(source)


def test_a_vocabulary_without_the_special_tokens_is_not_written(tmp_path):
    folder = tokenizer_folder(tmp_path / "tokenizer")
    (folder / "vocab.json").write_text('{"a": 0}')
    with pytest.raises(CheckpointError) as raised:
        preset_files(CONFIG, "float32", tokenizer_folder=folder)
    assert len(raised.value.problems) == 2


# -- damage -----------------------------------------------------------------------------------------------------------


def soft_link(file):
    del file[QUERY]
    file[QUERY] = h5py.SoftLink("/layers")


def external_link(file):
    del file[QUERY]
    file[QUERY] = h5py.ExternalLink("other.h5", "/w")


def one_dataset_twice(file):
    file["layers/again"] = file[QUERY]


def replaced(**options):
    def change(file):
        del file[QUERY]
        file.create_dataset(QUERY, **options)

    return change


def external_storage(file):
    del file[QUERY]
    file.create_dataset(QUERY, (22, 2, 11), "<f4", external=[("/etc/hostname", 0, 22 * 22 * 4)])


def virtual_dataset(file):
    del file[QUERY]
    layout = h5py.VirtualLayout((22, 2, 11), "<f4")
    layout[:] = h5py.VirtualSource("other.h5", "w", (22, 2, 11))
    file.create_virtual_dataset(QUERY, layout)


def wrong_mark(file):
    replaced(data=np.zeros((22, 2, 11), "V2"))(file)
    file[QUERY].attrs["dtype"] = "int16"


def a_list_as_mark(file):
    replaced(data=np.zeros((22, 2, 11), "V2"))(file)
    file[QUERY].attrs["dtype"] = ["bfloat16"]


def old_and_new_name(file):
    file[QUERY.replace("query_dense", "_query_dense")] = file[QUERY][()]


def quantised(file):
    replaced(data=np.zeros((22, 2, 11), np.int8))(file)
    file[QUERY.replace("vars/0", "vars/2")] = np.ones(22, np.float32)


def deep_groups(file):
    file.create_group("/".join("abcdefghijklmnopqrstuvwxyz"))


DAMAGE = [
    (soft_link, "got a soft or external link"),
    (external_link, "got a soft or external link"),
    (one_dataset_twice, "expected a tree"),
    (deep_groups, "expected a tree"),
    (external_storage, "external or virtual data"),
    (virtual_dataset, "external or virtual data"),
    (wrong_mark, "expected a dtype"),
    (a_list_as_mark, "expected a dtype"),
    (quantised, "expected a dtype of float64, float32, float16, bfloat16, got int8"),
    (old_and_new_name, f"{QUERY}: stored twice"),
    (replaced(data=np.array([b"x"], object), dtype=h5py.string_dtype()), "expected a dtype"),
    (replaced(data=np.zeros((22, 2, 11), ">f4")), "expected a dtype"),
    (replaced(data=h5py.Empty("f4")), "positive length"),
    (replaced(data=np.float32(1)), "positive length"),
    (replaced(shape=(10**6, 10**6), dtype="f4"), "expected 4000000000000 bytes"),
    (replaced(shape=(10**6, 10**6), dtype="f4", chunks=(10, 10)), "at least one byte for 1000"),
    (replaced(data=np.zeros((22, 2, 11), "f4"), compression="lzf"), "no filters but gzip and shuffle"),
    (replaced(data=np.zeros((2200, 3100), "f4"), compression="gzip", chunks=(2200, 3100)), "at least one byte"),
]


@pytest.mark.parametrize("archived", [False, True], ids=["h5", "archive"])
@pytest.mark.parametrize(("damage", "problem"), DAMAGE, ids=lambda value: getattr(value, "__name__", None))
def test_a_damaged_or_hostile_file_is_refused_by_name(tmp_path, damage, problem, archived):
    path = tmp_path / "model.weights.h5"
    write_weights(path, STORED)
    with h5py.File(path, "r+") as file:
        damage(file)
    if archived:
        with zipfile.ZipFile(tmp_path / "m.keras", "w") as archive:
            archive.write(path, path.name)
        path = tmp_path / "m.keras"
    with pytest.raises(CheckpointError) as raised:
        open_file(path)
    assert str(path) in str(raised.value)
    assert problem in str(raised.value)


@pytest.fixture
def archive(tmp_path):
    write_weights(tmp_path / "model.weights.h5", STORED)
    config = preset_files(CONFIG, "float32")["config.json"]

    def write(members=None, **options):
        with zipfile.ZipFile(tmp_path / "m.keras", "w", **options) as file:
            for name, content in members or [("config.json", config), ("model.weights.h5", None)]:
                file.writestr(name, (tmp_path / "model.weights.h5").read_bytes() if content is None else content)
        return tmp_path / "m.keras"

    return write


def test_the_hand_made_archive_of_these_tests_is_a_good_one(archive):
    assert_same(open_file(archive()), STORED)
    assert preset_config(archive()) == CONFIG


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize(
    ("members", "problem"),
    [
        ([("config.json", "{}")], "model.weights.h5: expected one such member in the archive, got 0"),
        ([("model.weights.h5", None)] * 2, "model.weights.h5: expected one such member in the archive, got 2"),
        ([("model.weights.h5", b"")], "damaged or another file"),
        ([("model.weights.h5", b"x" * 5000)], "damaged or another file"),
    ],
)
def test_an_archive_without_its_weights_is_refused(archive, members, problem):
    with pytest.raises(CheckpointError) as raised:
        open_file(archive(members))
    assert problem in str(raised.value)


def test_a_compressed_archive_is_refused(archive):
    with pytest.raises(CheckpointError, match=r"model\.weights\.h5: expected a member stored as it is"):
        open_file(archive(compression=zipfile.ZIP_DEFLATED))


@pytest.mark.parametrize("text", ["{", "[]", '{"a": 1, "a": 2}', "[" * 200_000, " " * (10 * 2**20 + 1)])
def test_an_archive_with_a_broken_config_is_refused(archive, text):
    with pytest.raises(CheckpointError, match=r"config\.json: "):
        preset_config(archive([("config.json", text), ("model.weights.h5", None)]))


@pytest.mark.parametrize("cut", [1, 300, 20_000])
def test_a_truncated_archive_is_refused(archive, cut):
    path = archive()
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(CheckpointError, match="damaged or truncated zip"):
        open_file(path)


def test_an_archive_whose_two_headers_disagree_is_refused(archive):
    path = archive()
    path.write_bytes(path.read_bytes().replace(b"model.weights.h5", b"other.weights.h5", 1))
    with pytest.raises(CheckpointError, match=r"model\.weights\.h5: damaged or truncated"):
        open_file(path)


def test_a_member_larger_than_its_archive_is_refused(archive):
    path = archive()
    data = bytearray(path.read_bytes())
    struct.pack_into("<II", data, data.rindex(b"PK\x01\x02") + 20, 2**31, 2**31)
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"model\.weights\.h5: damaged or truncated"):
        open_file(path)


def test_no_single_damaged_byte_of_an_archive_does_more_than_raise_our_errors(archive):
    path = archive()
    good, generator = path.read_bytes(), np.random.default_rng(5)
    refused = 0
    for place in [*range(0, 60, 2), *generator.integers(0, len(good), 40), *range(len(good) - 180, len(good), 2)]:
        path.write_bytes(good[:place] + bytes([generator.integers(256)]) + good[place + 1 :])
        try:
            preset_config(path)
            file = open_file(path)
            for name in file.tensors:
                file.read(name)
        except (CheckpointError, ConfigError):
            refused += 1
    assert refused > 30


# -- the index --------------------------------------------------------------------------------------------------------


@pytest.fixture
def sharded(tmp_path, small_files):
    write_preset(tmp_path)
    return tmp_path / INDEX_NAME


def edit_index(index, change):
    fields = json.loads(index.read_text())
    change(fields["weight_map"])
    index.write_text(json.dumps(fields))


GROUP = "/" + QUERY.rpartition("/")[0]


@pytest.mark.parametrize(
    "file",
    ["../model_00000.weights.h5", "/etc/model_00000.weights.h5", "a\\model_00000.weights.h5", "model_0.weights.h5", "",
     "model.weights.h5", "model_00000.weights.h5\n", "x" * 4000],
)  # fmt: skip
def test_a_shard_of_another_name_is_refused(sharded, file):
    edit_index(sharded, lambda weight_map: weight_map.update({GROUP: [file]}))
    with pytest.raises(CheckpointError, match=r"expected model_00000\.weights\.h5 or the like"):
        open_shards(sharded)


@pytest.mark.parametrize("value", [7, None, [], [7], {"a": 1}, [["model_00000.weights.h5"]]])
def test_a_group_without_file_names_is_refused(sharded, value):
    edit_index(sharded, lambda weight_map: weight_map.update({GROUP: value}))
    with pytest.raises(CheckpointError, match="query_dense/vars: expected a file name or a list of them"):
        open_shards(sharded)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": ["a"]}'])
def test_a_broken_index_is_named(sharded, text):
    sharded.write_text(text)
    with pytest.raises(CheckpointError, match=INDEX_NAME):
        open_shards(sharded)


def test_a_missing_shard_and_one_that_the_index_leaves_out_are_named(sharded):
    (sharded.parent / "model_00001.weights.h5").unlink()
    with pytest.raises(CheckpointError, match=r"model_00001\.weights\.h5: missing"):
        open_shards(sharded)
    edit_index(sharded, lambda weight_map: weight_map.update(dict.fromkeys(weight_map, "model_00001.weights.h5")))
    (sharded.parent / "model_00001.weights.h5").touch()
    with pytest.raises(CheckpointError, match=r"model_00000\.weights\.h5: not in the index, which names 1 shards"):
        open_shards(sharded)


def test_a_group_that_the_index_puts_elsewhere_is_named(sharded):
    edit_index(sharded, lambda weight_map: weight_map.pop(GROUP))
    edit_index(sharded, lambda weight_map: weight_map.update({"/layers/other/vars": "model_00002.weights.h5"}))
    with pytest.raises(CheckpointError) as raised:
        open_shards(sharded)
    assert f"{GROUP[1:]}: stored in model_0000" in str(raised.value)
    assert "layers/other/vars: the index says model_00002.weights.h5, where it is not" in str(raised.value)


def test_a_tensor_in_two_shards_is_refused(sharded):
    shutil.copy(sharded.parent / "model_00000.weights.h5", sharded.parent / "model_00002.weights.h5")
    with pytest.raises(CheckpointError, match=r"stored in model_00000\.weights\.h5 and model_00002\.weights\.h5"):
        open_shards(sharded)


def test_a_link_that_leaves_the_folder_is_refused(sharded, tmp_path_factory):
    shard = sharded.parent / "model_00001.weights.h5"
    outside = tmp_path_factory.mktemp("outside") / shard.name
    shard.rename(outside)
    os.symlink(outside, shard)
    with pytest.raises(CheckpointError, match="a link that leaves the folder"):
        open_shards(sharded)


# -- as checkpoints ---------------------------------------------------------------------------------------------------


def as_read_back(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Two rows of the position table, which no token uses, are not stored: they come back as zeros."""
    positions = tensors["decoder.embed_positions.weight"].copy()
    positions[:2] = 0
    return {**tensors, "decoder.embed_positions.weight": positions}


@pytest.mark.parametrize("task", ["base", "causal-lm"])
@pytest.mark.parametrize("dtype", NUMPY_DTYPES)
def test_a_checkpoint_comes_back_from_a_preset_bit_for_bit(tmp_path, dtype, task):
    config = config_of(dropout=0.3, attention_dropout=0.3, torch_dtype=dtype, num_hidden_layers=11)
    tensors = tensors_of(config, dtype=dtype)
    write_checkpoint(tmp_path, config, tensors, format="keras-hub", task=task)
    assert (tmp_path / "task.json").exists() == (task == "causal-lm")
    with open_checkpoint(tmp_path) as checkpoint:
        checkpoint.check()
        assert (checkpoint.format, checkpoint.config) == ("keras-hub", config)
        assert_holds(checkpoint, as_read_back(tensors))


def test_a_checkpoint_is_stored_as_written_out_by_hand_and_runs_in_keras_hub(tmp_path):
    tensors, inputs = tensors_of(CONFIG), inputs_of(CONFIG)
    write_checkpoint(tmp_path, CONFIG, tensors, format="keras-hub")
    assert_same(open_file(tmp_path / "model.weights.h5"), STORED)
    logits = np.asarray(OPTCausalLM.from_preset(str(tmp_path))(inputs))
    expected = reference_logits(CONFIG, tensors, inputs["token_ids"])
    assert np.abs(logits - expected).max() < 1e-5 * max(1, np.abs(expected).max())


def test_a_tokenizer_is_written_beside_the_weights(tmp_path):
    config, folder = config_of(vocab_size=307), tokenizer_folder(tmp_path / "tokenizer")
    write_checkpoint(tmp_path / "preset", config, tensors_of(config), format="keras-hub", tokenizer_folder=folder)
    model = OPTCausalLM.from_preset(str(tmp_path / "preset"))
    assert model.preprocessor.tokenizer.token_to_id("</s>") == 2


@pytest.mark.parametrize(
    ("variant", "problems"),
    [
        ("350m-style", ["do_layer_norm_before", "has_final_layer_norm", "has_projections"]),
        ("no-final-norm", ["has_final_layer_norm"]),
        ("no-bias", ["enable_bias"]),
        ("non-affine", ["layer_norm_elementwise_affine"]),
        ("untied", ["tie_word_embeddings"]),
    ],
)
def test_what_the_class_cannot_be_is_not_written(tmp_path, variant, problems):
    config = config_of(variant)
    with pytest.raises(CheckpointError) as raised:
        write_checkpoint(tmp_path / "new", config, tensors_of(config), format="keras-hub")
    assert [problem.partition(":")[0] for problem in raised.value.problems] == problems
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "silu"])
def test_another_activation_is_not_written(tmp_path, activation):
    config = config_of(activation_function=activation)
    with pytest.raises(CheckpointError, match=f"activation_function: expected relu for keras-hub, got {activation}"):
        write_checkpoint(tmp_path / "new", config, tensors_of(config), format="keras-hub")


def test_float64_and_other_tasks_are_not_written(tmp_path):
    doubles = {name: array.astype(np.float64) for name, array in tensors_of(CONFIG).items()}
    with pytest.raises(CheckpointError, match="expected a dtype of float32, float16, bfloat16 for keras-hub"):
        write_checkpoint(tmp_path / "new", CONFIG, doubles, format="keras-hub")
    task = "question-answering"
    with pytest.raises(CheckpointError, match="task: expected one of base, causal-lm for keras-hub"):
        write_checkpoint(tmp_path / "new", CONFIG, tensors_of(CONFIG, task), format="keras-hub", task=task)


def test_a_sharded_preset_is_a_checkpoint(tmp_path, small_files):
    write_preset(tmp_path)
    assert (tmp_path / INDEX_NAME).exists()
    with open_checkpoint(tmp_path) as checkpoint:
        checkpoint.check()
        assert_holds(checkpoint, as_read_back(tensors_of(CONFIG)))


def test_bare_weights_are_a_checkpoint_when_a_config_is_given(tmp_path, backbone):
    path = tmp_path / "bare.weights.h5"
    OPTCausalLM(backbone).save_weights(path)
    with pytest.raises(CheckpointError, match=r"config\.json: missing"):
        open_checkpoint(path)
    with open_checkpoint(path, config=CONFIG) as checkpoint:
        checkpoint.check()
        assert_holds(checkpoint, as_read_back(tensors_of(CONFIG)))


def test_a_preset_whose_config_does_not_fit_names_every_weight(tmp_path):
    write_preset(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    fields["config"].update(num_heads=11, num_layers=4)
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(CheckpointError) as raised, open_checkpoint(tmp_path) as checkpoint:
        checkpoint.check()
    message = str(raised.value)
    assert "decoder.layers.3.fc1.weight: missing" in message
    assert "decoder.layers.0.self_attn.q_proj.weight: expected (22, 22), got (22, 2, 11)" in message
