"""One training step: gradients, clipping, micro-batches, and updates, on TensorFlow and JAX.

The options of Keras optimizers for this do not fit:

- `gradient_accumulation_steps` divides by the number of micro-batches, but a loss of this package
  is divided by the number of labels in the whole batch;
- `global_clipnorm` clips the gradients of each replica and knows no loss scale; the released code
  clips the sum over all replicas;
- `scale_loss` scales a loss, but clipping and the reported norm need the scale itself;
- `use_ema` leaves batch statistics out of the averages.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from official_selftrain.engine.replicas import replicas, sum_over_replicas
from official_selftrain.engine.weight_average import WeightAverage
from official_selftrain.utils.types import Tensor


class GradientTrainer(keras.Model):
    """Trains a network with a loss that a subclass computes; knows neither boxes nor labels.

    A subclass implements, in addition to Keras' `call(images)` and `compute_loss`:

    - `streams(images)`: names of the parts of a batch, in order; raises for a wrong batch;
    - `loss_sum(outputs, labels)`: (sum of the losses, count) of one source on this replica;
    - `divisor(count)`: the number that turns this replica's sum into its part of the global mean;
    - `joint_loss(shares)`: the loss from `{source: this replica's part of the mean}`; also updates
      the trackers;
    - `combine(**parts)`: the weighted sum of losses, or lists of gradients, by source;
    - `observe(labels)`: tracks statistics of the labels.

    Losses and averages are float32, whatever the precision of the student. An optimizer that scales
    the loss (`keras.optimizers.LossScaleOptimizer`, for float16) skips updates whose gradients are
    not finite.

    Args:
        student: the built network, images -> outputs.
        sources: names of the sources whose gradients `accumulate_step` collects; () if it is not
            called, because each one needs the memory of a set of weights.
        l2: weight of half the sum of squared kernels, which is added to the loss (released code).
        clip_norm: largest global norm of the gradients; 0 turns clipping off.
        ema_decay: decay of the averaged weights, `average`; 0 turns them off.
        scalars: names of additional means to track.
    """

    def __init__(
        self,
        student: keras.Model,
        sources: Sequence[str],
        l2: float,
        clip_norm: float,
        ema_decay: float,
        scalars: Sequence[str],
    ):
        # A 16-bit policy is for the student only: sums of losses would lose digits.
        super().__init__(dtype="float32")
        self.student = student
        self.l2 = l2
        self.clip_norm = clip_norm
        self.average = WeightAverage(student, ema_decay) if ema_decay else None
        names = ("loss", *scalars, "gradient_norm")
        self.trackers = {name: keras.metrics.Mean(name=name) for name in names}
        self._collected = {name: _Accumulator(student.trainable_variables) for name in sources}
        self.built = True  # all state exists; `student` is built already

    @property
    def metrics(self) -> list[keras.metrics.Metric]:
        """The trackers: means over the steps since the last reset."""
        return list(self.trackers.values())

    def l2_share(self) -> Tensor:
        """This replica's part of the L2 term of the loss, a float32 scalar."""
        # The sum over replicas must contain the term once.
        return self.l2 * half_squared_kernels(self.student) / replicas()

    if keras.backend.backend() == "tensorflow":

        def train_step(self, data: Any) -> dict[str, Tensor]:
            """Makes one update: forward pass, loss, clipped gradients, optimizer.

            Args:
                data: (images by source, labels by source).

            Returns:
                The scalars.
            """
            import tensorflow as tf

            images, labels = data[:2]
            # Checked early: within `call`, Keras would wrap the error into many lines.
            self.streams(images)
            with tf.GradientTape() as tape:
                loss = self.compute_loss(images, labels, self(images, training=True))
                scaled = loss * _loss_scale(self.optimizer)
            self._update(tape.gradient(scaled, self.student.trainable_variables))
            return {name: tracker.result() for name, tracker in self.trackers.items()}

        def accumulate_step(self, data: Any) -> None:
            """Adds the gradients of a micro-batch to those that `update_step` will use.

            The divisor of a loss is known only when all labels of the batch have been counted, so
            sums are collected and divided once. The update is that of the whole batch, except that
            batch statistics are those of each micro-batch and source.

            Args:
                data: (images by source, labels by source).
            """
            import tensorflow as tf

            images, labels = data[:2]
            for source in self.streams(images):
                with tf.GradientTape() as tape:
                    outputs = self.student(images[source], training=True)
                    value, count = self.loss_sum(outputs, labels[source])
                    scaled = value * _loss_scale(self.optimizer)
                gradients = tape.gradient(scaled, self.student.trainable_variables)
                self._collected[source].add(gradients, value, count)
            self.observe(labels)

        def update_step(self) -> None:
            """Updates the student from what `accumulate_step` has collected since the last one."""
            shares, gradients = {}, {}
            for source, collected in self._collected.items():
                found, value, count = collected.pop()
                divisor = self.divisor(count)
                shares[source] = value / divisor
                gradients[source] = [gradient / divisor for gradient in found]
            self.joint_loss(shares)
            result = self.combine(**gradients)
            # The L2 term depends on weights only, so its gradient is added once, in closed form.
            if self.l2:
                factor = self.l2 * _loss_scale(self.optimizer) / replicas()
                variables = self.student.trainable_variables
                result = [
                    gradient + factor * ops.cast(v, gradient.dtype) if is_kernel(v) else gradient
                    for gradient, v in zip(result, variables, strict=True)
                ]
            self._update(result)

        def _update(self, gradients: list[Tensor]) -> None:
            """Clips and applies gradients, of which this replica has its part, times the scale."""
            import tensorflow as tf

            # Each replica has a part of the loss, so the sum is the gradient of a single device.
            gradients = sum_over_replicas(gradients)
            norm, scale = tf.linalg.global_norm(gradients), _loss_scale(self.optimizer)
            if self.clip_norm:
                gradients, _ = tf.clip_by_global_norm(gradients, self.clip_norm * scale, norm)
            self._track_norm(norm / scale)
            # The optimizer sums over replicas again.
            gradients = [gradient / replicas() for gradient in gradients]
            variables = self.student.trainable_variables
            self.optimizer.apply_gradients(zip(gradients, variables, strict=True))
            if self.average is not None:
                self.average.update(self.student, self.optimizer.iterations)

    elif keras.backend.backend() == "jax":
        # Keras calls it with other arguments on JAX.
        def train_step(  # type: ignore[misc]
            self, state: tuple, data: Any
        ) -> tuple[dict[str, Tensor], tuple]:
            """Makes one update without side effects.

            Args:
                state: values of the trainable, non-trainable, optimizer, and metrics variables.
                data: (images by source, labels by source).

            Returns:
                The scalars, and the new state.
            """
            import jax

            trainable, others, optimizer, metrics = state
            images, labels = data[:2]
            self.streams(images)
            differentiate = jax.value_and_grad(self.compute_loss_and_updates, has_aux=True)
            (_, (_, _, others, metrics)), gradients = differentiate(
                trainable, others, metrics, images, labels, None, True, optimizer
            )
            # Inside this function, the optimizer's variables hold old values; the state has the
            # current ones.
            before = zip(self.optimizer.variables, optimizer, strict=True)
            with keras.StatelessScope(state_mapping=before):
                scale = ops.convert_to_tensor(_loss_scale(self.optimizer))
            norm = ops.sqrt(sum(ops.sum(ops.square(gradient)) for gradient in gradients)) / scale
            if self.clip_norm:
                # The norm is that of unscaled gradients, but the ratio is the same for scaled ones.
                factor = self.clip_norm / ops.maximum(norm, self.clip_norm)
                gradients = [gradient * factor for gradient in gradients]
            trainable, optimizer = self.optimizer.stateless_apply(optimizer, gradients, trainable)
            after = [
                *zip(self.trainable_variables, trainable, strict=True),
                *zip(self.non_trainable_variables, others, strict=True),
                *zip(self.optimizer.variables, optimizer, strict=True),
                *zip(self.metrics_variables, metrics, strict=True),
            ]
            with keras.StatelessScope(state_mapping=after) as scope:
                self._track_norm(norm)
                if self.average is not None:
                    self.average.update(self.student, self.optimizer.iterations)
                scalars = {name: tracker.result() for name, tracker in self.trackers.items()}
            others = [scope.get_current_value(v) for v in self.non_trainable_variables]
            metrics = [scope.get_current_value(v) for v in self.metrics_variables]
            return scalars, (trainable, others, optimizer, metrics)

    def _track_norm(self, norm: Tensor) -> None:
        """Tracks the gradient norm, except for an update that is skipped because of overflow."""
        # Without a loss scale, infinity is no overflow but a divergence, which `check_finite` must
        # see.
        if hasattr(self.optimizer, "dynamic_scale"):
            finite = ops.isfinite(norm)
            weight = ops.cast(finite, "float32")
            self.trackers["gradient_norm"].update_state(ops.where(finite, norm, 0.0), weight)
        else:
            self.trackers["gradient_norm"].update_state(norm)


