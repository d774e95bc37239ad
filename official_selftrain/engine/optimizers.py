"""SGD with momentum and learning-rate schedules as in the released code.

Source: TensorFlow's TPU repository, `models/official/detection/modeling/optimizers.py` and
`learning_rates.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import keras
from keras import ops

from official_selftrain.utils.types import Tensor

if TYPE_CHECKING:
    from official_selftrain.config import OptimizerConfig


@keras.saving.register_keras_serializable("official_selftrain")
class WarmupSchedule(keras.optimizers.schedules.LearningRateSchedule):
    """Linear warmup, followed by a cosine decay to 0 or by steps.

    With s the number of updates made so far:
    s < warmup: warmup_rate + s / warmup * (rate - warmup_rate);
    cosine: rate / 2 * (1 + cos(pi * (s - warmup) / (total - warmup)));
    steps: `rates[k]` from `boundaries[k]` on.

    Args:
        kind: "cosine" or "step".
        rate: learning rate at the end of the warmup.
        warmup_rate: learning rate at the beginning of the warmup.
        warmup_steps: number of updates of the warmup; 0 for none.
        total_steps: number of updates of the training.
        boundaries: for "step", ascending numbers of updates.
        rates: for "step", the learning rate from each boundary on.
    """

    def __init__(
        self,
        kind: str,
        rate: float,
        warmup_rate: float,
        warmup_steps: int,
        total_steps: int,
        boundaries: Sequence[int] = (),
        rates: Sequence[float] = (),
    ):
        self.settings: dict[str, Any] = {
            "kind": kind,
            "rate": rate,
            "warmup_rate": warmup_rate,
            "warmup_steps": warmup_steps,
            "total_steps": total_steps,
            "boundaries": tuple(boundaries),
            "rates": tuple(rates),
        }

    def __call__(self, step: Tensor) -> Tensor:
        """The learning rate, a float32 scalar, after `step` updates."""
        s = self.settings
        step = ops.cast(step, "float32")
        warmup = float(s["warmup_steps"])
        if s["kind"] == "cosine":
            # A training that consists of warmup only must not divide by 0.
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

    def get_config(self) -> dict[str, Any]:
        """The arguments of the constructor."""
        return self.settings


@keras.saving.register_keras_serializable("official_selftrain")
class MomentumSGD(keras.optimizers.SGD):
    """SGD whose momentum accumulates gradients, as in TF1: v = m v + g, w = w - rate v.

    Keras accumulates rate * g instead, which differs while the learning rate changes.
    """

    def update_step(
        self, gradient: Tensor, variable: keras.Variable, learning_rate: Tensor
    ) -> None:
        """Updates one variable; called by Keras."""
        rate = ops.cast(learning_rate, variable.dtype)
        # A private method of Keras, which its own optimizers use; there is no public one.
        velocity = self.momentums[self._get_variable_index(variable)]
        gradient = ops.cast(gradient, variable.dtype)
        self.assign(velocity, self.momentum * velocity + gradient)
        self.assign_sub(variable, rate * velocity)


def make_optimizer(
    config: OptimizerConfig, steps: int, precision: str = "float32"
) -> keras.optimizers.Optimizer:
    """The optimizer of a `config.OptimizerConfig` for a training of `steps` updates.

    With the precision "mixed_float16" it scales the loss, because small gradients would become 0 in
    16 bits, and skips updates that overflow.
    """
    schedule = WarmupSchedule(
        kind=config.schedule,
        rate=config.learning_rate,
        warmup_rate=config.warmup_learning_rate,
        warmup_steps=config.warmup_steps,
        total_steps=steps,
        boundaries=config.step_boundaries,
        rates=config.step_rates,
    )
    optimizer = MomentumSGD(schedule, momentum=config.momentum)
    # bfloat16 has the exponent range of float32, so its gradients need no scaling.
    if precision == "mixed_float16":
        return keras.optimizers.LossScaleOptimizer(optimizer)
    return optimizer
