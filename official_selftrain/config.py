"""Typed configuration: groups, YAML in and out, overrides, and the experiment registry.

Imports neither Keras nor TensorFlow, so a typo is answered at once.
Precedence: the experiment, then `--config_file`, then each `--params_override`.
"""

import difflib
import os
import pathlib
import re
import runpy
from typing import Annotated, Any, Literal

import pydantic
import yaml

from official_selftrain.errors import UserError

PACKAGE = pathlib.Path(__file__).resolve().parent
EXPERIMENT_FOLDERS = (PACKAGE / "experiments", PACKAGE.parent / "experiments")

Fraction = pydantic.confloat(ge=0, le=1)
Scales = Annotated[tuple[pydantic.PositiveFloat, ...], pydantic.Field(min_length=1)]
Positive = pydantic.PositiveInt
BACKBONES = (
    *(f"spinenet{variant}" for variant in ("49S", "49", "96", "143", "143L", "190")),
    *(f"efficientnet-b{number}" for number in range(9)),
    "efficientnet-l2",
    *(f"efficientnet-lite{number}" for number in range(5)),
    *(f"resnet{depth}" for depth in (10, 14, 18, 26, 34, 50, 101, 152, 200)),
)
BackboneName = Literal[BACKBONES]
WITH_IMAGENET = (*(f"efficientnet-b{number}" for number in range(8)), "efficientnet-lite0")


class Group(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", validate_default=True)


class SpineNetSizes(Group):
    """A SpineNet of one's own sizes; see `applications.spinenet.Variant`."""

    endpoint_filters: Positive
    filter_size_scale: pydantic.PositiveFloat
    resample_alpha: pydantic.PositiveFloat = 0.5
    block_repeats: Positive = 1


class NmsConfig(Group):
    """Suppression of double detections; defaults are the released ones (reference section 18)."""

    score_threshold: Fraction = 0.05
    iou_threshold: Fraction = 0.5
    pre_nms: Positive = 5000
    max_detections: Positive = 100
    soft_sigma: pydantic.NonNegativeFloat = 0.0  # 0 is hard NMS; the paper's SpineNet rows use 0.3


class EfficientNetSizes(Group):
    """An EfficientNet of one's own sizes; see `applications.efficientnet.Variant`."""

    width: pydantic.PositiveFloat
    depth: pydantic.PositiveFloat = 1.0


class NetworkConfig(Group):
    """A backbone, its neck and batch norm; defaults are those of the released SpineNet-49."""

    num_classes: int | None = pydantic.Field(None, ge=2)  # with background 0; None: ask the labels
    image_size: tuple[Positive, Positive] = (640, 640)  # height, width in pixels
    backbone: BackboneName = "spinenet49"
    backbone_sizes: SpineNetSizes | EfficientNetSizes | None = None  # in place of the named one's
    neck: Literal["none", "fpn", "nasfpn"] = "none"
    neck_filters: Positive = 256
    neck_repeats: Positive = 7  # cells of a NAS-FPN
    neck_separable: bool = False  # depthwise-separable convolutions
    neck_sum_only: bool = False  # NAS-FPN without attention
    stochastic_depth: float | None = pydantic.Field(None, gt=0, lt=1)
    drop_block: tuple[Fraction, Positive] | None = None  # share kept, block side; ResNet, NAS-FPN
    activation: Literal["relu", "swish"] = "swish"
    bn_momentum: Fraction = 0.997
    bn_epsilon: pydantic.PositiveFloat = 1e-3
    bn_synchronized: bool = True
    bn_frozen: bool = False
    # Of activations; weights, batch statistics, losses and their averages are float32.
    precision: Literal["float32", "mixed_bfloat16", "mixed_float16"] = "float32"

    @pydantic.field_validator("image_size")
    @classmethod
    def _fits_the_pyramid(cls, size):
        if any(side % 128 for side in size):
            raise ValueError(f"height and width must be divisible by 128 = 2^7; given {size}")
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
    head_convs: Positive = 4
    head_filters: Positive = 256
    anchor_size: pydantic.PositiveFloat = 3.0  # side of the smallest anchor in strides
    max_instances: Positive = 100  # boxes per image that reach the loss
    focal_alpha: Fraction = 0.25
    focal_gamma: pydantic.NonNegativeFloat = 1.5
    huber_delta: pydantic.PositiveFloat = 0.1
    box_weight: pydantic.NonNegativeFloat = 50.0
    nms: NmsConfig = NmsConfig()


class SegmentationConfig(NetworkConfig):
    """Segmenter; defaults are those of the released EfficientNet-B7 configuration."""

    kind: Literal["segmentation"] = "segmentation"
    image_size: tuple[Positive, Positive] = (512, 512)
    backbone: BackboneName = "efficientnet-b7"
    neck: Literal["none", "fpn", "nasfpn"] = "nasfpn"
    neck_separable: bool = True
    activation: Literal["relu", "swish"] = "relu"
    aspp: bool = False  # on level 5 of the backbone
    head_level: pydantic.NonNegativeInt = 2  # the logits have stride 2^head_level
    head_convs: Positive = 3
    fusion: bool = True  # sum all levels before the head
    loss_size: Literal["logits", "mask"] = "logits"  # where logits and labels meet
    label_smoothing: pydantic.confloat(ge=0, lt=1) = 0.0
    class_weights: tuple[pydantic.NonNegativeFloat, ...] | None = None  # one a class
    eval_scales: Scales = (1.0,)  # of image_size; their mean probability decides
    eval_flip: bool = False  # also mirrored
    eval_size: Literal["image", "network"] = "image"  # where predictions meet the truth
    label_scales: Scales = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)  # the same for pseudo labels
    label_flip: bool = False
    label_classes: Positive = 1  # stored for each pixel with their probabilities; pseudo.soft

    @pydantic.model_validator(mode="after")
    def _a_weight_for_each_class(self):
        weights, count = self.class_weights, self.num_classes
        if weights is not None and count is not None and len(weights) != count:
            raise ValueError(f"class_weights has {len(weights)} numbers for {count} classes")
        return self


