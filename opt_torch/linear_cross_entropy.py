"""The head and its loss in one, PyTorch: cross entropy of hidden states under a matrix, with logits held once at most.

Three products of the size of the logits, as the plain way has, but no second tensor of that size: gradients of logits
exist by blocks of columns alone. Where the logits are no output they exist by blocks of rows alone: the forward pass
then makes the gradients of a block beside its loss (Hsu et al., Liger Kernel, arXiv:2410.10989, section 3.2).
"""

from collections.abc import Iterator
from itertools import repeat
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from opt_core.reference import IGNORED_LABEL
from opt_torch.sdpa import needs_gradient, without_autocast

ROW_BLOCK = 2**26  # logits held at once where they are not kept: 256 MB in float32
COLUMN_BLOCK = 2**22  # their gradients held at once: in the caches of a CPU, 0.39 s for 0.58 (OPT, 1024 rows, bfloat16)


class Part(Protocol):
    """The part of the vocabulary that a device has, where several share it."""

    first: int  # the token of its first row

    def total(self, x: Tensor, how: str = "sum") -> Tensor:
        """The sum over the devices, or the largest ("max"), without gradients."""


def linear_cross_entropy(
    hidden_RE: Tensor, weight_VE: Tensor, targets_R: Tensor, keep_logits: bool, part: Part | None = None
) -> tuple[Tensor, Tensor | None]:
    """The mean of -log softmax(hidden weight^T)[target] over the targets that are not -100; 0 where all are.

    Returns the loss, in float32 at least, and the logits [R, V] if they are to be kept. Gradients are summed in float32
    at least and have the dtypes of the arguments; one that arrives at the logits is added to that of the loss.
    Of a `part` of the vocabulary the loss is that of all of it, logits and gradients are those of its own rows.

    Raises:
        RuntimeError: in the backward pass with `create_graph`, since gradients of these gradients do not exist.
    """
    dtype = _dtype_of_products(hidden_RE)
    with without_autocast(hidden_RE.device):
        if keep_logits:
            return _LogitsKept.apply(hidden_RE, weight_VE, targets_R, dtype, part)
        if needs_gradient(hidden_RE, weight_VE):
            return _LogitsInBlocks.apply(hidden_RE, weight_VE, targets_R, dtype, part), None
        return _loss_by_rows(hidden_RE.to(dtype), weight_VE.to(dtype), targets_R, part=part), None


class _LogitsKept(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_RE, weight_VE, targets_R, dtype, part):
        ctx.set_materialize_grads(False)
        logits_RV = F.linear(hidden_RE.to(dtype), weight_VE.to(dtype))
        softmax = _softmax_of(logits_RV, part)
        ctx.part = part
        ctx.save_for_backward(hidden_RE, weight_VE, targets_R, logits_RV, *softmax)
        return _losses(logits_RV, softmax, targets_R, part).sum() / _count(targets_R), logits_RV

    @staticmethod
    def backward(ctx, d_loss, d_logits_RV):
        _check_once()
        hidden_RE, weight_VE, targets_R, logits_RV, *softmax = ctx.saved_tensors
        gradients = _zeros(ctx, hidden_RE, weight_VE)
        scale = 0 if d_loss is None else d_loss / _count(targets_R)
        blocks = _gradient_of_logits(logits_RV, _Softmax(*softmax), targets_R, scale, d_logits_RV, ctx.part)
        _backpropagate(blocks, hidden_RE.to(logits_RV.dtype), weight_VE.to(logits_RV.dtype), *gradients)
        return _cast(gradients[0], hidden_RE.dtype), _cast(gradients[1], weight_VE.dtype), None, None, None


class _LogitsInBlocks(torch.autograd.Function):
    """All but a factor of the gradients is known in the forward pass."""

    @staticmethod
    def forward(ctx, hidden_RE, weight_VE, targets_R, dtype, part):
        gradients = _zeros(ctx, hidden_RE, weight_VE)
        loss = _loss_by_rows(hidden_RE.to(dtype), weight_VE.to(dtype), targets_R, *gradients, part)
        for gradient in gradients:
            if gradient is not None:
                gradient /= _count(targets_R)
        ctx.dtypes = hidden_RE.dtype, weight_VE.dtype
        ctx.save_for_backward(*gradients)
        return loss

    @staticmethod
    def backward(ctx, d_loss):
        _check_once()
        gradients = ctx.saved_tensors
        if d_loss.device.type != "cpu" or torch.compiler.is_compiling() or d_loss != 1:  # a copy of the weight's size
            gradients = [None if d is None else d * d_loss for d in gradients]
        return *map(_cast, gradients, ctx.dtypes), None, None, None


