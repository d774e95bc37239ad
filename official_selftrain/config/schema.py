"""The groups of settings; a `Config` holds one of each."""

import difflib
import math
import pathlib
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, get_args

import pydantic
from pydantic import Field

from official_selftrain.config.build import ConfigModel, model_from_dict
from official_selftrain.config.networks import WITH_IMAGENET, BackboneName
from official_selftrain.config.overrides import merge, nested
from official_selftrain.config.values import (
    Batch,
    BelowOne,
    Boxes,
    Buffer,
    Candidates,
    Classes,
    Convs,
    Count,
    Factor,
    Filters,
    Fraction,
    Interval,
    Level,
    Loop,
    Magnitude,
    Rate,
    RateOrZero,
    Repeats,
    Scale,
    Scales,
    Seed,
    Side,
    Sigma,
    Steps,
    Text,
    Threads,
    Weight,
    Words,
    real,
    whole,
)
from official_selftrain.utils.errors import UserError

# --- The network and its task ----------------------------------------------------------------


class SpineNetSizes(ConfigModel):
    """Sizes of a SpineNet that has no name of its own."""

    misplaced: ClassVar[str] = (
        "sizes of a SpineNet among those of an EfficientNet; set task.backbone_sizes to null "
        "before you set other ones"
    )

    endpoint_filters: Filters = Field(description="Channels of every level of the pyramid.")
    filter_size_scale: Factor = Field(
        description="Factor on the channels of all blocks; 1.0 is SpineNet-49."
    )
    resample_alpha: Factor = Field(
        default=0.5, description="Factor on the channels inside a resampling."
    )
    block_repeats: Repeats = Field(default=1, description="Copies of each block.")


class EfficientNetSizes(ConfigModel):
    """Sizes of an EfficientNet that has no name of its own."""

    misplaced: ClassVar[str] = (
        "sizes of an EfficientNet among those of a SpineNet; set task.backbone_sizes to null "
        "before you set other ones"
    )

    width: Factor = Field(description="Factor on the channels; 1.0 is EfficientNet-B0.")
    depth: Factor = Field(default=1.0, description="Factor on the number of blocks.")


class NmsConfig(ConfigModel):
    """Non-maximum suppression of detections. The defaults are those of the released code."""

    score_threshold: Fraction = Field(
        default=0.05, description="Detections with this score or a lower one are dropped."
    )
    iou_threshold: Fraction = Field(
        default=0.5,
        description="A box is suppressed if its IoU with a better one of its class is above this.",
    )
    pre_nms: Candidates = Field(
        default=5000, description="Best-scoring candidates per image that enter the suppression."
    )
    max_detections: Boxes = Field(default=100, description="Detections kept per image.")
    soft_sigma: Sigma = Field(
        default=0.0,
        description=(
            "Sigma of Soft-NMS, which lowers the scores of overlapping boxes instead of dropping "
            "them; 0 is ordinary NMS. The paper's SpineNet results use 0.3."
        ),
    )


def _sizes_of(values: Any) -> str:
    """The family that sizes belong to, which the names of the keys tell."""
    if isinstance(values, dict):
        # The nearest name counts, so that a typo is reported as one of the right family.
        near = (difflib.get_close_matches(str(key), ("width", "depth")) for key in values)
        return "efficientnet" if any(near) else "spinenet"
    return "efficientnet" if isinstance(values, EfficientNetSizes) else "spinenet"


Sizes = Annotated[
    Annotated[SpineNetSizes, pydantic.Tag("spinenet")]
    | Annotated[EfficientNetSizes, pydantic.Tag("efficientnet")],
    pydantic.Discriminator(_sizes_of),
]
Neck = Literal["none", "fpn", "nasfpn"]
Activation = Literal["relu", "swish"]