def _kind(values):
    """Which of the two tasks a config means; detection unless it says otherwise."""
    if isinstance(values, dict):
        return values.get("kind", "detection")
    return getattr(values, "kind", "detection")


TaskConfig = Annotated[
    Annotated[DetectionConfig, pydantic.Tag("detection")]
    | Annotated[SegmentationConfig, pydantic.Tag("segmentation")],
    pydantic.Discriminator(_kind),
]


class SourceConfig(Group):
    """Where images and labels come from: one of `records`, `images`, `tfds` or `embedded`.

    Relative paths start at `data_dir` where that is given. docs/data.md explains every kind.
    """

    records: str | None = None  # TFRecord files: a glob, or several joined by commas
    images: str | None = None  # a folder of images, a glob, or tar files
    annotations: str | None = None  # COCO JSON, or a folder of VOC XML or YOLO txt; None: no boxes
    masks: str | None = None  # a folder (glob, tars) of PNG masks with the stems of the images
    image_list: str | None = None  # text file: one file name or stem a line, others are left out
    exclude_lists: tuple[str, ...] = ()  # such files of images to leave out
    class_list: str | None = None  # one name a line (or data.yaml); id 1 first, with masks id 0
    label_by_folder: bool = False  # the class of an image is the folder it lies in
    tfds: str | None = None  # a data set of tensorflow-datasets, such as "coco/2017"
    split: str = "train"  # of tfds
    embedded: Literal["train", "unlabeled", "val"] | None = None  # a split of the embedded digits
    on_bad_record: Literal["stop", "skip"] = "stop"

    @pydantic.model_validator(mode="after")
    def _one_source(self):
        kinds = ("records", "images", "tfds", "embedded")
        given = [key for key in kinds if getattr(self, key)]
        if len(given) > 1:
            raise ValueError(f"give one of {', '.join(kinds)}, not {' and '.join(given)}")
        for key in ("annotations", "masks", "class_list", "label_by_folder"):
            if getattr(self, key) and not self.images:
                raise ValueError(f"{key} needs `images`, a folder, glob or tars of image files")
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

    batch_size: Positive = 256  # over all replicas
    policy: Literal[tuple(JITTER)] = "S1"  # S1 weakest, S4 strongest; keras_cv needs its extra
    flip: bool = True  # mirror left to right with probability 0.5
    jitter: tuple[pydantic.PositiveFloat, pydantic.PositiveFloat] | None = None  # None: policy's
    auto_augment: Literal["v0", "v1", "v2", "v3", "test"] = "v0"  # sub-policies of S2 and S3
    magnitude: pydantic.NonNegativeFloat = 10.0  # of S4; the paper's ResNet-101 takes 15
    num_ops: Positive = 2  # operations an image, of S4
    as_released: bool = False  # with the released slips, such as Contrast; see data/image_ops.py
    shuffle_buffer: Positive = 1024  # images
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
    batch_size: Positive = 8


