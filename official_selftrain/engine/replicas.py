"""The replicas of `tf.distribute` that share a step, as code inside the step sees them.

On JAX there is one program over all devices, hence one replica.
"""

import keras
from keras import ops


def replicas():
    """Number of replicas that share the step."""
    if keras.backend.backend() != "tensorflow":
        return 1
    import tensorflow as tf

    return tf.distribute.get_strategy().num_replicas_in_sync


def replica_index():
    """Index of this replica among them."""
    if replicas() == 1:
        return 0
    import tensorflow as tf

    context = tf.distribute.get_replica_context()
    return 0 if context is None else context.replica_id_in_sync_group


def sum_over_replicas(values):
    """Sum of a tensor, or of each of a list, over the replicas that share the step."""
    if replicas() == 1:
        return values
    import tensorflow as tf

    context = tf.distribute.get_replica_context()
    return context.all_reduce(tf.distribute.ReduceOp.SUM, values)


class ReplicaSeed(keras.random.SeedGenerator):
    """Draws other random numbers on each replica; Keras' own draws the same on all."""

    def next(self, ordered=True):
        seed = super().next(ordered)
        offset = ops.cast(replica_index(), seed.dtype) * 104729
        return seed + ops.stack([offset, ops.zeros_like(offset)])