class NetworkConfig(ConfigModel):
    """A backbone, its neck and batch norm. The defaults are those of the released SpineNet-49."""

    num_classes: Classes | None = Field(
        default=None,
        description=(
            "Number of classes, including the background (class 0). By default the labels tell."
        ),
    )
    image_size: tuple[Side, Side] = Field(
        default=(640, 640),
        description="Height and width of the network's input in pixels, multiples of 128.",
    )
    backbone: BackboneName = Field(default="spinenet49", description="Name of the backbone.")
    backbone_sizes: Sizes | None = Field(
        default=None,
        description=(
            "Sizes that replace those of the named backbone: endpoint_filters, filter_size_scale, "
            "resample_alpha and block_repeats of a SpineNet, width and depth of an EfficientNet."
        ),
    )
    neck: Neck = Field(
        default="none",
        description=(
            "Feature pyramid on top of the backbone. A SpineNet is one itself; the other backbones "
            "need fpn or nasfpn."
        ),
    )
    neck_filters: Filters = Field(default=256, description="Channels of the neck.")
    neck_repeats: Repeats = Field(default=7, description="Number of cells of a NAS-FPN.")
    neck_separable: bool = Field(
        default=False, description="Use depthwise-separable convolutions in the neck."
    )
    neck_sum_only: bool = Field(
        default=False, description="Combine the levels of a NAS-FPN by sums only, no attention."
    )
    stochastic_depth: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description=(
            "Probability of dropping the deepest block in training; that of earlier ones is lower."
        ),
    )
    drop_block: tuple[Fraction, Side] | None = Field(
        default=None,
        description=(
            "DropBlock of a ResNet or NAS-FPN: the fraction of activations kept, and the side of a "
            "block in cells of the feature map."
        ),
    )
    activation: Activation = Field(default="swish", description="Activation function.")
    bn_momentum: Fraction = Field(
        default=0.997, description="Decay of the moving statistics of batch norm."
    )
    bn_epsilon: Annotated[float, real(1.0, "it is added to a variance of about 1")] = Field(
        default=1e-3, description="Number added to the variance in batch norm."
    )
    bn_synchronized: bool = Field(
        default=True, description="Compute batch statistics over all devices."
    )
    bn_frozen: bool = Field(
        default=False, description="Keep the moving statistics fixed and normalize by them."
    )
    precision: Literal["float32", "mixed_bfloat16", "mixed_float16"] = Field(
        default="float32",
        description=(
            "Type of the activations. Weights, batch statistics, losses and their averages are "
            "always float32."
        ),
    )

    @pydantic.field_validator("image_size", mode="before")
    @classmethod
    def _two_sides(cls, size: Any) -> Any:
        if isinstance(size, int):
            raise ValueError(f"must be height and width in pixels, such as [{size}, {size}]")
        return size

    @pydantic.field_validator("image_size")
    @classmethod
    def _fits_the_pyramid(cls, size: tuple[int, int]) -> tuple[int, int]:
        # Level 7, the coarsest, has stride 2^7.
        if any(side % 128 for side in size):
            nearest = [max(round(side / 128), 1) * 128 for side in size]
            raise ValueError(
                f"height and width must be divisible by 128 = 2^7; given {list(size)}, the nearest "
                f"is {nearest}"
            )
        return size

    @pydantic.model_validator(mode="after")
    def _parts_fit(self) -> "NetworkConfig":
        family = self.backbone.rstrip("0123456789SL").removesuffix("-b").split("-")[0]
        own = {"spinenet": SpineNetSizes, "efficientnet": EfficientNetSizes}.get(family)
        if self.backbone_sizes is not None and type(self.backbone_sizes) is not own:
            raise ValueError(f"backbone_sizes does not fit backbone {self.backbone!r}")
        if self.neck == "none" and family != "spinenet":
            raise ValueError(f"{self.backbone} has no levels 6 and 7; set neck to fpn or nasfpn")
        return self


class DetectionConfig(NetworkConfig):
    """RetinaNet. The defaults are those of the released SpineNet-49."""

    misplaced: ClassVar[str] = (
        "settings of task.kind=detection, but this task is segmentation; start from an experiment "
        "of that kind"
    )

    kind: Literal["detection"] = Field(default="detection", description="The task.")
    head_convs: Convs = Field(default=4, description="Convolutions of each head.")
    head_filters: Filters = Field(default=256, description="Channels of each head.")
    anchor_size: Annotated[float, real(1000.0, "it counts strides of the network")] = Field(
        default=3.0, description="Side of the smallest anchor of a level, in strides of the level."
    )
    max_instances: Boxes = Field(
        default=100,
        description="Boxes per image that the loss takes; further ones count as background.",
    )
    focal_alpha: Fraction = Field(
        default=0.25, description="Weight of the objects in the focal loss."
    )
    focal_gamma: Annotated[float, real(100.0, "nothing would be learned", zero=True)] = Field(
        default=1.5, description="Exponent of the focal loss; 0 is the cross entropy."
    )
    huber_delta: Annotated[float, real(1e6, "float32 has seven digits")] = Field(
        default=0.1, description="Error of a box at which its loss turns from square to linear."
    )
    box_weight: Weight = Field(
        default=50.0, description="Weight of the box loss relative to the class loss."
    )
    nms: NmsConfig = Field(default=NmsConfig(), description="Non-maximum suppression.")