class SelfTrainingConfig(Group):
    """The method (paper appendix B) and the stages of `run`."""

    alpha: pydantic.NonNegativeFloat = 1.0  # weight of the pseudo loss
    normalize: bool = True  # by moving averages; False is the plain weighted sum
    decay: Literal["auto"] | Fraction = 0.9997  # "auto": time constant of 7 % of the run
    separate_batch_norm: bool = False  # one forward pass per source instead of a shared one
    student_init: Literal["teacher", "random"] = "teacher"
    rounds: Positive = 1
    control: bool = False  # also train on human labels alone, as long and on as many images a step
    teacher: dict[str, Any] = {}  # dotted overrides for the teacher stage, e.g. trainer.steps


class OptimizerConfig(Group):
    """SGD with momentum and its learning-rate schedule (reference section 12)."""

    momentum: Fraction = 0.9
    l2: pydantic.NonNegativeFloat = 4e-5  # times half the squared kernels, added to the loss
    clip_norm: pydantic.NonNegativeFloat = 10.0  # of all gradients together; 0 is off
    schedule: Literal["cosine", "step"] = "cosine"
    learning_rate: pydantic.PositiveFloat = 0.28
    warmup_steps: pydantic.NonNegativeInt = 2000
    warmup_learning_rate: pydantic.NonNegativeFloat = 0.0067
    step_boundaries: tuple[Positive, ...] = ()
    step_rates: tuple[pydantic.PositiveFloat, ...] = ()

    @pydantic.model_validator(mode="after")
    def _boundaries_have_rates(self):
        if len(self.step_boundaries) != len(self.step_rates):
            raise ValueError("step_boundaries and step_rates must have the same length")
        return self


class TrainerConfig(Group):
    steps: Positive
    # A run folder, .weights.h5 file, "imagenet", "imagenet++" or TF1 checkpoint of the backbone.
    init: str | None = None
    steps_per_loop: Positive = 100  # steps between two reports
    checkpoint_interval: Positive = 1000  # steps
    keep_checkpoints: Positive = 5
    evaluation_interval: pydantic.NonNegativeInt = 0  # steps; 0 evaluates at the end only
    seed: pydantic.NonNegativeInt = 0
    micro_batches: Positive = 1  # parts of a batch, whose gradients are added up for an update
    ema_decay: pydantic.confloat(ge=0, lt=1) = 0.0  # of averaged weights, evaluated too; 0: none
    skip_nonfinite: pydantic.NonNegativeInt = 0  # batches to leave out for a NaN before stopping


STRATEGIES = ("default", "mirrored", "multi_worker_mirrored", "tpu", "jax")


class RuntimeConfig(Group):
    """Where it runs; never changes what is computed, up to rounding."""

    strategy: Literal[STRATEGIES] = "default"
    tpu: str | None = None  # name or address of a TPU, or "local"
    devices: pydantic.NonNegativeInt = 0  # of mirrored and jax; 0: all. A CPU can be split in parts
    jit_compile: bool = False  # compile steps with XLA; always so on a TPU and on JAX
    input_threads: pydantic.NonNegativeInt = 0  # 0: as many as there are cores
    stall_seconds: pydantic.NonNegativeInt = 300  # without progress before a warning; 0: never

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
    experiment: str
    description: str = ""
    published: float | None = None  # the paper's AP
    data_dir: str | None = None
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


def make(values):
    """Builds a `Config` from nested dicts; see `make_group`."""
    return make_group(Config, values)


def make_group(group, values):
    """Builds a `Config`, or one of its groups, from nested dicts.

    Raises:
        UserError: one line for all faults, each with its dotted key, what was given, and the
            nearest known name.
    """
    try:
        return group.model_validate(values)
    except pydantic.ValidationError as error:
        raise UserError("; ".join(_explain(e) for e in error.errors())) from None