def _loss_by_rows(
    hidden_RE: Tensor,
    weight_VE: Tensor,
    targets_R: Tensor,
    d_hidden_RE: Tensor | None = None,
    d_weight_VE: Tensor | None = None,
    part: Part | None = None,
) -> Tensor:
    """Adds the gradients of the sum of the losses where there is something to add them to; returns their mean."""
    size = max(1, ROW_BLOCK // max(1, len(weight_VE)))
    d_hidden = repeat(None) if d_hidden_RE is None else d_hidden_RE.split(size)
    blocks = zip(hidden_RE.split(size), targets_R.split(size), d_hidden, strict=False)
    return sum(_sum_of_losses(h, weight_VE, t, d, d_weight_VE, part) for h, t, d in blocks) / _count(targets_R)


def _sum_of_losses(hidden_RE, weight_VE, targets_R, d_hidden_RE, d_weight_VE, part) -> Tensor:
    logits_RV = F.linear(hidden_RE, weight_VE)
    softmax = _softmax_of(logits_RV, part)
    blocks = _gradient_of_logits(logits_RV, softmax, targets_R, part=part)
    _backpropagate(blocks, hidden_RE, weight_VE, d_hidden_RE, d_weight_VE)
    return _losses(logits_RV, softmax, targets_R, part).sum()


class _Softmax(NamedTuple):
    """What makes softmax of logits: exp(logits - largest) / sum. Not its logarithm, whose rounding is 8 u here."""

    largest_R: Tensor
    sums_R: Tensor


def _softmax_of(logits_RV: Tensor, part: Part | None) -> _Softmax:
    R, V = logits_RV.shape
    largest_R, sums_R = logits_RV.new_empty(2, R, dtype=_wide(logits_RV.dtype)).unbind()
    rows = max(1, COLUMN_BLOCK // max(1, V))
    buffer_CV = torch.empty_like(logits_RV[:rows], dtype=sums_R.dtype)
    for first in range(0, R, rows):
        block_CV, largest_C = logits_RV[first : first + rows], largest_R[first : first + rows]
        largest_C.copy_(block_CV.amax(-1))
        exp_CV = torch.sub(block_CV, largest_C[:, None], out=buffer_CV[: len(block_CV)]).exp_()
        sums_R[first : first + rows] = exp_CV.sum(-1)
    if part is None:
        return _Softmax(largest_R, sums_R)
    largest_of_all_R = part.total(largest_R, "max")
    return _Softmax(largest_of_all_R, part.total(sums_R * (largest_R - largest_of_all_R).exp()))


def _losses(logits_RV: Tensor, softmax: _Softmax, targets_R: Tensor, part: Part | None) -> Tensor:
    """Of each row; 0 where it does not count."""
    places_R = targets_R if part is None else targets_R - part.first
    chosen_R = logits_RV.gather(1, places_R.clamp(0, logits_RV.shape[1] - 1)[:, None])[:, 0]
    if part is not None:
        here_R = (places_R >= 0) & (places_R < logits_RV.shape[1])
        chosen_R = part.total(torch.where(here_R, chosen_R, 0))
    return torch.where(targets_R != IGNORED_LABEL, softmax.sums_R.log() - (chosen_R - softmax.largest_R), 0)


def _gradient_of_logits(
    logits_RV: Tensor,
    softmax: _Softmax,
    targets_R: Tensor,
    scale=1,
    d_logits_RV: Tensor | None = None,
    part: Part | None = None,
) -> Iterator[tuple[slice, Tensor]]:
    """`scale` times the gradient of the sum of the losses, plus `d_logits_RV`, by blocks of columns in one buffer."""
    R, V = logits_RV.shape
    scale_R1 = torch.where(targets_R != IGNORED_LABEL, scale, torch.zeros_like(softmax.sums_R))[:, None]
    factor_R1 = scale_R1 / softmax.sums_R[:, None]
    places_R = targets_R if part is None else targets_R - part.first
    size = min(V, max(1024, COLUMN_BLOCK // max(1, R)))
    buffer = softmax.sums_R.new_empty(R * size)
    for first in range(0, V, size):
        block_RC = logits_RV[:, first : first + size]
        d_RC = buffer[: block_RC.numel()].view(block_RC.shape)
        torch.sub(block_RC, softmax.largest_R[:, None], out=d_RC).exp_().mul_(factor_R1)
        here_R1 = ((places_R >= first) & (places_R < first + block_RC.shape[1]))[:, None]
        d_RC.scatter_add_(1, torch.where(here_R1, places_R[:, None] - first, 0), torch.where(here_R1, -scale_R1, 0))
        if d_logits_RV is not None:
            d_RC += d_logits_RV[:, first : first + size]
        yield slice(first, first + size), d_RC.to(logits_RV.dtype)


def _backpropagate(blocks, hidden_RE, weight_VE, d_hidden_RE: Tensor | None, d_weight_VE: Tensor | None) -> None:
    """Adds what the gradient of the logits, in `blocks` of columns, is for hidden states and weight."""
    if d_hidden_RE is None and d_weight_VE is None:
        return
    for columns, d_RC in blocks:
        if d_hidden_RE is not None:
            _add_product(d_hidden_RE, d_RC, weight_VE[columns])
        if d_weight_VE is not None:
            _add_product(d_weight_VE[columns], d_RC.T, hidden_RE)


def _add_product(sum_IK: Tensor, x_IJ: Tensor, y_JK: Tensor) -> None:
    if sum_IK.dtype == x_IJ.dtype:
        sum_IK.addmm_(x_IJ, y_JK)
    else:
        sum_IK += x_IJ @ y_JK


def _check_once() -> None:
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError("linear_cross_entropy: expected create_graph=False, its gradients cannot be differentiated")


def _zeros(ctx, *inputs: Tensor) -> tuple[Tensor | None, ...]:
    """What the gradients of these inputs are summed in, None where none is wanted."""
    pairs = zip(inputs, ctx.needs_input_grad[: len(inputs)], strict=True)
    return tuple(torch.zeros_like(x, dtype=_wide(x.dtype)) if wanted else None for x, wanted in pairs)


def _cast(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if x is None else x.to(dtype)


def _count(targets_R: Tensor) -> Tensor:
    return (targets_R != IGNORED_LABEL).sum().clamp(min=1)


def _dtype_of_products(x: Tensor) -> torch.dtype:
    """As autocast has it, which leaves float64 alone."""
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
