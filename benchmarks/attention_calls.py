"""What benchmarks/attention.py times, framework by framework: attention alone, and a training step of the model.

Attention alone is that of a backend on random [B, N, T, H]: "forward", and "both", forward and gradients of all three.
In decoding one query a row attends to the filled slots of a cache with room for all positions of the model.
A training step is the loss of the causal language model, without dropout, its gradients, and AdamW; weights and both
moments are in the dtype that is measured. PyTorch runs it as written, JAX compiled, TensorFlow as a graph, on a GPU
compiled by XLA.

Memory is, of attention alone, what a call takes beside its inputs; of a training step, all that the process holds at
its peak beyond what it held after the imports, weights among it. On a GPU that is what the framework's allocator gave
out, on a CPU resident memory, but for two: TensorFlow's allocator counts there, too; and for JAX it is what XLA says
that a compiled function needs: temporary memory for attention, and for training on a GPU arguments and results with it.
"""

import abc
import ctypes
import importlib
import importlib.util
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from opt_core import OPTConfig
from opt_core.errors import MissingFrameworkError
from opt_zoo.backends import load_backend
from opt_zoo.bench.contestant import NotRunError
from opt_zoo.bench.memory import PeakMemory
from opt_zoo.bench.worker import FIRST_TOKEN_ID

RATE = 1e-5  # of learning; the numbers of a step do not matter here
Call = Callable[[], Any]


class NotHere(Exception):
    """Why an implementation is not measured."""


class Calls(abc.ABC):
    """Those of one framework; `job` is a Job of attention_worker.py."""

    framework: str

    def __init__(self, job):
        self.job, self.config = job, OPTConfig.from_dict({**job.config, "dropout": 0.0, "attention_dropout": 0.0})

    def start(self) -> None:
        """Imports all that is needed; raises NotRunError."""
        try:
            load_backend(self.framework)
        except MissingFrameworkError as error:
            raise NotRunError(str(error)) from None
        self.imported = PeakMemory()

    @abc.abstractmethod
    def attention(self, implementation: str) -> dict[str, Call]:
        """Calls by what they compute, "forward" and "both"; raises InputError or NotHere."""

    @abc.abstractmethod
    def decoding(self, implementation: str) -> dict[str, Call]:
        """One call, "forward"."""

    @abc.abstractmethod
    def training(self, implementation: str) -> dict[str, Call]:
        """One call, "step"."""

    @abc.abstractmethod
    def wait(self, result: Any) -> None:
        """Returns when the device has computed a result."""

    def memory(self, call: Call, alone: bool) -> int | None:
        """Bytes of a second call, as the first one compiles; resident memory, where a framework does not say better."""
        self.wait(call())
        _give_back_freed_memory()
        from_here = PeakMemory()  # from here on the peak counts for `imported`, too
        self.wait(call())
        return (from_here if alone else self.imported).growth

    def random_qkv(self) -> list[np.ndarray]:
        """Query, key, value and the gradient of the output, [B, N, T, H] float32; the query is scaled already.

        On a GPU [B, T, N, H], as they lie in a model, where kernels that want another order have to change it.
        """
        shape = [self.job.batch, self.config.num_attention_heads, self.job.length, self.config.head_size]
        if self.job.device == "cuda":
            shape[1:3] = reversed(shape[1:3])
        rng = np.random.default_rng(0)
        q, k, v, d_out = (rng.standard_normal(shape, np.float32) for _ in range(4))
        return [q * np.float32(self.config.head_size**-0.5), k, v, d_out]

    def random_cache(self) -> list[np.ndarray]:
        """A query [B, N, 1, H], scaled already, and the keys and values of a cache [B, N, S, H], float32."""
        rng, (B, H) = np.random.default_rng(0), (self.job.batch, self.config.head_size)
        lengths = (1, *[self.config.max_position_embeddings] * 2)
        shapes = ((B, self.config.num_attention_heads, length, H) for length in lengths)
        q, k, v = (rng.standard_normal(shape, np.float32) for shape in shapes)
        return [q * np.float32(H**-0.5), k, v]

    def filled(self) -> np.ndarray:
        """How many slots of each row are filled before the token of this call, [B]: with it, `job.length`."""
        return np.full(self.job.batch, self.job.length - 1)

    def as_in_a_model(self, attend: Callable[..., Any]) -> Callable[..., Any]:
        """`attend` of [B, N, T, H] for what `random_qkv` returns."""
        if self.job.device == "cpu":
            return attend
        swap = self.swap
        return lambda *qkv: swap(attend(*map(swap, qkv)))

    @abc.abstractmethod
    def swap(self, x: Any) -> Any:
        """[B, T, N, H] to [B, N, T, H], and back."""

    def random_ids(self) -> np.ndarray:
        shape = self.job.batch, self.job.length
        return np.random.default_rng(0).integers(FIRST_TOKEN_ID, self.config.vocab_size, shape)


