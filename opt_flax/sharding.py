"""A model on a mesh of devices, JAX: the rules of `opt_core.sharding` as NamedShardings; `jit` does the rest.

Weights lie as the table says, rows of a batch over its axes where they divide; XLA puts in what devices have to tell
each other (GSPMD, Xu et al., arXiv:2105.04663). Two things it is not asked to split, which run in `jax.shard_map`:
attention of each device's rows and heads, since of Pallas' kernels XLA cannot, and what it writes into a cache it would
put together; and the loss by chunks, for which it would gather the rows of all devices (jax 0.10). A model without a
mesh has a placement of None, and computes as if this file were not there.
"""

import functools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import jax
import numpy as np
from flax import nnx
from jax import Array, lax
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from opt_core.config import OPTConfig
from opt_core.errors import InputError, raise_if
from opt_core.schema import SCHEMA, published_name, weights
from opt_core.sharding import RULES, Mesh, Rules, batch_axes, computing_mesh, partition, spec_of
from opt_flax.linear_cross_entropy import Part

# How long a process that leaves waits for others: for one that is gone, and for one that still computes. With JAX's own
# 100 and 300 seconds (jax 0.10), so long would nobody learn of an error that one process alone had.
HEARTBEAT_SECONDS, SHUTDOWN_SECONDS = 20, 60
_OF_LAYER = "decoder.layers.{layer}."
LAYER = {row.name.removeprefix(_OF_LAYER): row.dims for row in SCHEMA if row.name.startswith(_OF_LAYER)}


@dataclass(frozen=True)
class Placement:
    """Where the arrays of a model lie; a static attribute of its modules, so programs are compiled for it."""

    device_mesh: jax.sharding.Mesh
    rules: Rules = RULES

    @functools.cached_property
    def mesh(self) -> Mesh:
        return Mesh(self.device_mesh.axis_names, self.device_mesh.devices.shape)

    @property
    def has_processes(self) -> bool:
        """Whether devices of other processes are among these."""
        return self.device_mesh.is_multi_process

    @functools.cached_property
    def gathers(self) -> bool:
        """Whether weights are cut over axes of the batch, so that devices gather them to compute with them."""
        cutting = {axis for _, axis in self.rules.weights}
        return any(axis in cutting and self.mesh.size(axis) > 1 for axis in batch_axes(self.mesh, self.rules))

    def sharding(self, *axes: str | tuple[str, ...] | None) -> NamedSharding:
        """That of an array whose dimensions are cut over `axes`; with none, each device has all of it."""
        while axes and axes[-1] is None:  # as compiled functions give them back: else the next call is compiled anew
            axes = axes[:-1]
        return NamedSharding(self.device_mesh, PartitionSpec(*axes))

    def weight(self, dims: str) -> NamedSharding:
        """That of a weight whose dimensions have these letters of the schema."""
        return self.sharding(*spec_of(dims, self.mesh, self.rules))

    def weights(self, config: OPTConfig, task: str) -> dict[str, NamedSharding]:
        """Canonical name to the sharding of every weight."""
        return {row.name: self.weight(row.dims) for row in weights(config, task)}

    def rows(self, batch: int) -> tuple[str, ...] | None:
        """The axes that cut a batch of so many rows; None where they do not divide it."""
        axes = batch_axes(self.mesh, self.rules)
        return None if not axes or batch % math.prod(map(self.mesh.size, axes)) else axes

    def computing(self, letter: str) -> str | None:
        """The axis along which devices with the same rows compute with other parts of a dimension."""
        return spec_of(letter, computing_mesh(self.mesh, self.rules), self.rules)[0]

    def loss_part(self, batch: int) -> Part:
        """How the loss of so many rows is cut."""
        rows, (_, width) = self.rows(batch), spec_of("VE", self.mesh, self.rules)
        return Part(self.device_mesh, rows, self.computing("V"), width if width in (rows or ()) else None)

    def cache(self, batch: int) -> tuple[NamedSharding, NamedSharding]:
        """Those of keys and values [B, N, S, H], and of lengths [B]."""
        return self.sharding(self.rows(batch), self.computing("A")), self.sharding(self.rows(batch))

    def put_cache(self, cache):
        """The same `Cache`, lying so."""
        buffers, lengths = self.cache(cache.batch_size)
        keys, values = (tuple(self.put(x, buffers) for x in part) for part in (cache.keys, cache.values))
        return cache._replace(keys=keys, values=values, lengths=self.put(cache.lengths, lengths))

    def put(self, x, sharding: NamedSharding | None = None) -> Array:
        """An array of every process, or one of this mesh, cut; by default each device gets all of it."""
        sharding = sharding or self.sharding()
        if isinstance(x, jax.Array) and x.sharding.device_set == sharding.device_set:
            return jax.device_put(x, sharding)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])


