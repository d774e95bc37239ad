"""Moving average of weights and batch statistics."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from official_selftrain.utils.types import Tensor


class WeightAverage(keras.layers.Layer):
    """Moving average (EMA) of all float variables of a model: weights and batch statistics.

    decay_t = min(decay, (1 + t) / (10 + t)) after t updates, as in TF1, so that the average of a
    short run does not stay close to the initial weights. Batch statistics are averaged too, because
    statistics of other weights would not match. Keras' option `use_ema` of an optimizer has a
    constant decay and averages trainable weights only.

    Args:
        model: the network to average. It is not stored, because Keras would then track its
            variables twice; pass it to each method.
        decay: fraction of the old average that one update keeps, 0 to 1.
    """

    def __init__(self, model: keras.Model, decay: float, **kwargs: Any):
        super().__init__(dtype="float32", **kwargs)
        self.decay = decay
        self.averages = [
            # Replicas hold identical values, so reading the first is enough.
            self.add_weight(
                v.shape,
                initializer="zeros",
                trainable=False,
                aggregation="only_first_replica",
                name=f"average_{index}",
            )
            for index, v in enumerate(_float_variables(model))
        ]

    def update(self, model: keras.Model, updates: Tensor) -> None:
        """Moves the averages towards the model's values.

        Args:
            model: the network.
            updates: integer scalar, number of updates of the model, this one included.
        """
        # After the first update the decay is 0: the zeros that the averages start from are
        # replaced, and need no bias correction.
        t = ops.cast(updates, "float32")
        decay = ops.minimum(self.decay, (1.0 + t) / (10.0 + t)) * ops.cast(t > 1, "float32")
        for variable, average in zip(_float_variables(model), self.averages, strict=True):
            average.assign(decay * average + (1.0 - decay) * ops.cast(variable, "float32"))

    def swap_weights(self, model: keras.Model) -> None:
        """Exchanges the averages with the model's own values; a second call restores them."""
        for variable, average in zip(_float_variables(model), self.averages, strict=True):
            own = ops.convert_to_numpy(variable)
            variable.assign(ops.convert_to_numpy(average))
            average.assign(own)


def _float_variables(model: keras.Model) -> list[keras.Variable]:
    """All variables except for the states of random generators, which are integers."""
    return [v for v in model.variables if keras.backend.is_float_dtype(v.dtype)]
