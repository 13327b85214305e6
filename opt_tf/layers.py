"""The layers with weights, TensorFlow: published names, published (out, in) layout, published initialisation.

Weights are cast to the dtype of what they meet, so that a mixed policy (float32 weights, bfloat16 products) needs no
more.
"""

import contextlib
import contextvars
import math
from collections.abc import Iterator

import keras
import tensorflow as tf
from tensorflow import Tensor
from tensorflow.compiler.tf2xla.ops import gen_xla_ops
from tensorflow.compiler.tf2xla.python import xla
from tensorflow.compiler.xla import xla_data_pb2
from tensorflow.experimental import dtensor
from tensorflow.python.ops import control_flow_util

from opt_core.config import LAYER_NORM_EPS

# TensorFlow's own gelu (2.21) has its constants in float32, which a float64 model would feel.
ACTIVATION_FUNCTIONS = {
    "relu": tf.nn.relu,
    "gelu": lambda x: 0.5 * x * (1 + tf.math.erf(x * 0.5**0.5)),
    "gelu_new": lambda x: 0.5 * x * (1 + tf.tanh((2 / math.pi) ** 0.5 * (x + 0.044715 * x**3))),
    "silu": tf.nn.silu,
}

FEW_ROWS = 256  # up to here, packing the weights costs more than the best order of the factors gains

_no_values = contextvars.ContextVar("no_values", default=False)


@contextlib.contextmanager
def no_values() -> Iterator[None]:
    """Weights made inside are not initialised: their memory is reserved, not touched, until they are assigned."""
    token = _no_values.set(True)
    try:
        yield
    finally:
        _no_values.reset(token)


class Module(keras.layers.Layer):
    """A Keras layer, complete when constructed, whose call is a plain function call.

    Keras tracks its weights; building, casting and mask propagation around the call are left out.
    """

    def __init__(self, dtype=None):
        super().__init__(dtype=dtype, autocast=False)
        self.built = True

    def __call__(self, *args, **kwargs):
        return self.call(*args, **kwargs)

    def add_parameter(self, name: str, *shape: int) -> keras.Variable:
        """An uninitialised weight."""
        empty = lambda shape, dtype: tf.raw_ops.Empty(shape=shape, dtype=dtype)  # noqa: E731
        return self.add_weight(name=name, shape=shape, initializer=empty, autocast=False)


class Linear(Module):
    """x W^T + b with `weight` [out, in]; weights start normal with `init_std`, biases at zero.

    With an adapter (`enable_lora`) it adds scaling * (x A^T) B^T, with `lora_A` [r, in] and `lora_B` [out, r].
    """

    def __init__(self, in_features: int, out_features: int, *, bias: bool, init_std: float, dtype=None):
        super().__init__(dtype)
        self.init_std = init_std
        self.weight = self.add_parameter("weight", out_features, in_features)
        self.bias = self.add_parameter("bias", out_features) if bias else None
        self.lora_A = self.lora_B = None
        if not _no_values.get():
            self.reset_parameters()

    def reset_parameters(self) -> None:
        self.weight.assign(tf.random.normal(self.weight.shape, stddev=self.init_std, dtype=self.weight.dtype))
        if self.bias is not None:
            self.bias.assign(tf.zeros_like(self.bias))

    def enable_lora(self, rank: int, lora_alpha: float | None = None, lora_dropout: float = 0.0) -> None:
        """Freezes the weight and adds an adapter to train, as Keras' own layers do; the scaling is lora_alpha / rank.

        The matrices are float32 at least. A starts uniform within 1 / sqrt(in), B at zero, so nothing changes yet.
        `lora_alpha` is `rank` by default, `lora_dropout` acts on the input of the adapter in training.
        """
        if self.lora_enabled:
            raise ValueError("enable_lora: expected a layer without an adapter")
        out_features, in_features = self.weight.shape
        wide = "float64" if self.weight.dtype == "float64" else "float32"
        uniform = keras.initializers.RandomUniform(-(in_features**-0.5), in_features**-0.5)
        options = dict(dtype=wide, autocast=False)
        self.lora_A = self.add_weight(name="lora_A", shape=(rank, in_features), initializer=uniform, **options)
        self.lora_B = self.add_weight(name="lora_B", shape=(out_features, rank), initializer="zeros", **options)
        self.lora_scaling = (rank if lora_alpha is None else lora_alpha) / rank
        self.lora_dropout = lora_dropout
        self.weight.trainable = False

    @property
    def lora_enabled(self) -> bool:
        return self.lora_A is not None

    def merge_lora(self) -> None:
        """Adds the adapter's product to the weight, rounded once, and drops the adapter."""
        product = tf.matmul(self.lora_B, self.lora_A) * self.lora_scaling
        self.weight.assign(tf.cast(tf.cast(self.weight, product.dtype) + product, self.weight.dtype))
        for matrix in (self.lora_A, self.lora_B):
            self._untrack_variable(matrix)
        self.lora_A = self.lora_B = None
        self.weight.trainable = True

    def call(self, x: Tensor, seed: Tensor | None = None) -> Tensor:
        """`seed` [2] is given in training, for the dropout of an adapter."""
        y = linear(x, self.weight, self.bias)
        if not self.lora_enabled:
            return y
        down = linear(drop_values(x, 0.0 if seed is None else self.lora_dropout, seed), self.lora_A)
        return y + self.lora_scaling * linear(down, self.lora_B)


