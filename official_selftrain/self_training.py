"""The method: one combined, normalised loss on human and pseudo labels.

Zoph et al., "Rethinking Pre-training and Self-training", NeurIPS 2020, appendix B:

    L = (L_human + alpha * (mean_human / mean_pseudo) * L_pseudo) / (1 + alpha)

where the means are moving averages of the two losses over training. This file knows neither boxes
nor masks: a task supplies one loss per source.
"""

import keras
from keras import ops

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
        task: has `loss(outputs, labels, sum_over_replicas)`, returning a dict of scalars with
            "total", each this replica's share of the loss of the global batch.
        alpha: weight of the pseudo loss. 0 leaves the pseudo half out altogether, so that training
            equals the supervised one to the bit.
        decay: of the moving averages.
        normalize: False for the plain weighted sum.
        separate_batch_norm: one forward pass per source, so that each has its own batch
            statistics, instead of one pass over both.
        l2: weight of half the sum of squared kernels, added to the loss (released code).
        clip_norm: largest norm of all gradients together; 0 does not clip.
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
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.student = student
        self.task = task
        self.alpha = alpha
        self.normalize = normalize
        self.separate_batch_norm = separate_batch_norm
        self.l2 = l2
        self.clip_norm = clip_norm
        self.normalizer = LossNormalizer(decay)
        self.trackers = {}
        names = ("loss", "human_loss", "pseudo_loss", "ratio", "pseudo_objects", "gradient_norm")
        for name in names:
            self.trackers[name] = keras.metrics.Mean(name=name)
        self.built = True  # all state exists; `student` is built already

    def call(self, images, training=False):
        """Outputs by source; one forward pass over all sources unless told otherwise."""
        sources = [source for source in images if source == HUMAN or self.alpha > 0]
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

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        """This replica's share of the loss; the sum over replicas is the loss of one device."""
        shares = {
            source: self.task.loss(outputs, y[source], sum_over_replicas)["total"]
            for source, outputs in y_pred.items()
        }
        totals = {source: sum_over_replicas(share) for source, share in shares.items()}
        for source, total in totals.items():
            self.normalizer.update(source, total)
            self.trackers[f"{source}_loss"].update_state(total)
        if PSEUDO in shares:
            ratio = self.normalizer.ratio() if self.normalize else 1.0
            loss = combined_loss(shares[HUMAN], shares[PSEUDO], self.alpha, ratio)
            self.trackers["ratio"].update_state(ratio)
            self.trackers["pseudo_objects"].update_state(self.task.objects(y[PSEUDO]))
        else:
            loss = shares[HUMAN]
        if self.l2:
            loss = loss + self.l2 * half_squared_kernels(self.student) / replicas()
        self.trackers["loss"].update_state(sum_over_replicas(loss))
        return loss

    if keras.backend.backend() == "tensorflow":

        def train_step(self, data):
            """Forward, combined loss, clipped gradients, update. `data` is (images, labels)."""
            import tensorflow as tf

            images, labels = data[:2]
            with tf.GradientTape() as tape:
                loss = self.compute_loss(images, labels, self(images, training=True))
            variables = self.student.trainable_variables
            # Each replica holds a share of the loss, so summed gradients are those of one device.
            gradients = sum_over_replicas(tape.gradient(loss, variables))
            norm = tf.linalg.global_norm(gradients)
            if self.clip_norm:
                gradients, _ = tf.clip_by_global_norm(gradients, self.clip_norm, norm)
            self.trackers["gradient_norm"].update_state(norm)
            # The optimizer sums over replicas once more.
            gradients = [gradient / replicas() for gradient in gradients]
            self.optimizer.apply_gradients(zip(gradients, variables, strict=True))
            return {name: tracker.result() for name, tracker in self.trackers.items()}

    elif keras.backend.backend() == "jax":

        def train_step(self, state, data):
            """The same, without side effects: (state, (images, labels)) -> (scalars, state)."""
            import jax

            trainable, others, optimizer, metrics = state
            images, labels = data[:2]
            differentiate = jax.value_and_grad(self.compute_loss_and_updates, has_aux=True)
            (_, (_, _, others, metrics)), gradients = differentiate(
                trainable, others, metrics, images, labels, None, True, optimizer
            )
            norm = ops.sqrt(sum(ops.sum(ops.square(gradient)) for gradient in gradients))
            if self.clip_norm:
                factor = self.clip_norm / ops.maximum(norm, self.clip_norm)
                gradients = [gradient * factor for gradient in gradients]
            trainable, optimizer = self.optimizer.stateless_apply(optimizer, gradients, trainable)
            mapping = zip(self.metrics_variables, metrics, strict=True)
            with keras.StatelessScope(state_mapping=mapping) as scope:
                self.trackers["gradient_norm"].update_state(norm)
                scalars = {name: tracker.result() for name, tracker in self.trackers.items()}
            metrics = [scope.get_current_value(variable) for variable in self.metrics_variables]
            return scalars, (trainable, others, optimizer, metrics)

    @property
    def metrics(self):
        return list(self.trackers.values())


def half_squared_kernels(model):
    """Half the sum of squares of every kernel: no biases, no batch normalisation."""
    kernels = [v for v in model.trainable_variables if v.name.endswith("kernel")]
    return 0.5 * sum(ops.sum(ops.square(ops.cast(v, "float32"))) for v in kernels)


def replicas():
    """Number of replicas that share the step."""
    if keras.backend.backend() != "tensorflow":
        return 1
    import tensorflow as tf

    return tf.distribute.get_strategy().num_replicas_in_sync


def sum_over_replicas(values):
    """Sum of a tensor, or of each of a list, over the replicas that share the step."""
    if replicas() == 1:
        return values
    import tensorflow as tf

    context = tf.distribute.get_replica_context()
    return context.all_reduce(tf.distribute.ReduceOp.SUM, values)
