"""Typed configuration: groups, YAML in and out, overrides, and the experiment registry.

Imports neither Keras nor TensorFlow, so a typo is answered at once.
Precedence: the experiment, then `--config_file`, then each `--params_override`.
"""

import difflib
import functools
import json
import os
import pathlib
import re
import runpy
import traceback
from typing import Annotated, ClassVar, Literal, get_args, get_origin

import pydantic
import yaml

from official_selftrain.errors import UserError
from official_selftrain.files import read_text

PACKAGE = pathlib.Path(__file__).resolve().parent
EXPERIMENT_FOLDERS = (PACKAGE / "experiments", PACKAGE.parent / "experiments")

BACKBONES = (
    *(f"spinenet{variant}" for variant in ("49S", "49", "96", "143", "143L", "190")),
    *(f"efficientnet-b{number}" for number in range(9)),
    "efficientnet-l2",
    *(f"efficientnet-lite{number}" for number in range(5)),
    *(f"resnet{depth}" for depth in (10, 14, 18, 26, 34, 50, 101, 152, 200)),
)
BackboneName = Literal[BACKBONES]
WITH_IMAGENET = (*(f"efficientnet-b{number}" for number in range(8)), "efficientnet-lite0")


# --- Kinds of values: every number has a limit, so that none brings a machine to a halt -----------


def _limits(highest=None, why=""):
    """Validators that refuse truth values, and more than `highest`; `why` is told with it."""

    def check(value):
        if isinstance(value, bool):
            raise ValueError("must be a number")
        if highest is not None and isinstance(value, (int, float)) and value > highest:
            raise ValueError(f"must be at most {highest:,}: {why}")
        return value

    # Before, since more than 64 bits are no number to Pydantic; after, for numbers given as text.
    return pydantic.BeforeValidator(check), pydantic.AfterValidator(check)


def _whole(highest, why, lowest=1):
    """Whole numbers from `lowest` to `highest`."""
    return Annotated[(int, pydantic.Field(ge=lowest), *_limits(highest, why))]


def _real(highest, why, zero=False):
    """Finite numbers above 0, or from 0 on, to `highest`."""
    above = pydantic.Field(ge=0) if zero else pydantic.Field(gt=0)
    return Annotated[(float, above, *_limits(highest, why))]


def _text(value):
    if isinstance(value, (list, tuple)):
        raise ValueError("must be one text; several files are a glob, or joined by commas: 'a,b'")
    if isinstance(value, (bool, int, float)):
        raise ValueError("must be a text; put it in quotes if it is a name")
    if isinstance(value, str):
        if "\0" in value:
            raise ValueError("holds a NUL character, which no file name can")
        if any("\ud800" <= letter <= "\udfff" for letter in value):
            raise ValueError("is not UTF-8, so that it cannot be saved with the run")
    return value


def _name(value):
    if value == "":
        raise ValueError("is an empty text; leave it out, or set it to null")
    return value


Words = Annotated[str, pydantic.BeforeValidator(_text)]
Text = Annotated[str, pydantic.BeforeValidator(_text), pydantic.AfterValidator(_name)]
Fraction = Annotated[(float, pydantic.Field(ge=0, le=1), *_limits())]
BelowOne = Annotated[(float, pydantic.Field(ge=0, lt=1), *_limits())]

