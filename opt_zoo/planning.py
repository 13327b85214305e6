"""What a model needs on several devices: bytes on each of them, and the least time of a step; nothing is allocated.

Formulas with their sources and what they leave out: docs/scale.md. Memory is that of `opt_torch`, whose measured peak
the tests compare; time counts what no implementation can avoid (`bench.work`) and no communication, hence is a floor.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

from opt_core.config import OPTConfig
from opt_core.errors import InputError
from opt_core.schema import weights
from opt_core.sharding import LAYOUTS, Mesh, computing_mesh, local_batch, local_shapes, meshes
from opt_zoo.bench.work import ITEM_BYTES, work_of
from opt_zoo.devices import Device

MODES = ("inference", "training")
# Of `linear_cross_entropy`: the most logits that the loss holds at once, and of their gradients, of which it holds two.
LOGITS_BLOCK, GRADIENTS_BLOCK = 2**26, 2**22
FLOAT32 = 4
MOST_DEVICES = 1024  # that `fewest_devices` tries


class Job(NamedTuple):
    """What is to be done: `batch` rows of `length` tokens in a step, on all devices together.

    Inference: a prompt and its new tokens have `length` slots in the cache. Training: a step of AdamW, its batch
    computed in `accumulate` parts, each layer computed again in the backward pass if `recompute`; gradients and both
    moments have the dtype of the weights, as the Trainers have it, products `compute_dtype` if it is another.
    """

    config: OPTConfig
    mode: str = "inference"
    dtype: str = "float32"
    batch: int = 1
    length: int = 2048
    accumulate: int = 1
    recompute: bool = False
    compute_dtype: str | None = None

    @property
    def computed_in(self) -> str:
        return self.compute_dtype or self.dtype

    def check(self) -> None:
        """Raises an InputError that lists the numbers that are out of range."""
        counts = dict(batch=self.batch, length=self.length, accumulate=self.accumulate)
        problems = [f"{name}: expected at least 1, got {count}" for name, count in counts.items() if count < 1]
        if self.length > self.config.max_position_embeddings:
            problems.append(f"length: expected at most {self.config.max_position_embeddings}, got {self.length}")
        if self.mode == "inference" and self.computed_in != self.dtype:
            problems.append(f"compute_dtype: expected {self.dtype}, the dtype, in inference, got {self.compute_dtype}")
        if problems:
            raise InputError("plan", problems)


class Memory(NamedTuple):
    """Bytes on each device."""

    weights: int
    gradients: int
    optimizer: int
    cache: int
    activations: int  # at their peak, with the buffers of that moment
    gathered: int  # weights of other devices or in another dtype, there while they are used, and their gradients
    total: int  # at the peak of them together, which may be less than their sum


class Plan(NamedTuple):
    """A job on a mesh. `problems` says why it cannot run there; the rest is then None."""

    layout: str
    mesh: Mesh
    batch: int
    problems: tuple[str, ...] = ()
    memory: Memory | None = None
    seconds: dict[str, float] | None = None  # "prefill" and "step", or "step" of training; None: rates unknown

    def fits(self, memory_bytes: int) -> bool:
        return self.memory is not None and self.memory.total <= memory_bytes


def plans(job: Job, devices: int, device: Device, layouts: tuple[str, ...] = tuple(LAYOUTS)) -> Iterator[Plan]:
    """A plan for every mesh of every layout.

    Raises:
        InputError: numbers of the job or of devices that are out of range.
    """
    job.check()
    if devices < 1:
        raise InputError("plan", [f"devices: expected at least 1, got {devices}"])
    for layout in layouts:
        try:
            found = meshes(layout, devices)
        except InputError as error:
            yield Plan(layout, Mesh((), ()), job.batch, error.problems)
            continue
        for mesh in found:
            yield plan(job, layout, mesh, device)


def plan(job: Job, layout: str, mesh: Mesh, device: Device) -> Plan:
    try:
        return Plan(layout, mesh, job.batch, (), memory_of(job, mesh), seconds_of(job, mesh, device))
    except InputError as error:
        return Plan(layout, mesh, job.batch, error.problems)


def fewest_devices(job: Job, device: Device, layout: str) -> Plan | None:
    """The first plan that fits, over 1, 2, 4, ... devices; where they cut the batch, each has a row at least."""
    count = len(LAYOUTS[layout]) ** 2  # the least that has two axes is 2 x 2
    while count <= MOST_DEVICES:
        for mesh in meshes(layout, count):
            parts = mesh.devices // computing_mesh(mesh).devices * job.accumulate
            found = plan(job._replace(batch=-(-job.batch // parts) * parts), layout, mesh, device)
            if found.fits(device.memory):
                return found
        count *= 2
    return None


# -- memory -----------------------------------------------------------------------------------------------------------


def memory_of(job: Job, mesh: Mesh) -> Memory:
    """Raises an InputError as `partition` and `local_batch` do."""
    config, item = job.config, ITEM_BYTES[job.dtype]
    rows = _rows(job, mesh)
    part = Part(config, mesh.size("tensor"), rows * job.length, item, ITEM_BYTES[job.computed_in])
    held = item * sum(map(math.prod, local_shapes(config, mesh).values()))
    gathered = _gathered(job, mesh)
    if job.mode == "inference":
        cache = rows * job.length * part.slot_bytes
        activations = max(part.prefill_bytes, cache)  # the cache of the prompt is copied into one with all slots
        total = held + cache + activations + gathered.in_layer
        return Memory(held, 0, 0, cache, activations, gathered.in_layer, total)
    at_loss, backward = part.loss_bytes(job.recompute), part.backward_bytes(job.recompute)
    moments = [(at_loss, gathered.outside), (backward, gathered.in_layer + gathered.layer)]
    if job.accumulate > 1:
        moments = [(held + activations, others) for activations, others in moments]
    else:  # activations go as gradients come
        moments.append((held + part.last_bytes(), gathered.at_end))
    peak = max(moments, key=sum)
    return Memory(held, held, 2 * held, 0, max(at_loss, backward), peak[1], 3 * held + sum(peak))


def _rows(job: Job, mesh: Mesh) -> int:
    """Of a device, computed at once."""
    rows = local_batch(job.batch, mesh)
    if job.mode == "training" and rows % job.accumulate:
        raise InputError(f"{mesh}", [f"accumulate: expected a divisor of {rows} rows, got {job.accumulate}"])
    return rows // (job.accumulate if job.mode == "training" else 1)


class Part(NamedTuple):
    """What a device computes: all of the width, a share 1 / `cut` of heads, feed-forward and vocabulary."""

    config: OPTConfig
    cut: int
    tokens: int
    item: int  # bytes of a weight, and of a hidden state between layers
    computed: int  # of what products take

    @property
    def heads(self) -> Iterator[float]:
        """Of each layer."""
        return (self.config.heads_of(layer) / self.cut for layer in range(self.config.num_hidden_layers))

    @property
    def slot_bytes(self) -> int:
        """Keys and values of a token in all layers."""
        return int(2 * sum(self.heads) * self.config.head_size * self.item)

    @property
    def prefill_bytes(self) -> int:
        """Of a layer, at its widest: its input, residual, normalised input, feed-forward before and after the
        activation; beside the cache."""
        D, F = self.config.hidden_size, self.config.ffn_dim
        return int(self.tokens * self.item * (3 * D + 2 * F / self.cut))

    def saved_bytes(self, heads: float) -> float:
        """Of a layer for its backward pass: inputs and outputs of both norms; q, k, v and the output of attention; the
        feed-forward once, twice where the activation's input is not in its output. No array of T x T."""
        D, F, A = self.config.hidden_size, self.config.ffn_dim, heads * self.config.head_size
        hidden = 1 if self.config.activation_function == "relu" else 2
        values = 2 * D * self.item + self.computed * (2 * D + 4 * A + hidden * F / self.cut)
        masks = 2 * D * (self.config.dropout > 0)  # a byte each
        return self.tokens * (values + masks + FLOAT32 * (4 + heads))  # statistics of norms and softmax

    def kept_bytes(self, recompute: bool) -> float:
        """Of all layers, from the forward pass to the backward pass."""
        if recompute:
            return self.config.num_hidden_layers * self.tokens * self.config.hidden_size * self.item
        return sum(map(self.saved_bytes, self.heads))

    @property
    def end_bytes(self) -> float:
        """Behind the last layer: its output, normalised and projected, and the gradient of that in float32."""
        D, E = self.config.hidden_size, self.config.word_embed_proj_dim
        return self.tokens * (
            (self.item + self.computed) * D + self.computed * E * self.config.has_projections + FLOAT32 * E
        )

    @property
    def head_weight_bytes(self) -> float:
        """The gradient of the head in float32, in which its parts are summed."""
        return FLOAT32 * self.config.vocab_size / self.cut * self.config.word_embed_proj_dim

    def loss_bytes(self, recompute: bool) -> int:
        """At the loss, which makes the head's gradient: a block of logits is there."""
        vocabulary = self.config.vocab_size / self.cut
        block = min(self.tokens * vocabulary, max(LOGITS_BLOCK, vocabulary))
        logits = self.computed * block + 2 * FLOAT32 * min(block, GRADIENTS_BLOCK)
        return int(self.kept_bytes(recompute) + self.end_bytes + self.head_weight_bytes + logits)

    def backward_bytes(self, recompute: bool) -> int:
        """At the last layer, the first in the backward pass, which computes its own again with `recompute`."""
        again = self.largest_saved_bytes if recompute else 0
        return int(self.kept_bytes(recompute) + again + self.local_bytes + self.head_weight_bytes)

    def last_bytes(self) -> int:
        """Beside the gradients, when all layers but the first have theirs: that layer's; or the token table's, which
        is there twice then, from the head and from the embedding."""
        return int(max(self.largest_saved_bytes + self.local_bytes, self.head_weight_bytes))

    @property
    def largest_saved_bytes(self) -> float:
        return max(map(self.saved_bytes, self.heads), default=0)

    @property
    def local_bytes(self) -> float:
        """In the backward pass of a layer: gradients of the feed-forward before and after the activation, of the hidden
        states, and of a weight."""
        D, F = self.config.hidden_size, self.config.ffn_dim / self.cut
        return self.computed * self.tokens * (2 * F + D) + self.item * (self.tokens * D + D * F)


