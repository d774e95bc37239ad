"""The groups of settings; a `Config` holds one of each."""

import difflib
import math
import pathlib
from typing import Annotated, ClassVar, Literal

import pydantic

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


class SpineNetSizes(ConfigModel):
    """A SpineNet of one's own sizes; see `applications.spinenet.Variant`."""

    misplaced: ClassVar = (
        "sizes of a SpineNet among those of an EfficientNet; set task.backbone_sizes to null "
        "before other ones"
    )

    endpoint_filters: Filters
    filter_size_scale: Factor
    resample_alpha: Factor = 0.5
    block_repeats: Repeats = 1


class NmsConfig(ConfigModel):
    """Suppression of double detections; defaults are the released ones (reference section 18)."""

    score_threshold: Fraction = 0.05
    iou_threshold: Fraction = 0.5
    pre_nms: Candidates = 5000
    max_detections: Boxes = 100
    soft_sigma: Sigma = 0.0  # 0 is hard NMS; the paper's SpineNet rows use 0.3


class EfficientNetSizes(ConfigModel):
    """An EfficientNet of one's own sizes; see `applications.efficientnet.Variant`."""

    misplaced: ClassVar = (
        "sizes of an EfficientNet among those of a SpineNet; set task.backbone_sizes to null "
        "before other ones"
    )

    width: Factor
    depth: Factor = 1.0


def _sizes_of(values):
    """Whose sizes these are, by the names of the keys."""
    if isinstance(values, dict):
        near = (difflib.get_close_matches(str(key), ("width", "depth")) for key in values)
        return "efficientnet" if any(near) else "spinenet"
    return "efficientnet" if isinstance(values, EfficientNetSizes) else "spinenet"


Sizes = Annotated[
    Annotated[SpineNetSizes, pydantic.Tag("spinenet")]
    | Annotated[EfficientNetSizes, pydantic.Tag("efficientnet")],
    pydantic.Discriminator(_sizes_of),
]


class NetworkConfig(ConfigModel):
    """A backbone, its neck and batch norm; defaults are those of the released SpineNet-49."""

    num_classes: Classes | None = None  # with background 0; None: ask the labels
    image_size: tuple[Side, Side] = (640, 640)  # height, width in pixels
    backbone: BackboneName = "spinenet49"
    backbone_sizes: Sizes | None = None  # in place of the named one's
    neck: Literal["none", "fpn", "nasfpn"] = "none"
    neck_filters: Filters = 256
    neck_repeats: Repeats = 7  # cells of a NAS-FPN
    neck_separable: bool = False  # depthwise-separable convolutions
    neck_sum_only: bool = False  # NAS-FPN without attention
    stochastic_depth: float | None = pydantic.Field(None, gt=0, lt=1)
    drop_block: tuple[Fraction, Side] | None = None  # share kept, block side; ResNet, NAS-FPN
    activation: Literal["relu", "swish"] = "swish"
    bn_momentum: Fraction = 0.997
    bn_epsilon: real(1.0, "it is added to a variance of about 1") = 1e-3
    bn_synchronized: bool = True
    bn_frozen: bool = False
    # Of activations; weights, batch statistics, losses and their averages are float32.
    precision: Literal["float32", "mixed_bfloat16", "mixed_float16"] = "float32"

    @pydantic.field_validator("image_size", mode="before")
    @classmethod
    def _two_sides(cls, size):
        if isinstance(size, int):
            raise ValueError(f"must be height and width in pixels, such as [{size}, {size}]")
        return size

    @pydantic.field_validator("image_size")
    @classmethod
    def _fits_the_pyramid(cls, size):
        if any(side % 128 for side in size):
            nearest = [max(round(side / 128), 1) * 128 for side in size]
            raise ValueError(
                f"height and width must be divisible by 128 = 2^7; given {list(size)}, the nearest "
                f"is {nearest}"
            )
        return size

    @pydantic.model_validator(mode="after")
    def _parts_fit(self):
        family = self.backbone.rstrip("0123456789SL").removesuffix("-b").split("-")[0]
        own = {"spinenet": SpineNetSizes, "efficientnet": EfficientNetSizes}.get(family)
        if self.backbone_sizes is not None and type(self.backbone_sizes) is not own:
            raise ValueError(f"backbone_sizes does not fit backbone {self.backbone!r}")
        if self.neck == "none" and family != "spinenet":
            raise ValueError(f"{self.backbone} has no levels 6 and 7; set neck to fpn or nasfpn")
        return self


