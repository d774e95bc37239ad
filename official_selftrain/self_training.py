"""The method: one combined, normalized loss on human and pseudo labels.

Zoph et al., "Rethinking Pre-training and Self-training", NeurIPS 2020, appendix B:

    L = (L_human + alpha * (mean_human / mean_pseudo) * L_pseudo) / (1 + alpha)

where the means are moving averages of the two losses over training. This file knows neither boxes
nor masks: a task supplies one loss per source.
"""

import keras
from keras import ops

from official_selftrain.engine.replicas import sum_over_replicas
from official_selftrain.engine.step import GradientTrainer
from official_selftrain.utils.errors import UserError

HUMAN, PSEUDO = "human", "pseudo"
MIN_RATIO, MAX_RATIO = 1e-6, 1e6  # a guard against division by zero, far from any real training


def combined_loss(human, pseudo, alpha, ratio=1.0):
    """Joint loss on human and pseudo labels.

        loss = (human + alpha * ratio * pseudo) / (1 + alpha)

    Args:
        human: scalar, loss on the human-labeled part of the batch.
        pseudo: scalar, the same on the pseudo-labeled part.
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


class SelfTrainer(GradientTrainer):
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
        l2, clip_norm, ema_decay: see `engine.step.GradientTrainer`.
        accumulate: prepare for `accumulate_step` (TensorFlow).
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
    ):
        sources = (HUMAN, PSEUDO) if alpha > 0 else (HUMAN,)
        scalars = ("human_loss", "pseudo_loss", "ratio", "pseudo_label_density")
        collected = sources if accumulate else ()
        super().__init__(student, collected, l2, clip_norm, ema_decay, scalars)
        self.task = task
        self.alpha = alpha
        self.normalize = normalize
        self.separate_batch_norm = separate_batch_norm
        self.normalizer = LossNormalizer(decay)

    def call(self, images, training=False):
        """Outputs by source; one forward pass over all sources unless told otherwise."""
        sources = self.sources(images)
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
        shares = {}
        for source, outputs in y_pred.items():
            value, count = self.loss_sum(outputs, y[source])
            shares[source] = value / self.divisor(count)
        self.observe(y)
        return self.joint_loss(shares)

    def joint_loss(self, shares):
        """This replica's share of the joint loss; moves the averages.

        Args:
            shares: `{source: this replica's share of the mean loss}`.
        """
        for source, share in shares.items():
            total = sum_over_replicas(share)
            self.normalizer.update(source, total)
            self.trackers[f"{source}_loss"].update_state(total)
        loss = self.combine(**shares)
        if PSEUDO in shares:
            self.trackers["ratio"].update_state(self.ratio())
        if self.l2:
            loss = loss + self.l2_share()
        self.trackers["loss"].update_state(sum_over_replicas(loss))
        return loss

    def combine(self, human, pseudo=None):
        """`combined_loss` of two losses or two lists of gradients; `human` where it is alone."""
        if pseudo is None:
            return human
        ratio = self.ratio()
        return keras.tree.map_structure(
            lambda h, p: combined_loss(h, p, self.alpha, ratio), human, pseudo
        )

    def ratio(self):
        """What brings the pseudo loss to the scale of the human one at present."""
        return self.normalizer.ratio() if self.normalize else 1.0

    def sources(self, images):
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

    def loss_sum(self, outputs, labels):
        """(sum of the losses, count that divides it) of one source on this replica."""
        sums, count = self.task.loss_sums(outputs, labels)
        return sums["total"], count

    def divisor(self, count):
        """What makes a sum over this replica its share of the mean over all replicas."""
        return self.task.normalizer(sum_over_replicas(count))

    def observe(self, labels):
        """Tracks the mean number of pseudo-labeled objects per image."""
        if PSEUDO in labels and self.alpha > 0:
            objects = self.task.label_density(labels[PSEUDO])
            self.trackers["pseudo_label_density"].update_state(objects)