def _give_back_freed_memory() -> None:
    """Lets the next peak count what a call needs, not what the last one left to the allocator (glibc alone)."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


# -- PyTorch ----------------------------------------------------------------------------------------------------------


class Torch(Calls):
    framework = "torch"

    def start(self) -> None:
        super().start()
        self.torch = importlib.import_module("torch")
        self._model: Any = None

    def tensor(self, array: np.ndarray):
        return self.torch.from_numpy(array).to(self.job.device, getattr(self.torch, self.job.dtype))

    def attention(self, implementation: str) -> dict[str, Call]:
        attend, torch = self.as_in_a_model(self._attend(implementation)), self.torch
        *qkv, d_out = map(self.tensor, self.random_qkv())
        leaves = [x.clone().requires_grad_() for x in qkv]

        def forward():
            with torch.no_grad():
                return attend(*qkv)

        return {"forward": forward, "both": lambda: torch.autograd.grad(attend(*leaves), leaves, d_out)}

    def decoding(self, implementation: str) -> dict[str, Call]:
        from opt_torch import attention, cache, sdpa

        torch, name = self.torch, implementation
        q, k, v = map(self.tensor, self.random_cache())
        lengths = torch.from_numpy(self.filled()).to(self.job.device)
        if name == "eager":
            attend = lambda: attention.eager_attention(q, k, v, lengths)[0]  # noqa: E731
        elif name.startswith("library:"):
            if self.job.device == "cpu":
                raise NotHere("PyTorch has one kernel on a CPU, the one of sdpa")
            mask, kernel = attention.attend_mask(1, k.shape[2], lengths, q.device), sdpa.KERNELS[name.partition(":")[2]]

            def attend():
                with torch.nn.attention.sdpa_kernel([kernel]):
                    return torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, scale=1.0)
        else:
            attention.check_implementation(name, self.config)
            slots = cache.slots_behind(lengths, 1)
            attend = lambda: attention.cached_attention(q, k, v, slots, 0.0, name)  # noqa: E731

        def forward():
            with torch.no_grad():
                return attend()

        return {"forward": forward}

    def swap(self, x):
        return x.transpose(1, 2)

    def _attend(self, implementation: str) -> Callable[..., Any]:
        """`library:NAME` is a kernel of PyTorch's `scaled_dot_product_attention`, called as a user would."""
        from opt_torch import attention, sdpa

        if implementation == "eager":
            return lambda q, k, v: attention.eager_attention(q, k, v, None)[0]
        if not implementation.startswith("library:"):
            attention.check_implementation(implementation, self.config)
            return lambda q, k, v: attention.causal_attention(q, k, v, attn_implementation=implementation)
        if self.job.device == "cpu":
            raise NotHere("PyTorch has one kernel on a CPU, the one of sdpa")
        return self._library_kernel(sdpa.KERNELS[implementation.partition(":")[2]])

    def _library_kernel(self, kernel) -> Callable[..., Any]:
        function = self.torch.nn.functional.scaled_dot_product_attention
        from torch.nn.attention import sdpa_kernel

        def attend(q, k, v):
            try:
                with sdpa_kernel([kernel]):
                    return function(q, k, v, is_causal=True, scale=1.0)
            except RuntimeError as error:
                if "No available kernel" in str(error):
                    raise NotHere(f"PyTorch: {error}") from None
                raise

        return attend

    def training(self, implementation: str) -> dict[str, Call]:
        if self._model is None:
            self._model = self._make_model().to(self.job.device, getattr(self.torch, self.job.dtype)).train()
            self._optimizer = self.torch.optim.AdamW(self._model.parameters(), lr=RATE)
            self._ids = self.torch.from_numpy(self.random_ids()).to(self.job.device)
        self._model.set_attn_implementation(implementation)  # raises where it does not run

        def step():
            self._model.set_attn_implementation(implementation)
            loss = self._model(input_ids=self._ids, labels=self._ids, use_cache=False).loss
            loss.backward()
            self._optimizer.step()
            self._optimizer.zero_grad()
            return loss

        return {"step": step}

    def _make_model(self):
        return importlib.import_module("opt_torch").OPTForCausalLM(self.config)

    def wait(self, result: Any) -> None:
        if self.job.device == "cuda":
            self.torch.cuda.synchronize()

    def memory(self, call: Call, alone: bool) -> int | None:
        if self.job.device == "cpu":
            return super().memory(call, alone)
        self.wait(call())
        cuda = self.torch.cuda
        before = cuda.memory_allocated() if alone else 0
        cuda.reset_peak_memory_stats()
        self.wait(call())
        return cuda.max_memory_allocated() - before