def init_mesh(text: str, device: str | None = None) -> jax.sharding.Mesh:
    """The mesh of a text such as "fsdp=2,tensor=4", of this job's devices; joins the processes of the job first.

    There are several where `torchrun` or what sets the same variables has started them (WORLD_SIZE above 1, RANK,
    MASTER_ADDR, MASTER_PORT), or Slurm or Open MPI, which `jax.distributed.initialize` knows; elsewhere call that
    yourself before. On CPUs they talk by gloo.

    Args:
        device: a platform's name, "cpu" or "cuda"; by default JAX's own.

    Raises:
        InputError: a text that is no mesh, or a mesh of more or, with several processes, other than all devices.
    """
    mesh = Mesh.parse(text)
    _join_processes()
    devices = jax.devices(device)
    if len(devices) < mesh.devices or (jax.process_count() > 1 and len(devices) > mesh.devices):
        raise InputError("init_mesh", [f"{mesh}: expected as many devices as there are, {len(devices)}"])
    types = (AxisType.Auto,) * len(mesh.names)
    return jax.make_mesh(mesh.sizes, mesh.names, devices=devices[: mesh.devices], axis_types=types)


def shard_model(model, device_mesh: jax.sharding.Mesh, rules: Rules = RULES):
    """Cuts the weights of a model over the devices of a mesh, in place, and returns it.

    From then on it computes on all of them, and so do its gradients. With several processes each has the same model.

    Raises:
        InputError: the mesh divides some size of the model not (all of them are listed), or the model has one already.
    """
    if model.placement is not None:
        raise InputError("shard_model", [f"model: expected one on a single device, got one on {model.mesh}"])
    model.set_placement(placement_on(device_mesh, model.config, model.task, rules))
    place(model)
    return model


def placement_on(device_mesh: jax.sharding.Mesh, config: OPTConfig, task: str, rules: Rules = RULES) -> Placement:
    """The placement of a model of `config`; axes of a mesh that are `Explicit`, as JAX makes them, become `Auto`.

    Raises:
        InputError: as `shard_model`.
    """
    if not isinstance(device_mesh, jax.sharding.Mesh):
        raise InputError("device_mesh", [f"expected a jax.sharding.Mesh, got {type(device_mesh).__name__}"])
    found = {device.process_index for device in device_mesh.devices.flat}
    if len(found) > 1 and len(found) != jax.process_count():
        text = f"expected devices of one process or of all {jax.process_count()}, got some of processes {sorted(found)}"
        raise InputError("device_mesh", [text])
    types = (AxisType.Auto,) * len(device_mesh.axis_names)
    placement = Placement(jax.sharding.Mesh(device_mesh.devices, device_mesh.axis_names, axis_types=types), rules)
    partition(config, placement.mesh, rules, task)
    return placement


def place(model) -> None:
    """Puts every array of a model with a mesh where it belongs: weights by the rules, all else on each device."""
    placement = model.placement
    if placement is None:
        return
    placed = placement.weights(model.config, model.task)
    placed = {published_name(name, model.task): sharding for name, sharding in placed.items()}
    for path, node in nnx.iter_graph(model):
        if isinstance(node, nnx.Variable):
            node.set_value(placement.put(node.get_value(), placed.get(".".join(map(str, path)))))


def local_parts(sharding: NamedSharding, shape: Sequence[int]) -> list[tuple[tuple[slice, ...], list[jax.Device]]]:
    """The different parts of an array that devices of this process have, each with these devices."""
    devices: dict[tuple[tuple[int, int], ...], list[jax.Device]] = {}
    for device, index in sharding.addressable_devices_indices_map(tuple(shape)).items():
        ends = tuple(part.indices(length)[:2] for part, length in zip(index, shape, strict=True))
        devices.setdefault(ends, []).append(device)
    return [(tuple(slice(*pair) for pair in ends), found) for ends, found in devices.items()]


