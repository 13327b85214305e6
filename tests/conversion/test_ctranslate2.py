"""CTranslate2's folders: what its converter writes is read back bit for bit; damaged and foreign files are refused."""

import json
import shutil
import struct

import ctranslate2
import numpy as np
import pytest
from checkpoints import NUMPY_DTYPES, TINY, assert_holds, config_of, tensors_of
from ctranslate2.converters import TransformersConverter

from conversion import open_checkpoint, write_checkpoint
from conversion.ctranslate2.ctranslate2_config import config_of as converted_config
from conversion.ctranslate2.ctranslate2_file import open_file
from opt_core.errors import CheckpointError, ConfigError, InputError
from opt_core.reference import Reference

VOCAB_SIZE = 104  # a multiple of 8, to which CTranslate2 pads the vocabulary
HELD = ("pre-norm", "350m-style", "no-bias", "untied")
WEIGHT = "decoder/layer_1/ffn/linear_0/weight"
FUSED_BIAS = "decoder/layer_2/self_attention/linear_0/bias"
TOKENS = ["<s>", "<pad>", "</s>", "<unk>", *map(chr, range(33, 33 + VOCAB_SIZE - 5))]  # one less than rows


def config_to_convert(variant: str = "pre-norm", **more):
    return config_of(variant, vocab_size=VOCAB_SIZE, **more)


