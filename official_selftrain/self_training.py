"""The method: one combined, normalized loss on human and pseudo labels.

Zoph et al., "Rethinking Pre-training and Self-training", NeurIPS 2020, appendix B:

    L = (L_human + alpha * (mean_human / mean_pseudo) * L_pseudo) / (1 + alpha)

where the means are moving averages of the two losses over training. This file knows neither boxes
nor masks: a task supplies the two losses.
"""

from collections.abc import Mapping
from typing import Any

import keras
from keras import ops

from official_selftrain.engine.replicas import sum_over_replicas
from official_selftrain.engine.step import GradientTrainer
from official_selftrain.utils.errors import UserError
from official_selftrain.utils.types import Tensor

HUMAN, PSEUDO = "human", "pseudo"
MIN_RATIO, MAX_RATIO = 1e-6, 1e6  # a guard against division by zero, far from any real training


def combined_loss(human: Tensor, pseudo: Tensor, alpha: float, ratio: Tensor = 1.0) -> Tensor:
    """Joint loss on human and pseudo labels.

        loss = (human + alpha * ratio * pseudo) / (1 + alpha)

    Args:
        human: scalar, loss on the human-labeled part of the batch.
        pseudo: scalar, the same on the pseudo-labeled part.
        alpha: weight of the pseudo part; 0 leaves only the human labels.
        ratio: scalar, moving average of `human` over that of `pseudo`. It brings both losses to one
            scale, so that `alpha` means the same in every experiment; 1 is the plain weighted sum.
            It is not differentiated.
    """
    return (human + alpha * ops.stop_gradient(ratio) * pseudo) / (1.0 + alpha)


class LossNormalizer(keras.layers.Layer):
    """Moving averages of the human and the pseudo loss.

    An average starts at the first loss that it sees, so it needs no bias correction, and it
    includes the present step: the first ratio is `human / pseudo`.

    Args:
        decay: fraction of the old average that one step keeps, in [0, 1]; 0.9997 in the paper.
    """

    def __init__(self, decay: float = 0.9997, **kwargs: Any) -> None:
        super().__init__(dtype="float32", **kwargs)
        self.decay = decay
        # Without aggregation="mean", replicas would keep averages of their own and drift apart.
        # Losses are never negative, so -1 marks an average that has seen nothing.
        self.averages = {
            stream: self.add_weight(
                (),
                initializer=keras.initializers.Constant(-1.0),
                trainable=False,
                aggregation="mean",
                name=f"mean_{stream}_loss",
            )
            for stream in (HUMAN, PSEUDO)
        }

    def update(self, stream: str, loss: Tensor) -> None:
        """Moves the average of a stream toward `loss`, a scalar."""
        loss = ops.stop_gradient(ops.cast(loss, "float32"))
        average = self.averages[stream]
        moved = self.decay * average + (1.0 - self.decay) * loss
        average.assign(ops.where(average < 0, loss, moved))

    def ratio(self) -> Tensor:
        """Scalar `mean_human / mean_pseudo`, once both have been seen."""
        human = ops.convert_to_tensor(self.averages[HUMAN])
        pseudo = ops.convert_to_tensor(self.averages[PSEUDO])
        # A pseudo loss of exactly 0 must not divide; the clip alone would come too late.
        return ops.clip(human / ops.maximum(pseudo, 1e-12), MIN_RATIO, MAX_RATIO)