class SegmentationConfig(NetworkConfig):
    """Segmenter. The defaults are those of the released EfficientNet-B7 configuration."""

    misplaced: ClassVar[str] = (
        "settings of task.kind=segmentation, but this task is detection; start from an experiment "
        "of that kind"
    )

    kind: Literal["segmentation"] = Field(default="segmentation", description="The task.")
    image_size: tuple[Side, Side] = Field(
        default=(512, 512),
        description="Height and width of the network's input in pixels, multiples of 128.",
    )
    backbone: BackboneName = Field(default="efficientnet-b7", description="Name of the backbone.")
    neck: Neck = Field(
        default="nasfpn",
        description=(
            "Feature pyramid on top of the backbone. A SpineNet is one itself; the other backbones "
            "need fpn or nasfpn."
        ),
    )
    neck_separable: bool = Field(
        default=True, description="Use depthwise-separable convolutions in the neck."
    )
    activation: Activation = Field(default="relu", description="Activation function.")
    aspp: bool = Field(
        default=False,
        description="Add atrous spatial pyramid pooling on level 5 of the backbone.",
    )
    head_level: Level = Field(
        default=2, description="Level of the pyramid whose size the logits have: stride 2^level."
    )
    head_convs: Convs = Field(default=3, description="Convolutions of the head.")
    fusion: bool = Field(default=True, description="Add all levels before the head.")
    loss_size: Literal["logits", "mask"] = Field(
        default="logits",
        description=(
            "Size at which the loss compares logits and mask: logits shrinks the mask, as the "
            "released code does; mask enlarges the logits."
        ),
    )
    label_smoothing: BelowOne = Field(
        default=0.0, description="Fraction of a label's weight spread over all classes."
    )
    class_weights: tuple[Weight, ...] | None = Field(
        default=None, description="Weights of the classes in the loss. By default all are equal."
    )
    eval_scales: Scales = Field(
        default=(1.0,),
        description=(
            "Scales, relative to image_size, at which an image is evaluated; the mean probability "
            "decides."
        ),
    )
    eval_flip: bool = Field(default=False, description="Evaluate the mirrored image as well.")
    eval_size: Literal["image", "network"] = Field(
        default="image",
        description=(
            "Size at which predictions are compared with masks: image is that of each image, "
            "network is image_size, as in the released code."
        ),
    )
    label_scales: Scales = Field(
        default=(0.5, 0.75, 1.0, 1.25, 1.5, 1.75),
        description="The same as eval_scales for pseudo labels. The default is the paper's.",
    )
    label_flip: bool = Field(default=False, description="Label the mirrored image as well.")
    label_classes: Annotated[
        int, whole(254, "a mask has 8 bits, and the value 255 means ignored")
    ] = Field(
        default=1,
        description=(
            "Most probable classes that are stored for each pixel of a pseudo label, with their "
            "probabilities; pseudo.soft needs 2 or more."
        ),
    )

    @pydantic.model_validator(mode="after")
    def _classes_fit(self) -> "SegmentationConfig":
        weights, count = self.class_weights, self.num_classes
        if count is not None and count > 255:
            raise ValueError(
                f"num_classes={count} must be at most 255: a mask has 8 bits, and the value 255 "
                "means ignored"
            )
        if weights is not None and count is not None and len(weights) != count:
            raise ValueError(f"class_weights has {len(weights)} numbers for {count} classes")
        return self


def _kind(values: Any) -> str:
    """The task that settings are for; detection unless they say otherwise."""
    if isinstance(values, dict):
        return str(values.get("kind", "detection"))
    return getattr(values, "kind", "detection")


