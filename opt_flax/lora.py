"""Low-rank adapters, Flax NNX: y = W x + b + (lora_alpha / r) B (A x), of which A and B alone are trained.

What an adapter is, its shapes and first values: `opt_core.lora`. Its files, which are PEFT's: `conversion.adapters`.
The two matrices are `nnx.LoRAParam`s, so `nnx.Optimizer(model, tx, wrt=nnx.LoRAParam)` trains them, and a gradient for
them alone is `nnx.grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))`.
"""

import dataclasses
from collections.abc import Mapping

import jax.numpy as jnp
from flax import nnx
from jax import Array

from conversion.adapters import read_adapter, write_adapter
from opt_core.errors import InputError
from opt_core.lora import LoraConfig, Pair, adapter_shapes, new_adapter
from opt_core.schema import published_name
from opt_flax.layers import Dropout, Linear, at_least_float32, contract, linear, shapes_only
from opt_flax.loading import owner_of
from opt_flax.processes import Whole, write_from_first
from opt_flax.sharding import place


class LoraLinear(Linear):
    """A linear module with an adapter: `weight` and `bias` stay what they were, `lora_A` [r, in], `lora_B` [out, r]."""

    def __init__(self, plain: Linear, pair: Pair, lora: LoraConfig, *, rngs: nnx.Rngs):
        self.init_std, self.weight, self.bias = plain.init_std, plain.weight, plain.bias
        dtype = at_least_float32(plain.weight.dtype)
        self.lora_A = nnx.LoRAParam(jnp.array(pair["A"], dtype))
        self.lora_B = nnx.LoRAParam(jnp.array(pair["B"], dtype))
        self.scaling = lora.scaling
        self.dropout = Dropout(lora.lora_dropout, rngs=rngs if lora.lora_dropout else None)

    def __call__(self, x: Array) -> Array:
        down = linear(self.dropout(x), self.lora_A.get_value())
        return super().__call__(x) + self.scaling * linear(down, self.lora_B.get_value())

    def merged(self) -> Linear:
        """The plain module with the product of the adapter in its weight, rounded once."""
        product = contract("or,ri->oi", self.lora_B.get_value(), self.lora_A.get_value())
        weight = self.weight.get_value()
        with shapes_only():
            shape = dict(bias=self.bias is not None, init_std=self.init_std, rngs=nnx.Rngs(0), dtype=weight.dtype)
            plain = Linear(1, 1, **shape)
        plain.weight = nnx.Param((weight + self.scaling * product).astype(weight.dtype))
        plain.bias = self.bias
        return plain


def add_lora(model, lora: LoraConfig, seed: int = 0) -> None:
    """Gives the linear modules that `lora` names an adapter each, in place; the model computes what it did before.

    From then on `model.trainable` is the adapters. Their first values depend on the seed alone, and so does their
    dropout; they are float32 at least.

    Raises:
        InputError: the model has adapters.
    """
    if model.lora is not None:
        raise InputError("add_lora", ["model: expected one without adapters; merge_lora makes it one"])
    rngs = nnx.Rngs(seed)
    for name, pair in new_adapter(model.config, lora, seed).items():
        parent, attribute = owner_of(model, published_name(name, model.task))
        with_adapter = LoraLinear(getattr(parent, attribute), pair, lora, rngs=rngs)
        with_adapter.dropout.deterministic = not model.training
        setattr(parent, attribute, with_adapter)
    model.lora = lora
    place(model)


def merge_lora(model) -> None:
    """Adds the products of the adapters to the weights, in place; the modules are plain ones again."""
    for name in _adapted(model):
        parent, attribute = owner_of(model, published_name(name, model.task))
        setattr(parent, attribute, getattr(parent, attribute).merged())
    model.lora = None
    place(model)


def save_adapter(model, folder) -> None:
    """Writes the adapters as PEFT does, without the base model.

    Of a model of several processes, each calls this, and the first writes.
    """
    modules = _adapted(model)
    arrays = {f"{name}.{x}": getattr(modules[name], f"lora_{x}").get_value() for name in modules for x in "AB"}

    def write(whole: Mapping[str, Whole]) -> None:
        pairs = {name: {x: whole[f"{name}.{x}"]() for x in "AB"} for name in modules}
        write_adapter(folder, dataclasses.replace(model.lora, task=model.task), pairs)

    write_from_first(model.placement, arrays, write)


def load_adapter(model, folder) -> None:
    """Reads adapters that any backend or PEFT wrote, in place of those that the model has.

    Raises:
        CheckpointError, ConfigError: everything wrong with the files; the model is then as it was.
    """
    lora, arrays = read_adapter(folder, model.config)
    if model.lora is None:
        add_lora(model, lora)
    elif dataclasses.replace(model.lora, task=None, base_model_name_or_path=None) != dataclasses.replace(
        lora, task=None, base_model_name_or_path=None
    ):
        raise InputError("load_adapter", [f"{folder}: expected adapters as the model has, {model.lora}, got {lora}"])
    for name, module in _adapted(model).items():
        module.lora_A.set_value(jnp.array(arrays[name]["A"], module.lora_A.dtype))
        module.lora_B.set_value(jnp.array(arrays[name]["B"], module.lora_B.dtype))
    place(model)


def _adapted(model) -> dict[str, LoraLinear]:
    """The modules with adapters, by canonical name."""
    if model.lora is None:
        raise InputError("invalid arguments", ["model: expected one with adapters, add_lora makes them"])
    found = {}
    for name in adapter_shapes(model.config, model.lora):
        parent, attribute = owner_of(model, published_name(name, model.task))
        found[name] = getattr(parent, attribute)
    return found