class SelfTrainer(GradientTrainer):
    """Trains a student on human labels, and on pseudo labels where a batch has them.

    A batch consists of streams: images and labels are dicts `{"human": ..., "pseudo": ...}`. The
    teacher is trained by the same class, on batches without "pseudo": only data and alpha tell the
    two trainings apart.

    Args:
        student: the network, images -> dict of outputs.
        task: supplies `loss_sums`, `normalizer` and `label_density`; see `tasks.base.Task`.
        alpha: weight of the pseudo loss. 0 leaves the pseudo stream out altogether, so that a step
            equals a supervised one to the bit.
        decay: of the moving averages.
        normalize: False gives the plain weighted sum.
        separate_batch_norm: run one forward pass per stream, so that each has batch statistics of
            its own, instead of one pass over both.
        l2, clip_norm, ema_decay: see `engine.step.GradientTrainer`.
        accumulate: prepare for `accumulate_step` (TensorFlow only).
    """

    def __init__(
        self,
        student: keras.Model,
        task: Any,
        alpha: float = 1.0,
        decay: float = 0.9997,
        normalize: bool = True,
        separate_batch_norm: bool = False,
        l2: float = 0.0,
        clip_norm: float = 0.0,
        ema_decay: float = 0.0,
        accumulate: bool = False,
    ) -> None:
        streams = (HUMAN, PSEUDO) if alpha > 0 else (HUMAN,)
        scalars = ("human_loss", "pseudo_loss", "ratio", "pseudo_label_density")
        collected = streams if accumulate else ()
        super().__init__(student, collected, l2, clip_norm, ema_decay, scalars)
        self.task = task
        self.alpha = alpha
        self.normalize = normalize
        self.separate_batch_norm = separate_batch_norm
        self.normalizer = LossNormalizer(decay)

    def call(self, images: Mapping[str, Tensor], training: bool = False) -> dict[str, Any]:
        """`{stream: outputs}`, from one forward pass over all streams unless told otherwise."""
        streams = self.streams(images)
        if self.separate_batch_norm or len(streams) == 1:
            return {stream: self.student(images[stream], training=training) for stream in streams}
        joint = ops.concatenate([images[stream] for stream in streams], axis=0)
        outputs = self.student(joint, training=training)
        result, start = {}, 0
        for stream in streams:
            end = start + images[stream].shape[0]
            result[stream] = {key: value[start:end] for key, value in outputs.items()}
            start = end
        return result

    def compute_loss(
        self, x: Any, y: Any, y_pred: Any, sample_weight: Any = None, training: bool = True
    ) -> Tensor:
        """This replica's part of the loss of `{stream: labels}` and `{stream: outputs}`."""
        parts = {}
        for stream, outputs in y_pred.items():
            value, count = self.loss_sum(outputs, y[stream])
            parts[stream] = value / self.divisor(count)
        self.observe(y)
        return self.joint_loss(parts)

    def joint_loss(self, parts: Mapping[str, Tensor]) -> Tensor:
        """This replica's part of the joint loss; moves the averages.

        Args:
            parts: `{stream: scalar}`, this replica's parts of the mean losses.
        """
        for stream, part in parts.items():
            total = sum_over_replicas(part)
            self.normalizer.update(stream, total)
            self.trackers[f"{stream}_loss"].update_state(total)
        loss = self.combine(**parts)
        if PSEUDO in parts:
            self.trackers["ratio"].update_state(self.ratio())
        if self.l2:
            loss = loss + self.l2_share()
        self.trackers["loss"].update_state(sum_over_replicas(loss))
        return loss

    def combine(self, human: Any, pseudo: Any = None) -> Any:
        """`combined_loss` of two losses, or of two lists of gradients; `human` without pseudo."""
        if pseudo is None:
            return human
        ratio = self.ratio()
        return keras.tree.map_structure(
            lambda h, p: combined_loss(h, p, self.alpha, ratio), human, pseudo
        )

    def ratio(self) -> Tensor:
        """Factor that brings the pseudo loss to the present scale of the human loss."""
        return self.normalizer.ratio() if self.normalize else 1.0

    def streams(self, images: Mapping[str, Tensor]) -> list[str]:
        """The streams of a batch to learn from.

        Raises:
            UserError: if there are others than human and pseudo labels, or no human ones.
        """
        unknown = set(images) - {HUMAN, PSEUDO}
        if unknown or HUMAN not in images:
            raise UserError(
                f"a batch has the streams {', '.join(sorted(images))}; it must have {HUMAN!r} and "
                f"may have {PSEUDO!r}. Joint training on further streams does not exist yet"
            )
        return [stream for stream in images if stream == HUMAN or self.alpha > 0]

    def loss_sum(self, outputs: Mapping, labels: Mapping) -> tuple[Tensor, Tensor]:
        """(sum of the losses, count that divides it) of one stream on this replica."""
        sums, count = self.task.loss_sums(outputs, labels)
        return sums["total"], count

    def divisor(self, count: Tensor) -> Tensor:
        """What turns a sum over this replica into its part of the mean over all replicas."""
        return self.task.normalizer(sum_over_replicas(count))

    def observe(self, labels: Mapping[str, Mapping]) -> None:
        """Tracks how much is labeled in the pseudo stream."""
        if PSEUDO in labels and self.alpha > 0:
            density = self.task.label_density(labels[PSEUDO])
            self.trackers["pseudo_label_density"].update_state(density)
