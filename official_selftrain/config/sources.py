"""Settings of where images and labels come from, and of how they are read."""

from collections.abc import Mapping
from typing import Literal

import pydantic
from pydantic import Field

from official_selftrain.config.build import ConfigModel
from official_selftrain.config.values import (
    AutoOrBatch,
    AutoOrFraction,
    Batch,
    Buffer,
    Fraction,
    Magnitude,
    Repeats,
    Scale,
    Seed,
    Text,
)
from official_selftrain.utils.errors import UserError


class SourceConfig(ConfigModel):
    """Where images and labels come from: one of `records`, `images`, `tfds` or `builtin`.

    Relative paths start at `data_dir` if that is given. docs/data.md explains every kind. The flags
    of `prepare_data` and the table in docs/data.md are made of these fields.
    """

    records: Text | None = Field(
        default=None,
        description=(
            "TFRecord files: a glob, or several globs joined by commas. Those of the released code "
            "and of the TensorFlow Model Garden work."
        ),
        examples=["data/train-*.tfrecord"],
    )
    images: Text | None = Field(
        default=None,
        description=(
            "Image files: a folder, which is searched with its subfolders; a glob such as "
            "`photos/**/*.jpg`; or tar files such as `train-*.tar`."
        ),
        examples=["data/images"],
    )
    annotations: Text | None = Field(
        default=None,
        description=(
            "Boxes of the images: a COCO JSON file, or a folder of PASCAL VOC `.xml` files or YOLO "
            "`.txt` files."
        ),
        examples=["data/train.json"],
    )
    masks: Text | None = Field(
        default=None,
        description=(
            "PNG masks that have the same paths as their images: a folder, a glob or tar files."
        ),
        examples=["data/masks"],
    )
    image_list: Text | None = Field(
        default=None,
        description=(
            "Text file with one image name or stem per line; only these images are used. Lines "
            "that start with `#` and name no image are comments."
        ),
        examples=["train.txt"],
    )
    exclude_lists: tuple[Text, ...] = Field(
        default=(),
        description="Text files like `image_list`, with the images that are not used.",
        examples=["val.txt,test.txt"],
    )
    class_list: Text | None = Field(
        default=None,
        description=(
            "Text file with one class name per line, or a YOLO `data.yaml`. The first class has "
            "id 1, or 0 with `masks`. A COCO file has its own names and takes no list."
        ),
        examples=["classes.txt"],
    )
    label_by_folder: bool = Field(
        default=False,
        description="The class of an image is the name of its folder (for classification).",
    )
    tfds: Text | None = Field(
        default=None,
        description=(
            "Name of a data set of tensorflow-datasets: `coco/2017`, `voc/2012`, `open_images_v4`, "
            "`imagenet2012`, or another one with the same features."
        ),
        examples=["coco/2017"],
    )
    split: Text = Field(
        default="train", description="Split of the `tfds` data set.", examples=["validation"]
    )
    builtin: Literal["digits/train", "digits/unlabeled", "digits/val"] | None = Field(
        default=None,
        description=(
            "Built-in data set, which the demo uses: `digits/train`, `digits/unlabeled` or "
            "`digits/val`."
        ),
    )
    on_bad_record: Literal["stop", "skip"] = Field(
        default="stop",
        description=(
            "What happens at the first image or label that cannot be used: `stop` with an error, "
            "or `skip`, log and count it."
        ),
    )

    @pydantic.model_validator(mode="after")
    def _one_source(self) -> "SourceConfig":
        kinds = ("records", "images", "tfds", "builtin")
        given = [key for key in kinds if getattr(self, key)]
        if len(given) > 1:
            raise ValueError(f"give one of {', '.join(kinds)}, not {' and '.join(given)}")
        for key in ("annotations", "masks", "label_by_folder"):
            if getattr(self, key) and not self.images:
                raise ValueError(f"{key} needs `images`, a folder, glob or tars of image files")
        if self.class_list and not (self.images or self.records):
            raise ValueError("class_list needs `images` or `records`")
        for key in ("image_list", "exclude_lists"):
            if getattr(self, key) and not (self.images or self.tfds):
                raise ValueError(f"{key} needs `images` or `tfds`")
        return self

    @property
    def given(self) -> bool:
        """Whether the source says where its images are."""
        return bool(self.records or self.images or self.tfds or self.builtin)


Policy = Literal["S1", "S2", "S3", "S4", "keras_cv"]
# Smallest and largest scale of the policies, relative to the target size (paper section 3.1).
JITTER: Mapping[str, tuple[float, float]] = {
    "S1": (0.8, 1.2),
    "S2": (0.8, 1.2),
    "S3": (0.5, 2.0),
    "S4": (0.5, 2.0),
    "keras_cv": (0.5, 2.0),
}


