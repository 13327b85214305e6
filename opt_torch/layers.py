"""The layers with weights, PyTorch: published names, published (out, in) layout, published initialisation."""

import functools

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from opt_core.config import LAYER_NORM_EPS

ACTIVATION_FUNCTIONS = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_new": functools.partial(F.gelu, approximate="tanh"),  # unlike a lambda, it can be pickled
    "silu": F.silu,
}


FEW_ROWS = 32  # up to here, reading the weights takes longer than multiplying with them


class Linear(nn.Linear):
    """x W^T + b with `weight` [out, in]; weights start normal with `init_std`, biases at zero."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool, init_std: float):
        self.init_std = init_std
        super().__init__(in_features, out_features, bias=bias)

    def reset_parameters(self) -> None:
        _draw_normal(self.weight, self.init_std)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


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


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b in the dtype of `x`."""
    if not _is_one_decode_step(x, weight):
        return F.linear(x, weight, bias)
    y = _one_row(x, weight, bias) if x.numel() == x.shape[-1] else _few_rows(x, weight, bias)
    return y.reshape(*x.shape[:-1], -1)


def _is_one_decode_step(x: Tensor, weight: Tensor) -> bool:
    """Whether these are few rows of plain numbers on a CPU, computed now and without gradients."""
    return (
        0 < x.numel() <= FEW_ROWS * x.shape[-1]
        and x.device.type == "cpu"
        and x.dtype == weight.dtype
        and x.dtype in (torch.float32, torch.bfloat16)
        and type(weight) in (nn.Parameter, Tensor)
        and not (torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling())
    )


# PyTorch's fastest products for so many rows; `F.linear` packs W anew in each call. The weights of opt-125m against
# `F.linear`, torch 2.13, two cores with AVX-512 and AMX: bfloat16 0.57 of its time at 1 row, 0.58 at 8; float32 0.84 at
# 1 row, 0.68 at 8, and no gain at 2 and 3.


def _one_row(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    x_I = x.reshape(-1)
    return torch.mv(weight, x_I) if bias is None else torch.addmv(bias, weight, x_I)


def _few_rows(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    x_RI = x.reshape(-1, x.shape[-1])
    if x_RI.dtype == torch.bfloat16:  # (W x^T + b)^T: W is the left factor, and read as it lies
        return (weight @ x_RI.T if bias is None else torch.addmm(bias[:, None], weight, x_RI.T)).T
    if len(x_RI) > 3 and torch.backends.mkldnn.is_available():
        return torch.ops.mkldnn._linear_pointwise(x_RI, weight, bias, "none", [], "")
    return F.linear(x_RI, weight, bias)


def _draw_normal(weight: nn.Parameter, std: float) -> None:
    """Leaves a weight without memory as it is: to draw on the meta device, PyTorch 2.13 imports its compiler (1 s)."""
    if not weight.is_meta:
        nn.init.normal_(weight, std=std)