def _explain(error):
    path = [str(part) for part in error["loc"]]
    key = ".".join(path) or "config"
    if error["type"] == "extra_forbidden":
        return f"unknown key {key!r}{did_you_mean(path[-1], _fields_at(path[:-1]))}"
    given = "" if isinstance(error.get("input"), dict) else f" (given {error.get('input')!r})"
    return f"{key}: {error['msg'].removeprefix('Value error, ')}{given}"


def _fields_at(path):
    group = Config
    for part in path:
        field = group.model_fields.get(part)
        kinds = [] if field is None else [field.annotation, *_arguments(field.annotation)]
        groups = [k for k in kinds if isinstance(k, type) and issubclass(k, Group)]
        if not groups:
            return []
        group = groups[0]
    return list(group.model_fields)


def _arguments(annotation):
    return getattr(annotation, "__args__", ())


def did_you_mean(name, known):
    """The end of an error message: the nearest of the `known` names, or all of them."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if near:
        return f"; did you mean {near[0]!r}?"
    return f"; known: {', '.join(known)}" if known else ""


# --- YAML and overrides ----------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """YAML that refuses duplicate keys and reads 1e-3 as a number."""


class _LastWins(yaml.SafeLoader):
    """YAML in which the later of two equal keys wins, as the released Pascal files need it."""


def _mapping(loader, node):
    keys = [loader.construct_object(key) for key, _ in node.value]
    twice = {key for key in keys if keys.count(key) > 1}
    if twice:
        line = node.start_mark.line + 1
        raise UserError(f"the block at line {line} has the key {twice.pop()!r} twice")
    return yaml.SafeLoader.construct_mapping(loader, node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)
for _loader in (_Loader, _LastWins):
    _loader.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"),
        list("-+0123456789"),
    )


def load_yaml(text, origin, last_wins=False):
    """Parses YAML; `origin` is named in errors. Equal keys are refused unless the last wins."""
    try:
        return yaml.load(text, _LastWins if last_wins else _Loader)
    except UserError as error:
        raise UserError(f"{origin}: {error}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{origin} is not valid YAML: {' '.join(str(error).split())}") from None


def load_file(path, last_wins=False):
    """A YAML or JSON file as nested dicts; see `load_yaml`."""
    try:
        values = load_yaml(pathlib.Path(path).read_text(encoding="utf-8"), path, last_wins)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the config file {path}: {error}") from None
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
        if not equals or not key.strip():
            raise UserError(f"--params_override takes key=value,key=value; cannot read {item!r}")
        merged = merge(merged, nested(key.strip(), load_yaml(value, f"--params_override {item!r}")))
    return merged


def _split_commas(text):
    """Splits at commas outside brackets and quotes."""
    items, depth, quote = [""], 0, ""
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter
        depth += (letter in "[{") - (letter in "]}") if not quote else 0
        if letter == "," and not depth and not quote:
            items.append("")
        else:
            items[-1] += letter
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
    """`{name: nested dicts}` of one file, or of all files that come with the package."""
    files = [pathlib.Path(path)] if path else sorted(experiment_folder().glob("[!_]*.py"))
    experiments = {}
    for file in files:
        if not file.is_file():
            raise UserError(f"the experiment file {file} does not exist")
        for name, values in runpy.run_path(str(file)).get("EXPERIMENTS", {}).items():
            if name in experiments:
                raise UserError(f"two experiments are called {name!r}; the second is in {file}")
            experiments[name] = {"experiment": name, **values}
    return experiments


def load_experiment(name):
    """The nested dicts of an experiment: `name`, or `path/file.py:name`."""
    path, _, short = name.rpartition(":") if ".py:" in name else ("", "", name)
    experiments = load_experiments(path or None)
    if short not in experiments:
        hint = did_you_mean(short, list(experiments))
        raise UserError(f"no experiment is called {short!r}{hint}; --experiment=list shows all")
    return experiments[short]


def resolve(experiment=None, config_file=None, overrides=(), data_dir=None):
    """The checked config of a command line."""
    if not experiment and not config_file:
        raise UserError("say what to run: --experiment=NAME (`list` shows all) or --config_file")
    values = load_experiment(experiment) if experiment else {}
    if config_file:
        values = merge(values, load_file(config_file))
    for text in overrides:
        values = merge(values, parse_override(text))
    if data_dir:
        values = merge(values, {"data_dir": os.path.abspath(data_dir)})
    return make(values)