class DetectionConfig(NetworkConfig):
    """RetinaNet."""

    misplaced: ClassVar = (
        "settings of task.kind=detection, and this task is segmentation; start from an experiment "
        "of that kind"
    )

    kind: Literal["detection"] = "detection"
    head_convs: Convs = 4
    head_filters: Filters = 256
    anchor_size: real(1000.0, "it counts strides of the network") = (
        3.0  # side of the smallest anchor in strides
    )
    max_instances: Boxes = 100  # boxes per image that reach the loss
    focal_alpha: Fraction = 0.25
    focal_gamma: real(100.0, "nothing would be learned", zero=True) = 1.5
    huber_delta: real(1e6, "float32 has seven digits") = 0.1
    box_weight: Weight = 50.0
    nms: NmsConfig = NmsConfig()


class SegmentationConfig(NetworkConfig):
    """Segmenter; defaults are those of the released EfficientNet-B7 configuration."""

    misplaced: ClassVar = (
        "settings of task.kind=segmentation, and this task is detection; start from an experiment "
        "of that kind"
    )

    kind: Literal["segmentation"] = "segmentation"
    image_size: tuple[Side, Side] = (512, 512)
    backbone: BackboneName = "efficientnet-b7"
    neck: Literal["none", "fpn", "nasfpn"] = "nasfpn"
    neck_separable: bool = True
    activation: Literal["relu", "swish"] = "relu"
    aspp: bool = False  # on level 5 of the backbone
    head_level: Level = 2  # the logits have stride 2^head_level
    head_convs: Convs = 3
    fusion: bool = True  # sum all levels before the head
    loss_size: Literal["logits", "mask"] = "logits"  # where logits and labels meet
    label_smoothing: BelowOne = 0.0
    class_weights: tuple[Weight, ...] | None = None  # one a class
    eval_scales: Scales = (1.0,)  # of image_size; their mean probability decides
    eval_flip: bool = False  # also mirrored
    eval_size: Literal["image", "network"] = "image"  # where predictions meet the truth
    label_scales: Scales = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)  # the same for pseudo labels
    label_flip: bool = False
    label_classes: whole(254, "a mask has 8 bits, of which 255 is ignored") = (
        1  # stored for each pixel with their probabilities; pseudo.soft
    )

    @pydantic.model_validator(mode="after")
    def _classes_fit(self):
        weights, count = self.class_weights, self.num_classes
        if count is not None and count > 255:
            raise ValueError(
                f"num_classes={count} must be at most 255: a mask has 8 bits, and 255 is ignored"
            )
        if weights is not None and count is not None and len(weights) != count:
            raise ValueError(f"class_weights has {len(weights)} numbers for {count} classes")
        return self


def _kind(values):
    """Which of the two tasks a config means; detection unless it says otherwise."""
    if isinstance(values, dict):
        return str(values.get("kind", "detection"))
    return getattr(values, "kind", "detection")


TaskConfig = Annotated[
    Annotated[DetectionConfig, pydantic.Tag("detection")]
    | Annotated[SegmentationConfig, pydantic.Tag("segmentation")],
    pydantic.Discriminator(_kind),
]


class SourceConfig(ConfigModel):
    """Where images and labels come from: one of `records`, `images`, `tfds` or `embedded`.

    Relative paths start at `data_dir` where that is given. docs/data.md explains every kind.
    """

    records: Text | None = None  # TFRecord files: a glob, or several joined by commas
    images: Text | None = None  # a folder of images, a glob, or tar files
    annotations: Text | None = None  # COCO JSON, or a folder of VOC XML or YOLO txt; None: no boxes
    masks: Text | None = None  # a folder (glob, tars) of PNG masks with the stems of the images
    image_list: Text | None = None  # text file: one file name or stem a line, others are left out
    exclude_lists: tuple[Text, ...] = ()  # such files of images to leave out
    class_list: Text | None = None  # one name a line (or data.yaml); id 1 first, with masks id 0
    label_by_folder: bool = False  # the class of an image is the folder it lies in
    tfds: Text | None = None  # a data set of tensorflow-datasets, such as "coco/2017"
    split: Text = "train"  # of tfds
    embedded: Literal["train", "unlabeled", "val"] | None = None  # a split of the embedded digits
    on_bad_record: Literal["stop", "skip"] = "stop"

    @pydantic.model_validator(mode="after")
    def _one_source(self):
        kinds = ("records", "images", "tfds", "embedded")
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
    def given(self):
        return bool(self.records or self.images or self.tfds or self.embedded)


