"""Low-rank adapters, PyTorch: y = W x + b + (lora_alpha / r) B (A x), of which A and B alone are trained.

What an adapter is, its shapes and first values: `opt_core.lora`. Its files, which are PEFT's: `conversion.adapters`.
PEFT itself works on these models too; here is what needs no further package.
"""

import dataclasses

import torch
from torch import Tensor, nn

from conversion.adapters import read_adapter, write_adapter
from opt_core.errors import InputError
from opt_core.lora import LoraConfig, Pair, adapter_shapes, new_adapter
from opt_core.schema import published_name
from opt_torch.layers import Linear, linear
from opt_torch.loading import from_numpy, owner_of, to_numpy


class LoraLinear(Linear):
    """A linear module with an adapter: `weight` and `bias` stay what they were, `lora_A` [r, in], `lora_B` [out, r]."""

    def __init__(self, plain: Linear, pair: Pair, lora: LoraConfig):
        _take(self, plain)
        place = dict(device=plain.weight.device, dtype=torch.promote_types(plain.weight.dtype, torch.float32))
        self.lora_A, self.lora_B = (nn.Parameter(from_numpy(pair[letter]).to(**place, copy=True)) for letter in "AB")
        self.scaling = lora.scaling
        self.dropout = nn.Dropout(lora.lora_dropout)
        self.train(plain.training)

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        down = linear(self.dropout(x).to(self.lora_A.dtype), self.lora_A)
        return y + (self.scaling * linear(down, self.lora_B)).to(y.dtype)

    @torch.no_grad()
    def merged(self) -> Linear:
        """The plain module with the product of the adapter in its weight, rounded once."""
        plain = _take(Linear.__new__(Linear), self)
        product = self.scaling * (self.lora_B @ self.lora_A)
        plain.weight = nn.Parameter((self.weight + product).to(self.weight.dtype))
        return plain


def add_lora(model, lora: LoraConfig, seed: int = 0) -> None:
    """Gives the linear modules that `lora` names an adapter each, in place; the model computes what it did before.

    From then on the adapters are the only parameters that require a gradient. Their first values depend on the seed
    alone; they are float32 at least.

    Raises:
        InputError: the model has adapters, or is sharded.
    """
    model.check_whole("add_lora")
    if model.lora is not None:
        raise InputError("add_lora", ["model: expected one without adapters; merge_lora makes it one"])
    model.requires_grad_(False)
    for name, pair in new_adapter(model.config, lora, seed).items():
        parent, attribute = owner_of(model, published_name(name, model.task))
        setattr(parent, attribute, LoraLinear(getattr(parent, attribute), pair, lora))
    model.lora = lora


def merge_lora(model) -> None:
    """Adds the products of the adapters to the weights, in place; the modules are plain ones again, all trainable."""
    for name, module in _adapted(model).items():
        parent, attribute = owner_of(model, published_name(name, model.task))
        setattr(parent, attribute, module.merged())
    model.lora = None
    model.requires_grad_(True)


def save_adapter(model, folder) -> None:
    """Writes the adapters as PEFT does, without the base model."""
    arrays = {
        name: {"A": to_numpy(module.lora_A), "B": to_numpy(module.lora_B)} for name, module in _adapted(model).items()
    }
    write_adapter(folder, dataclasses.replace(model.lora, task=model.task), arrays)


@torch.no_grad()
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
        module.lora_A.copy_(from_numpy(arrays[name]["A"]))
        module.lora_B.copy_(from_numpy(arrays[name]["B"]))


def _adapted(model) -> dict[str, LoraLinear]:
    """The modules with adapters, by canonical name."""
    if model.lora is None:
        raise InputError("invalid arguments", ["model: expected one with adapters; add_lora makes them"])
    names = adapter_shapes(model.config, model.lora)
    return {name: model.get_submodule(published_name(name, model.task)) for name in names}


def _arithmetic(lora: LoraConfig) -> LoraConfig:
    return dataclasses.replace(lora, task=None, base_model_name_or_path=None)


def _take(module: Linear, source: Linear) -> Linear:
    """Makes `module` a linear module with the parameters of another."""
    nn.Module.__init__(module)
    module.in_features, module.out_features, module.init_std = source.in_features, source.out_features, source.init_std
    module.weight, module.bias = source.weight, source.bias
    return module.train(source.training)