class Gathered(NamedTuple):
    """Bytes of whole weights that are there while they are used: where a batch axis cuts them, those outside the layers
    throughout, and of the layers the one in use and the one that is fetched meanwhile. Their gradients are as large."""

    outside: int
    layer: int = 0  # the largest
    gradients: int = 0  # of those outside, until the backward pass ends

    @property
    def in_layer(self) -> int:
        return self.outside + 2 * self.layer

    @property
    def at_end(self) -> int:
        """In the first layer, the last in the backward pass, with its gradients."""
        return self.in_layer + self.layer + self.gradients


def _gathered(job: Job, mesh: Mesh) -> Gathered:
    """Where no batch axis cuts weights, but products have another dtype: a copy of all of them."""
    computed = ITEM_BYTES[job.computed_in]
    outside, layers = 0, [0] * job.config.num_hidden_layers
    whole = local_shapes(job.config, computing_mesh(mesh))
    for weight in weights(job.config):
        size = computed * math.prod(whole[weight.name])
        if weight.layer is None:
            outside += size
        else:
            layers[weight.layer] += size
    if mesh.size("fsdp") == 1:
        return Gathered(outside + sum(layers) if job.computed_in != job.dtype else 0)
    return Gathered(outside, max(layers, default=0), outside)


# -- time -------------------------------------------------------------------------------------------------------------


def seconds_of(job: Job, mesh: Mesh, device: Device) -> dict[str, float] | None:
    """The larger of bytes over bandwidth and operations over rate; None where the device's are not known."""
    rate = device.flops_of(job.computed_in)
    if rate is None or device.bandwidth is None:
        return None
    cut, rows = mesh.size("tensor"), local_batch(job.batch, mesh)
    if job.mode == "training":
        return {"step": training_flops(job.config, job.dtype, rows, job.length) / cut / rate}
    work = work_of(job.config, job.dtype, rows, job.length, 0)
    return {
        "prefill": max(work.prefill_bytes / device.bandwidth, work.prefill_flops / rate) / cut,
        "step": max(work.step_bytes / device.bandwidth, work.step_flops / rate) / cut,
    }


def training_flops(config: OPTConfig, dtype: str, rows: int, length: int) -> float:
    """Three times those of a forward pass with the head at every position: two products of each backwards."""
    matrices = length * work_of(config, dtype, rows, 0, 0).step_flops
    width = config.num_hidden_layers * config.hidden_size
    return 3 * (matrices + rows * 2 * width * length**2)
