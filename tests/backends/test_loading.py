"""from_pretrained and save_pretrained: what one backend saves, all load; what does not fit is refused whole."""

import itertools
import json

import numpy as np
import pytest
from harness import NUMPY_DTYPES, VARIANTS, Backend, config_of, rounded_weights, save_random, token_ids

from conversion import write_checkpoint
from opt_core import OPTConfig
from opt_core.errors import ConfigError, InputError, KeywordError
from opt_core.schema import head_names, shapes


def weights_of(backend, model) -> dict[str, np.ndarray]:
    return {name: backend.numpy(model.weight(name)) for name in shapes(model.config, model.task)}


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("task", Backend.CLASSES)
def test_a_model_holds_exactly_the_stored_values(backend, task, dtype, tmp_path):
    config = config_of("350m style")
    model = backend.model_class(task).from_pretrained(save_random(tmp_path, config, task, dtype), dtype="auto")
    for name, want in rounded_weights(config, task, dtype).items():
        got = model.weight(name)
        assert backend.dtype_of(got) == dtype
        np.testing.assert_array_equal(backend.numpy(got), want.astype(np.float64), err_msg=name)


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_one_backend_saves_every_other_loads(backends, variant, tmp_path):
    config = config_of(variant)
    for saver, loader in itertools.product(backends, backends):
        folder = tmp_path / f"{saver}-{loader}"
        saved = saver.random_model(config)
        saved.save_pretrained(folder)
        loaded = loader.model_class().from_pretrained(folder)
        assert loaded.config == OPTConfig.from_json(folder)
        assert loaded.config.architectures == ["OPTForCausalLM"]
        got, want = weights_of(loader, loaded), weights_of(saver, saved)
        assert got.keys() == want.keys()
        for name in want:
            np.testing.assert_array_equal(got[name], want[name], err_msg=name)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_saving_keeps_half_precision(backend, dtype, tmp_path):
    model = backend.random_model(config_of(), dtype=dtype)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == dtype
    again = backend.model_class().from_pretrained(tmp_path, dtype="auto")
    assert backend.dtype_of(again.weight("decoder.embed_tokens.weight")) == dtype
    for name, want in weights_of(backend, model).items():
        np.testing.assert_array_equal(backend.numpy(again.weight(name)), want)


def test_shards_are_written_and_read(backend, tmp_path):
    model = backend.random_model(config_of())
    model.save_pretrained(tmp_path, max_shard_size=20_000)
    assert (tmp_path / "model.safetensors.index.json").exists()
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    again = backend.model_class().from_pretrained(tmp_path)
    for name, want in weights_of(backend, model).items():
        np.testing.assert_array_equal(backend.numpy(again.weight(name)), want)


def test_what_is_pushed_is_what_would_be_saved(backend, tmp_path, monkeypatch):
    pushed = {}

    def push_folder(folder, repo_id, **options):
        pushed.update(repo_id=repo_id, options=options, model=backend.model_class().from_pretrained(folder))
        return "address"

    monkeypatch.setattr(f"opt_{backend.name}.loading.push_folder", push_folder)
    model = backend.random_model(config_of())
    assert model.push_to_hub("somebody/opt", private=True) == "address"
    assert (pushed["repo_id"], pushed["options"]) == ("somebody/opt", {"private": True})
    for name, want in weights_of(backend, model).items():
        np.testing.assert_array_equal(backend.numpy(pushed["model"].weight(name)), want)


def test_float32_is_the_default_and_names_and_dtypes_of_the_framework_are_taken(backend, tmp_path):
    save_random(tmp_path, config_of(), dtype="float16")
    from_pretrained = backend.model_class().from_pretrained
    of = lambda model: backend.dtype_of(model(token_ids(config_of())).logits)  # noqa: E731
    native = {"torch": "torch", "tf": "tf", "flax": "jnp"}[backend.name]
    assert of(from_pretrained(tmp_path)) == "float32"
    assert of(from_pretrained(tmp_path, dtype="auto")) == "float16"
    assert of(from_pretrained(tmp_path, dtype="bfloat16")) == "bfloat16"
    assert of(from_pretrained(tmp_path, torch_dtype="bfloat16")) == "bfloat16"
    assert of(from_pretrained(tmp_path, dtype=getattr(backend, native).bfloat16)) == "bfloat16"
    for dtype in (np.float16, np.dtype("float16"), NUMPY_DTYPES["bfloat16"]):
        assert of(from_pretrained(tmp_path, dtype=dtype)) == np.dtype(dtype).name
    with pytest.raises(ValueError, match="dtype: expected one of auto, float32, float16, bfloat16, got 'int8'"):
        from_pretrained(tmp_path, dtype="int8")
    for wrong in (int, np.dtype("int64")):
        with pytest.raises(ValueError, match=r"dtype: expected one of auto, float32, float16, bfloat16, got .*int"):
            from_pretrained(tmp_path, dtype=wrong)


