"""The method: one combined, normalised loss on human and pseudo labels.

Zoph et al., "Rethinking Pre-training and Self-training", NeurIPS 2020, appendix B:

    L = (L_human + alpha * (mean_human / mean_pseudo) * L_pseudo) / (1 + alpha)

where the means are moving averages of the two losses over training. This file knows neither boxes
nor masks: a task supplies one loss per source.
"""

import keras
from keras import ops

from official_selftrain.engine.replicas import replicas, sum_over_replicas
from official_selftrain.engine.weight_average import WeightAverage
from official_selftrain.utils.errors import UserError

HUMAN, PSEUDO = "human", "pseudo"
MIN_RATIO, MAX_RATIO = 1e-6, 1e6  # a guard against division by zero, far from any real training


def combined_loss(human, pseudo, alpha, ratio=1.0):
    """Joint loss on human and pseudo labels.

        loss = (human + alpha * ratio * pseudo) / (1 + alpha)

    Args:
        human: scalar, loss on the human-labelled part of the batch.
        pseudo: scalar, the same on the pseudo-labelled part.
        alpha: weight of the pseudo part; 0 trains on human labels alone.
        ratio: scalar, moving average of `human` over that of `pseudo`; it brings both losses to one
            scale, so that `alpha` means the same in every experiment. 1 is the plain weighted sum.
            Not differentiated.
    """
    return (human + alpha * ops.stop_gradient(ratio) * pseudo) / (1.0 + alpha)


class LossNormalizer(keras.layers.Layer):
    """Moving averages of the human and the pseudo loss.

    An average starts at the first loss it sees, so it needs no bias correction, and includes the
    present step: the first ratio is `human / pseudo`.

    Args:
        decay: share of the old average kept in one step; 0.9997 in the paper.
    """

    def __init__(self, decay=0.9997, **kwargs):
        super().__init__(dtype="float32", **kwargs)
        self.decay = decay
        # Without aggregation="mean", replicas would keep averages of their own and drift apart.
        # Losses are never negative: -1 means "nothing seen".
        self.averages = {
            source: self.add_weight(
                (),
                initializer=keras.initializers.Constant(-1.0),
                trainable=False,
                aggregation="mean",
                name=f"mean_{source}_loss",
            )
            for source in (HUMAN, PSEUDO)
        }

    def update(self, source, loss):
        """Moves the average of a source towards `loss`, a scalar."""
        loss = ops.stop_gradient(ops.cast(loss, "float32"))
        average = self.averages[source]
        moved = self.decay * average + (1.0 - self.decay) * loss
        average.assign(ops.where(average < 0, loss, moved))

    def ratio(self):
        """`mean_human / mean_pseudo`, once both have been seen."""
        human = ops.convert_to_tensor(self.averages[HUMAN])
        pseudo = ops.convert_to_tensor(self.averages[PSEUDO])
        return ops.clip(human / ops.maximum(pseudo, 1e-12), MIN_RATIO, MAX_RATIO)


