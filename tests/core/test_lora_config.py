"""Adapters: shapes from the schema, first values, and the published config read strictly."""

import numpy as np
import pytest
from harness import config_of

from opt_core.errors import ConfigError
from opt_core.lora import MODULES, LoraConfig, adapter_shapes, new_adapter
from opt_core.schema import shapes


def test_an_adapter_is_as_wide_as_its_linear_and_as_deep_as_its_rank():
    config, lora = config_of(), LoraConfig(r=3, target_modules=MODULES)
    got = adapter_shapes(config, lora)
    assert len(got) == config.num_hidden_layers * len(MODULES)
    for module, (shape_A, shape_B) in got.items():
        assert (shape_B[0], shape_A[1]) == shapes(config)[f"{module}.weight"]
        assert (shape_A[0], shape_B[1]) == (3, 3)


def test_only_the_modules_asked_for_get_one():
    modules = adapter_shapes(config_of(num_hidden_layers=2), LoraConfig(target_modules=["v_proj", "fc2"]))
    assert list(modules) == [
        f"decoder.layers.{layer}.{name}" for layer in (0, 1) for name in ("self_attn.v_proj", "fc2")
    ]


def test_a_new_adapter_changes_nothing_and_its_first_values_fill_their_range():
    config = config_of()
    for pair in new_adapter(config, LoraConfig(r=31, target_modules=("fc1", "fc2"))).values():
        bound = pair["A"].shape[1] ** -0.5
        assert not pair["B"].any()
        assert pair["A"].dtype == pair["B"].dtype == np.float32
        assert 0.99 * bound < np.abs(pair["A"]).max() <= bound
        assert abs(pair["A"].mean()) < 0.05 * bound


def test_first_values_depend_on_the_seed_and_the_module_alone():
    few, many = (LoraConfig(target_modules=modules) for modules in (("q_proj",), MODULES))
    first, second, other = (new_adapter(config_of(), lora, seed) for lora, seed in ((few, 3), (many, 3), (few, 5)))
    assert all(np.array_equal(first[module]["A"], second[module]["A"]) for module in first)
    assert not any(np.array_equal(first[module]["A"], other[module]["A"]) for module in first)
    values = [pair["A"].ravel()[0] for pair in second.values()]
    assert len(set(values)) == len(values)


def test_the_order_of_modules_means_nothing():
    assert LoraConfig(target_modules=["v_proj", "q_proj"]) == LoraConfig(target_modules=("q_proj", "v_proj"))
    assert LoraConfig(r=5, lora_alpha=2).scaling == 0.4


def test_every_wrong_field_comes_in_one_error():
    wrong = dict(r=0, lora_alpha="8", lora_dropout=1, target_modules=("q", "v"), task="translation")
    with pytest.raises(ConfigError) as caught:
        LoraConfig(**wrong)
    assert {problem.partition(":")[0] for problem in caught.value.problems} == set(wrong)


def test_a_config_survives_the_trip_through_published_fields():
    for task in ("base", "causal-lm", None):
        lora = LoraConfig(5, 7, 0.3, ("fc1", "k_proj"), task, "facebook/opt-125m")
        assert LoraConfig.from_dict(lora.to_dict()) == lora


@pytest.mark.parametrize("task", ["sequence-classification", "question-answering"])
def test_a_task_whose_files_peft_asks_for_a_head_is_not_said(task):
    lora = LoraConfig(task=task)
    assert lora.to_dict()["task_type"] is None
    assert LoraConfig.from_dict(lora.to_dict()) == LoraConfig()


@pytest.mark.parametrize(
    "field",
    [
        dict(use_dora=True),
        dict(use_rslora=True),
        dict(bias="all"),
        dict(modules_to_save=["score"]),
        dict(rank_pattern={"fc1": 3}),
        dict(alpha_pattern={"fc1": 3}),
        dict(layers_to_transform=[0]),
        dict(lora_bias=True),
        dict(fan_in_fan_out=True),
        dict(of_a_later_version={"x": 1}),
        dict(init_lora_weights="pissa"),
        dict(peft_type="IA3"),
        dict(task_type="TOKEN_CLS"),
        dict(task_type=["CAUSAL_LM"]),
        dict(lora_alpha=10**400),
        dict(target_modules="all-linear"),
        dict(target_modules=None),
    ],
    ids=lambda field: next(iter(field)),
)
def test_what_would_change_the_arithmetic_is_refused_by_name(field):
    with pytest.raises(ConfigError, match=rf"^adapter_config\.json: {next(iter(field))}: "):
        LoraConfig.from_dict({**LoraConfig().to_dict(), **field}, source="adapter_config.json")


def test_the_config_that_peft_writes_is_read():
    peft = pytest.importorskip("peft")
    theirs = peft.LoraConfig(r=5, lora_alpha=7, lora_dropout=0.3, target_modules=["fc1"], task_type="CAUSAL_LM")
    assert LoraConfig.from_dict(theirs.to_dict()) == LoraConfig(5, 7, 0.3, ("fc1",), "causal-lm")