MAX_CLASSES, MAX_SIDE = 10_000, 8192
Classes = _whole(MAX_CLASSES, "each class has weights of its own in the last layer", 2)
Side = _whole(MAX_SIDE, "memory grows with the pixels of an image")
Batch = _whole(16_384, "all images of a batch are in memory at a time")
Buffer = _whole(1_000_000, "so many encoded images are kept in memory")
Threads = _whole(1024, "more threads than cores gain nothing", 0)
Filters = _whole(8192, "memory grows with the filters")
Convs = _whole(100, "memory and time grow with the layers")
Repeats = _whole(32, "memory and time grow with the layers")
Factor = _real(32.0, "memory grows with the square of the factor")
Steps = _whole(1_000_000_000, "steps are counted in 32 bits")
Interval = _whole(1_000_000_000, "steps are counted in 32 bits", 0)
Loop = _whole(100_000, "nothing is reported or saved before a loop ends")
Boxes = _whole(10_000, "memory grows with the number of boxes")
Candidates = _whole(1_000_000, "memory grows with the number of boxes")
Seed = _whole(2**32 - 1, "random generators take 32 bits", 0)
Count = _whole(10_000, "time and disk grow with it")
Rate = _real(1000.0, "no network learns at such a rate")
RateOrZero = _real(1000.0, "no network learns at such a rate", zero=True)
Weight = _real(1e6, "float32 has seven digits", zero=True)
Sigma = _real(100.0, "nothing would be suppressed", zero=True)
Level = _whole(7, "no network has more levels", 0)
Magnitude = _real(100.0, "nothing would be left of an image", zero=True)
Scale = _real(16.0, "memory grows with the square of the scale")
Scales = Annotated[tuple[Scale, ...], pydantic.Field(min_length=1, max_length=64)]


