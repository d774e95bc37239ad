"""Moving average of weights and statistics."""

import keras
from keras import ops


class WeightAverage(keras.layers.Layer):
    """Moving average of all numbers of a model: weights and batch statistics.

    decay_t = min(decay, (1 + t) / (10 + t)) after t updates, as in TF1, so that the average of a
    short run does not stay close to the initial weights. Batch statistics are averaged too, because
    statistics of other weights would not match.

    Args:
        model: the network to average. It is not stored, because Keras would then track its
            variables twice; pass it to each method.
        decay: share of the old average kept in one step.
    """

    def __init__(self, model, decay, **kwargs):
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

    def update(self, model, updates):
        """Moves the averages after `updates` updates of the model."""
        t = ops.cast(updates, "float32")
        decay = ops.minimum(self.decay, (1.0 + t) / (10.0 + t)) * ops.cast(t > 1, "float32")
        for variable, average in zip(_float_variables(model), self.averages, strict=True):
            average.assign(decay * average + (1.0 - decay) * ops.cast(variable, "float32"))

    def swap_weights(self, model):
        """Exchanges the averages with the model's own numbers; twice restores them."""
        for variable, average in zip(_float_variables(model), self.averages, strict=True):
            own = ops.convert_to_numpy(variable)
            variable.assign(ops.convert_to_numpy(average))
            average.assign(own)


def _float_variables(model):
    """Variables without the states of random generators."""
    return [v for v in model.variables if keras.backend.is_float_dtype(v.dtype)]
