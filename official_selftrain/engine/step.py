"""One step of training: gradients, clipping, micro-batches and updates, on either backend.

Keras has options for some of this, and none fits: its gradient accumulation divides by the number
of micro-batches, where a loss here is divided by the labels of the whole batch; its
`global_clipnorm` clips what each replica has, where the release clips the sum over replicas; and
its averages of weights leave out the batch statistics.
"""

import keras
from keras import ops

from official_selftrain.engine.replicas import replicas, sum_over_replicas
from official_selftrain.engine.weight_average import WeightAverage


class GradientTrainer(keras.Model):
    """Trains a network by a loss that a subclass computes; knows neither boxes nor labels.

    A subclass has, besides `call(images)` and `compute_loss` of Keras:

    - `streams(images)`: names of the parts of a batch, in order; refuses a batch that is wrong;
    - `loss_sum(outputs, labels)`: (sum of the losses of one source, count) of this replica;
    - `divisor(count)`: what makes sums means, for the count of this replica;
    - `joint_loss(shares)`: the loss of `{source: share}`, with what is remembered of it;
    - `combine(**parts)`: `{source: share}`, or gradients of them, added up as in that loss;
    - `observe(labels)`: tracks statistics of the labels.

    Args:
        student: the network, built: images -> outputs.
        sources: names whose gradients `accumulate_step` collects; () where it is not called.
        l2: weight of half the sum of squared kernels, added to the loss (released code).
        clip_norm: largest norm of all gradients together; 0 does not clip.
        ema_decay: above 0, `average` holds a `WeightAverage` of the student.
        scalars: names of further means that are tracked.

    Losses and averages are float32 whatever the precision of the student. An optimizer that scales
    the loss (`keras.optimizers.LossScaleOptimizer`, for float16) skips the updates whose gradients
    are not finite.
    """

    def __init__(self, student, sources, l2, clip_norm, ema_decay, scalars):
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
    def metrics(self):
        """The means over the steps since their last reset."""
        return list(self.trackers.values())

    def l2_share(self):
        """This replica's share of the L2 term of the loss."""
        return self.l2 * half_squared_kernels(self.student) / replicas()

    if keras.backend.backend() == "tensorflow":

        def train_step(self, data):
            """Forward, loss, clipped gradients, update. `data` is (images, labels)."""
            import tensorflow as tf

            images, labels = data[:2]
            self.streams(images)  # Keras would wrap its error into many lines
            with tf.GradientTape() as tape:
                loss = self.compute_loss(images, labels, self(images, training=True))
                scaled = loss * _loss_scale(self.optimizer)
            self._update(tape.gradient(scaled, self.student.trainable_variables))
            return {name: tracker.result() for name, tracker in self.trackers.items()}

        def accumulate_step(self, data):
            """Adds up the gradients of a micro-batch, source by source; `update_step` uses them.

            The divisor of a loss is known only when all labels have been counted, so sums are
            collected, and divided once: the update is that of the whole batch, except that batch
            statistics are those of each micro-batch and source.
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

        def update_step(self):
            """Updates the student by what `accumulate_step` has collected since the last update."""
            shares, gradients = {}, {}
            for source, collected in self._collected.items():
                found, value, count = collected.pop()
                divisor = self.divisor(count)
                shares[source] = value / divisor
                gradients[source] = [gradient / divisor for gradient in found]
            self.joint_loss(shares)
            result = self.combine(**gradients)
            if self.l2:
                factor = self.l2 * _loss_scale(self.optimizer) / replicas()
                variables = self.student.trainable_variables
                result = [
                    gradient + factor * ops.cast(v, gradient.dtype) if is_kernel(v) else gradient
                    for gradient, v in zip(result, variables, strict=True)
                ]
            self._update(result)

        def _update(self, gradients):
            """Clips this replica's share of the (scaled) gradients, and applies them."""
            import tensorflow as tf

            # Each replica holds a share of the loss, so summed gradients are those of one device.
            gradients = sum_over_replicas(gradients)
            norm, scale = tf.linalg.global_norm(gradients), _loss_scale(self.optimizer)
            if self.clip_norm:
                gradients, _ = tf.clip_by_global_norm(gradients, self.clip_norm * scale, norm)
            self._track_norm(norm / scale)
            # The optimizer sums over replicas once more.
            gradients = [gradient / replicas() for gradient in gradients]
            variables = self.student.trainable_variables
            self.optimizer.apply_gradients(zip(gradients, variables, strict=True))
            if self.average is not None:
                self.average.update(self.student, self.optimizer.iterations)

    elif keras.backend.backend() == "jax":

        def train_step(self, state, data):
            """The same, without side effects: (state, (images, labels)) -> (scalars, state)."""
            import jax

            trainable, others, optimizer, metrics = state
            images, labels = data[:2]
            self.streams(images)
            differentiate = jax.value_and_grad(self.compute_loss_and_updates, has_aux=True)
            (_, (_, _, others, metrics)), gradients = differentiate(
                trainable, others, metrics, images, labels, None, True, optimizer
            )
            before = zip(self.optimizer.variables, optimizer, strict=True)
            with keras.StatelessScope(state_mapping=before):
                scale = ops.convert_to_tensor(_loss_scale(self.optimizer))
            norm = ops.sqrt(sum(ops.sum(ops.square(gradient)) for gradient in gradients)) / scale
            if self.clip_norm:
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

    def _track_norm(self, norm):
        """An update that is skipped for overflow is not counted."""
        if hasattr(self.optimizer, "dynamic_scale"):
            finite = ops.isfinite(norm)
            weight = ops.cast(finite, "float32")
            self.trackers["gradient_norm"].update_state(ops.where(finite, norm, 0.0), weight)
        else:
            self.trackers["gradient_norm"].update_state(norm)


class _Accumulator:
    """What this replica has added up over its micro-batches: gradients, a value and a count."""

    def __init__(self, variables):
        import tensorflow as tf

        self.collected = [
            tf.Variable(
                tf.zeros(shape),
                trainable=False,
                synchronization=tf.VariableSynchronization.ON_READ,
                aggregation=tf.VariableAggregation.SUM,
            )
            for shape in [*(v.shape for v in variables), (), ()]
        ]

    def add(self, gradients, value, count):
        for collected, new in zip(self.collected, [*gradients, value, count], strict=True):
            collected.assign_add(new)

    def pop(self):
        """Returns (gradients, value, count) and resets them to zero."""
        import tensorflow as tf

        values = [tf.identity(collected) for collected in self.collected]
        with tf.control_dependencies(values):
            for collected in self.collected:
                collected.assign(tf.zeros_like(collected))
        *gradients, value, count = values
        return gradients, value, count


def _loss_scale(optimizer):
    """Factor that keeps gradients of float16 from underflow; 1 without it."""
    return getattr(optimizer, "dynamic_scale", 1.0)


def is_kernel(variable):
    return variable.name.endswith("kernel")


def half_squared_kernels(model):
    """Half the sum of squares of every kernel: no biases, no batch normalization."""
    kernels = [v for v in model.trainable_variables if is_kernel(v)]
    return 0.5 * sum(ops.sum(ops.square(ops.cast(v, "float32"))) for v in kernels)
