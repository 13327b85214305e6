"""The optimizer, PyTorch: `torch.optim.AdamW` and a schedule with the equations of `opt_core.optimization`.

Clipping is not the optimizer's in PyTorch: `torch.nn.utils.clip_grads_with_norm_` has the recipe's equation. The norm
is computed here, since in float32 on a CPU PyTorch's own is too small: torch 2.13, 0.26 % for opt-125m's embedding.
Parameters may be DTensors, of which each process changes its part.
"""

import math
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from opt_core.errors import InputError
from opt_core.optimization import TrainingRecipe, is_decayed


def make_optimizer(
    model: nn.Module, recipe: TrainingRecipe
) -> tuple[torch.optim.AdamW, torch.optim.lr_scheduler.LambdaLR]:
    """An optimizer and its schedule, which together take the steps of `opt_core.optimization.adamw_step`.

    It changes what requires a gradient, in two groups: what is decayed, and what is not. Moments have the dtypes of the
    parameters. Call `step` of both after each `backward` and clipping.

    Raises:
        InputError: nothing in the model requires a gradient.
    """
    groups = {recipe.weight_decay: [], 0.0: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[recipe.weight_decay if _is_decayed(name, parameter) else 0.0].append(parameter)
    if not any(groups.values()):
        remedy = "one whose weights wait on the CPU or on disk (device_map) has none"
        raise InputError("make_optimizer", [f"model: expected parameters that require a gradient; {remedy}"])
    optimizer = torch.optim.AdamW(
        [dict(params=parameters, weight_decay=decay) for decay, parameters in groups.items() if parameters],
        lr=1.0,  # the schedule multiplies it with the rate of the step
        betas=(recipe.beta1, recipe.beta2),
        eps=recipe.epsilon,
        fused=True,
    )
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: float(recipe.learning_rate_at(step)))


def gradient_norm(gradients: Iterable[Tensor]) -> Tensor:
    """The norm of all gradients together, in float32 at least; of rows first, then of their norms.

    Of DTensors all processes have to ask; each gets the same number.
    """
    norms: dict[DeviceMesh | None, list[Tensor]] = {}
    for g in gradients:
        mesh = g.device_mesh if isinstance(g, DTensor) else None
        norms.setdefault(mesh, []).append(_norm_of_part(g) / math.sqrt(_holders(g)))
    return torch.linalg.vector_norm(torch.stack([_norm_of_all(torch.stack(n), mesh) for mesh, n in norms.items()]))


def name_of(name: str) -> str:
    """The canonical name of a parameter, from its name in the model."""
    name = name.removeprefix("model.")
    return f"{name}.weight" if name.endswith((".lora_A", ".lora_B")) else name


def _is_decayed(name: str, parameter: nn.Parameter) -> bool:
    try:
        return is_decayed(name_of(name))
    except ValueError:  # of a module that is not ours: matrices, as everywhere
        return parameter.ndim > 1


def _norm_of_part(gradient: Tensor) -> Tensor:
    part = gradient.to_local() if isinstance(gradient, DTensor) else gradient
    return torch.linalg.vector_norm(torch.linalg.vector_norm(part, dim=-1, dtype=_wide(part.dtype)))


def _holders(gradient: Tensor) -> int:
    """How many processes have the same part: along an axis that does not cut it, all."""
    if not isinstance(gradient, DTensor):
        return 1
    places = zip(gradient.device_mesh.shape, gradient.placements, strict=True)
    return math.prod(size for size, placement in places if placement.is_replicate())


def _norm_of_all(norms: Tensor, mesh: DeviceMesh | None) -> Tensor:
    square = torch.linalg.vector_norm(norms).square()
    for group in () if mesh is None else mesh.get_all_groups():
        dist.all_reduce(square, group=group)
    return square.sqrt()


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
