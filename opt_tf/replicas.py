"""Data parallel over the replicas of a `tf.distribute` strategy, TensorFlow: what they must agree on.

TensorFlow copies the weights, deals out rows and runs the replicas. Keras adds up the gradients, but takes each
replica's mean for the loss, however many targets it has, and clips each replica's gradients before it adds them. With
what is here, a step is that of one device with all rows. Strategies of one process alone (MirroredStrategy).
"""

import tensorflow as tf
from tensorflow import Tensor

from opt_core.errors import InputError

_OF_SEVERAL_PROCESSES = (
    tf.distribute.MultiWorkerMirroredStrategy,
    tf.distribute.experimental.MultiWorkerMirroredStrategy,
    tf.distribute.experimental.ParameterServerStrategy,
)


def check_strategy(model, what: str) -> None:
    """Raises an InputError for a model that was made in the scope of a strategy of several processes.

    Keras 3.15 fails in their metrics, and every process would write the same files.
    """
    if isinstance(model.distribute_strategy, _OF_SEVERAL_PROCESSES):
        text = "strategy: expected one of a single process, such as MirroredStrategy, got one of several"
        raise InputError(what, [f"{text} (MultiWorkerMirroredStrategy, ParameterServerStrategy)"])


def replicas() -> int:
    """How many there are where this runs; 1 outside of what a strategy runs."""
    context = tf.distribute.get_replica_context()
    return 1 if context is None else context.num_replicas_in_sync


def sum_over_replicas(tensors: list[Tensor]) -> list[Tensor]:
    """The same tensors of all replicas, added up on each of them; no gradient flows back."""
    if replicas() == 1:
        return tensors
    return tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, tensors)


def shares_of_replica(counts: list[Tensor | int]) -> list[Tensor]:
    """What part this replica has of each of the counts, of those of all replicas together."""
    counts = [tf.cast(count, tf.float32) for count in counts]
    return [count / tf.maximum(total, 1) for count, total in zip(counts, sum_over_replicas(counts), strict=True)]


def share_loss(part: Tensor) -> Tensor:
    """This replica's part of a loss, with the value of the whole over the number of replicas on each of them.

    Gradients of the parts add up to that of the whole; Keras' trackers multiply the value with that number.
    """
    (whole,) = sum_over_replicas([tf.stop_gradient(part)])
    return part + tf.stop_gradient(whole / replicas() - part)


def seed_of_replica(seed: Tensor) -> Tensor:
    """Another seed [2] on every replica, whose rows would else lose the same values."""
    if replicas() == 1:
        return seed
    number = tf.distribute.get_replica_context().replica_id_in_sync_group
    return tf.random.experimental.stateless_fold_in(seed, number)