class SelfTrainer(keras.Model):
    """Trains a student on human labels, and on pseudo labels where a batch has them.

    Inputs and labels are dicts by source, `{"human": ..., "pseudo": ...}`. The teacher trains with
    the same class on batches without "pseudo": only data and alpha tell the two trainings apart.

    Args:
        student: the network, images -> outputs.
        task: has `loss_sums(outputs, labels)`, returning a dict of sums over the batch with "total"
            and a count, and `normalizer(count)`, the divisor for the count of the global batch.
        alpha: weight of the pseudo loss. 0 leaves the pseudo half out altogether, so that training
            equals the supervised one to the bit.
        decay: of the moving averages.
        normalize: False for the plain weighted sum.
        separate_batch_norm: one forward pass per source, so that each has its own batch
            statistics, instead of one pass over both.
        l2: weight of half the sum of squared kernels, added to the loss (released code).
        clip_norm: largest norm of all gradients together; 0 does not clip.
        ema_decay: above 0, `average` holds a `WeightAverage` of the student.
        accumulate: prepare for `accumulate_step` (TensorFlow).

    Losses and moving averages are float32 whatever the precision of the student. An optimizer that
    scales the loss (`keras.optimizers.LossScaleOptimizer`, for float16) skips the updates whose
    gradients are not finite.
    """

    def __init__(
        self,
        student,
        task,
        alpha=1.0,
        decay=0.9997,
        normalize=True,
        separate_batch_norm=False,
        l2=0.0,
        clip_norm=0.0,
        ema_decay=0.0,
        accumulate=False,
        **kwargs,
    ):
        super().__init__(dtype="float32", **kwargs)
        self.student = student
        self.task = task
        self.alpha = alpha
        self.normalize = normalize
        self.separate_batch_norm = separate_batch_norm
        self.l2 = l2
        self.clip_norm = clip_norm
        self.normalizer = LossNormalizer(decay)
        self.average = WeightAverage(student, ema_decay) if ema_decay else None
        self.trackers = {}
        names = ("loss", "human_loss", "pseudo_loss", "ratio", "pseudo_objects", "gradient_norm")
        for name in names:
            self.trackers[name] = keras.metrics.Mean(name=name)
        sources = [source for source in (HUMAN, PSEUDO) if source == HUMAN or alpha > 0]
        self._sums = {s: _Sums(student.trainable_variables) for s in sources if accumulate}
        self._objects = _Sums(()) if accumulate else None
        self.built = True  # all state exists; `student` is built already

    def call(self, images, training=False):
        """Outputs by source; one forward pass over all sources unless told otherwise."""
        sources = self._sources(images)
        if self.separate_batch_norm or len(sources) == 1:
            return {source: self.student(images[source], training=training) for source in sources}
        joint = ops.concatenate([images[source] for source in sources], axis=0)
        outputs = self.student(joint, training=training)
        result, start = {}, 0
        for source in sources:
            end = start + images[source].shape[0]
            result[source] = {key: value[start:end] for key, value in outputs.items()}
            start = end
        return result

    def _sources(self, images):
        """The sources to learn from.

        Raises:
            UserError: if there are others than human and pseudo labels, or no human ones.
        """
        unknown = set(images) - {HUMAN, PSEUDO}
        if unknown or HUMAN not in images:
            raise UserError(
                f"a batch has the sources {', '.join(sorted(images))}; it must have {HUMAN!r} and "
                f"may have {PSEUDO!r}. Joint training on further sources does not exist yet"
            )
        return [source for source in images if source == HUMAN or self.alpha > 0]

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        """This replica's share of the loss; the sum over replicas is the loss of one device."""
        shares = {}
        for source, outputs in y_pred.items():
            sums, count = self.task.loss_sums(outputs, y[source])
            shares[source] = sums["total"] / self.task.normalizer(sum_over_replicas(count))
        return self._joint_loss(shares, self._pseudo_objects(y))[0]

    def _pseudo_objects(self, labels):
        """Mean number of pseudo-labelled objects per image, 0 where there are none."""
        return self.task.objects(labels[PSEUDO]) if PSEUDO in labels and self.alpha > 0 else 0.0

    def _joint_loss(self, shares, objects):
        """This replica's share of the joint loss, and the ratio; moves the averages.

        Args:
            shares: `{source: this replica's share of the normalised loss}`.
            objects: mean number of pseudo-labelled objects per image.
        """
        for source, share in shares.items():
            total = sum_over_replicas(share)
            self.normalizer.update(source, total)
            self.trackers[f"{source}_loss"].update_state(total)
        loss, ratio = shares[HUMAN], 1.0
        if PSEUDO in shares:
            ratio = self.normalizer.ratio() if self.normalize else 1.0
            loss = combined_loss(shares[HUMAN], shares[PSEUDO], self.alpha, ratio)
            self.trackers["ratio"].update_state(ratio)
            self.trackers["pseudo_objects"].update_state(objects)
        if self.l2:
            loss = loss + self.l2 * half_squared_kernels(self.student) / replicas()
        self.trackers["loss"].update_state(sum_over_replicas(loss))
        return loss, ratio

    if keras.backend.backend() == "tensorflow":

        def train_step(self, data):
            """Forward, combined loss, clipped gradients, update. `data` is (images, labels)."""
            import tensorflow as tf

            images, labels = data[:2]
            self._sources(images)  # Keras would wrap its error into many lines
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
            for source in self._sources(images):
                with tf.GradientTape() as tape:
                    outputs = self.student(images[source], training=True)
                    sums, count = self.task.loss_sums(outputs, labels[source])
                    scaled = sums["total"] * _loss_scale(self.optimizer)
                gradients = tape.gradient(scaled, self.student.trainable_variables)
                self._sums[source].add(gradients, sums["total"], count)
            self._objects.add((), self._pseudo_objects(labels), 1.0)

        def update_step(self):
            """Updates the student by what `accumulate_step` has collected since the last update."""
            shares, gradients = {}, {}
            for source, sums in self._sums.items():
                found, total, count = sums.take()
                normalizer = self.task.normalizer(sum_over_replicas(count))
                shares[source] = total / normalizer
                gradients[source] = [gradient / normalizer for gradient in found]
            _, objects, batches = self._objects.take()
            _, ratio = self._joint_loss(shares, objects / batches)
            result = gradients[HUMAN]
            if PSEUDO in gradients:
                pairs = zip(gradients[HUMAN], gradients[PSEUDO], strict=True)
                result = [combined_loss(h, p, self.alpha, ratio) for h, p in pairs]
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
            self._sources(images)
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

    @property
    def metrics(self):
        return list(self.trackers.values())


class _Sums:
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

    def take(self):
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
    """Half the sum of squares of every kernel: no biases, no batch normalisation."""
    kernels = [v for v in model.trainable_variables if is_kernel(v)]
    return 0.5 * sum(ops.sum(ops.square(ops.cast(v, "float32"))) for v in kernels)