def test_values_that_the_dtype_cannot_hold_are_refused_and_named(backend, tmp_path):
    config = config_of()
    weights = rounded_weights(config)
    weights["decoder.layers.1.fc1.weight"][2, 3] = -70000.0
    weights["decoder.layers.2.fc2.bias"][4] = 1e30
    write_checkpoint(tmp_path, config, weights)
    assert backend.model_class().from_pretrained(tmp_path, dtype="bfloat16")
    with pytest.raises(ValueError, match="2 problems") as caught:
        backend.model_class().from_pretrained(tmp_path, dtype="float16")
    assert "decoder.layers.1.fc1.weight: expected values within the range of float16, got 70000" in str(caught.value)
    assert "decoder.layers.2.fc2.bias: expected values within the range of float16, got 1e+30" in str(caught.value)


def test_a_loaded_model_is_in_evaluation_mode(backend):
    model = backend.random_model(config_of(dropout=0.5, attention_dropout=0.5, layerdrop=0.5))
    ids = token_ids(model.config)
    np.testing.assert_array_equal(backend.numpy(model(ids).logits), backend.numpy(model(ids).logits))


@pytest.mark.parametrize("task", ["sequence-classification", "question-answering"])
def test_a_missing_head_is_started_anew_and_named(backend, task, tmp_path, caplog):
    config = config_of()
    save_random(tmp_path, config)
    model, info = backend.model_class(task).from_pretrained(tmp_path, output_loading_info=True)
    assert tuple(info["missing_keys"]) == head_names(task)
    assert head_names(task)[0] in caplog.text
    values = backend.numpy(model.weight(head_names(task)[0]))
    assert 0.3 * config.init_std < values.std() < 3 * config.init_std


def test_config_fields_can_be_given_by_keyword(backend, tmp_path):
    save_random(tmp_path, config_of())
    model = backend.model_class("sequence-classification").from_pretrained(tmp_path, num_labels=7)
    assert model.config.num_labels == 7
    assert model(token_ids(config_of())).logits.shape == (4, 7)
    with pytest.raises(ValueError, match="num_label: neither an argument nor a field of OPTConfig"):
        backend.model_class().from_pretrained(tmp_path, num_label=7)


def test_published_arguments_are_taken_or_told_what_to_write(backend, tmp_path):
    save_random(tmp_path, config_of())
    model_class = backend.model_class()
    model = model_class.from_pretrained(tmp_path, low_cpu_mem_usage=True, use_safetensors=True, trust_remote_code=False)
    with pytest.raises(ConfigError) as caught:
        model_class.from_pretrained(tmp_path, from_tf=True, load_in_8bit=True, num_label=7)
    assert [problem.partition(":")[0] for problem in caught.value.problems] == ["num_label", "from_tf", "load_in_8bit"]
    with pytest.raises(InputError, match="dtype, torch_dtype: expected one of them, got 2"):
        model_class.from_pretrained(tmp_path, dtype="float16", torch_dtype="bfloat16")
    model.save_pretrained(tmp_path / "saved", safe_serialization=True)
    with pytest.raises(KeywordError, match="safe_serialization: expected None or True, got False; opt-zoo convert"):
        model.save_pretrained(tmp_path / "other", safe_serialization=False)
    with pytest.raises(KeywordError, match="max_shards_size: unknown keyword; did you mean max_shard_size"):
        model.save_pretrained(tmp_path / "other", max_shards_size="5GB")
    assert not (tmp_path / "other").exists()
    assert model(token_ids(config_of()), return_dict=True).logits is not None
    with pytest.raises(KeywordError, match="return_dict: expected None or True, got False; outputs are named tuples"):
        model(token_ids(config_of()), return_dict=False)
    with pytest.raises(KeywordError, match="inputs: expected None, got ndarray; it is called input_ids"):
        model.generate(inputs=token_ids(config_of()))


def test_a_base_model_loads_from_a_language_model_and_back(backend, tmp_path):
    config = config_of()
    save_random(tmp_path / "lm", config)
    base = backend.model_class("base").from_pretrained(tmp_path / "lm")
    base.save_pretrained(tmp_path / "base")
    lm = backend.model_class().from_pretrained(tmp_path / "base")
    want = backend.model_class().from_pretrained(tmp_path / "lm")
    ids = token_ids(config)
    np.testing.assert_array_equal(backend.numpy(lm(ids).logits), backend.numpy(want(ids).logits))


