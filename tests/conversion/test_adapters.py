"""Adapters on disk: the identity, PEFT's files both ways, strict about names and shapes."""

import dataclasses
import json

import ml_dtypes
import numpy as np
import pytest
from checkpoints import config_of

from conversion.adapters import ADAPTER_BIN_NAME, ADAPTER_CONFIG_NAME, ADAPTER_NAME, read_adapter, write_adapter
from opt_core.errors import CheckpointError, ConfigError
from opt_core.lora import MODULES, LoraConfig, new_adapter
from opt_core.schema import TASKS

CONFIG = config_of(num_hidden_layers=2)
LORA = LoraConfig(r=3, lora_alpha=5, target_modules=("fc1", "q_proj"), task="causal-lm")


def random_adapter(config=CONFIG, lora=LORA, dtype=np.float32):
    """None of its values is zero."""
    pairs = new_adapter(config, lora)
    chance = np.random.default_rng(0)
    return {
        module: {letter: chance.standard_normal(array.shape).astype(dtype) for letter, array in pair.items()}
        for module, pair in pairs.items()
    }


def assert_same(got, expected) -> None:
    assert got.keys() == expected.keys()
    for module, pair in expected.items():
        for letter in "AB":
            assert got[module][letter].dtype == pair[letter].dtype
            assert np.array_equal(got[module][letter], pair[letter]), (module, letter)


@pytest.mark.parametrize("task", [*TASKS, None])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_what_is_read_is_what_was_written(tmp_path, task, dtype):
    lora = LoraConfig(3, 5, 0.1, MODULES, task, "facebook/opt-125m")
    adapter = random_adapter(lora=lora, dtype=dtype)
    write_adapter(tmp_path, lora, adapter)
    said = task if task in ("base", "causal-lm") else None  # PEFT asks the files of the others for a head
    for source, config in ((tmp_path, CONFIG), (tmp_path / ADAPTER_NAME, None)):
        got_lora, got = read_adapter(source, config)
        assert got_lora == dataclasses.replace(lora, task=said)
        assert_same(got, adapter)


def test_a_new_adapter_takes_the_place_of_an_older_one_with_all_its_files(tmp_path):
    write_adapter(tmp_path, LoraConfig(), random_adapter(lora=LoraConfig()))
    (tmp_path / ADAPTER_NAME).rename(tmp_path / ADAPTER_BIN_NAME)
    write_adapter(tmp_path, LORA, random_adapter())
    assert read_adapter(tmp_path)[0] == LORA
    assert {path.name for path in tmp_path.iterdir()} == {ADAPTER_NAME, ADAPTER_CONFIG_NAME}


def test_an_adapter_of_a_pruned_model_has_its_shapes(tmp_path):
    config, lora = CONFIG.without_heads({1: [0]}), LoraConfig(target_modules=("out_proj", "v_proj"))
    write_adapter(tmp_path, lora, random_adapter(config, lora))
    assert read_adapter(tmp_path, config)[1]["decoder.layers.1.self_attn.v_proj"]["B"].shape == (11, 8)
    with pytest.raises(CheckpointError, match=r"layers\.1\.self_attn\.out_proj\.lora_A\.weight: expected \(8, 22\)"):
        read_adapter(tmp_path, CONFIG)


# -- strict -----------------------------------------------------------------------------------------------------------


def test_every_matrix_that_does_not_fit_is_named_before_anything_is_written(tmp_path):
    adapter = random_adapter()
    del adapter["decoder.layers.1.fc1"]["B"]
    adapter["decoder.layers.0.fc1"]["A"] = np.ones((2, 22), np.float32)
    adapter["decoder.layers.0.self_attn.q_proj"]["B"][1] = np.inf
    adapter["decoder.layers.0.fc2"] = {"A": np.ones((3, 31), np.float32)}
    with pytest.raises(CheckpointError) as caught:
        write_adapter(tmp_path / "new", LORA, adapter)
    assert sorted(caught.value.problems) == [
        "decoder.layers.0.fc1.lora_A.weight: expected (3, any), got (2, 22)",
        "decoder.layers.0.fc2.lora_A.weight: unexpected, got (3, 31)",
        "decoder.layers.0.self_attn.q_proj.lora_B.weight: expected finite floats",
        "decoder.layers.1.fc1.lora_B.weight: missing, expected (any, 3)",
    ]
    assert not (tmp_path / "new").exists()


def test_an_adapter_for_another_model_is_refused_with_every_shape(tmp_path):
    write_adapter(tmp_path, LORA, random_adapter())
    with pytest.raises(CheckpointError) as caught:
        read_adapter(tmp_path, CONFIG.replace(ffn_dim=29, num_hidden_layers=1))
    assert sorted(caught.value.problems) == [
        "decoder.layers.0.fc1.lora_B.weight: expected (29, 3), got (31, 3)",
        "decoder.layers.1.fc1.lora_A.weight: unexpected, got (3, 22)",
        "decoder.layers.1.fc1.lora_B.weight: unexpected, got (31, 3)",
        "decoder.layers.1.self_attn.q_proj.lora_A.weight: unexpected, got (3, 22)",
        "decoder.layers.1.self_attn.q_proj.lora_B.weight: unexpected, got (22, 3)",
    ]


def test_a_layer_that_lacks_is_missed_without_a_config_too(tmp_path):
    adapter = {module: pair for module, pair in random_adapter().items() if ".layers.0." not in module}
    with pytest.raises(CheckpointError, match="expected matrices of all layers from 0 on, got those of 1"):
        write_adapter(tmp_path, LORA, adapter)