TaskConfig = Annotated[
    Annotated[DetectionConfig, pydantic.Tag("detection")]
    | Annotated[SegmentationConfig, pydantic.Tag("segmentation")],
    pydantic.Discriminator(_kind),
]


# --- Data ------------------------------------------------------------------------------------


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

    batch_size: Batch = Field(default=256, description="Images per step, over all devices.")
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
    def scale_jitter(self) -> tuple[float, float]:
        """Smallest and largest scale, relative to the target size."""
        return self.jitter or JITTER[self.policy]


class PseudoConfig(InputConfig):
    """The teacher's labels as the student reads them (paper section 3.2)."""

    score_threshold: Fraction = Field(
        default=0.5,
        description=(
            "Boxes with this score or a lower one are dropped; pixels with a lower one are ignored."
        ),
    )
    class_thresholds: dict[int, Fraction] = Field(
        default={}, description="Thresholds that replace score_threshold, by class id."
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

    def thresholds(self, num_classes: int) -> list[float]:
        """The threshold of each class, by class id."""
        return [self.class_thresholds.get(c, self.score_threshold) for c in range(num_classes)]


class EvaluationConfig(SourceConfig):
    """A source to evaluate on."""

    batch_size: Batch = Field(default=8, description="Images per step, over all devices.")


# --- Training --------------------------------------------------------------------------------

Decay = Annotated[
    Annotated[Literal["auto"], pydantic.Tag("auto")] | Annotated[Fraction, pydantic.Tag("number")],
    pydantic.Discriminator(lambda value: "auto" if isinstance(value, str) else "number"),
]


def _plain(value: Any) -> Any:
    """Tuples as lists, so that the settings equal what YAML makes of them."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


class SelfTrainingConfig(ConfigModel):
    """The method (paper appendix B) and the stages of `run`."""

    alpha: Weight = Field(
        default=1.0, description="Weight of the loss on pseudo labels; 0 is supervised training."
    )
    normalize: bool = Field(
        default=True,
        description=(
            "Scale the loss on pseudo labels by the ratio of the moving averages of both losses. "
            "Without it the loss is a plain weighted sum."
        ),
    )
    decay: Decay = Field(
        default=0.9997,
        description=(
            "Decay per step of the moving averages; auto has a time constant of 7 % of the steps, "
            "for runs of less than some 20,000."
        ),
    )
    separate_batch_norm: bool = Field(
        default=False,
        description=(
            "Pass human-labeled and pseudo-labeled images through the network separately, each "
            "with its own batch statistics, instead of together."
        ),
    )
    student_init: Literal["teacher", "random"] = Field(
        default="teacher", description="Initial weights of the student."
    )
    rounds: Annotated[int, whole(100, "each round is a whole training")] = Field(
        default=1,
        description="Students trained one after the other, each the teacher of the next.",
    )
    control: bool = Field(
        default=False,
        description=(
            "Also train on human labels only, for as many steps and images per step as the "
            "student, to see what the pseudo labels add."
        ),
    )
    teacher: Annotated[dict[str, pydantic.JsonValue], pydantic.BeforeValidator(_plain)] = Field(
        default={},
        description="Settings that differ for the teacher, by dotted key such as trainer.steps.",
    )


class OptimizerConfig(ConfigModel):
    """SGD with momentum and its learning-rate schedule."""

    momentum: Fraction = Field(default=0.9, description="Momentum of SGD.")
    l2: Annotated[float, real(100.0, "nothing would be learned", zero=True)] = Field(
        default=4e-5,
        description="Weight decay: this times half the sum of the squared kernels is in the loss.",
    )
    clip_norm: Weight = Field(
        default=10.0, description="Largest norm of all gradients together; 0 does not clip."
    )
    schedule: Literal["cosine", "step"] = Field(
        default="cosine",
        description="Learning rate after the warmup: a cosine to 0, or step_rates.",
    )
    learning_rate: Rate = Field(default=0.28, description="Learning rate after the warmup.")
    warmup_steps: Interval = Field(
        default=2000, description="Steps in which the learning rate rises linearly."
    )
    warmup_learning_rate: RateOrZero = Field(
        default=0.0067, description="Learning rate of the first step."
    )
    step_boundaries: tuple[Steps, ...] = Field(
        default=(), description="Steps at which the learning rate changes, with schedule=step."
    )
    step_rates: tuple[Rate, ...] = Field(
        default=(), description="Learning rates from each of step_boundaries on."
    )

    @pydantic.model_validator(mode="after")
    def _boundaries_have_rates(self) -> "OptimizerConfig":
        if len(self.step_boundaries) != len(self.step_rates):
            raise ValueError("step_boundaries and step_rates must have the same length")
        return self


class TrainerConfig(ConfigModel):
    """One training: its length, start, checkpoints and reports."""

    steps: Steps = Field(description="Number of updates.")
    init: Text | None = Field(
        default=None,
        description=(
            "Initial weights: a run folder, a .weights.h5 file, a TF1 checkpoint of the backbone, "
            "or imagenet or imagenet++. By default they are random."
        ),
    )
    steps_per_loop: Loop = Field(default=100, description="Steps between two progress reports.")
    checkpoint_interval: Steps = Field(default=1000, description="Steps between two checkpoints.")
    keep_checkpoints: Count = Field(default=5, description="Number of newest checkpoints to keep.")
    evaluation_interval: Interval = Field(
        default=0, description="Steps between two evaluations; 0 evaluates at the end only."
    )
    seed: Seed = Field(
        default=0, description="Seed of the initial weights, the order of the data and the noise."
    )
    micro_batches: Batch = Field(
        default=1,
        description=(
            "Parts of a batch that are computed one after the other to save memory; their "
            "gradients are added up for one update."
        ),
    )
    ema_decay: BelowOne = Field(
        default=0.0,
        description=(
            "Decay per step of the averaged weights (EMA), which are evaluated as well; 0 averages "
            "none."
        ),
    )
    skip_nonfinite: Interval = Field(
        default=0,
        description="Batches with a NaN or infinite loss to skip before the run stops.",
    )


Strategy = Literal["default", "mirrored", "multi_worker_mirrored", "tpu", "jax"]
STRATEGIES = get_args(Strategy)


class RuntimeConfig(ConfigModel):
    """Where a run computes. None of it changes the results, except for rounding."""

    strategy: Strategy = Field(
        default="default",
        description=(
            "Devices: default is one, mirrored all GPUs of a machine, multi_worker_mirrored "
            "several machines, tpu a TPU, jax the JAX backend."
        ),
    )
    tpu: Text | None = Field(
        default=None, description="Name or address of a TPU, or local, with strategy=tpu."
    )
    devices: Annotated[int, whole(256, "no machine has more", 0)] = Field(
        default=0,
        description=(
            "Number of devices with mirrored and jax; 0 uses all. A CPU can be divided into "
            "several logical devices."
        ),
    )
    jit_compile: bool = Field(
        default=False, description="Compile the steps with XLA; TPU and JAX always do."
    )
    input_threads: Threads = Field(
        default=0, description="Threads that read and augment images; 0 is one per core."
    )
    stall_seconds: Annotated[int, whole(604_800, "that is a week", 0)] = Field(
        default=300, description="Seconds without progress before a warning; 0 never warns."
    )

    @pydantic.model_validator(mode="after")
    def _possible(self) -> "RuntimeConfig":
        if self.jit_compile and self.strategy in ("mirrored", "multi_worker_mirrored"):
            raise ValueError(
                "jit_compile: TensorFlow cannot compile a step that runs on several replicas"
            )
        if self.tpu and self.strategy != "tpu":
            raise ValueError("tpu needs strategy=tpu")
        if self.devices and self.strategy not in ("mirrored", "jax"):
            raise ValueError("devices needs strategy=mirrored or strategy=jax")
        return self


# --- The whole -------------------------------------------------------------------------------


class Config(ConfigModel):
    """All settings of a run."""

    experiment: Text = Field(description="Name of the experiment.")
    description: Words = Field(default="", description="What it is, in one line.")
    published: float | None = Field(
        default=None, description="The paper's result: AP or mIoU in percent."
    )
    data_dir: Text | None = Field(
        default=None, description="Folder at which relative paths of the data start."
    )
    task: TaskConfig = Field(default=DetectionConfig(), description="The network and its task.")
    human: InputConfig = Field(description="Images with human labels to train on.")
    unlabeled: SourceConfig | None = Field(
        default=None, description="Images that the teacher labels."
    )
    pseudo: PseudoConfig | None = Field(
        default=None, description="How the student reads the teacher's labels."
    )
    evaluation: EvaluationConfig | None = Field(
        default=None, description="Images with human labels to evaluate on."
    )
    self_training: SelfTrainingConfig = Field(
        default=SelfTrainingConfig(), description="The method and the stages of `run`."
    )
    optimizer: OptimizerConfig = Field(
        default=OptimizerConfig(), description="SGD and its learning rate."
    )
    trainer: TrainerConfig = Field(description="Steps, checkpoints and evaluations.")
    runtime: RuntimeConfig = Field(default=RuntimeConfig(), description="Devices and threads.")

    @pydantic.model_validator(mode="after")
    def _stages_are_possible(self) -> "Config":
        if self.optimizer.warmup_steps > self.trainer.steps:
            raise ValueError(
                f"optimizer.warmup_steps ({self.optimizer.warmup_steps}) is more than "
                f"trainer.steps ({self.trainer.steps})"
            )
        # Weights of the published sizes do not fit other ones.
        if self.trainer.init == "imagenet" and (
            self.task.backbone not in WITH_IMAGENET or self.task.backbone_sizes is not None
        ):
            raise ValueError(
                f"trainer.init=imagenet: {self.task.backbone} has no public ImageNet weights; "
                "efficientnet-lite0 and efficientnet-b0 to b7 of the published sizes have"
            )
        self._check_micro_batches()
        self._check_thresholds()
        if (
            self.pseudo is not None
            and self.pseudo.soft
            and getattr(self.task, "label_classes", 1) < 2
        ):
            raise ValueError(
                "pseudo.soft learns the probabilities of several classes: it needs task.kind="
                "segmentation and task.label_classes=2 or more, with which the teacher labeled"
            )
        return self

    def _check_micro_batches(self) -> None:
        count = self.trainer.micro_batches
        self.check_batch_sizes(count, f"trainer.micro_batches={count}")
        # The divisors of the losses are known only after all micro-batches. Until then the
        # gradients of the two streams are kept apart, and each needs a pass of its own.
        if count > 1 and self.pseudo is not None and not self.self_training.separate_batch_norm:
            raise ValueError(
                "trainer.micro_batches adds up the gradients of each source by itself: it needs "
                "self_training.separate_batch_norm=true"
            )

    def check_batch_sizes(self, parts: int, divisor: str) -> None:
        """Checks that the batches of both training streams can be divided into equal parts.

        Args:
            parts: number of parts.
            divisor: what this number is, for the message.

        Raises:
            UserError: with the next larger batch size that can be divided.
        """
        for name in ("human", "pseudo"):
            source = getattr(self, name)
            if source is not None and source.batch_size % parts:
                raise UserError(
                    f"{name}.batch_size={source.batch_size} is not divisible by {divisor}; take "
                    f"{math.ceil(source.batch_size / parts) * parts}"
                )

    def _check_thresholds(self) -> None:
        # A threshold for the background makes sense for pixels, but no box has this class.
        first = 0 if self.task.kind == "segmentation" else 1
        count = self.task.num_classes
        for number in self.pseudo.class_thresholds if self.pseudo else ():
            if number < first or (count is not None and number >= count):
                last = "" if count is None else f" to {count - 1}"
                raise ValueError(
                    f"pseudo.class_thresholds names class {number}, but the classes are numbered "
                    f"from {first}{last}"
                )

    @property
    def decay(self) -> float:
        """Decay per step of the moving averages of the losses."""
        if self.self_training.decay == "auto":
            return 1 - 1 / max(0.07 * self.trainer.steps, 1)
        return self.self_training.decay

    def path(self, path: str) -> str:
        """A relative path of the data, seen from `data_dir`."""
        return str(pathlib.Path(self.data_dir or ".") / path)

    def override(self, changes: Mapping[str, Any]) -> "Config":
        """Returns a copy with `{dotted key: value}` applied and everything checked again.

        Raises:
            UserError: see `model_from_dict`.
        """
        merged = self.model_dump()
        for key, value in changes.items():
            merged = merge(merged, nested(key, value))
        return model_from_dict(type(self), merged)
