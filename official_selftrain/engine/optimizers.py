"""SGD with momentum and the released learning-rate schedules (reference section 12)."""

import math

import keras
from keras import ops


@keras.saving.register_keras_serializable("official_selftrain")
class WarmupSchedule(keras.optimizers.schedules.LearningRateSchedule):
    """Linear warm-up, then a cosine to 0 or steps.

    With s the number of updates made so far:
    s < warmup: warmup_rate + s / warmup * (rate - warmup_rate);
    cosine: rate / 2 * (1 + cos(pi * (s - warmup) / (total - warmup)));
    steps: `rates[k]` from `boundaries[k]` on.

    Args:
        kind: "cosine" or "step".
        rate: peak learning rate.
        warmup_rate, warmup_steps: of the warm-up.
        total_steps: of the training.
        boundaries, rates: of the steps.
    """

    def __init__(self, kind, rate, warmup_rate, warmup_steps, total_steps, boundaries=(), rates=()):
        self.settings = {
            "kind": kind,
            "rate": rate,
            "warmup_rate": warmup_rate,
            "warmup_steps": warmup_steps,
            "total_steps": total_steps,
            "boundaries": tuple(boundaries),
            "rates": tuple(rates),
        }

    def __call__(self, step):
        s = self.settings
        step = ops.cast(step, "float32")
        warmup = float(s["warmup_steps"])
        if s["kind"] == "cosine":
            done = (step - warmup) / max(s["total_steps"] - warmup, 1.0)
            rate = s["rate"] * (ops.cos(math.pi * done) + 1.0) / 2.0
        else:
            rate = ops.full_like(step, s["rate"])
            for boundary, level in zip(s["boundaries"], s["rates"], strict=True):
                rate = ops.where(step >= boundary, level, rate)
        if not warmup:
            return rate
        rising = s["warmup_rate"] + step / warmup * (s["rate"] - s["warmup_rate"])
        return ops.where(step < warmup, rising, rate)

    def get_config(self):
        return self.settings


@keras.saving.register_keras_serializable("official_selftrain")
class MomentumSGD(keras.optimizers.SGD):
    """SGD whose momentum collects gradients, not steps: v = m v + g, w = w - rate v.

    As in TF1. Keras multiplies by the rate before collecting, which differs while the rate changes.
    """

    def update_step(self, gradient, variable, learning_rate):
        rate = ops.cast(learning_rate, variable.dtype)
        velocity = self.momentums[self._get_variable_index(variable)]
        gradient = ops.cast(gradient, variable.dtype)
        self.assign(velocity, self.momentum * velocity + gradient)
        self.assign_sub(variable, rate * velocity)


def make_optimizer(config, steps, precision="float32"):
    """The optimizer of a `config.OptimizerConfig` for a training of `steps` steps.

    For "mixed_float16" it scales the loss, and skips updates that overflow.
    """
    schedule = WarmupSchedule(
        config.schedule,
        config.learning_rate,
        config.warmup_learning_rate,
        config.warmup_steps,
        steps,
        config.step_boundaries,
        config.step_rates,
    )
    optimizer = MomentumSGD(schedule, momentum=config.momentum)
    if precision == "mixed_float16":
        return keras.optimizers.LossScaleOptimizer(optimizer)
    return optimizer
