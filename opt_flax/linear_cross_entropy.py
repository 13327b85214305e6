"""The head and its loss in one, JAX: cross entropy of hidden states under a matrix, with logits held once at most.

Three products of the size of the logits, as the plain way has, but no second array of that size: derivatives of logits
exist in chunks of rows alone. Where the logits are no output, they do too: the forward pass then makes the derivatives
of a chunk beside its loss (Hsu et al., Liger Kernel, arXiv:2410.10989, section 3.2).

On a mesh of devices each makes the logits of its own rows and its part of the vocabulary, and no others; of a row they
tell each other the largest logit, the sum of the exponentials and the logit of the target (Shoeybi et al.,
arXiv:1909.08053, section 3).
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_derivatives import SymbolicZero
from jax.sharding import Mesh, PartitionSpec

from opt_core.reference import IGNORED_LABEL
from opt_flax.layers import at_least_float32, contract, linear

# Logits that exist at a time: 128 MB in float32. With half as many, the head of opt-125m takes 1.15 times as long for
# 1024 tokens (two CPU cores, jax 0.10): the gradient of the weight is added up twice as often.
BLOCK = 2**25


class Part(NamedTuple):
    """The axes of a mesh that cut rows, the vocabulary, and E of the gradient of the weight: one of those of rows."""

    device_mesh: Mesh
    rows: tuple[str, ...] | None
    vocabulary: str | None
    width: str | None


@functools.partial(jax.jit, static_argnames=("keep_logits", "part"))
def linear_cross_entropy(
    hidden_RE: Array, weight_VE: Array, targets_R: Array, keep_logits: bool, part: Part | None = None
) -> tuple[Array, Array | None]:
    """The mean of -log softmax(hidden weight^T)[target] over the targets that are not -100; 0 where all are.

    Returns the loss, in float32 at least, and the logits [R, V] if they are to be kept; the loss beside them is that of
    the rounded ones. Gradients are summed in float32 at least and have the dtypes of the arguments; one that arrives at
    the logits is added to that of the loss. They can be differentiated again; forward mode (`jax.jvp` of the loss) is
    refused by JAX. NaN where a target is out of range, which a compiled function cannot refuse. With a `part`, arrays
    are those of all devices of a mesh, and are cut over them.
    """
    if keep_logits:
        return _loss_and_logits(hidden_RE, weight_VE, targets_R, part)
    return _loss_alone(hidden_RE, weight_VE, targets_R, part), None


# -- logits kept ------------------------------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _loss_and_logits(hidden_RE: Array, weight_VE: Array, targets_R: Array, part: Part | None) -> tuple[Array, Array]:
    make_logits = _on_devices(part, _make_logits, "RVR", (" ", "W", ("R", "R")))
    total, logits_RV, _ = make_logits(hidden_RE, weight_VE, targets_R)
    return total / _counted(targets_R), logits_RV


def _make_logits(
    hidden_RE: Array, weight_VE: Array, targets_R: Array, part: Part | None
) -> tuple[Array, Array, tuple[Array, Array]]:
    """The sum of the losses, the logits, and what their softmax is made with."""
    R, V, wide = len(hidden_RE), len(weight_VE), at_least_float32(hidden_RE.dtype)
    weight_VE = weight_VE.astype(hidden_RE.dtype)

    def add_rows(i: Array, carry: tuple) -> tuple:
        total, logits_RV, scales = carry
        start, targets_r, _ = _chunk(targets_R, V, i)
        logits_rV = linear(_rows(hidden_RE, start, len(targets_r)), weight_VE)
        loss, scales_r = _loss(logits_rV, targets_r, part)
        return total + loss, _put(logits_RV, logits_rV, start), tuple(map(_put, scales, scales_r, (start, start)))

    carry = (jnp.zeros((), wide), jnp.zeros((R, V), hidden_RE.dtype), (jnp.zeros(R, wide), jnp.zeros(R, wide)))
    total, logits_RV, scales = lax.fori_loop(0, _chunks(R, V), add_rows, carry)
    return _over_rows(total, part), logits_RV, scales


def _keep_logits(hidden, weight, targets, part: Part | None) -> tuple[tuple[Array, Array], tuple]:
    hidden_RE, weight_VE, targets_R = (primal.value for primal in (hidden, weight, targets))
    make_logits = _on_devices(part, _make_logits, "RVR", (" ", "W", ("R", "R")))
    total, logits_RV, scales = make_logits(hidden_RE, weight_VE, targets_R)
    return (total / _counted(targets_R), logits_RV), (hidden_RE, weight_VE, targets_R, logits_RV, scales)


def _differentiate_logits(part: Part | None, saved: tuple, d_outputs: tuple) -> tuple[Array, Array, None]:
    hidden_RE, weight_VE, targets_R, _, _ = saved
    d_loss, d_logits_RV = d_outputs
    factor = 0.0 if isinstance(d_loss, SymbolicZero) else d_loss / _counted(targets_R)
    if isinstance(d_logits_RV, SymbolicZero):  # then the factor can wait: in float16 it could make them 0
        sums = _on_devices(part, _d_kept_logits, ("R", "V", "R", "W", ("R", "R")), ("R", "D"))(*saved)
        return *_rounded(sums, factor, hidden_RE, weight_VE), None
    more = ("W", " "), (d_logits_RV, jnp.asarray(factor))
    sums = _on_devices(part, _d_kept_logits, ("R", "V", "R", "W", ("R", "R"), *more[0]), ("R", "D"))(*saved, *more[1])
    return *_rounded(sums, 1.0, hidden_RE, weight_VE), None


def _d_kept_logits(
    hidden_RE: Array, weight_VE: Array, targets_R: Array, logits_RV: Array, scales: tuple[Array, Array],
    d_logits_RV: Array | None = None, factor: Array | None = None, *, part: Part | None,
) -> tuple[Array, Array]:  # fmt: skip
    """Derivatives of the sum of the losses, or of `factor` times that and what else came to the logits."""
    R, V = logits_RV.shape

    def add_rows(i: Array, sums: tuple[Array, Array]) -> tuple[Array, Array]:
        start, targets_r, new_r = _chunk(targets_R, V, i)
        scales_r = tuple(_rows(x_R, start, len(targets_r)) for x_R in scales)
        d_logits_rV = _d_logits(_rows(logits_RV, start, len(targets_r)), scales_r, targets_r, part)
        if d_logits_RV is not None:
            more_rV = jnp.where(new_r[:, None], _rows(d_logits_RV, start, len(targets_r)), 0)
            d_logits_rV = d_logits_rV * factor + more_rV
        return _add_products(sums, d_logits_rV, hidden_RE, weight_VE, start)

    return _over_devices(lax.fori_loop(0, _chunks(R, V), add_rows, _zeros(hidden_RE, weight_VE)), part)


_loss_and_logits.defvjp(_keep_logits, _differentiate_logits, symbolic_zeros=True)


# -- no logits --------------------------------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _loss_alone(hidden_RE: Array, weight_VE: Array, targets_R: Array, part: Part | None) -> Array:
    return _on_devices(part, _sum_losses, "RVR", " ")(hidden_RE, weight_VE, targets_R) / _counted(targets_R)


def _sum_losses(hidden_RE: Array, weight_VE: Array, targets_R: Array, part: Part | None) -> Array:
    R, V = len(hidden_RE), len(weight_VE)

    def add_rows(i: Array, total: Array) -> Array:
        start, targets_r, _ = _chunk(targets_R, V, i)
        return total + _loss(_logits(hidden_RE, weight_VE, start, len(targets_r)), targets_r, part)[0]

    total = lax.fori_loop(0, _chunks(R, V), add_rows, jnp.zeros((), at_least_float32(hidden_RE.dtype)))
    return _over_rows(total, part)


def _differentiate_at_once(
    hidden_RE: Array, weight_VE: Array, targets_R: Array, part: Part | None
) -> tuple[Array, tuple]:
    total, sums = _on_devices(part, _sum_losses_and_derivatives, "RVR", (" ", ("R", "D")))(
        hidden_RE, weight_VE, targets_R
    )
    counted = _counted(targets_R)
    like = tuple(jnp.zeros(0, x.dtype) for x in (hidden_RE, weight_VE))  # a dtype is nothing that JAX would keep
    return total / counted, (sums, counted, like)


def _sum_losses_and_derivatives(
    hidden_RE: Array, weight_VE: Array, targets_R: Array, part: Part | None
) -> tuple[Array, tuple[Array, Array]]:
    R, V = len(hidden_RE), len(weight_VE)

    def add_rows(i: Array, carry: tuple) -> tuple:
        total, sums = carry
        start, targets_r, _ = _chunk(targets_R, V, i)
        logits_rV = _logits(hidden_RE, weight_VE, start, len(targets_r))
        loss, scales_r = _loss(logits_rV, targets_r, part)
        d_logits_rV = _d_logits(logits_rV, scales_r, targets_r, part)
        return total + loss, _add_products(sums, d_logits_rV, hidden_RE, weight_VE, start)

    carry = (jnp.zeros((), at_least_float32(hidden_RE.dtype)), _zeros(hidden_RE, weight_VE))
    total, sums = lax.fori_loop(0, _chunks(R, V), add_rows, carry)
    return _over_rows(total, part), _over_devices(sums, part)


def _scale_derivatives(_: Part | None, saved: tuple, d_loss: Array) -> tuple[Array, Array, None]:
    sums, counted, like = saved
    return *_rounded(sums, d_loss / counted, *like), None


_loss_alone.defvjp(_differentiate_at_once, _scale_derivatives)


# -- a chunk ----------------------------------------------------------------------------------------------------------


def _chunks(R: int, V: int) -> int:
    return -(-R * V // BLOCK)


def _chunk(targets_R: Array, V: int, i: Array) -> tuple[Array, Array, Array]:
    """The first row of chunk i, its targets, and which rows are new: the last chunk repeats some of the one before."""
    R = len(targets_R)
    rows = -(-R // _chunks(R, V))
    start = jnp.minimum(i * rows, R - rows)
    new_r = start + jnp.arange(rows) >= i * rows
    return start, jnp.where(new_r, _rows(targets_R, start, rows), IGNORED_LABEL), new_r


def _rows(x: Array, start: Array, rows: int) -> Array:
    return lax.dynamic_slice_in_dim(x, start, rows)


def _put(x: Array, rows: Array, start: Array) -> Array:
    return lax.dynamic_update_slice_in_dim(x, rows, start, 0)


def _logits(hidden_RE: Array, weight_VE: Array, start: Array, rows: int) -> Array:
    """Logits of a chunk, not rounded."""
    return contract("re,ve->rv", _rows(hidden_RE, start, rows), weight_VE.astype(hidden_RE.dtype))


def _loss(logits_rV: Array, targets_r: Array, part: Part | None) -> tuple[Array, tuple[Array, Array]]:
    """The sum of the losses of a chunk; of each row, the largest logit, and the sum of exp(logit - largest).

    Not their log-sum-exp: softmax made with it has its error, 8 roundoffs for 50,272 equal logits in float32.
    """
    logits_rV, counted_r = logits_rV.astype(at_least_float32(logits_rV.dtype)), targets_r != IGNORED_LABEL
    largest_r = _largest(logits_rV.max(-1), part)
    sum_r = _over_vocabulary(jnp.exp(logits_rV - largest_r[:, None]).sum(-1), part)
    chosen_r = _chosen(logits_rV, jnp.where(counted_r, targets_r, 0), part)
    return jnp.where(counted_r, jnp.log(sum_r) - (chosen_r - largest_r), 0).sum(), (largest_r, sum_r)


def _chosen(logits_rV: Array, targets_r: Array, part: Part | None) -> Array:
    """The logit of each target, NaN where there is none."""
    V = logits_rV.shape[1]
    if part is None or part.vocabulary is None:
        columns_r = jnp.where(targets_r < 0, V, targets_r)
        return jnp.take_along_axis(logits_rV, columns_r[:, None], 1, mode="fill")[:, 0]
    columns_r = targets_r - _first(V, part)
    columns_r = jnp.where(columns_r < 0, V, columns_r)
    here_r = jnp.take_along_axis(logits_rV, columns_r[:, None], 1, mode="fill", fill_value=0)[:, 0]
    there = (targets_r >= 0) & (targets_r < V * lax.axis_size(part.vocabulary))
    return jnp.where(there, _over_vocabulary(here_r, part), jnp.nan)


def _d_logits(logits_rV: Array, scales_r: tuple[Array, Array], targets_r: Array, part: Part | None) -> Array:
    """Derivatives of the sum of the losses of a chunk: softmax less one at the target, 0 where nothing is counted."""
    largest_r, sum_r = scales_r
    softmax_rV = jnp.exp(logits_rV.astype(sum_r.dtype) - largest_r[:, None]) / sum_r[:, None]
    V = logits_rV.shape[1]
    d_logits_rV = softmax_rV - (jnp.arange(V) + _first(V, part) == targets_r[:, None])
    return jnp.where((targets_r != IGNORED_LABEL)[:, None], d_logits_rV, 0)


def _add_products(
    sums: tuple[Array, Array], d_logits_rV: Array, hidden_RE: Array, weight_VE: Array, start: Array
) -> tuple[Array, Array]:
    """The derivatives of hidden states and weight with those of a chunk added."""
    d_hidden_RE, d_weight_VE = sums
    rows, d_logits_rV = len(d_logits_rV), d_logits_rV.astype(hidden_RE.dtype)
    d_hidden_rE = contract("rv,ve->re", d_logits_rV, weight_VE.astype(hidden_RE.dtype))
    d_hidden_RE = _put(d_hidden_RE, _rows(d_hidden_RE, start, rows) + d_hidden_rE, start)
    return d_hidden_RE, d_weight_VE + contract("rv,re->ve", d_logits_rV, _rows(hidden_RE, start, rows))


def _zeros(*arrays: Array) -> tuple[Array, ...]:
    return tuple(jnp.zeros(x.shape, at_least_float32(x.dtype)) for x in arrays)


def _rounded(sums: tuple[Array, Array], factor: Array | float, hidden: Array, weight: Array) -> tuple[Array, Array]:
    return (sums[0] * factor).astype(hidden.dtype), (sums[1] * factor).astype(weight.dtype)


def _counted(targets_R: Array) -> Array:
    return jnp.maximum((targets_R != IGNORED_LABEL).sum(), 1)


# -- a mesh of devices ------------------------------------------------------------------------------------------------


def _on_devices(part: Part | None, function: Callable, inputs, outputs) -> Callable:
    """`function` of what each device has of every array, of which a letter says how it is cut: by rows (R), by the
    vocabulary (V), by both (W), as the gradient of the weight (D), or not.
    """
    function = functools.partial(function, part=part)
    if part is None:
        return function
    rows, vocabulary = part.rows, part.vocabulary
    axes = {"R": (rows,), "V": (vocabulary,), "W": (rows, vocabulary), "D": (vocabulary, part.width), " ": ()}
    inputs, outputs = (jax.tree.map(lambda letter: PartitionSpec(*axes[letter]), x) for x in (tuple(inputs), outputs))
    return jax.shard_map(function, mesh=part.device_mesh, in_specs=inputs, out_specs=outputs, check_vma=False)


def _over_rows(x: Array, part: Part | None) -> Array:
    """The sum over the devices that have other rows."""
    return x if part is None or part.rows is None else lax.psum(x, part.rows)


def _over_vocabulary(x: Array, part: Part | None) -> Array:
    """The sum over the devices that have other tokens."""
    return x if part is None or part.vocabulary is None else lax.psum(x, part.vocabulary)


def _largest(x: Array, part: Part | None) -> Array:
    """The largest of the devices that have other tokens; a loss does not depend on it."""
    return x if part is None or part.vocabulary is None else lax.pmax(lax.stop_gradient(x), part.vocabulary)


def _first(V: int, part: Part | None) -> Array | int:
    """The token of the first of so many logits."""
    return 0 if part is None or part.vocabulary is None else lax.axis_index(part.vocabulary) * V


def _over_devices(sums: tuple[Array, Array], part: Part | None) -> tuple[Array, Array]:
    """Derivatives of all, of which a device keeps what it has of the weight."""
    d_hidden_RE, d_weight_VE = sums
    if part is None or part.rows is None:
        return _over_vocabulary(d_hidden_RE, part), d_weight_VE
    if part.width is not None:
        d_weight_VE = lax.psum_scatter(d_weight_VE, part.width, scatter_dimension=1, tiled=True)
    others = tuple(axis for axis in part.rows if axis != part.width)
    return _over_vocabulary(d_hidden_RE, part), lax.psum(d_weight_VE, others) if others else d_weight_VE