def save_by_name(folder, tensors) -> None:
    from safetensors.numpy import save_file

    write_adapter(folder, LORA, random_adapter())
    save_file(tensors, folder / ADAPTER_NAME, metadata={"format": "pt"})


@pytest.mark.parametrize(
    "name",
    [
        "base_model.model.model.decoder.layers.0.self_attn_layer_norm.lora_A.weight",
        "base_model.model.score.weight",
        "base_model.model.model.decoder.embed_tokens.lora_embedding_A",
        "base_model.model.lm_head.lora_A.weight",
        "model.decoder.layers.0.fc1.lora_A.weight",
        "base_model.model.model.decoder.layers.0.fc1.lora_A.default.weight",
    ],
)
def test_a_tensor_that_is_no_matrix_of_an_adapter_is_named(tmp_path, name):
    pytest.importorskip("safetensors")
    save_by_name(tmp_path, {name: np.ones((3, 22), np.float32)})
    with pytest.raises(CheckpointError, match="unexpected, not a matrix of an adapter") as caught:
        read_adapter(tmp_path)
    assert name in str(caught.value)


def test_one_matrix_under_two_names_is_refused(tmp_path):
    pytest.importorskip("safetensors")
    names = [f"base_model.model.{prefix}decoder.layers.0.fc1.lora_A.weight" for prefix in ("", "model.")]
    save_by_name(tmp_path, {name: np.ones((3, 22), np.float32) for name in names})
    with pytest.raises(CheckpointError, match="stored twice"):
        read_adapter(tmp_path)


def test_a_folder_without_an_adapter_says_what_was_looked_for(tmp_path):
    with pytest.raises(CheckpointError, match=r"looked for adapter_model\.safetensors, adapter_model\.bin"):
        read_adapter(tmp_path)
    with pytest.raises(CheckpointError, match="no such file or folder"):
        read_adapter(tmp_path / "nothing")
    (tmp_path / ADAPTER_NAME).write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"adapter_config\.json: missing"):
        read_adapter(tmp_path)


def test_a_config_that_would_change_the_arithmetic_is_refused_with_its_file(tmp_path):
    write_adapter(tmp_path, LORA, random_adapter())
    path = tmp_path / ADAPTER_CONFIG_NAME
    path.write_text(json.dumps({**json.loads(path.read_text()), "use_dora": True}))
    with pytest.raises(ConfigError, match=r"adapter_config\.json: use_dora: expected it switched off"):
        read_adapter(tmp_path)


# -- PEFT -------------------------------------------------------------------------------------------------------------

TASK_OF = {
    "causal-lm": "AutoModelForCausalLM",
    "base": "AutoModel",
    "question-answering": "AutoModelForQuestionAnswering",
}


def peft_model(task: str, lora: LoraConfig):
    """The published class under PEFT with its adapter's matrices random."""
    peft, transformers, torch = (pytest.importorskip(name) for name in ("peft", "transformers", "torch"))
    config = transformers.OPTConfig(**CONFIG.to_dict())
    base = getattr(transformers, TASK_OF[task]).from_config(config)
    fields = lora.to_dict()
    kept = ("r", "lora_alpha", "lora_dropout", "target_modules", "task_type")
    model = peft.get_peft_model(base, peft.LoraConfig(**{name: fields[name] for name in kept}))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter.data)
    return model


def matrices_of(model, letter: str) -> dict[str, np.ndarray]:
    return {
        name.partition("decoder.")[2].partition(".lora_")[0]: parameter.detach().numpy()
        for name, parameter in model.named_parameters()
        if f"lora_{letter}" in name
    }


@pytest.mark.parametrize("task", TASK_OF)
@pytest.mark.parametrize("is_safe", [True, False], ids=["safetensors", "bin"])
def test_what_peft_writes_is_read(tmp_path, task, is_safe):
    lora = LoraConfig(3, 7, 0.1, ("fc2", "k_proj"), None if task == "question-answering" else task)
    model = peft_model(task, lora)
    model.save_pretrained(tmp_path, safe_serialization=is_safe)
    got_lora, got = read_adapter(tmp_path, CONFIG)
    assert (got_lora.r, got_lora.lora_alpha, got_lora.lora_dropout) == (3, 7, 0.1)
    assert (got_lora.target_modules, got_lora.task) == (("fc2", "k_proj"), lora.task)
    for letter in "AB":
        theirs = matrices_of(model, letter)
        assert len(theirs) == len(got) == 4
        assert all(np.array_equal(got[f"decoder.{module}"][letter], array) for module, array in theirs.items())


@pytest.mark.parametrize("task", TASK_OF)
def test_what_is_written_is_read_by_peft(tmp_path, task):
    lora = LoraConfig(3, 7, 0.1, ("fc2", "k_proj"), task)
    model = peft_model(task, lora)  # of question answering, PEFT would train and keep the head as well
    adapter = random_adapter(lora=lora)
    write_adapter(tmp_path, lora, adapter)
    import peft

    loaded = peft.PeftModel.from_pretrained(model.unload(), tmp_path)
    config = loaded.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout, config.use_dora) == (3, 7, 0.1, False)
    for letter in "AB":
        theirs = matrices_of(loaded, letter)
        assert {f"decoder.{module}" for module in theirs} == adapter.keys()
        assert all(np.array_equal(adapter[f"decoder.{module}"][letter], array) for module, array in theirs.items())