def test_a_foreign_untied_head_is_left_out_and_named(backend, tmp_path, caplog):
    save_random(tmp_path, config_of("untied head"))
    _, info = backend.model_class("base").from_pretrained(tmp_path, output_loading_info=True)
    assert info["unexpected_keys"] == ["lm_head.weight"]
    assert "lm_head.weight" in caplog.text


def test_a_stored_head_can_be_kept_by_untying_it(backend, tmp_path):
    config = config_of("untied head")
    save_random(tmp_path, config)
    fields = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**fields, "tie_word_embeddings": True}))
    with pytest.raises(ValueError, match="a config with tie_word_embeddings=false keeps both"):
        backend.model_class().from_pretrained(tmp_path)
    model = backend.model_class().from_pretrained(tmp_path, tie_word_embeddings=False)
    want = rounded_weights(config)["lm_head.weight"]
    np.testing.assert_array_equal(backend.numpy(model.weight("lm_head.weight")), want)


def test_everything_wrong_with_a_checkpoint_is_said_at_once(backend, tmp_path):
    save_random(tmp_path, config_of())
    fields = json.loads((tmp_path / "config.json").read_text())
    fields.update(ffn_dim=59, num_hidden_layers=4, enable_bias=False)
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match="problems") as caught:
        backend.model_class().from_pretrained(tmp_path)
    text = str(caught.value)
    assert str(tmp_path) in text
    assert "decoder.layers.0.fc1.weight: expected (59, 35), got (53, 35)" in text
    assert "decoder.layers.3.fc1.weight: missing, expected (59, 35)" in text
    assert "decoder.layers.2.fc2.bias: unexpected, got (35,)" in text


def test_a_source_that_does_not_exist_is_refused(backend, tmp_path):
    with pytest.raises((ValueError, OSError), match="nowhere"):
        backend.model_class().from_pretrained(tmp_path / "nowhere", local_files_only=True)


@pytest.mark.parametrize("source", [None, "", 3])
def test_a_source_that_is_none_is_refused(backend, source):
    with pytest.raises(ValueError, match=f"source: expected a folder, a weight file or a hub id, got {source!r}"):
        backend.model_class().from_pretrained(source)


def test_a_refused_save_leaves_no_folder(backend, tmp_path):
    model = backend.random_model(config_of())
    for size in ("5 parsecs", 1.5, "1.5"):
        with pytest.raises(ValueError, match="max_shard_size: expected a size such as '5GB' or a number of bytes"):
            model.save_pretrained(tmp_path / "new", max_shard_size=size)
    assert not (tmp_path / "new").exists()


def test_a_truncated_file_is_refused(backend, tmp_path):
    save_random(tmp_path, config_of())
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        backend.model_class().from_pretrained(tmp_path)


@pytest.mark.parametrize("variant", ["pre-norm", "untied head", "350m style"])
@pytest.mark.parametrize("new_size", [101, 89])
def test_resizing_keeps_the_old_rows(backend, variant, new_size, tmp_path):
    config = config_of(variant)
    model = backend.random_model(config)
    ids = token_ids(config.replace(vocab_size=89))
    old = backend.numpy(model(ids).logits)
    embeddings = model.resize_token_embeddings(new_size)
    assert embeddings.weight.shape == (new_size, config.word_embed_proj_dim)
    assert model.get_input_embeddings() is embeddings
    assert model.config.vocab_size == new_size
    logits = backend.numpy(model(ids).logits)
    kept = min(new_size, 97)
    assert logits.shape[-1] == new_size
    np.testing.assert_allclose(logits[..., :kept], old[..., :kept], atol=1e-5)
    model.save_pretrained(tmp_path)
    again = backend.model_class().from_pretrained(tmp_path)
    np.testing.assert_allclose(backend.numpy(again(ids).logits), logits, atol=1e-5)


def test_resizing_rounds_up_to_a_multiple(backend):
    model = backend.random_model(config_of())
    model.resize_token_embeddings(98, pad_to_multiple_of=8)
    assert model.config.vocab_size == 104


def test_parameters_are_counted_once(backend):
    from opt_core.schema import parameter_count

    for variant in VARIANTS:
        config = config_of(variant)
        assert backend.random_model(config).num_parameters() == parameter_count(config)
