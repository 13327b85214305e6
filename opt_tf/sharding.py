"""A model on a mesh of devices, TensorFlow: inference, experimental as TensorFlow's DTensor is.

The rules of `opt_core.sharding` become layouts; DTensor splits the operations by them and puts in what devices have to
tell each other. One process drives all devices. A model on a mesh takes and returns ordinary tensors, in calls that run
as compiled functions; the buffers of its caches alone stay cut, by heads. Not done: training, several processes.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf
from tensorflow import Tensor
from tensorflow.experimental import dtensor

from opt_core.checks import check_labels
from opt_core.errors import InputError, raise_if
from opt_core.keywords import arguments_of
from opt_core.sharding import RULES, Mesh, Rules, Spec, batch_axes, partition, shard_slices
from opt_tf.attention import FUSED
from opt_tf.cache import Cache
from opt_tf.inputs import known

KINDS = ("CPU", "GPU", "TPU")


class Placement(NamedTuple):
    """Where the weights and the rows of a model are."""

    device_mesh: dtensor.Mesh
    rules: Rules

    def __deepcopy__(self, memo) -> "Placement":
        return self

    @property
    def mesh(self) -> Mesh:
        names = tuple(self.device_mesh.dim_names)
        return Mesh(names, tuple(map(self.device_mesh.dim_size, names)))

    def cut(self, array: np.ndarray | Tensor, spec: Spec) -> Tensor:
        """An array on the mesh: each device gets its part alone."""
        mesh, parts = self.mesh, []
        for rank, device in enumerate(self.device_mesh.local_devices()):
            part = array[shard_slices(array.shape, spec, mesh, mesh.coordinates(rank))] if any(spec) else array
            with tf.device(device):
                parts.append(tf.identity(tf.convert_to_tensor(part)))
        return dtensor.pack(parts, self.layout(spec))

    def layout(self, spec: Iterable[str | None]) -> dtensor.Layout:
        return dtensor.Layout([dtensor.UNSHARDED if axis is None else axis for axis in spec], self.device_mesh)

    def put(self, x):
        """What an argument is on the mesh: of a tensor its rows are cut where they divide; all else stays."""
        if not tf.is_tensor(x) or dtensor.is_dtensor(x):
            return x
        rows = x.shape[0] if x.shape.rank else 1
        axes = (axis for axis in batch_axes(self.mesh, self.rules) if rows and rows % self.mesh.size(axis) == 0)
        return self.cut(x, (next(axes, None), *[None] * (x.shape.rank - 1)) if x.shape.rank else ())

    def whole(self, x: Tensor) -> Tensor:
        """Inside of what is compiled for the mesh: the same on every device."""
        return dtensor.relayout(x, dtensor.Layout.replicated(self.device_mesh, x.shape.rank))


class CutVariable(dtensor.DVariable):
    """A variable whose parts lie on the devices of a mesh. What it gives to NumPy, and takes, is whole.

    `used_layout` is how it is computed with: whole along the axes that cut rows.
    """

    def __init__(self, placement: Placement, spec: Spec, value: Tensor, name: str):
        super().__init__(value, name=name)
        self.placement, self.spec = placement, spec
        self.used_layout = placement.layout(None if axis in placement.rules.batch else axis for axis in spec)

    def numpy(self) -> np.ndarray:
        mesh, array = self.placement.mesh, np.empty(self.shape, self.dtype.as_numpy_dtype)
        for rank, part in enumerate(dtensor.unpack(self.read_value())):
            array[shard_slices(array.shape, self.spec, mesh, mesh.coordinates(rank))] = part.numpy()
        return array

    def assign(self, value, *args, **kwargs):
        if not dtensor.is_dtensor(value):
            value = self.placement.cut(tf.convert_to_tensor(value, self.dtype), self.spec)
        return super().assign(value, *args, **kwargs)

    def __deepcopy__(self, memo) -> "CutVariable":
        return CutVariable(self.placement, self.spec, self.placement.cut(self.numpy(), self.spec), self.name)


def init_mesh(text: str, device: str | None = None) -> dtensor.Mesh:
    """The mesh of a text such as "tensor=2", over the first devices of this process.

    On a CPU they are virtual ones, which TensorFlow makes when it starts: so call this before anything that computes.

    Args:
        device: "CPU", "GPU" or "TPU"; by default GPU where there is any.

    Raises:
        InputError: what `Mesh.parse` refuses; an unknown kind of device; fewer devices than the mesh has.
    """
    mesh = Mesh.parse(text)
    kind = (device or ("GPU" if tf.config.list_physical_devices("GPU") else "CPU")).upper()
    if kind not in KINDS:
        raise InputError("init_mesh", [f"device: expected one of {', '.join(KINDS)}, got {device!r}"])
    with contextlib.suppress(ValueError):  # TensorFlow has started already, with the devices that it has
        dtensor.initialize_accelerator_system(kind, num_logical_cpu_devices=mesh.devices if kind == "CPU" else None)
    found = len(tf.config.list_logical_devices(kind))
    if found < mesh.devices:
        more = "; TensorFlow makes them when it starts: call init_mesh before it computes" if kind == "CPU" else ""
        raise InputError(f"{mesh}", [f"devices: expected {mesh.devices} of kind {kind}, got {found}{more}"])
    names = [f"{kind}:{number}" for number in range(mesh.devices)]
    return dtensor.create_mesh(list(zip(mesh.names, mesh.sizes, strict=True)), devices=names)


def shard_model(model, device_mesh: dtensor.Mesh, rules: Rules = RULES):
    """Lays the weights of a model out over a mesh, in place, one after another; returns it.

    Raises:
        InputError: before anything is changed: sizes that do not divide; a model that is on a mesh, has adapters, was
            made in the scope of a strategy, or attends by a kernel.
    """
    placement = Placement(device_mesh, rules)
    for name, spec in specs_on(placement, model).items():
        set_value(model.weight(name), placement, model.weight(name).numpy(), spec)
    place(model, placement)
    return model


def specs_on(placement: Placement, model) -> dict[str, Spec]:
    """Name to the axis of each dimension, for every stored weight; raises as `shard_model`."""
    raise_if(InputError, "a model on a mesh", _model_problems(placement, model))
    return partition(model.config, placement.mesh, placement.rules, model.task)


def set_value(variable: keras.Variable, placement: Placement, array: np.ndarray, spec: Spec) -> None:
    """Gives a Keras variable, in place of its value, one on the mesh; Keras 3.15 has no public way."""
    variable._value = CutVariable(placement, spec, placement.cut(array, spec), variable.name)


def place(model, placement: Placement) -> None:
    """From here on the model computes on the mesh, where its weights are."""
    for part in (model, model.base_model):
        part.placement = placement
        part.forget_compiled()


def check_on_no_mesh(model, what: str) -> None:
    """Raises an InputError for a model that is on a mesh."""
    if model.placement is not None:
        raise InputError(what, ["model: expected one on no mesh, which is for inference; save_pretrained leaves one"])


# -- calls ------------------------------------------------------------------------------------------------------------


def compile_for(placement: Placement, function: Callable) -> Callable:
    """A function of tensors and options, compiled for a mesh: it takes and returns ordinary ones, but for caches."""
    compiled = tf.function(lambda *given: _map(placement.whole, function(*given)), autograph=False)

    def call(*given):
        given = tf.nest.map_structure(placement.put, given)
        with dtensor.default_mesh(placement.device_mesh):
            out = compiled(*given)
        return _map(lambda x: dtensor.unpack(x)[0], out)

    return call


def call_on_mesh(model, arguments: dict):
    """A call of a model that is on a mesh.

    Raises:
        InputError: what is wrong with the arguments; training, or a call inside of a traced function.
    """
    raise_if(InputError, "a model on a mesh", _call_problems(arguments))
    model.check_inputs(**{name: x for name, x in arguments.items() if name in arguments_of(model.check_inputs)})
    tensors = {name: x for name, x in arguments.items() if tf.is_tensor(x) or isinstance(x, Cache)}
    if model.task == "causal-lm" and "labels" in tensors:
        check_labels("labels", known(tensors["labels"]), tensors["labels"].shape, model.config.vocab_size)
    options = tuple(sorted((name, x) for name, x in arguments.items() if name not in {*tensors, "training"}))

    def program(tensors, *options):
        return model.call(**tensors, **dict(options))

    if model.compiled_call is None:
        model.compiled_call = compile_for(model.placement, program)
    return model.compiled_call(tensors, *options)


def _map(function: Callable, out):
    """The function of every tensor in an output, but of the buffers of a cache."""
    if isinstance(out, Cache):
        return out._replace(lengths=function(out.lengths))
    if isinstance(out, tuple):
        parts = [_map(function, part) for part in out]
        return type(out)(*parts) if hasattr(out, "_fields") else tuple(parts)
    return function(out) if tf.is_tensor(out) else out


def _model_problems(placement: Placement, model) -> Iterator[str]:
    if len(placement.device_mesh.local_devices()) != placement.mesh.devices:
        yield "device_mesh: expected one over devices of this process alone"
    if model.placement is not None:
        yield "model: expected one that is on no mesh"
    if model.lora is not None:
        yield "model: expected one without adapters; merge_lora makes it one"
    if model.distribute_strategy.num_replicas_in_sync > 1:
        yield "model: expected one made outside of the scope of a strategy"
    if model.attn_implementation in FUSED:
        yield f"attn_implementation: expected eager or sdpa, got {model.attn_implementation!r}"


def _call_problems(arguments: dict) -> Iterator[str]:
    if arguments.get("training"):
        yield "training: expected False; TensorFlow's DTensor is used for inference alone"
    if not tf.executing_eagerly() or any(isinstance(x, keras.KerasTensor) for x in arguments.values()):
        yield "model: expected a call outside of functions and of other models, since it compiles one for the mesh"
