"""What a task is: the meaning of labels, apart from how they are trained on, stored or reported.

A new kind of labels is a class with these methods and a config with a `kind` of its own. Everything
else asks the task and never which task it is.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import keras
import numpy as np

from official_selftrain.config import InputConfig, PseudoConfig
from official_selftrain.data.prepared import PreparedData
from official_selftrain.data.records import ImageRecord
from official_selftrain.utils.types import Tensor

Labels = Mapping[str, Tensor]
Prediction = Any  # what a network found in one image: `Detections`, `MaskPrediction`


class LabelStatistics(Protocol):
    """Collects pseudo labels, and what held-back human labels say about them."""

    def add(self, record: ImageRecord, truth: ImageRecord) -> None:
        """Counts a pseudo-labeled record; `truth` is the same image with its own labels, if any."""

    def result(self) -> dict[str, Any]:
        """The statistics, for JSON; with `images`, `threshold`, `score_histogram`, `warnings`."""

    def error_message(self, result: dict[str, Any]) -> str | None:
        """Why nobody can learn from these labels, or None if one can."""


class ThresholdSearch(Protocol):
    """Compares predictions with human labels by their scores, to find thresholds for them."""

    def update(self, record: ImageRecord, prediction: Prediction) -> None:
        """Counts the prediction for one image; `record` holds its human labels."""

    def merge(self, other: Any) -> None:
        """Adds what another worker has counted."""

    def result(self, target: float, class_names: Mapping[int, str]) -> dict[str, dict[str, Any]]:
        """The threshold of each class; see `thresholds.ScoreCounts.result`."""

    def precision(self, thresholds: Sequence[float]) -> float | None:
        """Fraction of the labels above the threshold of their class that are right, or None."""


class Metric(Protocol):
    """Compares predictions with human labels."""

    def update(self, record: ImageRecord, prediction: Prediction) -> None:
        """Counts the prediction for one image; `record` holds its human labels."""

    def merge(self, other: Any) -> None:
        """Adds what another worker has counted."""

    def result(self) -> dict[str, float]:
        """`{name: value}` in [0, 1], -1 where a class has no human label."""


class Task(Protocol):
    """Turns records into labels, outputs into losses, and outputs into predictions.

    Shapes: B images of a batch, H x W pixels of the network input, C classes with the background.

    Attributes:
        config: the `NetworkConfig` of this task, with `num_classes` set.
        headline: name of the metric by which the best weights are chosen, such as "AP".
        label_unit: what `label_density` counts, such as "boxes per image".
        draws_masks: whether pictures show masks; otherwise they show boxes.
        class_layer: name of the layer whose weights depend on the classes.
    """

    config: Any
    headline: str
    label_unit: str
    draws_masks: bool
    class_layer: str

    def __init__(self, config: Any = None, labeling: bool = False, **changes: Any) -> None:
        """`changes` replace fields of `config`; `labeling` predicts for pseudo labels."""

    # --- The network -------------------------------------------------------------------------

    def build_model(self) -> keras.Model:
        """A new network, `[B, H, W, 3]` normalized images -> dict of outputs."""

    def inference_model(self, model: keras.Model) -> keras.Model:
        """The network that `predict` needs: `model`, or one with its weights for other sizes.

        Raises:
            UserError: if the backbone cannot predict at the sizes that the config asks for.
        """

    # --- Labels ------------------------------------------------------------------------------

    @staticmethod
    def check_sources(data: PreparedData) -> None:
        """Checks that the prepared sources hold the labels that this task learns from.

        Raises:
            UserError: naming the source that lacks them and the setting that gives them.
        """

    @staticmethod
    def has_truth(summary: Mapping[str, Any]) -> bool:
        """Whether a prepared source holds labels to measure against; see `sources.prepare`."""

    def warnings(self, config: Any, data: PreparedData) -> Iterator[str]:
        """Sentences on labels that a training with the `Config` would leave out."""

    def check_record(self, record: ImageRecord) -> None:
        """Checks that the task can use the labels of a record.

        Raises:
            UserError: naming the record and what is wrong.
        """

    def check_pseudo_record(self, record: ImageRecord, source: PseudoConfig) -> None:
        """Checks that a pseudo-labeled record holds what `source` learns from.

        Raises:
            UserError: naming the setting to change.
        """

    def make_record_filter(self, source: PseudoConfig) -> Callable[[Tensor], Tensor]:
        """A function serialized example -> bool: some label reaches the thresholds of `source`."""

    def parser(self, source: InputConfig | None = None) -> Callable:
        """A function (decoded example, seed `[2]`) -> (image `[H, W, 3]`, labels of one image).

        Args:
            source: that is trained on: its augmentation applies, and its thresholds of pseudo
                labels. Without one the image is only fitted into the network input.
        """

    # --- The loss ----------------------------------------------------------------------------

    def loss_sums(self, outputs: Labels, labels: Labels) -> tuple[dict[str, Tensor], Tensor]:
        """Sums of the losses over a batch, and the count that divides them.

        Sums and counts can be added over replicas and micro-batches, so the loss of the global
        batch is exact, also where an image or a whole batch has no label.

        Args:
            outputs: of the network, `[B, ...]`.
            labels: as `parser` returns them, `[B, ...]`.

        Returns:
            Dict of scalars with "total", and a scalar count.
        """

    def normalizer(self, count: Tensor) -> Tensor:
        """The divisor, above 0, that belongs to the count of the global batch."""

    def label_density(self, labels: Labels) -> Tensor:
        """Scalar, how much is labeled in a batch, in `label_unit`."""

    # --- Predictions -------------------------------------------------------------------------

    def predict(self, model: keras.Model, images: Tensor, labels: Labels) -> dict[str, Tensor]:
        """Predictions of a batch as tensors `[B, ...]`, compiled on the device.

        Args:
            model: what `inference_model` returned.
            images: as `parser` returns them outside training, `[B, ...]`.
            labels: dict with `image_info`, as in `geometry.plan_resize`.
        """

    def predictions(self, arrays: Mapping[str, np.ndarray], count: int) -> list[Prediction]:
        """The predictions of the first `count` images of what `predict` returned."""

    def metric(self, class_names: Mapping[int, str] | None = None) -> Metric:
        """An empty metric."""

    def to_record(self, record: ImageRecord, prediction: Prediction, teacher: str) -> ImageRecord:
        """The record with the labels that the network `teacher` predicts, and all its scores."""

    def serving(self, model: keras.Model, nms: str = "hard") -> Callable[[Tensor, Tensor], Any]:
        """What a SavedModel of `model` computes from (images, `image_info`).

        Args:
            model: the trained network.
            nms: "hard", "soft" or "none", the suppression of overlapping boxes.
        """

    # --- What people read --------------------------------------------------------------------

    def label_statistics(
        self,
        source: PseudoConfig,
        class_names: Mapping[int, str] | None = None,
        human: Iterable[ImageRecord] = (),
    ) -> LabelStatistics:
        """Empty statistics of pseudo labels at the thresholds of `source`.

        Args:
            source: the student's source of pseudo labels.
            class_names: `{class id: name}`.
            human: human-labeled records, whose classes are compared with the pseudo labels'.
        """

    def threshold_search(self, source: PseudoConfig) -> ThresholdSearch:
        """An empty search for the thresholds of the student's source of pseudo labels."""

    def density_thresholds(
        self,
        pseudo: Iterable[ImageRecord],
        human: Iterable[ImageRecord],
        class_names: Mapping[int, str],
    ) -> dict[str, dict[str, Any]]:
        """Thresholds that keep as many labels of each class as humans give an image.

        Args:
            pseudo: pseudo-labeled records.
            human: human-labeled records.
            class_names: `{class id: name}`.

        Returns:
            `{class name: {"class": id, "threshold": value, ...}}`; empty if labels have no number.
        """

    def kept(self, record: ImageRecord, source: PseudoConfig) -> ImageRecord:
        """A pseudo-labeled record with only those labels that `source` lets the student read."""

    def label_rows(self, result: Mapping[str, Any]) -> list[tuple[str, str]]:
        """A result of `label_statistics` as (name, text)."""
