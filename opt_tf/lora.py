"""Low-rank adapters, TensorFlow: y = W x + b + (lora_alpha / r) B (A x), of which A and B alone are trained.

What an adapter is, its shapes and first values: `opt_core.lora`. Its files, which are PEFT's: `conversion.adapters`.
The two matrices belong to the layer itself, as in Keras' own layers (`Linear.enable_lora`), so `fit`, callbacks and
optimizers see them as its trainable weights.
"""

import dataclasses

import tensorflow as tf

from conversion.adapters import read_adapter, write_adapter
from opt_core.errors import InputError
from opt_core.lora import LoraConfig, adapter_shapes, new_adapter
from opt_core.schema import published_name
from opt_tf.layers import Linear
from opt_tf.loading import owner_of, to_numpy
from opt_tf.sharding import check_on_no_mesh


def add_lora(model, lora: LoraConfig, seed: int = 0) -> None:
    """Gives the linear modules that `lora` names an adapter each, in place; the model computes what it did before.

    From then on `model.trainable_variables` are the adapters. Their first values depend on the seed alone; they are
    float32 at least.

    Raises:
        InputError: the model has adapters.
    """
    check_on_no_mesh(model, "add_lora")
    if model.lora is not None:
        raise InputError("add_lora", ["model: expected one without adapters; merge_lora makes it one"])
    for weight in model.weights:
        weight.trainable = False
    model.lora = lora
    for name, pair in new_adapter(model.config, lora, seed).items():
        module = _module(model, name)
        module.enable_lora(lora.r, lora.lora_alpha, lora.lora_dropout)
        for matrix, letter in ((module.lora_A, "A"), (module.lora_B, "B")):
            matrix.assign(pair[letter])
            matrix._path = f"{published_name(name, model.task)}.lora_{letter}".replace(".", "/")
    model.forget_compiled()


def merge_lora(model) -> None:
    """Adds the products of the adapters to the weights, in place; the modules are plain ones again, all trainable."""
    for module in _adapted(model).values():
        module.merge_lora()
    model.lora = None
    for weight in model.weights:
        weight.trainable = True
    model.forget_compiled()


def save_adapter(model, folder) -> None:
    """Writes the adapters as PEFT does, without the base model."""
    arrays = {
        name: {"A": to_numpy(module.lora_A), "B": to_numpy(module.lora_B)} for name, module in _adapted(model).items()
    }
    write_adapter(folder, dataclasses.replace(model.lora, task=model.task), arrays)


def load_adapter(model, folder) -> None:
    """Reads adapters that any backend or PEFT wrote, in place of those that the model has.

    Raises:
        CheckpointError, ConfigError: everything wrong with the files; the model is then as it was.
        InputError: they are of another rank, scale or place than those of the model.
    """
    lora, arrays = read_adapter(folder, model.config)
    if model.lora is None:
        add_lora(model, lora)
    elif _arithmetic(model.lora) != _arithmetic(lora):
        raise InputError("load_adapter", [f"{folder}: expected adapters as the model has, {model.lora}, got {lora}"])
    for name, module in _adapted(model).items():
        for matrix, letter in ((module.lora_A, "A"), (module.lora_B, "B")):
            matrix.assign(tf.cast(arrays[name][letter], matrix.dtype))


def _adapted(model) -> dict[str, Linear]:
    """The modules with adapters, by canonical name."""
    if model.lora is None:
        raise InputError("invalid arguments", ["model: expected one with adapters; add_lora makes them"])
    return {name: _module(model, name) for name in adapter_shapes(model.config, model.lora)}


def _module(model, name: str) -> Linear:
    parent, attribute = owner_of(model, published_name(name, model.task))
    return getattr(parent, attribute)


def _arithmetic(lora: LoraConfig) -> LoraConfig:
    return dataclasses.replace(lora, task=None, base_model_name_or_path=None)
