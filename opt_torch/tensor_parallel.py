"""Modules that compute with the parts of their weights that are here, PyTorch (Megatron, arXiv:1909.08053, section 3).

Weights are DTensors, and so are the sums and gathers over processes, with their gradients. What lies between is plain:
`ColwiseParallel` and `RowwiseParallel` of PyTorch 2.13 take every operator through DTensor, which is 4.0 ms of
processor time a layer and token where the numbers themselves take 0.2.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.nn import functional as F

from opt_torch.attention import Attention, LayerCache
from opt_torch.layers import Embedding, LayerNorm, Linear, linear


def kind_of(path: str, module: nn.Module, dim: int | None) -> type[nn.Module]:
    """What a module is from here on whose weight is cut along `dim`: a linear one is (out, in)."""
    if isinstance(module, nn.LayerNorm):
        return LocalLayerNorm
    if isinstance(module, nn.Embedding):
        return EmbeddingByRows if dim == 0 else LocalEmbedding
    if path == "lm_head" and dim == 0:
        return Head
    is_of_attention = path.split(".")[-2:-1] == ["self_attn"]
    return LinearByInputs if dim == 1 else LinearByOutputs if dim == 0 and not is_of_attention else LocalLinear


def _here(parameter: nn.Parameter | None) -> Tensor | None:
    """What this process has of a weight; its gradient is that of this part."""
    return None if parameter is None else parameter.to_local()


def _shared(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """What all have, on its way to parts of a weight: each adds to its gradient."""
    if not torch.is_grad_enabled():
        return x
    return DTensor.from_local(x, mesh, [Replicate()], run_check=False).to_local(grad_placements=[Partial()])


def _summed(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """The sum over the processes; its gradient is that of each summand."""
    if not torch.is_grad_enabled():
        x = x.contiguous()
        dist.all_reduce(x, group=mesh.get_group())
        return x
    return DTensor.from_local(x, mesh, [Partial()], run_check=False).full_tensor()


def _gathered(x: Tensor, mesh: DeviceMesh, dim: int) -> Tensor:
    """All of what each process has a part of along `dim`."""
    return DTensor.from_local(x, mesh, [Shard(dim)], run_check=False).full_tensor()


class LocalLinear(Linear):
    def forward(self, x: Tensor) -> Tensor:
        return linear(x, _here(self.weight), _here(self.bias))


class LinearByOutputs(LocalLinear):
    """Outputs of this process, of inputs that all have."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(_shared(x, self.weight.device_mesh))


class LinearByInputs(LocalLinear):
    """Outputs for all, of inputs that this process has; the bias is added to the sum."""

    def forward(self, x: Tensor) -> Tensor:
        y = _summed(linear(x, _here(self.weight)), self.weight.device_mesh)
        return y if self.bias is None else y + _here(self.bias)


class Head(LinearByOutputs):
    """Logits of the whole vocabulary."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return _gathered(y, self.weight.device_mesh, y.ndim - 1)


class LocalEmbedding(Embedding):
    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, _here(self.weight))


class EmbeddingByRows(LocalEmbedding):
    """Rows of all tokens: each process looks up its own."""

    def forward(self, ids: Tensor) -> Tensor:
        weight, mesh = _here(self.weight), self.weight.device_mesh
        places = ids - mesh.get_local_rank() * len(weight)
        is_here = (places >= 0) & (places < len(weight))
        rows = F.embedding(torch.where(is_here, places, 0), weight)
        return _summed(torch.where(is_here[..., None], rows, 0), mesh)


class LocalLayerNorm(LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, _here(self.weight), _here(self.bias), self.eps)


class AttentionByHeads(Attention):
    """Attention of the heads that this process has; masks of heads and weights that it returns are of all."""

    def forward(self, x_BTD: Tensor, *given) -> tuple[Tensor, LayerCache, Tensor | None]:
        *others, head_mask_N = given
        mesh = self.q_proj.weight.device_mesh
        if head_mask_N is not None:
            head_mask_N = DTensor.from_local(head_mask_N, mesh, [Replicate()], run_check=False)
            head_mask_N = head_mask_N.redistribute(placements=[Shard(0)]).to_local()
        # For q, k and v at once: the sum of their gradients is then summed over the processes once.
        y_BTD, present, weights_BNTS = super().forward(_shared(x_BTD, mesh), *others, head_mask_N)
        if weights_BNTS is not None:
            weights_BNTS = _gathered(weights_BNTS, mesh, 1)
        return y_BTD, present, weights_BNTS


class VocabularyPart(NamedTuple):
    """The columns of the logits that this process has, for a loss that never gathers them."""

    mesh: DeviceMesh
    first: int

    def total(self, x: Tensor, how: str = "sum") -> Tensor:
        """The sum, or what else `how` says, over the processes."""
        return DTensor.from_local(x, self.mesh, [Partial(how)], run_check=False).full_tensor()

    def whole(self, logits_RV: Tensor) -> Tensor:
        """The columns of all."""
        return _gathered(logits_RV, self.mesh, 1)


def vocabulary_part(hidden_RE: Tensor, weight_VE: Tensor) -> tuple[Tensor, Tensor, VocabularyPart | None]:
    """Both for a head that computes with the rows of the weight that are here; None where it has all."""
    if not isinstance(weight_VE, DTensor):
        return hidden_RE, weight_VE, None
    mesh, (placement,) = weight_VE.device_mesh, weight_VE.placements
    if not placement.is_shard(0):
        return hidden_RE, weight_VE.to_local(), None
    local_VE = weight_VE.to_local()
    return _shared(hidden_RE, mesh), local_VE, VocabularyPart(mesh, first=mesh.get_local_rank() * len(local_VE))
