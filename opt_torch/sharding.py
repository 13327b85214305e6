"""A model over several processes, PyTorch: each holds parts of the weights, as the table of `opt_core.sharding` says.

The engines are PyTorch's own: DTensor along the axis whose processes have the same rows, with the modules of
`tensor_parallel.py`, and FSDP2 (`fully_shard`) along those that have others. With gloo on a CPU, nccl on CUDA.
"""

import os
import pickle
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from opt_core.errors import InputError, raise_if
from opt_core.schema import shapes
from opt_core.sharding import RULES, TENSOR_PARALLEL, Mesh, Rules, Spec, partition
from opt_torch.attention import Attention
from opt_torch.tensor_parallel import AttentionByHeads, kind_of

TORCHRUN = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
EMBEDDINGS = "decoder.embed_tokens.weight"


def init_mesh(text: str, device=None) -> DeviceMesh:
    """The mesh of a text such as "fsdp=2,tensor=2", one process for each device; starts their group where none is.

    Args:
        device: "cpu" or "cuda"; by default CUDA where there is any. On CUDA a process takes the device LOCAL_RANK.

    Raises:
        InputError: what `Mesh.parse` refuses; no torchrun that started this process, or another number of them.
    """
    mesh = Mesh.parse(text)
    kind = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu")).type
    if not dist.is_initialized():
        missing = [name for name in TORCHRUN if name not in os.environ]
        raise_if(InputError, "processes", [f"{name}: expected as torchrun sets it, got none" for name in missing])
        if kind == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        dist.init_process_group("gloo" if kind == "cpu" else None)
    if dist.get_world_size() != mesh.devices:
        raise InputError(f"{mesh}", [f"processes: expected {mesh.devices}, got {dist.get_world_size()}"])
    return init_device_mesh(kind, mesh.sizes, mesh_dim_names=mesh.names)


def shard_model(model, device_mesh: DeviceMesh, rules: Rules = RULES):
    """Cuts the weights of a model, in place, and returns it; those of process 0 count, whatever the others have.

    From here on parameters are DTensors, a call takes the rows of this process (the same along the axis that is not of
    the batch) and `generate` the same rows everywhere. FSDP averages gradients over the axes of the batch.

    Raises:
        InputError: lists every size that does not divide, before anything is changed; the model is sharded already or
            has adapters, or is on several devices; axes or rules that there is no engine for.
    """
    mesh = Mesh(tuple(device_mesh.mesh_dim_names or ()), tuple(device_mesh.shape))
    specs = partition(model.config, mesh, rules, model.task)
    axes = _axes(mesh, rules)
    raise_if(InputError, "shard_model", _problems(model, mesh, rules, axes))
    _copy_from_first(model, device_mesh)
    if axes.computing:
        _parallelize(model, device_mesh[axes.computing], {name: _dim(specs[name], axes.computing) for name in specs})
    if axes.sharding or axes.replicating:
        dims = {name: _dim(specs[name], axes.sharding, None) for name in specs}
        _fully_shard(model, _batch_mesh(device_mesh, axes), dims)
    model.device_mesh, model.mesh, model.rules = device_mesh, mesh, rules
    model.head_parts = mesh.size(axes.computing) if ("A", axes.computing) in rules.weights else 1
    return model


class Axes(NamedTuple):
    """Which axis of a mesh is for which engine; None where it has none."""

    computing: str | None  # the same rows, and each process its own heads: DTensor
    sharding: str | None  # other rows, and weights are gathered before they are used: FSDP
    replicating: str | None  # other rows, and whole copies of what the other axes leave


def _axes(mesh: Mesh, rules: Rules) -> Axes:
    cutting = {axis for _, axis in rules.weights}
    computing = [name for name in mesh.names if name not in rules.batch and mesh.size(name) > 1]
    sharding = [name for name in mesh.names if name in rules.batch and name in cutting]
    replicating = [name for name in mesh.names if name in rules.batch and name not in cutting]
    problems = [
        f"axes {', '.join(map(repr, names))}: expected one at most that {what}"
        for names, what in (
            (computing, "cuts heads"),
            (sharding, "cuts weights and rows"),
            (replicating, "cuts rows alone"),
        )
        if len(names) > 1
    ]
    raise_if(InputError, f"{mesh}", problems)
    return Axes(*(next(iter(names), None) for names in (computing, sharding, replicating)))


def _problems(model, mesh: Mesh, rules: Rules, axes: Axes) -> Iterator[str]:
    if model.mesh is not None:
        yield f"model: expected one that is not sharded, got one over {model.mesh}"
    if model.lora is not None:
        yield "model: expected one without adapters; merge_lora makes it one"
    if model.offloaded is not None:
        yield "model: expected one on one device; load it without device_map"
    if mesh.devices != dist.get_world_size():
        yield f"device_mesh: expected all {dist.get_world_size()} processes in it, got {mesh.devices}"
    known = {letter for letter, _ in TENSOR_PARALLEL}
    for letter, axis in rules.weights:
        if axis == axes.computing and letter not in known:
            yield f"rules: expected {', '.join(sorted(known))} alone along {axis!r}, got {letter!r}"


def _dim(spec: Spec, *axes: str | None) -> int | None:
    """The dimension that the first of these axes cuts which the spec has; None is what no axis cuts."""
    return next((spec.index(axis) for axis in axes if axis in spec), None)