# -- inside a model ---------------------------------------------------------------------------------------------------


def on_rows(placement: Placement | None, x: Array) -> Array:
    """The same values, the first dimension cut as rows of a batch, and whole along the others."""
    if placement is None:
        return x
    return lax.with_sharding_constraint(x, placement.sharding(placement.rows(len(x))))


def pin_weights(placement: Placement | None, layer: nnx.Module, before_BTD: Array | None) -> None:
    """Says of the weights of a layer where they lie, and so of their gradients, in what is being compiled.

    XLA would sum the gradients of a weight that is gathered on every device as a whole, and leave them so. And it would
    gather the weights of all layers first (jax 0.10, CPU), those of a loop once for all its rounds: here a layer's wait
    for what the layer before is given, so that those of two are there at a time.
    """
    if placement is None:
        return
    variables = ((path, node) for path, node in nnx.iter_graph(layer) if isinstance(node, nnx.Variable))
    found = ((node, LAYER.get(".".join(map(str, path)))) for path, node in variables)
    nodes = [(node, placement.weight(dims)) for node, dims in found if dims]
    values = [lax.with_sharding_constraint(node.get_value(), sharding) for node, sharding in nodes]
    if before_BTD is not None:
        values, _ = lax.optimization_barrier((values, lax.stop_gradient(before_BTD)))
    for (node, _), value in zip(nodes, values, strict=True):
        node.set_value(value)


def by_heads(placement: Placement | None, function: Callable, *arrays: Array | None) -> Array:
    """`function` of arrays [B, N, ...] of four dimensions, and [B, ...] of fewer, on each device for what it has.

    So loops and fused kernels see plain arrays, of the rows and heads of a device.
    """
    if placement is None:
        return function(*arrays)
    rows, heads = placement.rows(len(arrays[0])), placement.computing("A")
    specs = jax.tree.map(lambda x: PartitionSpec(rows, heads) if x.ndim == 4 else PartitionSpec(rows), arrays)
    # check_vma: the types that it checks tell what differs between devices, which loops here and Pallas do not say
    local = jax.shard_map(
        function, mesh=placement.device_mesh, in_specs=specs, out_specs=PartitionSpec(rows, heads), check_vma=False
    )
    return local(*arrays)


def on_host(x: Array) -> np.ndarray:
    """All values, in every process: a view of an array of one device, of one in parts an array of its own.

    `numpy.asarray` would keep what it has put together as long as `x` lives.
    """
    if not (x.is_fully_addressable or x.is_fully_replicated):
        return multihost_utils.process_allgather(x, tiled=True)
    if len(x.sharding.device_set) == 1:
        return np.asarray(x)
    shards = x.addressable_shards[:1] if x.is_fully_replicated else x.addressable_shards
    whole = np.empty(x.shape, x.dtype)
    for shard in shards:
        whole[shard.index] = shard.data
    return whole


# -- processes --------------------------------------------------------------------------------------------------------


def _join_processes() -> None:
    """Starts JAX's distributed runtime where the environment says that there are several processes."""
    if jax.distributed.is_initialized():
        return
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise_if(InputError, "init_mesh", _missing_variables())
        shares_host = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > 1  # then each process has one GPU of the host
        local = [int(os.environ["LOCAL_RANK"])] if shares_host else None
        _initialize(_coordinator(), int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"]), local)
    elif any(int(os.environ.get(name, 1)) > 1 for name in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")):
        _initialize()


def _coordinator() -> str:
    """Where process 0 listens: on MASTER_PORT, or on the next one where `torchrun` itself listens on that."""
    is_taken = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return f"{os.environ['MASTER_ADDR']}:{int(os.environ['MASTER_PORT']) + is_taken}"


def _missing_variables() -> Iterator[str]:
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        if name not in os.environ:
            yield f"{name}: expected in the environment beside WORLD_SIZE, as torchrun sets it"


def _initialize(*arguments) -> None:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(
            *arguments, heartbeat_timeout_seconds=HEARTBEAT_SECONDS, shutdown_timeout_seconds=SHUTDOWN_SECONDS
        )
    except RuntimeError as error:
        raise InputError("init_mesh", [f"processes are joined before JAX computes anything: {error}"]) from error