class Embedding(Module):
    """Rows of `weight` [num_embeddings, width]; they start normal with `init_std`, that of `zero_row` at zero."""

    def __init__(self, num_embeddings: int, width: int, *, init_std: float, zero_row: int | None = None, dtype=None):
        super().__init__(dtype)
        self.init_std, self.zero_row = init_std, zero_row
        self.weight = self.add_parameter("weight", num_embeddings, width)
        if not _no_values.get():
            self.reset_parameters()

    def reset_parameters(self) -> None:
        rows = tf.random.normal(self.weight.shape, stddev=self.init_std, dtype=self.weight.dtype)
        if self.zero_row is not None:
            rows = tf.tensor_scatter_nd_update(rows, [[self.zero_row]], tf.zeros_like(rows[:1]))
        self.weight.assign(rows)

    def call(self, index: Tensor) -> Tensor:
        table = self.weight.value
        if table.dtype == tf.bfloat16 and _in_xla_on_cpu():
            table, index = _kept(tf.convert_to_tensor(table), index)
        rows = _rows_on_mesh(self.weight, index) if on_mesh() else tf.gather(table, index)
        rows = tf.cast(rows, self.compute_dtype)
        if tf.executing_eagerly():
            return rows
        # XLA clamps an index out of range; NaN is what a compiled function can answer in place of an error.
        in_range = (index >= 0) & (index < self.weight.shape[0])
        return tf.where(in_range[..., None], rows, tf.constant(float("nan"), rows.dtype))