class Transformers(Torch):
    """The published class in PyTorch, of transformers 4.57 or 5."""

    def start(self) -> None:
        missing = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
        if missing:
            raise NotRunError(f"{' and '.join(missing)} not installed")
        self._package = importlib.import_module("transformers")
        self._class = self._package.OPTForCausalLM  # imports PyTorch
        super().start()

    def attention(self, implementation: str) -> dict[str, Call]:
        raise NotHere("attention alone is not a function of transformers")

    decoding = attention

    def _make_model(self):
        return self._class(self._package.OPTConfig(**self.config.to_dict()))


# -- TensorFlow -------------------------------------------------------------------------------------------------------


class TensorFlow(Calls):
    framework = "tf"

    def start(self) -> None:
        super().start()
        self.tf = importlib.import_module("tensorflow")
        self._model: Any = None

    def _compile(self, function):
        return self.tf.function(function, jit_compile=self.job.device == "cuda", autograph=False)

    def attention(self, implementation: str) -> dict[str, Call]:
        from opt_tf.attention import causal_attention, check_implementation, eager_attention

        check_implementation(implementation, self.config, self.job.dtype)
        tf = self.tf
        *qkv, d_out = (tf.constant(x, self.job.dtype) for x in self.random_qkv())

        @self.as_in_a_model
        def attend(q, k, v):
            if implementation == "eager":
                return eager_attention(q, k, v, None)[0]
            return causal_attention(q, k, v, attn_implementation=implementation)

        def both(q, k, v, d_out):
            with tf.GradientTape() as tape:
                tape.watch([q, k, v])
                out = attend(q, k, v)
            return out, tape.gradient(out, [q, k, v], d_out)

        forward, both = self._compile(attend), self._compile(both)
        return {"forward": lambda: forward(*qkv), "both": lambda: both(*qkv, d_out)}

    def decoding(self, implementation: str) -> dict[str, Call]:
        from opt_tf.attention import cached_attention, check_implementation, eager_attention

        check_implementation(implementation, self.config, self.job.dtype)
        q, k, v = (self.tf.constant(x, self.job.dtype) for x in self.random_cache())
        lengths = self.tf.constant(self.filled())

        def attend(q, k, v, lengths):
            if implementation == "eager":
                return eager_attention(q, k, v, lengths)[0]
            return cached_attention(q, k, v, lengths)

        forward = self._compile(attend)
        return {"forward": lambda: forward(q, k, v, lengths)}

    def swap(self, x):
        return self.tf.transpose(x, [0, 2, 1, 3])

    def training(self, implementation: str) -> dict[str, Call]:
        if self._model is None:
            keras = importlib.import_module("keras")
            self._model = importlib.import_module("opt_tf").TFOPTForCausalLM(self.config, dtype=self.job.dtype)
            self._optimizer = keras.optimizers.AdamW(RATE)
            self._optimizer.build(self._model.trainable_variables)
            self._ids = self.tf.constant(self.random_ids())
        model, variables, tf = self._model, self._model.trainable_variables, self.tf
        model.set_attn_implementation(implementation)

        def step(ids):
            model.set_attn_implementation(implementation)  # runs once, when the graph is made
            with tf.GradientTape() as tape:
                loss = model(ids, labels=ids, use_cache=False, training=True).loss
            self._optimizer.apply(tape.gradient(loss, variables), variables)
            return loss

        compiled = self._compile(step)
        return {"step": lambda: compiled(self._ids)}

    def wait(self, result: Any) -> None:
        self.tf.nest.map_structure(lambda x: x.numpy() if x.shape.rank == 0 else x[:1, :1, :1].numpy(), result)

    def memory(self, call: Call, alone: bool) -> int | None:
        """By TensorFlow's own count, on a CPU, too: with oneDNN it keeps what it once took."""
        self.wait(call())
        info, device = self.tf.config.experimental, "CPU:0" if self.job.device == "cpu" else "GPU:0"
        try:
            before = info.get_memory_info(device)["current"] if alone else 0
            info.reset_memory_stats(device)
        except ValueError:  # built without oneDNN
            return None
        self.wait(call())
        return info.get_memory_info(device)["peak"] - before