class InputConfig(SourceConfig):
    """A source to train on, with its augmentation (docs/augmentation.md)."""

    batch_size: AutoOrBatch = Field(
        default=256,
        description=(
            "Images per step, over all devices. With auto they follow from the number of labeled "
            "images, see docs/method.md."
        ),
    )
    policy: Policy = Field(
        default="S1",
        description=(
            "Augmentation policy of the paper, from S1, the weakest, to S4; keras_cv needs the "
            "extra of that name."
        ),
    )
    flip: bool = Field(default=True, description="Mirror images with probability 0.5.")
    jitter: tuple[Scale, Scale] | None = Field(
        default=None,
        description=(
            "Smallest and largest scale to which an image is resized, relative to image_size. By "
            "default those of the policy."
        ),
    )
    auto_augment: Literal["v0", "v1", "v2", "v3", "test"] = Field(
        default="v0", description="Sub-policies of AutoAugment in S2 and S3."
    )
    magnitude: Magnitude = Field(
        default=10.0,
        description="Magnitude of RandAugment in S4. The paper uses 15 for ResNet-101.",
    )
    num_ops: Repeats = Field(default=2, description="Operations of RandAugment per image in S4.")
    as_released: bool = Field(
        default=False,
        description=(
            "Repeat what look like mistakes of the released code, which docs/augmentation.md lists."
        ),
    )
    shuffle_buffer: Buffer = Field(
        default=1024, description="Images among which the next one is drawn."
    )
    cache: bool = Field(
        default=False, description="Keep the encoded images in memory after the first epoch."
    )

    @pydantic.field_validator("jitter")
    @classmethod
    def _ordered(cls, jitter: tuple[float, float] | None) -> tuple[float, float] | None:
        if jitter is not None and jitter[0] > jitter[1]:
            raise ValueError(f"the smallest scale comes first; given {jitter}")
        return jitter

    @property
    def batch(self) -> int:
        """Images per step, which an automatic batch size has once the images are counted."""
        if self.batch_size == "auto":
            raise RuntimeError("call `with_batches` before the batch size is read")
        return self.batch_size

    @property
    def scale_jitter(self) -> tuple[float, float]:
        """Smallest and largest scale, relative to the target size."""
        return self.jitter or JITTER[self.policy]


class HumanConfig(InputConfig):
    """The labeled images to train on."""

    fraction: Fraction | None = Field(
        default=None,
        description=(
            "Part of the labeled images that is used, with each class in proportion. A smaller "
            "part lies inside every larger one. By default all are used."
        ),
    )
    fraction_seed: Seed = Field(
        default=0,
        description="Seed of the draw of `fraction`: it decides which images are labeled.",
    )


class UnlabeledConfig(SourceConfig):
    """The images that the teacher labels."""

    exclude_labeled: bool = Field(
        default=False,
        description=(
            "Leave out the image files that are also among the labeled images in use, or in the "
            "evaluation source. So one folder of images can be the source of all three."
        ),
    )


class PseudoConfig(InputConfig):
    """The teacher's labels as the student reads them (paper section 3.2)."""

    score_threshold: AutoOrFraction = Field(
        default=0.5,
        description=(
            "Boxes with this score or a lower one are dropped; pixels with a lower one are "
            "ignored. With auto each class gets the lowest threshold at which the teacher reaches "
            "target_precision on the selection images, or without these at which an image keeps "
            "as many boxes of the class as humans give it."
        ),
    )
    class_thresholds: dict[int, Fraction] = Field(
        default={}, description="Thresholds that replace score_threshold, by class id."
    )
    target_precision: Fraction = Field(
        default=0.8,
        description=(
            "Fraction of the labels of a class that score_threshold=auto wants to be right."
        ),
    )
    agnostic_nms_iou: Fraction | None = Field(
        default=None,
        description=(
            "Class-agnostic NMS: a box is dropped if its IoU with a better one of another class "
            "is above this, so that no object has two labels. By default no box is (detection)."
        ),
    )
    score_weighting: bool = Field(
        default=False,
        description=(
            "The loss of a box counts with its score, that of a pixel with its confidence, instead "
            "of in full."
        ),
    )
    keep_empty: bool = Field(
        default=True,
        description="Train on images without a remaining box, as background only.",
    )
    soft: bool = Field(
        default=False,
        description=(
            "Learn the probabilities of a pixel's classes instead of its most probable class "
            "(segmentation)."
        ),
    )

    @pydantic.model_validator(mode="after")
    def _one_choice(self) -> "PseudoConfig":
        if self.score_threshold == "auto" and self.class_thresholds:
            raise ValueError(
                "class_thresholds and score_threshold=auto exclude each other, because auto "
                "chooses the threshold of every class; leave out one of them"
            )
        return self

    def thresholds(self, num_classes: int) -> list[float]:
        """The threshold of each class, by class id.

        Raises:
            UserError: if they are still to be found, because `score_threshold` is `auto`.
        """
        default = self.score_threshold
        if default == "auto":
            raise UserError(
                "pseudo.score_threshold=auto is a number only once a teacher has labeled: use "
                "`run`, or labels of `pseudo_label`, or give a number"
            )
        return [self.class_thresholds.get(c, default) for c in range(num_classes)]


class EvaluationConfig(SourceConfig):
    """A source to evaluate on."""

    from_labeled: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description=(
            "Part of the labeled images that is held out to evaluate on if no `images` are given, "
            "or if a recipe names some and neither they nor their labels exist."
        ),
    )
    batch_size: Batch = Field(default=8, description="Images per step, over all devices.")

    @pydantic.model_validator(mode="after")
    def _held_out_images_exist(self) -> "EvaluationConfig":
        other = next((key for key in ("records", "tfds", "builtin") if getattr(self, key)), None)
        if self.from_labeled is not None and other:
            raise ValueError(
                f"from_labeled stands in for `images`, not for {other}; set one to null"
            )
        return self

    @property
    def given(self) -> bool:
        """Whether there is something to evaluate on."""
        return super().given or self.from_labeled is not None