class Group(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(
        frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False
    )


# --- Groups ----------------------------------------------------------------------------------


class SpineNetSizes(Group):
    """A SpineNet of one's own sizes; see `applications.spinenet.Variant`."""

    endpoint_filters: Filters
    filter_size_scale: Factor
    resample_alpha: Factor = 0.5
    block_repeats: Repeats = 1


class NmsConfig(Group):
    """Suppression of double detections; defaults are the released ones (reference section 18)."""

    score_threshold: Fraction = 0.05
    iou_threshold: Fraction = 0.5
    pre_nms: Candidates = 5000
    max_detections: Boxes = 100
    soft_sigma: Sigma = 0.0  # 0 is hard NMS; the paper's SpineNet rows use 0.3


class EfficientNetSizes(Group):
    """An EfficientNet of one's own sizes; see `applications.efficientnet.Variant`."""

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


class NetworkConfig(Group):
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
    bn_epsilon: _real(1.0, "it is added to a variance of about 1") = 1e-3
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

    kind: Literal["detection"] = "detection"
    head_convs: Convs = 4
    head_filters: Filters = 256
    anchor_size: _real(1000.0, "it counts strides of the network") = (
        3.0  # side of the smallest anchor in strides
    )
    max_instances: Boxes = 100  # boxes per image that reach the loss
    focal_alpha: Fraction = 0.25
    focal_gamma: _real(100.0, "nothing would be learned", zero=True) = 1.5
    huber_delta: _real(1e6, "float32 has seven digits") = 0.1
    box_weight: Weight = 50.0
    nms: NmsConfig = NmsConfig()


class SegmentationConfig(NetworkConfig):
    """Segmenter; defaults are those of the released EfficientNet-B7 configuration."""

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
    label_classes: _whole(254, "a mask has 8 bits, of which 255 is ignored") = (
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


_KINDS = {DetectionConfig: "detection", SegmentationConfig: "segmentation"}
_SIZES = {SpineNetSizes: "a SpineNet", EfficientNetSizes: "an EfficientNet"}

TaskConfig = Annotated[
    Annotated[DetectionConfig, pydantic.Tag("detection")]
    | Annotated[SegmentationConfig, pydantic.Tag("segmentation")],
    pydantic.Discriminator(_kind),
]


class SourceConfig(Group):
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
    class_thresholds: dict[int, Fraction] = {}  # in its place for some class ids
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


class SelfTrainingConfig(Group):
    """The method (paper appendix B) and the stages of `run`."""

    alpha: Weight = 1.0  # weight of the pseudo loss
    normalize: bool = True  # by moving averages; False is the plain weighted sum
    decay: Decay = 0.9997  # "auto": time constant of 7 % of the run
    separate_batch_norm: bool = False  # one forward pass per source instead of a shared one
    student_init: Literal["teacher", "random"] = "teacher"
    rounds: _whole(100, "each round is a whole training") = 1
    control: bool = False  # also train on human labels alone, as long and on as many images a step
    # Dotted overrides for the teacher stage, e.g. trainer.steps.
    teacher: Annotated[dict[str, pydantic.JsonValue], pydantic.BeforeValidator(_plain)] = {}


class OptimizerConfig(Group):
    """SGD with momentum and its learning-rate schedule (reference section 12)."""

    momentum: Fraction = 0.9
    l2: _real(100.0, "nothing would be learned", zero=True) = (
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


class TrainerConfig(Group):
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


class RuntimeConfig(Group):
    """Where it runs; never changes what is computed, up to rounding."""

    strategy: Literal[STRATEGIES] = "default"
    tpu: Text | None = None  # name or address of a TPU, or "local"
    devices: _whole(256, "a machine has no more", 0) = (
        0  # of mirrored and jax; 0: all. A CPU can be split in parts
    )
    jit_compile: bool = False  # compile steps with XLA; always so on a TPU and on JAX
    input_threads: Threads = 0  # 0: as many as there are cores
    stall_seconds: _whole(604_800, "that is a week", 0) = (
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


class Config(Group):
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
                "segmentation and task.label_classes=2 or more, with which the teacher labelled"
            )
        return self

    def _check_micro_batches(self):
        count = self.trainer.micro_batches
        for name in ("human", "pseudo"):
            source = getattr(self, name)
            if source is not None and source.batch_size % count:
                raise ValueError(
                    f"{name}.batch_size={source.batch_size} is not divisible by "
                    f"trainer.micro_batches={count}"
                )
        if count > 1 and self.pseudo is not None and not self.self_training.separate_batch_norm:
            raise ValueError(
                "trainer.micro_batches adds up the gradients of each source by itself: it needs "
                "self_training.separate_batch_norm=true"
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
        return make(merged)


# --- The configs of the stages of `run` ------------------------------------------------------


def teacher_config(config):
    """Supervised training on the human labels, with the overrides of `self_training.teacher`."""
    return config.override({"pseudo": None, **config.self_training.teacher})


def student_config(config, records, init):
    """Joint training on human and pseudo labels; `records` are the pseudo-labelled images."""
    changes = {"pseudo.records": records}
    if config.self_training.student_init == "teacher":
        changes["trainer.init"] = init
    return config.override(changes)


def control_config(config, init):
    """The student's training without pseudo labels: same start, steps and images per step."""
    batch = config.human.batch_size + config.pseudo.batch_size
    changes = {"pseudo": None, "human.batch_size": batch}
    if config.self_training.student_init == "teacher":
        changes["trainer.init"] = init
    return config.override(changes)


# --- Checking, with the nearest name for a misspelt one --------------------------------------


def make(values, origin=None):
    """Builds a `Config` from nested dicts; see `make_group`."""
    return make_group(Config, values, origin)


def make_group(group, values, origin=None):
    """Builds a `Config`, or one of its groups, from nested dicts.

    Args:
        group: the class.
        values: nested dicts.
        origin: where they come from: a name, or `(name, nested dicts)` pairs, the later on top of
            the earlier; each fault then names the one that it is in.

    Raises:
        UserError: one line for all faults, each with its dotted key, what was given, and the
            nearest known name.
    """
    layers = origin if isinstance(origin, (list, tuple)) else [(origin, values)]
    try:
        return group.model_validate(values)
    except pydantic.ValidationError as error:
        raise UserError("; ".join(_explain(group, error.errors(), layers))) from None
    except RecursionError:
        raise UserError("the settings are nested too deeply, or hold themselves") from None


def changed(config, **changes):
    """A copy of a config, or of one of its groups, with some fields changed and all checked.

    Raises:
        UserError: as `make_group` does, for a misspelt field and a value out of range.
    """
    return make_group(type(config), {**dict(config), **changes})


def load(path):
    """The checked `Config` of a file that is complete, such as the `config.yaml` of a run."""
    return make(load_file(path), str(path))


def _explain(root, errors, layers):
    """What is wrong, a line for each layer."""
    located = [(*_locate(root, error["loc"]), error) for error in errors]
    unknown = {(path[:-1], path[-1]) for path, _, e in located if e["type"] == "extra_forbidden"}
    lines, others, told = {}, {}, set()
    for path, group, error in located:
        if path in told:  # the second number of a pair, say
            continue
        told.add(path)
        origin = _origin(layers, path) or (layers[0][0] if len(layers) == 1 else None)
        if error["type"] == "missing" and any(
            section == path[:-1] and _nearest(name, [path[-1]]) for section, name in unknown
        ):
            continue  # it is there, misspelt
        if error["type"] != "extra_forbidden":
            message = _fault(root, path, error)
        elif path[-1] in (alternative := _alternative(group)).model_fields:
            others.setdefault((origin, group, alternative), []).append(".".join(path))
            continue
        else:
            message = _unknown(root, path, group)
        lines.setdefault(origin, []).append(message)
    for (origin, group, alternative), keys in others.items():
        lines.setdefault(origin, []).append(_of_another(keys, group, alternative))
    return [
        f"{origin}: {'; '.join(messages)}" if origin else "; ".join(messages)
        for origin, messages in lines.items()
    ]


def _alternative(group):
    """The other member of the union that a group is of; one without fields where there is none."""
    for kinds in (_KINDS, _SIZES):
        if group in kinds:
            return next(kind for kind in kinds if kind is not group)
    return Group


def _of_another(keys, group, alternative):
    """The message for settings of the other kind of task, or of sizes."""
    names = ", ".join(sorted(keys))
    if group in _KINDS:
        return (
            f"{names}: settings of task.kind={_KINDS[alternative]}, and this task is "
            f"{_KINDS[group]}; start from an experiment of that kind"
        )
    return (
        f"{names}: sizes of {_SIZES[alternative]} among those of {_SIZES[group]}; set "
        "task.backbone_sizes to null before other ones"
    )


def _locate(root, location):
    """The keys of a fault and the group that the last of them belongs to.

    Pydantic's location also has the tags of unions and the positions in a list, which no user can
    type.
    """
    path, group, field, members = [], root, None, {}
    for part in location:
        if len(members) > 1:
            members = {part: members.get(part)}  # a tag
        elif field is None or members:
            group = next(iter(members.values()), group)
            path.append(part)
            field = group.model_fields.get(part) if group else None
            members = _members(field.annotation) if field else {}
            if field is None:
                break
        elif get_origin(field.annotation) is dict:
            path.append(part)
            break
    return tuple(map(str, path)), group


def _members(annotation):
    """`{tag: group}` of the groups that a field can hold."""
    found = {}
    for part in (annotation, *get_args(annotation)):
        if isinstance(part, type) and issubclass(part, Group):
            tags = [t.tag for t in getattr(annotation, "__metadata__", ()) if hasattr(t, "tag")]
            found[tags[0] if tags else part.__name__] = part
        elif part is not annotation:
            found |= _members(part)
    return found


@functools.cache
def _keys(root):
    """All keys below a group, as tuples."""
    found = {}
    for name, field in root.model_fields.items():
        found[(name,)] = None
        for group in _members(field.annotation).values():
            found |= {(name, *below): None for below in _keys(group)}
    return list(found)


def _unknown(root, path, group):
    """The message for a key that does not exist."""
    key, name = ".".join(path), path[-1]
    parts = tuple(name.split("."))
    if len(parts) > 1 and (*path[:-1], *parts) in _keys(root):
        inside = ": {".join(parts) + ": ..." + "}" * (len(parts) - 1)
        return f"unknown key {key!r}; in a file, write it as {inside}"
    elsewhere = [".".join(known) for known in _keys(root) if known[-1] == name]
    if elsewhere:
        return f"unknown key {key!r}; it is {' or '.join(elsewhere)}"
    fields = list(group.model_fields) if group else []
    near = _nearest(name, fields)
    if near:
        return f"unknown key {key!r}; did you mean {near!r}?"
    if root is Config:
        names = {known[-1]: ".".join(known) for known in reversed(_keys(root))}
        near = _nearest(name, list(names), 0.8)
        if near:
            return f"unknown key {key!r}; did you mean {names[near]!r}?"
    return f"unknown key {key!r}; known: {', '.join(fields)}"


def _fault(root, path, error):
    """The message for a value that is not possible."""
    key, kind, given = ".".join(path), error["type"], error.get("input")
    message = error["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    if kind == "missing" and error["loc"][-1] == path[-1]:
        if root is Config and path == ("experiment",):
            return (
                "no experiment is named: give --experiment=NAME, the recipe that these settings "
                "change, or, if they are complete in themselves, a line `experiment: NAME` with a "
                "name of your own"
            )
        return f"{key} is missing"
    if kind == "union_tag_invalid":
        key, given = f"{key}.kind", given.get("kind")
        kinds = list(_KINDS.values())
        return f"{key}: must be {' or '.join(kinds)} (given {_short(given)}){_mean(given, kinds)}"
    if kind in ("model_type", "dict_type"):
        message = "must be a section, keys with values"
    if kind == "invalid_key":
        message = "a key must be a text; put it in quotes"
    if kind == "missing":
        message = "has too few numbers"
    if kind == "tuple_type":
        message = "must be a list, such as [a, b]"
    if kind == "literal_error" and isinstance(given, str):
        near = _nearest(given, re.findall(r"'([^']*)'", error["ctx"]["expected"]))
        if near:
            return f"{key}: unknown value {_short(given)}; did you mean {near!r}?"
    if isinstance(given, (dict, Group)):
        return f"{key}: {message}" if key else message
    return f"{key}: {message} (given {_short(given)})"


def _origin(layers, path):
    """The name of the last layer that sets a key."""
    for name, values in reversed(layers):
        for part in path:
            if not isinstance(values, dict) or part not in map(str, values):
                break
            values = next(value for key, value in values.items() if str(key) == part)
        else:
            if path:
                return name
    return None


def _short(value):
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:76]} ..."


def _nearest(name, known, cutoff=0.6):
    name = str(name)
    same = [other for other in known if other.lower() == name.lower()]
    return next(iter(same or difflib.get_close_matches(name, known, n=1, cutoff=cutoff)), None)


def _mean(name, known):
    near = _nearest(name, known, 0.5)
    return f"; did you mean {near!r}?" if near else ""


def did_you_mean(name, known):
    """The end of an error message: the nearest of the `known` names, or all of them."""
    return _mean(name, known) or (f"; known: {', '.join(known)}" if known else "")


# --- YAML and overrides ----------------------------------------------------------------------

LARGEST, DEEPEST = 100_000, 50  # values of a file once its anchors are written out, and levels


class _Loader(yaml.SafeLoader):
    """YAML that refuses duplicate keys and reads plain values by the rules of YAML 1.2.

    So `no` and `on` are words, a date is a text, and 1e-3 is a number.
    """

    yaml_implicit_resolvers: ClassVar = {}


class _LastWins(yaml.SafeLoader):
    """YAML in which the later of two equal keys wins, as the released Pascal files need it."""


_FLOAT = r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+"
for _tag, _pattern, _first in (
    ("bool", "true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", "[-+]?(0|[1-9][0-9]*)|0x[0-9a-fA-F]+", "-+0123456789"),
    ("float", rf"{_FLOAT}|[-+]?([0-9]+\.[0-9]*|\.[0-9]+)", "-+.0123456789"),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", "-+."),
    ("null", "~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("merge", "<<", "<"),
):
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), list(_first)
    )
_LastWins.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(f"^{_FLOAT}$"), list("-+0123456789")
)


def load_yaml(text, origin, last_wins=False):
    """Parses YAML; `origin` is named in errors. Equal keys are refused unless the last wins.

    Raises:
        UserError: if it is not valid, nested more than 50 levels, or of more than 100,000 values.
    """
    loader = None
    try:
        loader = (_LastWins if last_wins else _Loader)(text)
        node = loader.get_single_node()
        _check_size(node, {})
        if not last_wins:
            _check_keys(node, set())
        return None if node is None else loader.construct_document(node)
    except UserError as error:
        raise UserError(f"{origin}: {error}") from None
    except RecursionError:
        raise UserError(f"{origin} is nested too deeply") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        reason = " ".join(filter(None, (error.context, error.problem)))
        raise UserError(f"{origin}{where}: not valid YAML: {reason}") from None
    except (yaml.YAMLError, ValueError, OverflowError, TypeError) as error:
        raise UserError(f"{origin} is not valid YAML: {' '.join(str(error).split())}") from None
    finally:
        if loader is not None:
            loader.dispose()


def _children(node):
    if isinstance(node, yaml.MappingNode):
        return [part for pair in node.value for part in pair]
    return node.value if isinstance(node, yaml.SequenceNode) else []


def _check_size(node, sizes, depth=0):
    """How many values a node holds, each anchor counted where it is used."""
    if depth > DEEPEST:
        raise UserError(f"nested too deeply, more than {DEEPEST} levels, or holds itself")
    if id(node) not in sizes:
        sizes[id(node)] = 1 + sum(_check_size(n, sizes, depth + 1) for n in _children(node))
        if sizes[id(node)] > LARGEST:
            raise UserError(f"holds more than {LARGEST:,} values: no file of settings, or names?")
    return sizes[id(node)]


def _check_depth(value, origin, depth=0):
    """The same for dicts and lists that are not from YAML."""
    if depth > DEEPEST:
        raise UserError(f"{origin}: nested too deeply, more than {DEEPEST} levels, or holds itself")
    if isinstance(value, (dict, list, tuple)):
        for part in value.values() if isinstance(value, dict) else value:
            _check_depth(part, origin, depth + 1)


def _check_keys(node, seen):
    """Refuses equal keys of a mapping; a merged one (`<<`) may be set again."""
    if id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, yaml.MappingNode):
        lines = {}
        for key, _ in node.value:
            name, line = (key.tag, str(key.value)), key.start_mark.line + 1
            if name in lines and isinstance(key, yaml.ScalarNode):
                raise UserError(
                    f"the key {key.value!r} twice, in line {lines[name]} and in line {line}"
                )
            lines[name] = line
    for part in _children(node):
        _check_keys(part, seen)