# Scale jitter of the paper's policies, relative to the target size (paper section 3.1).
JITTER = {
    "S1": (0.8, 1.2),
    "S2": (0.8, 1.2),
    "S3": (0.5, 2.0),
    "S4": (0.5, 2.0),
    "keras_cv": (0.5, 2.0),
}


class InputConfig(SourceConfig):
    """A training source with its augmentation (docs/augmentation.md)."""

    batch_size: Batch = 256  # over all replicas
    policy: Literal[tuple(JITTER)] = "S1"  # S1 weakest, S4 strongest; keras_cv needs its extra
    flip: bool = True  # mirror left to right with probability 0.5
    jitter: tuple[Scale, Scale] | None = None  # None: policy's
    auto_augment: Literal["v0", "v1", "v2", "v3", "test"] = "v0"  # sub-policies of S2 and S3
    magnitude: Magnitude = 10.0  # of S4; the paper's ResNet-101 takes 15
    num_ops: Repeats = 2  # operations an image, of S4
    as_released: bool = False  # with the released slips, such as Contrast; see data/image_ops.py
    shuffle_buffer: Buffer = 1024  # images
    cache: bool = False  # keep the encoded images in memory

    @pydantic.field_validator("jitter")
    @classmethod
    def _ordered(cls, jitter):
        if jitter is not None and jitter[0] > jitter[1]:
            raise ValueError(f"the smallest scale comes first; given {jitter}")
        return jitter

    @property
    def scale_jitter(self):
        return self.jitter or JITTER[self.policy]


class PseudoConfig(InputConfig):
    """Teacher's labels as read by the student (paper section 3.2)."""

    score_threshold: Fraction = 0.5  # boxes at or below it are dropped, pixels below it ignored
    class_thresholds: dict[int, Fraction] = pydantic.Field({})  # in its place for some class ids
    keep_empty: bool = True  # images left without a box train as pure background
    soft: bool = False  # learn the probabilities of a pixel's classes, not its class alone

    def thresholds(self, num_classes):
        """The threshold of each class."""
        return [self.class_thresholds.get(c, self.score_threshold) for c in range(num_classes)]


class EvaluationConfig(SourceConfig):
    batch_size: Batch = 8


Decay = Annotated[
    Annotated[Literal["auto"], pydantic.Tag("auto")] | Annotated[Fraction, pydantic.Tag("number")],
    pydantic.Discriminator(lambda value: "auto" if isinstance(value, str) else "number"),
]