def as_ctranslate2(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The weights as CTranslate2 names and joins them, written out by hand for comparison with the table."""
    modules = {
        "self_attn_layer_norm": "self_attention/layer_norm",
        "self_attn.out_proj": "self_attention/linear_1",
        "fc1": "ffn/linear_0",
        "fc2": "ffn/linear_1",
        "final_layer_norm": "ffn/layer_norm",
    }
    embedding = tensors["decoder.embed_tokens.weight"]
    stored = {
        "decoder/embeddings/weight": embedding,
        "decoder/position_encodings/encodings": tensors["decoder.embed_positions.weight"][2:],
        "decoder/projection/weight": tensors.get("lm_head.weight", embedding),
    }
    for name, array in tensors.items():
        module, _, leaf = name.removeprefix("decoder.").rpartition(".")
        if leaf in ("weight", "bias") and "norm" in module:
            leaf = {"weight": "gamma", "bias": "beta"}[leaf]
        if module.startswith("layers."):
            _, layer, module = module.split(".", 2)
            if module == "self_attn.q_proj":
                parts = [tensors[f"decoder.layers.{layer}.self_attn.{letter}_proj.{leaf}"] for letter in "qkv"]
                stored[f"decoder/layer_{layer}/self_attention/linear_0/{leaf}"] = np.concatenate(parts)
            elif module in modules:
                stored[f"decoder/layer_{layer}/{modules[module]}/{leaf}"] = array
        elif module in ("project_in", "project_out"):
            stored[f"decoder/{module}/weight"] = array
        elif module == "final_layer_norm":
            stored[f"decoder/layer_norm/{leaf}"] = array
    return stored


def write_tokenizer(folder) -> None:
    (folder / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(TOKENS)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    special = dict(bos_token="</s>", eos_token="</s>", unk_token="</s>", pad_token="<pad>")
    (folder / "tokenizer_config.json").write_text(json.dumps(dict(tokenizer_class="GPT2Tokenizer", **special)))


def convert(folder, config, tensors, **options):
    """The folder that CTranslate2's own converter makes of what is written here."""
    write_checkpoint(folder / "published", config, tensors)
    write_tokenizer(folder / "published")
    TransformersConverter(str(folder / "published")).convert(str(folder / "converted"), **options)
    return folder / "converted"


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    config = config_to_convert()
    return convert(tmp_path_factory.mktemp("tiny"), config, tensors_of(config))


@pytest.fixture
def folder(tmp_path, converted):
    return shutil.copytree(converted, tmp_path / "converted")


def assert_same(file, expected: dict[str, np.ndarray]) -> None:
    assert set(file.tensors) == set(expected)
    for name, array in expected.items():
        got = file.read(name)
        assert (got.dtype, got.shape) == (array.dtype, array.shape), name
        assert got.tobytes() == array.tobytes(), name


# -- what CTranslate2 writes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", NUMPY_DTYPES)
@pytest.mark.parametrize("variant", HELD)
def test_what_the_converter_writes_is_read_back_bit_for_bit(tmp_path, variant, dtype):
    config = config_to_convert(variant)
    tensors = tensors_of(config, dtype=dtype)
    folder = convert(tmp_path, config, tensors)
    file = open_file(folder / "model.bin")
    assert_same(file, as_ctranslate2(tensors))
    assert converted_config(file, folder) == config


@pytest.mark.parametrize("dtype", NUMPY_DTYPES)
@pytest.mark.parametrize("variant", HELD)
def test_a_converted_folder_is_a_checkpoint_but_for_two_rows_that_no_token_uses(tmp_path, variant, dtype):
    config = config_to_convert(variant, num_hidden_layers=11, torch_dtype=dtype)
    tensors = tensors_of(config, dtype=dtype)
    with open_checkpoint(convert(tmp_path, config, tensors)) as checkpoint:
        checkpoint.check()
        assert (checkpoint.format, checkpoint.task, checkpoint.config) == ("ctranslate2", "causal-lm", config)
        tensors["decoder.embed_positions.weight"][:2] = 0
        assert_holds(checkpoint, tensors)


@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_new", "silu"])
def test_the_activation_comes_back(tmp_path, activation):
    config = config_to_convert(activation_function=activation)
    folder = convert(tmp_path, config, tensors_of(config))
    assert converted_config(open_file(folder / "model.bin"), folder) == config


@pytest.mark.parametrize("variant", HELD)
def test_ctranslate2_computes_what_the_reference_computes(tmp_path, variant):
    config = config_to_convert(variant)
    tensors = tensors_of(config)
    generator = ctranslate2.Generator(str(convert(tmp_path, config, tensors)), intra_threads=1)
    token_ids = np.random.default_rng(5).integers(4, VOCAB_SIZE - 1, (2, 11))
    logits = np.array(generator.forward_batch(token_ids.tolist()))
    head = tensors.get("lm_head.weight", tensors["decoder.embed_tokens.weight"]).astype(np.float64)
    expected = Reference(config, tensors)(token_ids).last_hidden_state @ head.T
    assert np.abs(logits - expected).max() < 1e-5 * max(1, np.abs(expected).max())


def test_weights_that_share_their_bytes_are_one_stored_tensor(converted):
    file = open_file(converted / "model.bin")
    assert file.tensors["decoder/projection/weight"] == file.tensors["decoder/embeddings/weight"]


def test_settings_are_kept_apart_from_weights(converted):
    file = open_file(converted / "model.bin")
    assert file.scalars["decoder/num_heads"] == TINY["num_attention_heads"]
    assert file.scalars["decoder/pre_norm"] == 1
    assert file.scalars["decoder/alignment_layer"] == -1
    assert not file.scalars.keys() & file.tensors.keys()


def test_writing_to_an_array_does_not_reach_the_file(folder):
    before, file = (folder / "model.bin").read_bytes(), open_file(folder / "model.bin")
    arrays = [file.read(name) for name in file.tensors]
    file.close()
    for array in arrays:
        assert array.flags.writeable
        assert array.flags.c_contiguous
        array += 1
    assert (folder / "model.bin").read_bytes() == before


def test_without_its_json_files_a_model_has_the_usual_tokens(folder):
    for name in ("config.json", "vocabulary.json"):
        (folder / name).unlink()
    assert converted_config(open_file(folder / "model.bin"), folder) == config_to_convert()


def test_the_ids_of_special_tokens_are_their_places_in_the_vocabulary(folder):
    tokens = json.loads((folder / "vocabulary.json").read_text())
    (folder / "vocabulary.json").write_text(json.dumps(tokens[7:] + tokens[:7]))
    config = converted_config(open_file(folder / "model.bin"), folder)
    assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (98, 99, 99)


@pytest.mark.parametrize("quantization", ["int8", "int16", "int8_float16"])
def test_quantised_weights_are_refused_by_name_with_what_to_do(tmp_path, quantization):
    config = config_to_convert()
    folder = convert(tmp_path, config, tensors_of(config), quantization=quantization)
    with pytest.raises(CheckpointError) as raised:
        open_file(folder / "model.bin")
    assert f"{WEIGHT}: expected a dtype of float32, float16, bfloat16, got int" in str(raised.value)
    assert "convert the original again" in raised.value.problems[-1]
    assert len(raised.value.problems) == 3 * 4 + 2  # of each layer four matrices, the embedding, the advice


@pytest.mark.parametrize("quantization", ["float16", "bfloat16"])
def test_weights_that_the_converter_rounded_are_read(tmp_path, quantization):
    config = config_to_convert()
    tensors = tensors_of(config)
    file = open_file(convert(tmp_path, config, tensors, quantization=quantization) / "model.bin")
    assert_same(file, as_ctranslate2({name: a.astype(NUMPY_DTYPES[quantization]) for name, a in tensors.items()}))


# -- damage -----------------------------------------------------------------------------------------------------------


class Parts:
    """A `model.bin` in parts to break, and put together again."""

    def __init__(self, path):
        self.version, self.specification, self.revision = 6, "TransformerDecoderSpec", 8
        file = open_file(path)
        self.variables = []
        for name, value in file.scalars.items():
            type_, format_ = (2, "<h") if "heads" in name or "alignment" in name else (1, "<b")
            self.variables.append([name, (), type_, struct.pack(format_, value)])
        for name, tensor in file.tensors.items():
            if name != "decoder/projection/weight":
                self.variables.append([name, tensor.shape, 0, file.read(name).tobytes()])
        self.aliases = [["decoder/projection/weight", "decoder/embeddings/weight"]]
        self.more = b""
        self.count = None

    def __getitem__(self, name):
        return next(variable for variable in self.variables if variable[0] == name)

    def __bytes__(self):
        def text(name):
            return struct.pack("<H", len(name.encode()) + 1) + name.encode() + b"\0"

        data = struct.pack("<I", self.version) + text(self.specification)
        count = len(self.variables) if self.count is None else self.count
        data += struct.pack("<II", self.revision, count)
        for name, shape, type_, content in self.variables:
            data += text(name) + struct.pack(f"<B{len(shape)}IBI", len(shape), *shape, type_, len(content)) + content
        data += struct.pack("<I", len(self.aliases)) + b"".join(text(a) + text(b) for a, b in self.aliases)
        return data + self.more


def setting(name, value, place=3):
    def change(parts):
        parts[f"decoder/{name}"][place] = struct.pack("<b", value)

    return change


def replaced(name, /, **fields):
    def change(parts):
        variable = parts[name]
        for place, field in enumerate(("name", "shape", "type", "content")):
            variable[place] = fields.get(field, variable[place])

    return change


def added(*variable):
    return lambda parts: parts.variables.append(list(variable))


def removed(name):
    return lambda parts: parts.variables.remove(parts[name])


def having(**fields):
    return lambda parts: parts.__dict__.update(fields)


DAMAGE = [
    (having(version=7), "version: expected one of 4, 5, 6, got 7"),
    (having(version=3), "version: expected one of 4, 5, 6, got 3"),
    (having(specification="WhisperSpec"), "expected TransformerDecoderSpec, got WhisperSpec"),
    (having(specification=""), "expected TransformerDecoderSpec"),
    (having(revision=9), "revision: expected 1 to 8, got 9"),
    (having(revision=0), "revision: expected 1 to 8, got 0"),
    (having(count=2**32 - 1), "variables: expected at most"),
    (having(count=3), "aliases: expected at most"),
    (having(more=b"\0"), "1 bytes follow the last alias"),
    (replaced(WEIGHT, shape=(31, 23)), f"{WEIGHT}: expected 2852 bytes for float32 (31, 23), got 2728"),
    (replaced(WEIGHT, shape=(2**31, 2**31)), f"{WEIGHT}: expected 18446744073709551616 bytes"),
    (replaced(WEIGHT, shape=(0, 22)), f"{WEIGHT}: expected axes of positive length"),
    (replaced(WEIGHT, shape=(1,) * 9), f"{WEIGHT}: expected at most 8 axes, got 9"),
    (replaced(WEIGHT, type=6), f"{WEIGHT}: expected axes of positive length and a type below 6"),
    (replaced(WEIGHT, type=4), f"{WEIGHT}: expected 1364 bytes for float16"),
    (replaced(WEIGHT, type=3), f"{WEIGHT}: expected a dtype of float32, float16, bfloat16, got int32"),
    (replaced(WEIGHT, name="decoder/embeddings/weight"), "decoder/embeddings/weight: two variables of this name"),
    (replaced(WEIGHT, name="a\nb"), "bytes of text and a zero"),
    (replaced(WEIGHT, name="é"), "bytes of text and a zero"),
    (replaced(WEIGHT, name="x" * 300), "up to 255 bytes of text and a zero, got 301 bytes"),
    (having(aliases=[["a", "b"]]), "a: an alias of b, which is not a variable"),
    (having(aliases=[["a", "a"]]), "a: an alias of a, which is not a variable"),
    (having(aliases=[["a", "decoder/num_heads"]]), "a: an alias of decoder/num_heads, which is not a variable with"),
    (having(aliases=[["a", WEIGHT], ["b", "a"]]), "b: an alias of a, which is not a variable"),
    (having(aliases=[["a", WEIGHT]] * 2), f"a: stored twice, once as an alias of {WEIGHT}"),
    (having(aliases=[["decoder/embeddings/weight", WEIGHT]]), "decoder/embeddings/weight: stored twice"),
]
OTHER_MODELS = [
    (removed("decoder/num_heads"), "num_heads: missing among the settings"),
    (removed("decoder/position_encodings/encodings"), "decoder/position_encodings/encodings: missing"),
    (removed("decoder/layer_0/ffn/linear_0/weight"), "decoder/layer_0/ffn/linear_0/weight: missing"),
    (setting("alibi", 1), "alibi: OPT has 0, got 1"),
    (setting("scale_embeddings", 1), "scale_embeddings: OPT has 0, got 1"),
    (setting("start_from_zero_embedding", 1), "start_from_zero_embedding: OPT has 0, got 1"),
    (setting("activation", 4), "activation: expected one of 0 (relu)"),
    (added("decoder/sliding_window", (), 3, bytes(4)), "sliding_window: not a setting of OPT"),
    (added("decoder/final_logit_softcapping", (), 0, bytes(4)), "final_logit_softcapping: not a setting of OPT"),
    (replaced("decoder/num_heads", content=struct.pack("<h", 3)), "hidden_size: expected a multiple"),
    (replaced("decoder/num_heads", content=struct.pack("<h", -2)), "num_attention_heads: expected an integer"),
    (replaced("decoder/num_heads", type=0, content=bytes(4)), "num_attention_heads: expected an integer"),
    (added("decoder/layer_9999/ffn/linear_0/bias", (1,), 0, bytes(4)), "layers: expected 0 to 3"),
    (replaced("decoder/embeddings/weight", shape=(VOCAB_SIZE * 22,)), "decoder/embeddings/weight: expected two axes"),
]


def broken(folder, change):
    parts = Parts(folder / "model.bin")
    change(parts)
    (folder / "model.bin").write_bytes(bytes(parts))
    return folder / "model.bin"


def test_the_hand_made_file_of_these_tests_is_a_good_one(folder):
    path = broken(folder, lambda parts: None)
    assert_same(open_file(path), as_ctranslate2(tensors_of(config_to_convert())))
    assert converted_config(open_file(path), folder) == config_to_convert()
    ctranslate2.Generator(str(folder))


@pytest.mark.parametrize("version", [4, 5])
def test_older_binary_versions_have_the_same_layout(folder, version):
    path = broken(folder, having(version=version, revision=2))
    assert_same(open_file(path), as_ctranslate2(tensors_of(config_to_convert())))


def test_settings_of_the_first_revision_have_no_prefix(folder):
    def change(parts):
        parts.revision = 1
        for name in ("num_heads", "pre_norm", "activation"):
            parts[f"decoder/{name}"][0] = name

    path = broken(folder, change)
    assert converted_config(open_file(path), folder) == config_to_convert()
    ctranslate2.Generator(str(folder))


def test_a_model_without_a_final_norm_is_told_by_its_absence(folder):
    path = broken(folder, lambda parts: [removed(f"decoder/layer_norm/{leaf}")(parts) for leaf in ("gamma", "beta")])
    assert converted_config(open_file(path), folder) == config_to_convert("no-final-norm")


@pytest.mark.parametrize(("change", "problem"), DAMAGE)
def test_a_damaged_or_hostile_file_is_refused_by_name(folder, change, problem):
    path = broken(folder, change)
    with pytest.raises(CheckpointError) as raised:
        open_file(path)
    assert str(path) in str(raised.value)
    assert problem in str(raised.value)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (added("decoder/layer_0/attention/linear_0/weight", (2, 2), 0, bytes(16)), "not a weight of OPT"),
        (added("decoder/layernorm_embedding/gamma", (22,), 0, bytes(88)), "not a weight of OPT"),
        (removed("decoder/layer_1/ffn/linear_1/weight"), "decoder.layers.1.fc2.weight: missing, expected (22, 31)"),
        (removed("decoder/layer_2/ffn/linear_0/bias"), "decoder.layers.2.fc1.bias: missing, expected (31,)"),
        (replaced(FUSED_BIAS, shape=(33,), content=bytes(132)), "v_proj.bias: expected (22,), got (11,)"),
        (removed("decoder/layer_norm/beta"), "decoder.final_layer_norm.bias: missing"),
        (replaced(WEIGHT, shape=(22, 31)), "decoder.layers.1.fc1.weight: expected (31, 22), got (22, 31)"),
    ],
)
def test_weights_that_do_not_fit_are_named(folder, change, problem):
    broken(folder, change)
    with pytest.raises(CheckpointError) as raised, open_checkpoint(folder) as checkpoint:
        checkpoint.check()
    assert problem in str(raised.value)