# -- JAX --------------------------------------------------------------------------------------------------------------


class Compiled:
    """A compiled function with its arguments, which it may replace, and the memory that XLA gives it."""

    def __init__(self, function, arguments: Callable[[], tuple], keep: Callable[[Any], Any] = lambda result: result):
        self._compiled, self._arguments, self._keep = function.lower(*arguments()).compile(), arguments, keep
        sizes = self._compiled.memory_analysis()
        self.temporary_bytes = int(sizes.temp_size_in_bytes)
        outputs = sizes.output_size_in_bytes - sizes.alias_size_in_bytes
        self.all_bytes = int(self.temporary_bytes + sizes.argument_size_in_bytes + outputs)

    def __call__(self) -> Any:
        return self._keep(self._compiled(*self._arguments()))


class Flax(Calls):
    framework = "flax"

    def start(self) -> None:
        super().start()
        self.jax = importlib.import_module("jax")
        self._model: Any = None

    def attention(self, implementation: str) -> dict[str, Call]:
        from opt_flax.attention import causal_attention, check_implementation, eager_attention

        jax = self.jax
        check_implementation(implementation, self.config, jax.numpy.dtype(self.job.dtype))
        *qkv, d_out = (jax.numpy.asarray(x, self.job.dtype) for x in self.random_qkv())

        @self.as_in_a_model
        def attend(q, k, v):
            if implementation == "eager":
                return eager_attention(q, k, v, None)[0]
            return causal_attention(q, k, v, attn_implementation=implementation)

        def both(q, k, v, d_out):
            out, gradients = jax.vjp(attend, q, k, v)
            return out, gradients(d_out)

        return {
            "forward": Compiled(jax.jit(attend), lambda: tuple(qkv)),
            "both": Compiled(jax.jit(both), lambda: (*qkv, d_out)),
        }

    def decoding(self, implementation: str) -> dict[str, Call]:
        from opt_flax.attention import cached_attention, check_implementation, eager_attention

        jax = self.jax
        check_implementation(implementation, self.config, jax.numpy.dtype(self.job.dtype))
        q, k, v = (jax.numpy.asarray(x, self.job.dtype) for x in self.random_cache())
        lengths = jax.numpy.asarray(self.filled())

        def attend(q, k, v, lengths):
            if implementation == "eager":
                return eager_attention(q, k, v, lengths)[0]
            return cached_attention(q, k, v, lengths, implementation)

        return {"forward": Compiled(jax.jit(attend), lambda: (q, k, v, lengths))}

    def swap(self, x):
        return x.swapaxes(1, 2)

    def training(self, implementation: str) -> dict[str, Call]:
        nnx, optax, jax = (importlib.import_module(name) for name in ("flax.nnx", "optax", "jax"))
        if self._model is None:
            dtype = jax.numpy.dtype(self.job.dtype)
            self._model = importlib.import_module("opt_flax").FlaxOPTForCausalLM(self.config, dtype=dtype)
            self._optimizer = optax.adamw(RATE)
            self._weights = nnx.state(self._model, nnx.Param)
            self._state = jax.jit(self._optimizer.init)(self._weights)
        self._model.set_attn_implementation(implementation)
        graph, _, rest = nnx.split(self._model, nnx.Param, ...)

        def step(weights, state, ids):
            loss_of = lambda weights: nnx.merge(graph, weights, rest)(ids, labels=ids, use_cache=False).loss  # noqa: E731
            loss, gradients = jax.value_and_grad(loss_of)(weights)
            updates, state = self._optimizer.update(gradients, state, weights)
            return optax.apply_updates(weights, updates), state, loss

        def keep(result):
            self._weights, self._state, loss = result
            return loss

        ids = jax.numpy.asarray(self.random_ids())
        arguments = lambda: (self._weights, self._state, ids)  # noqa: E731
        compiled = Compiled(jax.jit(step, donate_argnums=(0, 1)), arguments, keep)
        return {"step": compiled}

    def wait(self, result: Any) -> None:
        self.jax.block_until_ready(result)

    def memory(self, call: Call, alone: bool) -> int | None:
        if alone or self.job.device == "cuda":
            self.wait(call())
            return call.temporary_bytes if alone else call.all_bytes
        return super().memory(call, alone)


CALLS: dict[str, type[Calls]] = {"torch": Torch, "tf": TensorFlow, "flax": Flax, "transformers": Transformers}
