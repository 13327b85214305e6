"""The head and its loss in one, TensorFlow: the mean cross entropy of a linear layer's outputs, by chunks of rows.

The logits of a language model are its largest array: [1024, 50272] in float32 is 206 MB, and the plain formula holds
it three times, with the softmax and the gradient. Here no second one is made, and none at all where nobody asks for
the logits. Gradients are taken while the logits of a chunk are at hand, so no product is computed twice. Second-order
gradients are refused. What counts as a target: `losses.py`.
"""

import tensorflow as tf
from tensorflow import Tensor
from tensorflow.python.eager import record

from opt_core.reference import IGNORED_LABEL
from opt_tf.blockwise import loop
from opt_tf.layers import at_least_float32, dims, linear, on_mesh
from opt_tf.losses import cross_entropy

ROWS = 256  # of logits at a time


def linear_cross_entropy(
    hidden_RE: Tensor, weight_VE: Tensor, targets_R: Tensor, keep_logits: bool
) -> tuple[Tensor, Tensor | None]:
    """The mean of -log softmax(hidden W^T)[target] over targets that are not -100, and the logits [R, V] or None.

    The loss is float32 at least, and 0 where nothing is counted. Gradients arrive in the dtypes of `hidden_RE` and
    `weight_VE`, summed in float32 at least; one that comes in through the logits is added, as for any other tensor.

    Raises:
        NotImplementedError: when its gradients are to be differentiated.
    """
    if on_mesh():  # DTensor splits the plain formula, and no loop
        logits_RV = linear(hidden_RE, weight_VE)
        return cross_entropy(logits_RV, targets_R), logits_RV if keep_logits else None
    frozen = not getattr(weight_VE, "trainable", True)  # a variable of a model that trains adapters alone
    weight_VE = tf.convert_to_tensor(weight_VE)
    logits_RV = linear(hidden_RE, weight_VE) if keep_logits else None
    constant_RV = None if logits_RV is None else tf.stop_gradient(logits_RV)
    # A traced function need not see a tape around it: then the gradients are taken when they are asked for.
    taped = record.should_record_backprop([hidden_RE, weight_VE])

    @tf.custom_gradient
    def mean_loss(hidden_RE: Tensor, weight_VE: Tensor):
        given = hidden_RE, weight_VE, targets_R, constant_RV
        with record.stop_recording():  # or an eager tape would keep every chunk
            total, *sums = _by_rows(*given, taped, taped and not frozen)
            count = tf.cast(tf.maximum(tf.math.count_nonzero(targets_R != IGNORED_LABEL), 1), total.dtype)

        def gradient(d_loss: Tensor) -> list[Tensor | None]:
            with record.stop_recording():
                d_hidden_RE, d_weight_VE = sums if taped else _by_rows(*given, True, not frozen)[1:]
                gradients = [tf.cast(d_hidden_RE * (d_loss / count), hidden_RE.dtype)]
                if not frozen:
                    gradients.append(tf.cast(d_weight_VE * (d_loss / count), weight_VE.dtype))
            return [*_final(hidden_RE, weight_VE, gradients), *[None] * frozen]

        return total / count, gradient

    return mean_loss(hidden_RE, weight_VE), logits_RV


def _by_rows(
    hidden_RE: Tensor,
    weight_VE: Tensor,
    targets_R: Tensor,
    logits_RV: Tensor | None,
    wants_d_hidden: bool,
    wants_d_weight: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The sum of the losses, and its gradients as far as they are wanted, each in float32 at least."""
    R, E = dims(hidden_RE)
    J = -(-R // ROWS)
    J = tf.maximum(J, 1) if tf.is_tensor(J) else max(J, 1)  # a replica may have no row of a batch
    C = -(-R // J)
    weight_VE = tf.cast(weight_VE, hidden_RE.dtype)
    wide = tf.float64 if hidden_RE.dtype == tf.float64 else tf.float32

    def rows(j, total, d_hidden_RE, d_weight_VE):
        start = tf.minimum(j * C, R - C)
        hidden_CE = tf.slice(hidden_RE, [start, 0], [C, E])
        targets_C = tf.slice(targets_R, [start], [C])
        again_C = start + tf.range(C) < j * C  # rows of the chunk before
        targets_C = tf.where(again_C, tf.constant(IGNORED_LABEL, targets_C.dtype), targets_C)
        if logits_RV is None:
            logits_CV = linear(hidden_CE, weight_VE)
        else:
            logits_CV = tf.slice(logits_RV, [start, 0], [C, dims(logits_RV)[1]])
        counted_C = targets_C != IGNORED_LABEL
        losses_C, d_logits_CV = tf.raw_ops.SparseSoftmaxCrossEntropyWithLogits(
            features=at_least_float32(logits_CV), labels=tf.where(counted_C, targets_C, 0)
        )
        total += tf.reduce_sum(_only(counted_C, losses_C))
        d_logits_CV = tf.cast(d_logits_CV, hidden_RE.dtype)
        if wants_d_hidden:
            d_hidden_CE = _only(counted_C, tf.cast(tf.matmul(d_logits_CV, weight_VE), wide))
            d_hidden_RE = tf.tensor_scatter_nd_add(d_hidden_RE, (start + tf.range(C))[:, None], d_hidden_CE)
        if wants_d_weight:
            product_VE = tf.cast(tf.matmul(d_logits_CV, _only(counted_C, hidden_CE), transpose_a=True), wide)
            d_weight_VE = product_VE if d_weight_VE is None else d_weight_VE + product_VE
        return j + 1, total, d_hidden_RE, d_weight_VE

    nothing = tf.zeros([], wide)
    d_hidden_RE = tf.zeros([R, E], wide) if wants_d_hidden else nothing
    _, *sums = rows(tf.constant(0), nothing, d_hidden_RE, None if wants_d_weight else nothing)
    total, d_hidden_RE, d_weight_VE = loop(1, J, rows, *sums)
    return total, d_hidden_RE if wants_d_hidden else None, d_weight_VE if wants_d_weight else None


def _only(counted_C: Tensor, x: Tensor) -> Tensor:
    """The rows that are counted, the others as zeros."""
    counted = tf.reshape(counted_C, [-1, *[1] * (x.shape.rank - 1)])
    return tf.where(counted, x, tf.zeros([], x.dtype))


def _final(hidden_RE: Tensor, weight_VE: Tensor, gradients: list[Tensor]) -> list[Tensor]:
    """The gradients as they are, not to be differentiated: they were made outside of what tapes record."""

    @tf.custom_gradient
    def pass_on(hidden_RE: Tensor, weight_VE: Tensor):
        def refuse(*_):
            raise NotImplementedError("linear_cross_entropy: its gradients cannot be differentiated")

        return [tf.identity(x) for x in gradients], refuse

    return list(pass_on(hidden_RE, weight_VE))