class _Accumulator:
    """Sums over the micro-batches of this replica: gradients, a value, and a count.

    Args:
        variables: the variables of the gradients.
    """

    def __init__(self, variables: Sequence[keras.Variable]):
        import tensorflow as tf

        self.collected = [
            # Replicas collect separately. Mirrored variables would be summed with each assignment.
            tf.Variable(
                tf.zeros(shape),
                trainable=False,
                synchronization=tf.VariableSynchronization.ON_READ,
                aggregation=tf.VariableAggregation.SUM,
            )
            for shape in [*(v.shape for v in variables), (), ()]
        ]

    def add(self, gradients: list[Tensor], value: Tensor, count: Tensor) -> None:
        """Adds what one micro-batch gives."""
        for collected, new in zip(self.collected, [*gradients, value, count], strict=True):
            collected.assign_add(new)

    def pop(self) -> tuple[list[Tensor], Tensor, Tensor]:
        """Returns (gradients, value, count) and resets them to zero."""
        import tensorflow as tf

        values = [tf.identity(collected) for collected in self.collected]
        with tf.control_dependencies(values):
            for collected in self.collected:
                collected.assign(tf.zeros_like(collected))
        *gradients, value, count = values
        return gradients, value, count


def _loss_scale(optimizer: keras.optimizers.Optimizer) -> Tensor | float:
    """The factor that keeps float16 gradients from underflow; 1 for other optimizers."""
    return getattr(optimizer, "dynamic_scale", 1.0)


def is_kernel(variable: keras.Variable) -> bool:
    """Whether a variable is subject to the L2 term."""
    return variable.name.endswith("kernel")


def half_squared_kernels(model: keras.Model) -> Tensor:
    """Half the sum of squares of all kernels, without biases and batch norm; a float32 scalar."""
    kernels = [v for v in model.trainable_variables if is_kernel(v)]
    return 0.5 * sum(ops.sum(ops.square(ops.cast(v, "float32"))) for v in kernels)
