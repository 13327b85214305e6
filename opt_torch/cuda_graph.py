"""A decode step recorded as a CUDA graph: one launch for its hundreds of kernels. Not for CPUs, which launch nothing.

A graph reads and writes the addresses that it was recorded with. So a recorded step has a cache and tokens of its own,
into which a prompt is copied, and it is recorded anew when weights have moved or another shape is asked for. A model
that does more than kernels of these weights is run step by step instead: see `can_be_recorded`.
"""

import contextlib
import weakref
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from opt_torch.cache import Cache, init_cache

WARM_UP_RUNS = 3  # what libraries and Triton compile and allocate at first must not be recorded

_steps: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # of each model, one step and what it was recorded for


class RecordedStep:
    """`decode_step` of a model, for one batch size and capacity; what it returns holds until it is called again."""

    def __init__(self, model, like: Cache):
        self.model, self.records = weakref.proxy(model), can_be_recorded(model)
        dtype = like.keys[0].dtype if like.keys else model.dtype
        with _outliving_tensors():
            self.cache = init_cache(model.config, like.batch_size, like.capacity, dtype=dtype, device=model.device)
            self.token_B = torch.zeros_like(self.cache.lengths)
        self.replay: Callable[[], Tensor] | None = None

    def take(self, cache: Cache) -> None:
        """Makes the cache of this step a copy of `cache`."""
        for mine, given in zip(_tensors(self.cache), _tensors(cache), strict=True):
            mine.copy_(given)

    def __call__(self, token_B: Tensor, cache: Cache) -> tuple[Tensor, Cache]:
        """The logits [B, V] after one token a row, and the cache with it; `cache` is the one of this step."""
        self.token_B.copy_(token_B)
        if self.replay is None:
            self.replay = self.step
            if self.records:
                with _outliving_tensors():
                    self.replay = record_graph(self.step, self.token_B.device)
        logits_BV = self.replay()
        self.cache.lengths.add_(1)
        return logits_BV, self.cache

    def step(self) -> Tensor:
        return self.model.decode_step(self.token_B, self.cache)[0]


@contextlib.contextmanager
def _outliving_tensors() -> Iterator[None]:
    """For what is kept from call to call: what `torch.inference_mode` makes cannot be written to outside of it."""
    with torch.inference_mode(False), torch.no_grad():  # in this order, since the first turns gradients on
        yield


def recorded_step(model, cache: Cache) -> RecordedStep:
    """The step of a model, with a copy of `cache`; the last one made serves as long as shapes and weights stay."""
    weights = tuple(parameter.data_ptr() for parameter in model.parameters())
    names = tuple(layer.self_attn.attn_implementation for layer in model.base_model.decoder.layers)
    made_for = (cache.batch_size, cache.capacity, weights, names, can_be_recorded(model))
    if model not in _steps or _steps[model][0] != made_for:
        _steps[model] = made_for, RecordedStep(model, cache)
    step = _steps[model][1]
    step.take(cache)
    return step


def can_be_recorded(model) -> bool:
    """Whether steps differ by the numbers that they read alone.

    A replay runs no hooks, does not see that an adapter of PEFT was switched off, and would read weights that autocast
    has cast and keeps until its context ends.
    """

    def is_plain(module: nn.Module) -> bool:
        hooks = module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
        return not hooks and (module is model or type(module).__module__.startswith(("opt_torch.", "torch.nn.")))

    return not torch.is_autocast_enabled(model.device.type) and all(map(is_plain, model.modules()))


def record_graph(step: Callable[[], Tensor], device: torch.device) -> Callable[[], Tensor]:
    """Records what `step` does on a GPU. The result does it again, and returns the same tensor with new values.

    `step` must be repeatable: it runs a few times before, and recording runs nothing.
    """
    with torch.cuda.device(device):  # streams belong to the current one, and a graph records one stream
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP_RUNS):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # On a stream of this device: by default it is one of the device that was first recorded on. What other threads
        # ask of CUDA meanwhile, such as pinned memory for the next batch, is theirs.
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            out = step()

    def replay() -> Tensor:
        graph.replay()
        return out

    return replay


def _tensors(cache: Cache) -> tuple[Tensor, ...]:
    return (*cache.keys, *cache.values, cache.lengths)
