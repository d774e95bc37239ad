"""The replicas of `tf.distribute` that share a step, as seen by code inside the step.

JAX runs one program on all devices, so that there is always one replica.
"""

from __future__ import annotations

import keras
from keras import ops

from official_selftrain.utils.types import Tensor

# Difference between the seeds of neighboring replicas. Seeds of layers are often consecutive
# numbers: with a small difference, two layers on different replicas would draw the same numbers.
# Any large prime would do; this is the 10,000th.
SEED_STRIDE = 104729


def replicas() -> int:
    """Number of replicas that share the step."""
    if keras.backend.backend() != "tensorflow":
        return 1
    import tensorflow as tf

    return tf.distribute.get_strategy().num_replicas_in_sync


def replica_index() -> Tensor:
    """Index of this replica: an int, or a scalar tensor inside a step."""
    if replicas() == 1:
        return 0
    import tensorflow as tf

    context = tf.distribute.get_replica_context()
    return 0 if context is None else context.replica_id_in_sync_group


def sum_over_replicas(values: Tensor | list[Tensor]) -> Tensor | list[Tensor]:
    """Sums a tensor, or each tensor of a list, over the replicas that share the step."""
    if replicas() == 1:
        return values
    import tensorflow as tf

    context = tf.distribute.get_replica_context()
    return context.all_reduce(tf.distribute.ReduceOp.SUM, values)


class ReplicaSeed(keras.random.SeedGenerator):
    """Draws different random numbers on each replica.

    `keras.random.SeedGenerator` draws the same ones on all, so that every replica would drop the
    same blocks of its part of the batch.
    """

    def next(self, ordered: bool = True) -> Tensor:
        """The next seed, uint32 `[2]`."""
        seed = super().next(ordered)
        offset = ops.cast(replica_index(), seed.dtype) * SEED_STRIDE
        return seed + ops.stack([offset, ops.zeros_like(offset)])