def _rows_on_mesh(table: keras.Variable, index: Tensor) -> Tensor:
    """Rows of a table that devices share: each looks up those that it has, and they add them up.

    DTensor (TensorFlow 2.21) looks up in a whole table alone. This is what Megatron does (Shoeybi et al.,
    arXiv:1909.08053, section 3), for all parts of the table at a time.
    """
    P, (V, E) = table.value.used_layout.num_shards(0), table.shape
    first_P1 = tf.range(0, V, V // P, dtype=index.dtype)[:, None]
    local_PR = tf.reshape(index, [1, -1]) - first_P1
    is_here_PR = (local_PR >= 0) & (local_PR < V // P)
    rows_PRE = tf.gather(tf.reshape(in_use(table), [P, V // P, E]), tf.where(is_here_PR, local_PR, 0), batch_dims=1)
    rows_RE = tf.reduce_sum(tf.where(is_here_PR[..., None], rows_PRE, tf.zeros([], rows_PRE.dtype)), axis=0)
    return tf.reshape(rows_RE, [*index.shape, E])


class LayerNorm(Module):
    """(x - mean) / sqrt(variance + 1e-5) * weight + bias over the last dimension, in float32 at least inside."""

    def __init__(self, width: int, *, affine: bool, dtype=None):
        super().__init__(dtype)
        self.weight = self.add_parameter("weight", width) if affine else None
        self.bias = self.add_parameter("bias", width) if affine else None
        if not _no_values.get():
            self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.weight is not None:
            self.weight.assign(tf.ones_like(self.weight))
            self.bias.assign(tf.zeros_like(self.bias))

    def call(self, x: Tensor) -> Tensor:
        wide = _standardised(at_least_float32(x))
        if self.weight is not None:
            wide = wide * tf.cast(in_use(self.weight), wide.dtype) + tf.cast(in_use(self.bias), wide.dtype)
        return tf.cast(wide, x.dtype)


@tf.custom_gradient
def _standardised(x: Tensor):
    """(x - mean) / sqrt(variance + 1e-5), of which the gradient keeps the result alone, and the roots."""
    centred = x - tf.reduce_mean(x, axis=-1, keepdims=True)
    scale = tf.math.rsqrt(tf.reduce_mean(tf.square(centred), axis=-1, keepdims=True) + LAYER_NORM_EPS)
    y = centred * scale

    def gradient(dy: Tensor) -> Tensor:
        along_y = tf.reduce_mean(dy * y, axis=-1, keepdims=True)
        return scale * (dy - tf.reduce_mean(dy, axis=-1, keepdims=True) - y * along_y)

    return y, gradient


def linear(x: Tensor, weight: keras.Variable, bias: keras.Variable | None = None) -> Tensor:
    """x W^T + b in the dtype of `x`; leading dimensions are joined, since TensorFlow broadcasts W otherwise."""
    out_features, in_features = weight.shape
    rows_RI, weight = tf.reshape(x, [-1, in_features]), tf.cast(in_use(weight), x.dtype)
    if _in_xla_on_cpu():
        rows_RO = tf.cast(_xla_product(rows_RI, weight), x.dtype)
    else:
        rows_RO = tf.matmul(rows_RI, weight, transpose_b=True)
    rows_RO = rows_RO if bias is None else tf.nn.bias_add(rows_RO, tf.cast(in_use(bias), x.dtype))
    return tf.reshape(rows_RO, [*dims(x)[:-1], out_features])


@tf.custom_gradient
def _xla_product(x_RI: Tensor, weight: Tensor) -> Tensor:
    """x W^T, summed and returned in float32 at least, as XLA on a CPU (TensorFlow 2.21) does it fastest.

    Few rows as (W x^T)^T, since it packs the second factor each time. bfloat16 it multiplies as it is from 32 rows on
    (3 times as fast at 128 rows), and one row by one pass over W; else it would first make a float32 copy of W.
    """

    def gradient(dy_RO: Tensor) -> tuple[Tensor, Tensor]:
        dy_RO = tf.cast(dy_RO, x_RI.dtype)
        return tf.matmul(dy_RO, weight), tf.matmul(dy_RO, x_RI, transpose_a=True)

    R, is_bfloat16 = x_RI.shape[0], x_RI.dtype == tf.bfloat16
    if R is None or R > FEW_ROWS:
        return _dot(x_RI, weight), gradient
    if R == 1 and is_bfloat16:
        return _dot(*_barrier(x_RI, weight)), gradient
    padding = max(0, 32 - R) if is_bfloat16 else 0
    (y_OR,) = _barrier(_dot(weight, tf.pad(x_RI, [[0, padding], [0, 0]])))  # or XLA makes it x W^T again
    return tf.transpose(y_OR[:, :R]), gradient


def _dot(x_RI: Tensor, y_OI: Tensor) -> Tensor:
    last = xla_data_pb2.DotDimensionNumbers(lhs_contracting_dimensions=[1], rhs_contracting_dimensions=[1])
    wide = tf.float64 if x_RI.dtype == tf.float64 else tf.float32
    return xla.dot_general(x_RI, y_OI, last, preferred_element_type=wide)


def _barrier(*tensors: Tensor) -> list[Tensor]:
    """The same tensors, past which XLA moves nothing."""
    return gen_xla_ops.xla_optimization_barrier(input=tensors)


@tf.custom_gradient
def _kept(table: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Both as they are: in a loop, XLA on a CPU (TensorFlow 2.21) would keep a float32 copy of a bfloat16 table."""
    return tuple(_barrier(table, index)), lambda d_table, _: (d_table, None)


def _in_xla_on_cpu() -> bool:
    """Whether what is traced now belongs to a function with `jit_compile` and there is no GPU."""
    return control_flow_util.GraphOrParentsInXlaContext(tf.compat.v1.get_default_graph()) and not has_gpu()


def on_mesh() -> bool:
    """Whether what is traced now is to be split over a mesh of devices (`sharding.py`)."""
    return dtensor.get_default_mesh() is not None


def in_use(weight: keras.Variable) -> keras.Variable | Tensor:
    """A weight as it is computed with: on a mesh whole along the axes that cut rows, along which it may lie cut."""
    return dtensor.relayout(weight.value.read_value(), weight.value.used_layout) if on_mesh() else weight


def has_gpu() -> bool:
    return bool(tf.config.list_logical_devices("GPU"))


def drop_values(x: Tensor, rate: float, seed: Tensor | None) -> Tensor:
    """Zeroes each value with probability `rate` and scales the others by 1 / (1 - rate).

    `seed` [2] decides which, under XLA others than without it; at a rate of 0 there may be none.
    """
    if rate in (0, 1):  # TensorFlow refuses 1
        return x if rate == 0 else tf.zeros_like(x)
    return tf.nn.experimental.stateless_dropout(x, rate, seed, rng_alg="philox")


def at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == tf.float64 else tf.cast(x, tf.float32)


def dims(x: Tensor) -> list[int | Tensor]:
    """The sizes of `x`: integers where a traced function knows them, scalar tensors where it does not."""
    dynamic = None if x.shape.is_fully_defined() else tf.shape(x)
    return [dynamic[i] if size is None else size for i, size in enumerate(x.shape)]