def _load_json(text, path):
    def unique(pairs):
        values = dict(pairs)
        if len(values) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise UserError(f"{path}: the key {twice!r} twice")
        return values

    try:
        return json.loads(text, object_pairs_hook=unique)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    except RecursionError:
        raise UserError(f"{path} is nested too deeply") from None


def load_file(path, last_wins=False):
    """A YAML or JSON file as nested dicts; see `load_yaml`."""
    text = read_text(path, "config file")
    if str(path).endswith(".json") and not last_wins:
        values = _load_json(text, path)
        _check_depth(values, path)
    else:
        values = load_yaml(text, path, last_wins)
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold keys and values, such as `trainer: {{steps: 100}}`")
    return values


def parse_override(text):
    """Nested dicts from one `--params_override`.

    Takes the released code's forms: `a.b=1,c=[1,2]`, inline YAML `{a: {b: 1}}`, or a file.
    """
    text = text.strip()
    if text.startswith("{"):
        return load_yaml(text, "--params_override")
    if text.endswith((".yaml", ".yml", ".json")) and "=" not in text:
        return load_file(text)
    merged = {}
    for item in _split_commas(text):
        key, equals, value = item.partition("=")
        if not equals or not all(part.strip() for part in key.split(".")):
            raise UserError(f"--params_override takes key=value,key=value; cannot read {item!r}")
        merged = merge(merged, nested(key.strip(), load_yaml(value, f"--params_override {item!r}")))
    return merged


