"""The layers with weights, PyTorch: published names, published (out, in) layout, published initialisation."""

import functools

import torch
from torch import nn
from torch.nn import functional as F

from opt_core.config import LAYER_NORM_EPS

ACTIVATION_FUNCTIONS = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_new": functools.partial(F.gelu, approximate="tanh"),  # unlike a lambda, it can be pickled
    "silu": F.silu,
}


class Linear(nn.Linear):
    """x W^T + b with `weight` [out, in]; weights start normal with `init_std`, biases at zero."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool, init_std: float):
        self.init_std = init_std
        super().__init__(in_features, out_features, bias=bias)

    def reset_parameters(self) -> None:
        _draw_normal(self.weight, self.init_std)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class Embedding(nn.Embedding):
    """Rows of `weight` [num_embeddings, width]; they start normal with `init_std`, that of `zero_row` at zero."""

    def __init__(self, num_embeddings: int, width: int, *, init_std: float, zero_row: int | None = None):
        self.init_std, self.zero_row = init_std, zero_row
        super().__init__(num_embeddings, width)

    def reset_parameters(self) -> None:
        _draw_normal(self.weight, self.init_std)
        if self.zero_row is not None:
            with torch.no_grad():
                self.weight[self.zero_row].zero_()


class LayerNorm(nn.LayerNorm):
    """(x - mean) / sqrt(variance + 1e-5) * weight + bias over the last dimension, in float32 at least inside."""

    def __init__(self, width: int, *, affine: bool):
        super().__init__(width, eps=LAYER_NORM_EPS, elementwise_affine=affine)


def _draw_normal(weight: nn.Parameter, std: float) -> None:
    """Leaves a weight without memory as it is: to draw on the meta device, PyTorch 2.13 imports its compiler (1 s)."""
    if not weight.is_meta:
        nn.init.normal_(weight, std=std)