def _plain(value):
    """Tuples as lists, as they come back from YAML."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


class SelfTrainingConfig(ConfigModel):
    """The method (paper appendix B) and the stages of `run`."""

    alpha: Weight = 1.0  # weight of the pseudo loss
    normalize: bool = True  # by moving averages; False is the plain weighted sum
    decay: Decay = 0.9997  # "auto": time constant of 7 % of the run
    separate_batch_norm: bool = False  # one forward pass per source instead of a shared one
    student_init: Literal["teacher", "random"] = "teacher"
    rounds: whole(100, "each round is a whole training") = 1
    control: bool = False  # also train on human labels alone, as long and on as many images a step
    # Dotted overrides for the teacher stage, e.g. trainer.steps.
    teacher: Annotated[dict[str, pydantic.JsonValue], pydantic.BeforeValidator(_plain)] = (
        pydantic.Field({})
    )


class OptimizerConfig(ConfigModel):
    """SGD with momentum and its learning-rate schedule (reference section 12)."""

    momentum: Fraction = 0.9
    l2: real(100.0, "nothing would be learned", zero=True) = (
        4e-5  # times half the squared kernels, added to the loss
    )
    clip_norm: Weight = 10.0  # of all gradients together; 0 is off
    schedule: Literal["cosine", "step"] = "cosine"
    learning_rate: Rate = 0.28
    warmup_steps: Interval = 2000
    warmup_learning_rate: RateOrZero = 0.0067
    step_boundaries: tuple[Steps, ...] = ()
    step_rates: tuple[Rate, ...] = ()

    @pydantic.model_validator(mode="after")
    def _boundaries_have_rates(self):
        if len(self.step_boundaries) != len(self.step_rates):
            raise ValueError("step_boundaries and step_rates must have the same length")
        return self


class TrainerConfig(ConfigModel):
    steps: Steps
    # A run folder, .weights.h5 file, "imagenet", "imagenet++" or TF1 checkpoint of the backbone.
    init: Text | None = None
    steps_per_loop: Loop = 100  # steps between two reports
    checkpoint_interval: Steps = 1000
    keep_checkpoints: Count = 5
    evaluation_interval: Interval = 0  # steps; 0 evaluates at the end only
    seed: Seed = 0
    micro_batches: Batch = 1  # parts of a batch, whose gradients are added up for an update
    ema_decay: BelowOne = 0.0  # of averaged weights, evaluated too; 0: none
    skip_nonfinite: Interval = 0  # batches to leave out for a NaN before stopping


STRATEGIES = ("default", "mirrored", "multi_worker_mirrored", "tpu", "jax")


class RuntimeConfig(ConfigModel):
    """Where it runs; never changes what is computed, up to rounding."""

    strategy: Literal[STRATEGIES] = "default"
    tpu: Text | None = None  # name or address of a TPU, or "local"
    devices: whole(256, "a machine has no more", 0) = (
        0  # of mirrored and jax; 0: all. A CPU can be split in parts
    )
    jit_compile: bool = False  # compile steps with XLA; always so on a TPU and on JAX
    input_threads: Threads = 0  # 0: as many as there are cores
    stall_seconds: whole(604_800, "that is a week", 0) = (
        300  # without progress before a warning; 0: never
    )

    @pydantic.model_validator(mode="after")
    def _possible(self):
        if self.jit_compile and self.strategy in ("mirrored", "multi_worker_mirrored"):
            raise ValueError("jit_compile: TensorFlow cannot compile a step over several replicas")
        if self.tpu and self.strategy != "tpu":
            raise ValueError("tpu names the TPU of strategy=tpu")
        if self.devices and self.strategy not in ("mirrored", "jax"):
            raise ValueError("devices is of strategy=mirrored and strategy=jax")
        return self


class Config(ConfigModel):
    experiment: Text
    description: Words = ""
    published: float | None = None  # the paper's AP
    data_dir: Text | None = None
    task: TaskConfig = DetectionConfig()
    human: InputConfig
    unlabeled: SourceConfig | None = None  # images for the teacher to label
    pseudo: PseudoConfig | None = None
    evaluation: EvaluationConfig | None = None
    self_training: SelfTrainingConfig = SelfTrainingConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    trainer: TrainerConfig
    runtime: RuntimeConfig = RuntimeConfig()

    @pydantic.model_validator(mode="after")
    def _stages_are_possible(self):
        if self.optimizer.warmup_steps > self.trainer.steps:
            raise ValueError(
                f"optimizer.warmup_steps ({self.optimizer.warmup_steps}) is more than "
                f"trainer.steps ({self.trainer.steps})"
            )
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

    def _check_micro_batches(self):
        count = self.trainer.micro_batches
        self.check_batch_sizes(count, f"trainer.micro_batches={count}")
        if count > 1 and self.pseudo is not None and not self.self_training.separate_batch_norm:
            raise ValueError(
                "trainer.micro_batches adds up the gradients of each source by itself: it needs "
                "self_training.separate_batch_norm=true"
            )

    def check_batch_sizes(self, parts, divisor):
        """Checks that the batches of both training streams can be cut into equal parts.

        Args:
            parts: number of parts.
            divisor: what this number is, for the message.

        Raises:
            UserError: with the next larger batch size that can.
        """
        for name in ("human", "pseudo"):
            source = getattr(self, name)
            if source is not None and source.batch_size % parts:
                raise UserError(
                    f"{name}.batch_size={source.batch_size} is not divisible by {divisor}; take "
                    f"{math.ceil(source.batch_size / parts) * parts}"
                )

    def _check_thresholds(self):
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
    def decay(self):
        """Decay of the moving averages; the automatic one is for runs under some 20,000 steps."""
        if self.self_training.decay == "auto":
            return 1 - 1 / max(0.07 * self.trainer.steps, 1)
        return self.self_training.decay

    def path(self, path):
        """`path`, seen from `data_dir`."""
        return str(pathlib.Path(self.data_dir or ".") / path)

    def override(self, changes):
        """A copy with `{dotted key: value}` applied and everything checked again."""
        merged = self.model_dump()
        for key, value in changes.items():
            merged = merge(merged, nested(key, value))
        return model_from_dict(type(self), merged)