def _split_commas(text):
    """Splits at commas outside brackets and quotes; a quote inside a word is a letter."""
    items, depth, quote, before = [""], 0, "", "="
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"" and before in "=,[{:":
            quote = letter
        elif letter in "[{]}":
            depth = max(depth + (1 if letter in "[{" else -1), 0)
        if letter == "," and not depth and not quote:
            items.append("")
        else:
            items[-1] += letter
        before = letter if letter.strip() else before
    return [item for item in items if item.strip()]


def nested(key, value):
    """`nested("a.b", 1)` is `{"a": {"b": 1}}`."""
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def merge(base, changes):
    """Nested dicts merge; every other value, lists too, replaces."""
    merged = dict(base)
    for key, value in changes.items():
        old = merged.get(key)
        both = isinstance(old, dict) and isinstance(value, dict)
        merged[key] = merge(old, value) if both else value
    return merged


def dump(config):
    """YAML text from which `make` rebuilds the same config."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


# --- Experiments -----------------------------------------------------------------------------


def experiment_folder():
    """The folder of experiment files: inside a wheel, or beside the package in a checkout."""
    for folder in EXPERIMENT_FOLDERS:
        if folder.is_dir():
            return folder
    raise UserError(f"no experiments found in {' or '.join(map(str, EXPERIMENT_FOLDERS))}")


def load_experiments(path=None):
    """`{name: nested dicts}` of one file, or of all files that come with the package.

    The files are Python and are executed: load those of people you trust.

    Raises:
        UserError: one line with file and line if one cannot be executed, or its `EXPERIMENTS` is
            not `{name: settings}`.
    """
    files = [pathlib.Path(path)] if path else sorted(experiment_folder().glob("[!_]*.py"))
    experiments = {}
    for file in files:
        for name, values in _execute(file).items():
            if not isinstance(name, str) or not isinstance(values, dict):
                raise UserError(
                    f"{file}: EXPERIMENTS must be a dict of names and settings; {_short(name)} is "
                    f"{_short(values)}"
                )
            if name in experiments:
                raise UserError(f"two experiments are called {name!r}; the second is in {file}")
            _check_depth(values, f"{file}, experiment {name!r}")
            experiments[name] = {"experiment": name, **values}
    return experiments


def _execute(file):
    """The `EXPERIMENTS` of a Python file."""
    if not file.is_file():
        beside = file.parent.glob("*.py") if file.parent.is_dir() else ()
        hint = _mean(file.name, [other.name for other in beside])
        raise UserError(f"the experiment file {file} does not exist{hint}")
    try:
        found = runpy.run_path(str(file))
    except SyntaxError as error:
        raise UserError(f"{file}, line {error.lineno}, is not valid Python: {error.msg}") from None
    except (Exception, SystemExit) as error:
        frames = traceback.extract_tb(error.__traceback__)
        line = next((f.lineno for f in reversed(frames) if f.filename == str(file)), None)
        where = f"{file}, line {line}" if line else str(file)
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise UserError(f"{where}, cannot be executed: {reason}") from None
    experiments = found.get("EXPERIMENTS")
    if not isinstance(experiments, dict):
        raise UserError(
            f"{file} must define EXPERIMENTS, a dict of names and settings; it is "
            f"{'missing' if experiments is None else _short(experiments)}"
        )
    return experiments


def load_experiment(name):
    """The nested dicts of an experiment: `name`, or `FILE.py:name`, which executes the file."""
    path, _, short = name.rpartition(":") if ".py:" in name else ("", "", name)
    if name.endswith(".py"):
        known = ", ".join(f"{name}:{short}" for short in load_experiments(name))
        raise UserError(f"--experiment=FILE.py:NAME says which one of the file: {known or 'none'}")
    experiments = load_experiments(path or None)
    if short not in experiments:
        hint = did_you_mean(short, list(experiments))
        where = f" in {path}" if path else ""
        more = "" if path else "; --experiment=list shows all"
        raise UserError(f"no experiment is called {short!r}{where}{hint}{more}")
    return experiments[short]


def resolve(experiment=None, config_file=None, overrides=(), data_dir=None):
    """The checked config of a command line.

    Raises:
        UserError: one line for all mistakes, each with the file or flag that it is in.
    """
    if not experiment and not config_file:
        raise UserError("say what to run: --experiment=NAME (`list` shows all) or --config_file")
    layers = []
    if experiment:
        layers.append((f"experiment {experiment!r}", load_experiment(experiment)))
    if config_file:
        layers.append((str(config_file), load_file(config_file)))
    for text in overrides:
        layers.append((f"--params_override {_short(text)}", parse_override(text)))
    if data_dir:
        layers.append(("--data_dir", {"data_dir": os.path.abspath(data_dir)}))
    config = make(functools.reduce(merge, (values for _, values in layers), {}), layers)
    try:
        teacher_config(config)
    except UserError as error:
        raise UserError(f"self_training.teacher: {error}") from None
    return config
