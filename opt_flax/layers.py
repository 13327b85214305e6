"""The layers with weights, Flax NNX: published names, published (out, in) layout, published initialisation.

Results have the dtype of the input, to which weights are rounded where they have another; products, norms and
activations are computed in float32 at least, rounded once.
"""

import contextlib
import contextvars
import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax

from opt_core.config import LAYER_NORM_EPS

FEW_ROWS = 16  # up to here, reading the weights takes longer than multiplying with them
GROUPS = 4  # parts of a product of one row, so that no thread waits long for another


def at_least_float32(dtype) -> jnp.dtype:
    """The dtype that values of `dtype` are summed in."""
    return jnp.promote_types(dtype, jnp.float32)


def contract(formula: str, x: Array, y: Array) -> Array:
    """`einsum` of two arrays, summed and returned in float32 at least.

    float32 stays float32: by default a GPU would round the factors to TF32, a TPU to bfloat16.
    """
    precision = None if x.dtype in (jnp.float16, jnp.bfloat16) else lax.Precision.HIGHEST
    return jnp.einsum(formula, x, y, precision=precision, preferred_element_type=at_least_float32(x.dtype))


_shapes_only = contextvars.ContextVar("shapes_only", default=False)


@contextlib.contextmanager
def shapes_only():
    """Modules made inside draw no weights: for `nnx.eval_shape`, which otherwise traces random numbers never used."""
    token = _shapes_only.set(True)
    try:
        yield
    finally:
        _shapes_only.reset(token)


# Functions with names of their own, since a layer holds one of them: pickle finds neither lambdas nor jitted functions.
def _relu(x: Array) -> Array:
    return jax.nn.relu(x)


def _gelu(x: Array) -> Array:
    return jax.nn.gelu(x.astype(at_least_float32(x.dtype)), approximate=False).astype(x.dtype)


def _gelu_new(x: Array) -> Array:
    return jax.nn.gelu(x.astype(at_least_float32(x.dtype)), approximate=True).astype(x.dtype)


def _silu(x: Array) -> Array:
    return jax.nn.silu(x.astype(at_least_float32(x.dtype))).astype(x.dtype)


ACTIVATION_FUNCTIONS = {"relu": _relu, "gelu": _gelu, "gelu_new": _gelu_new, "silu": _silu}