def test_it_is_not_written_and_the_error_says_what_is(tmp_path):
    config = config_to_convert()
    with pytest.raises(InputError, match=r"format: expected one of safetensors, .*got 'ctranslate2'"):
        write_checkpoint(tmp_path / "new", config, tensors_of(config), format="ctranslate2")


@pytest.mark.parametrize(("change", "problem"), OTHER_MODELS)
def test_a_model_that_is_no_opt_is_refused(folder, change, problem):
    file = open_file(broken(folder, change))
    with pytest.raises(ConfigError) as raised:
        converted_config(file, folder)
    assert problem in str(raised.value)


def test_all_problems_with_the_settings_come_at_once(folder):
    def change(parts):
        for damage in (setting("alibi", 1), removed("decoder/pre_norm"), setting("activation", 6)):
            damage(parts)

    with pytest.raises(ConfigError) as raised:
        converted_config(open_file(broken(folder, change)), folder)
    assert len(raised.value.problems) == 3


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("config.json", '{"layer_norm_epsilon": 1e-6}', "layer_norm_epsilon: OPT has 1e-05, got 1e-06"),
        ("config.json", '{"a": 1, "a": 2}', "duplicate key"),
        ("config.json", "[]", "expected a JSON object"),
        ("vocabulary.json", "{}", "expected a list of tokens"),
        ("vocabulary.json", "[1, 2]", "expected a list of tokens"),
        ("vocabulary.json", '["a", "b"]', f"expected {VOCAB_SIZE} tokens"),
        ("vocabulary.json", "[" * 200_000, "not valid JSON"),
        ("vocabulary.json", " " * (10 * 2**20 + 1), "bytes of JSON"),
    ],
)
def test_a_broken_json_file_is_named(folder, name, text, problem):
    (folder / name).write_text(text)
    with pytest.raises(ConfigError) as raised:
        converted_config(open_file(folder / "model.bin"), folder)
    assert problem in str(raised.value)
    assert name in str(raised.value)


def test_every_cut_of_a_file_is_refused(folder):
    path = folder / "model.bin"
    good = path.read_bytes()
    for length in [*range(60), *range(60, len(good), 997), len(good) - 1]:
        path.write_bytes(good[:length])
        with pytest.raises(CheckpointError, match=r"truncated|expected at most"):
            open_file(path)


def test_no_single_damaged_byte_does_more_than_raise_our_errors(folder):
    path = folder / "model.bin"
    good, generator = path.read_bytes(), np.random.default_rng(11)
    headers = [place for place in range(len(good)) if good[place : place + 8] == b"decoder/"]
    places = [*range(40), *(place + generator.integers(-2, 60) for place in headers for _ in range(3))]
    refused = 0
    for place in places:
        path.write_bytes(good[:place] + bytes([generator.integers(256)]) + good[place + 1 :])
        try:
            file = open_file(path)
            converted_config(file, folder)
            for name in file.tensors:
                file.read(name)
        except (CheckpointError, ConfigError):
            refused += 1
    assert refused > 60