def _batch_mesh(device_mesh: DeviceMesh, axes: Axes) -> DeviceMesh:
    """What `fully_shard` takes: one axis, or two of which the second cuts weights."""
    if axes.replicating is None:
        return device_mesh[axes.sharding]
    if axes.sharding is not None:
        return device_mesh[axes.replicating, axes.sharding]
    names, place = (axes.replicating, "whole"), device_mesh.mesh_dim_names.index(axes.replicating)
    return device_mesh._unflatten(place, (device_mesh.size(place), 1), names)[names]


@torch.no_grad()
def _copy_from_first(model, device_mesh: DeviceMesh) -> None:
    """Moves the model to the device and makes its weights those of process 0; those without memory stay as they are."""
    for parameter in model.parameters():
        if not parameter.is_meta:
            parameter.data = parameter.to(device_mesh.device_type)
            everywhere = [Replicate()] * device_mesh.ndim
            parameter.data = distribute_tensor(parameter.data, device_mesh, everywhere).to_local()


# -- the same rows: tensor parallelism --------------------------------------------------------------------------------


def _parallelize(model, mesh: DeviceMesh, dims: Mapping[str, int | None]) -> None:
    """Cuts each weight along its dimension, None for whole, and has each module compute with the part that is here."""
    for path, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        for name, parameter in own.items():
            setattr(module, name, _part_of(parameter, mesh, dims[_canonical(f"{path}.{name}", dims)]))
        if own:
            module.__class__ = kind_of(path, module, dims[_canonical(f"{path}.weight", dims)])
        elif isinstance(module, Attention) and dims[_canonical(f"{path}.q_proj.weight", dims)] == 0:
            module.num_heads //= mesh.size()
            module.__class__ = AttentionByHeads
    model.tie_weights()


def _canonical(name: str, names: Mapping[str, object]) -> str:
    """The schema's name of a parameter; a tied head is the embeddings."""
    name = name.removeprefix("model.")
    return name if name in names else EMBEDDINGS


def _part_of(parameter: nn.Parameter, mesh: DeviceMesh, dim: int | None) -> nn.Parameter:
    local, placement = parameter.detach(), Replicate()
    if dim is not None:
        local, placement = local.chunk(mesh.size(), dim)[mesh.get_local_rank()], Shard(dim)
        local = local.clone(memory_format=torch.contiguous_format)  # a view would keep the whole in memory
    part = DTensor.from_local(local, mesh, [placement], run_check=False)
    return nn.Parameter(part, requires_grad=parameter.requires_grad)


# -- other rows: FSDP -------------------------------------------------------------------------------------------------


def _fully_shard(model, mesh: DeviceMesh, dims: Mapping[str, int | None]) -> None:
    """A group for each layer and one for the rest.

    All are freed after the forward pass: else a model that has computed without gradients would go on with weights that
    it gathered before they were changed. What the table leaves whole is cut as well, which FSDP has no way around.
    """
    # PyTorch 2.13 warns of in-place changes to keys and values, which layers return as views; there are none.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module", UserWarning)
    cut = {p: dims[_canonical(name, dims)] for name, p in model.named_parameters(remove_duplicate=False)}
    options = dict(mesh=mesh, reshard_after_forward=True)
    options["shard_placement_fn"] = lambda parameter: None if cut[parameter] is None else Shard(cut[parameter])
    for layer in model.base_model.decoder.layers:
        fully_shard(layer, **options)
    fully_shard(model, **options)
    if hasattr(model, "feed"):
        register_fsdp_forward_method(model, "feed")


# -- weights in and out -----------------------------------------------------------------------------------------------


def own_slices(model) -> dict[str, tuple[slice, ...]]:
    """Of each stored weight the part that this process has."""
    return {name: slices_of(model.weight(name)) for name in shapes(model.config, model.task)}


def slices_of(parameter: Tensor) -> tuple[slice, ...]:
    """The part that this process has."""
    if not isinstance(parameter, DTensor):
        return tuple(slice(0, length) for length in parameter.shape)
    where = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    return tuple(slice(start, start + length) for length, start in zip(*where, strict=True))


def as_part(local: Tensor, like: Tensor) -> Tensor:
    """What this process has of a weight, as that weight's DTensor; `like` may have no memory."""
    if not isinstance(like, DTensor):
        return local
    shape = dict(shape=like.shape, stride=like.stride())
    return DTensor.from_local(local.contiguous(), like.device_mesh, like.placements, run_check=False, **shape)


def whole_tensor(x: Tensor) -> Tensor:
    """All of a weight, on all processes; every one of them must call it."""
    return x.detach().full_tensor() if isinstance(x, DTensor) else x.detach()


def write_from_first(part: Callable[[str], Tensor], write: Callable[[Callable[[str], Tensor]], None]) -> None:
    """Calls `write` on process 0 with a function that gathers a tensor by its name; the others help it, until it ends.

    Every process must call this, with a function that gives its `part` of a tensor. At no time is more than one whole.

    Raises:
        Exception: whatever `write` raised, on every process.
    """
    if dist.get_rank() == 0:
        error = None
        try:
            write(lambda name: whole_tensor(part(_told(name))))
        except Exception as raised:
            error = raised
        _told(_sendable(error))
    else:
        while isinstance(error := _told(None), str):
            whole_tensor(part(error))
    if error is not None:
        raise error


def _sendable(error: Exception | None) -> Exception | None:
    """The error, or one with its text where it is of a kind that cannot leave its process."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"process 0: {error!r}")
    return error


def _told(message):
    """What process 0 says."""
    messages = [message]
    dist.broadcast_object_list(messages, src=0)
    return messages[0]