class Linear(nnx.Module):
    """x W^T + b with `weight` [out, in]; weights start normal with `init_std`, biases at zero."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool, init_std: float, rngs: nnx.Rngs, dtype):
        self.init_std = init_std
        self.weight = nnx.Param(_initial(rngs, (out_features, in_features), init_std, dtype))
        self.bias = nnx.Param(jnp.zeros(out_features, dtype)) if bias else None

    def reset_parameters(self, rngs: nnx.Rngs) -> None:
        weight = self.weight.get_value()
        self.weight = nnx.Param(_initial(rngs, weight.shape, self.init_std, weight.dtype))
        if self.bias is not None:
            self.bias = nnx.Param(jnp.zeros(weight.shape[:1], weight.dtype))

    def __call__(self, x: Array) -> Array:
        return linear(x, self.weight.get_value(), None if self.bias is None else self.bias.get_value())


class Embedding(nnx.Module):
    """Rows of `weight` [num_embeddings, width]; they start normal with `init_std`, that of `zero_row` at zero."""

    def __init__(
        self, num_embeddings: int, width: int, *, init_std: float, rngs: nnx.Rngs, dtype, zero_row: int | None = None
    ):
        self.init_std, self.zero_row = init_std, zero_row
        self.weight = nnx.Param(_initial(rngs, (num_embeddings, width), init_std, dtype, zero_row))

    def reset_parameters(self, rngs: nnx.Rngs) -> None:
        weight = self.weight.get_value()
        self.weight = nnx.Param(_initial(rngs, weight.shape, self.init_std, weight.dtype, self.zero_row))

    def __call__(self, ids: Array) -> Array:
        """The rows of `ids`; NaN for an id below 0 or beyond the table, which a compiled function cannot refuse."""
        return rows(self.weight.get_value(), ids)


class LayerNorm(nnx.Module):
    """(x - mean) / sqrt(variance + 1e-5) * weight + bias over the last dimension, in float32 at least inside."""

    def __init__(self, width: int, *, affine: bool, dtype):
        self.weight = nnx.Param(jnp.ones(width, dtype)) if affine else None
        self.bias = nnx.Param(jnp.zeros(width, dtype)) if affine else None

    def __call__(self, x: Array) -> Array:
        if self.weight is None:
            return layer_norm(x)
        return layer_norm(x, self.weight.get_value(), self.bias.get_value())


class Dropout(nnx.Dropout):
    """In training, zeroes each value with the probability `rate`, to 1/65536, and scales the others to keep the mean.

    A value costs 16 random bits. `nnx.Dropout` (flax 0.12) draws 32; and XLA on a CPU (jax 0.10) keeps for the gradient
    not the mask but what its bits are made of, 4 bytes a value here and 8 there. Bits have the shape of the values, so
    that devices of a mesh draw those of what they have, which are the same on any mesh.
    """

    def __call__(self, x: Array) -> Array:
        dropped = round(self.rate * 2**16)
        if self.deterministic or not dropped:
            return x
        if dropped == 2**16:
            return jnp.zeros_like(x)
        *rows, width = x.shape or (1,)
        words = jax.random.bits(self.rngs(), (*rows, math.ceil(width / 2)), jnp.uint32)
        draws = lax.bitcast_convert_type(words, jnp.uint16).reshape(*rows, -1)[..., :width].reshape(x.shape)
        return jnp.where(draws >= dropped, x * (2**16 / (2**16 - dropped)), 0)


@jax.jit
def linear(x: Array, weight: Array, bias: Array | None = None) -> Array:
    """x W^T + b in the dtype of `x`."""
    if x.dtype in (jnp.float16, jnp.bfloat16):
        return _half_linear(x, weight, bias)
    return _linear(x, weight.astype(x.dtype), bias)


@jax.custom_vjp
def _half_linear(x: Array, weight: Array, bias: Array | None) -> Array:
    """With derivatives that are products of half precision too, and sums of float32 for weights that are.

    JAX's own would multiply the float32 derivative of the sum with half-precision factors: as float32, on a CPU.
    """
    return _linear(x, weight.astype(x.dtype), bias)


def _half_linear_forward(x: Array, weight: Array, bias: Array | None) -> tuple[Array, tuple]:
    return _half_linear(x, weight, bias), (x, weight, bias)


def _half_linear_backward(saved: tuple, d_y: Array) -> tuple[Array, Array, Array | None]:
    x, weight, bias = saved
    d_x = contract("...o,oi->...i", d_y, weight.astype(x.dtype)).astype(x.dtype)
    d_y, x = (rows.reshape(-1, rows.shape[-1]) for rows in (d_y, x))
    d_weight = contract("ro,ri->oi", d_y, x).astype(weight.dtype)
    return d_x, d_weight, None if bias is None else d_y.sum(0, dtype=jnp.float32).astype(bias.dtype)


_half_linear.defvjp(_half_linear_forward, _half_linear_backward)


def _linear(x: Array, weight: Array, bias: Array | None) -> Array:
    few_rows = math.prod(x.shape[:-1]) <= FEW_ROWS and jax.default_backend() == "cpu"
    y = _weight_first(x, weight) if few_rows else contract("...i,oi->...o", x, weight)
    return (y if bias is None else y + bias).astype(x.dtype)


def _weight_first(x: Array, weight: Array) -> Array:
    """x W^T as (W x^T)^T: on a CPU (jax 0.10) XLA then reads W as it lies; for x W^T it packs W each time.

    It multiplies bfloat16 as it is only where both factors have two rows; one row of x would bring a float32 copy of W.
    One row of float32 goes to Eigen, which splits W in two uneven parts for two threads, and the other threads wake
    50 us after the first: in groups of rows of W, whoever is free takes the next (a step of opt-125m: 23.0 to 21.1 ms).
    """
    (out, width), rows_RI = weight.shape, x.reshape(-1, x.shape[-1])
    R = len(rows_RI)
    if R == 1 and x.dtype == jnp.bfloat16:
        rows_RI = jnp.pad(rows_RI, ((0, 1), (0, 0)))
    groups = GROUPS if R == 1 and x.dtype == jnp.float32 and out % GROUPS == 0 else 1
    rows_GRI = jnp.broadcast_to(rows_RI, (groups, *rows_RI.shape))
    y_GOR = contract("goi,gri->gor", weight.reshape(groups, out // groups, width), rows_GRI)
    y_OR = lax.optimization_barrier(y_GOR).reshape(out, -1)  # or XLA makes it x W^T again
    return y_OR[:, :R].T.reshape(*x.shape[:-1], out)


@jax.jit
def rows(table: Array, ids: Array) -> Array:
    if (
        table.dtype == jnp.bfloat16
    ):  # in a loop, XLA on a CPU (jax 0.10) would keep a float32 copy of the table otherwise
        table, ids = lax.optimization_barrier((table, ids))
    return table.at[ids].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)


@jax.jit
def layer_norm(x: Array, weight: Array | float = 1.0, bias: Array | float = 0.0) -> Array:
    y = x.astype(at_least_float32(x.dtype))
    y = y - y.mean(-1, keepdims=True)
    y = y * lax.rsqrt((y * y).mean(-1, keepdims=True) + LAYER_NORM_EPS)
    return (y * weight + bias).astype(x.dtype)


def _initial(rngs: nnx.Rngs, shape: tuple[int, ...], std: float, dtype, zero_row: int | None = None) -> Array:
    return jnp.zeros(shape, dtype) if _shapes_only.get() else _normal(rngs.params(), shape, std, dtype, zero_row)


@functools.partial(jax.jit, static_argnames=("shape", "std", "dtype", "zero_row"))
def _normal(key: Array, shape: tuple[int, ...], std: float, dtype, zero_row: int | None = None) -> Array:
    values = (std * jax.random.normal(key, shape)).astype(dtype)
    return values if zero_row is None else values.at[zero_row].set(0)
