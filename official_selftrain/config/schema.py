"""All settings: a `Config` holds one group of each kind."""

import math
import pathlib
from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args

import pydantic
from pydantic import Field

from official_selftrain.config.build import ConfigModel, model_from_dict
from official_selftrain.config.networks import PUBLIC_WEIGHTS, is_public
from official_selftrain.config.overrides import merge, nested
from official_selftrain.config.sources import (
    EvaluationConfig,
    HumanConfig,
    PseudoConfig,
    UnlabeledConfig,
)
from official_selftrain.config.tasks import DetectionConfig, TaskConfig
from official_selftrain.config.values import (
    AutoOrFraction,
    Batch,
    BelowOne,
    Count,
    Fraction,
    Interval,
    Loop,
    Passes,
    Rate,
    RateOrZero,
    Seed,
    Steps,
    Text,
    Threads,
    Weight,
    Words,
    real,
    whole,
)
from official_selftrain.utils.errors import UserError


def plain(value: Any) -> Any:
    """Tuples as lists and numbers that are keys as text, so that the settings are JSON."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value


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
    decay: AutoOrFraction = Field(
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
    teacher: Annotated[dict[str, pydantic.JsonValue], pydantic.BeforeValidator(plain)] = Field(
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
    base_batch_size: Batch | None = Field(
        default=None,
        description=(
            "Images per step for which the learning rates are meant; with more or fewer they are "
            "scaled in proportion. By default they hold for any number."
        ),
    )
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

    steps: Steps | None = Field(
        default=None,
        description=(
            "Number of updates. Without steps and epochs it follows from the number of labeled "
            "images, see docs/method.md."
        ),
    )
    epochs: Passes | None = Field(
        default=None,
        description="Number of passes over the human-labeled images, in place of steps.",
    )
    init: Text | None = Field(
        default=None,
        description=(
            "Initial weights: a run folder, a .weights.h5 or .keras file, a TF1 checkpoint of the "
            "backbone, imagenet, imagenet++, timm/NAME of the Hugging Face hub, or a .safetensors "
            "file of timm. By default they are random."
        ),
    )
    steps_per_loop: Loop = Field(default=100, description="Steps between two progress reports.")
    checkpoint_interval: Steps = Field(default=1000, description="Steps between two checkpoints.")
    keep_checkpoints: Count = Field(default=5, description="Number of newest checkpoints to keep.")
    evaluation_interval: Interval = Field(
        default=0,
        description=(
            "Steps between two evaluations. 0 evaluates at the end only, or, with a selection, "
            "about 20 times."
        ),
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

    @pydantic.model_validator(mode="after")
    def _one_length(self) -> "TrainerConfig":
        if self.steps is not None and self.epochs is not None:
            raise ValueError(
                f"steps ({self.steps}) and epochs ({self.epochs:g}) both give the length of the "
                "training; give one of them, and set the other to null if the experiment has it"
            )
        return self


class SelectionConfig(ConfigModel):
    """Labeled images that are held out of a training, to stop it and to choose its weights."""

    fraction: Fraction = Field(
        default=0.1,
        description=(
            "Part of the labeled images that is held out: at least `min_images`, and at most a "
            "quarter of them. None are if there are fewer than four times `min_images`."
        ),
    )
    min_images: Count = Field(default=24, description="Fewest images that are held out.")
    patience: Interval = Field(
        default=10,
        description="Evaluations without improvement after which a training stops; 0 never stops.",
    )
    seed: Seed = Field(default=0, description="Seed of the draw of the images.")


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
    human: HumanConfig = Field(description="Images with human labels to train on.")
    selection: SelectionConfig | None = Field(
        default=None, description="Labeled images that stop a training and choose its weights."
    )
    unlabeled: UnlabeledConfig | None = Field(
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
    trainer: TrainerConfig = Field(
        default=TrainerConfig(), description="Length, checkpoints and evaluations."
    )
    runtime: RuntimeConfig = Field(default=RuntimeConfig(), description="Devices and threads.")

    @pydantic.model_validator(mode="after")
    def _stages_are_possible(self) -> "Config":
        steps = self.trainer.steps
        if steps is not None and self.optimizer.warmup_steps > steps:
            raise ValueError(
                f"optimizer.warmup_steps ({self.optimizer.warmup_steps}) is more than "
                f"trainer.steps ({steps})"
            )
        self._check_init()
        self._check_auto_batches()
        self._check_micro_batches()
        self._check_thresholds()
        if (
            self.pseudo is not None
            and self.pseudo.agnostic_nms_iou is not None
            and self.task.kind != "detection"
        ):
            raise ValueError(
                "pseudo.agnostic_nms_iou drops boxes: it needs task.kind=detection, since a pixel "
                "of a mask has one class anyway; set it to null"
            )
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

    def _check_init(self) -> None:
        init, backbone = self.trainer.init, self.task.backbone
        if init is None or not is_public(init):
            return
        # Weights of the published sizes do not fit other ones.
        known = PUBLIC_WEIGHTS.get(init)
        if known and (backbone not in known or self.task.backbone_sizes is not None):
            raise ValueError(
                f"trainer.init={init}: {backbone} has no such public weights; those that have, in "
                f"their published sizes, are {', '.join(known)}"
            )
        if backbone.startswith("resnet") and self.task.activation != "relu":
            raise ValueError(
                f"trainer.init={init}: the public weights of {backbone} were trained with ReLU; "
                "set task.activation=relu"
            )

    def _check_auto_batches(self) -> None:
        if self.pseudo is None:
            return
        human, pseudo = self.human.batch_size, self.pseudo.batch_size
        if (human == "auto") != (pseudo == "auto"):
            raise ValueError(
                f"human.batch_size={human} and pseudo.batch_size={pseudo}: the two parts of a "
                "batch are both auto or both numbers; set the other one, too"
            )

    def _check_micro_batches(self) -> None:
        count = self.trainer.micro_batches
        self.check_batch_sizes(count, f"trainer.micro_batches={count}")
        # The divisors of the losses are known only after all micro-batches. Until then the
        # gradients of the two streams are kept apart, and each needs a pass of its own.
        if count > 1 and self.pseudo is not None and not self.self_training.separate_batch_norm:
            raise ValueError(
                "trainer.micro_batches adds up the gradients of each stream by itself: it needs "
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
            if source is None or source.batch_size == "auto":
                continue
            if source.batch_size % parts:
                raise UserError(
                    f"{name}.batch_size={source.batch_size} is not divisible by {divisor}; use "
                    f"{math.ceil(source.batch_size / parts) * parts}"
                )

    def _check_thresholds(self) -> None:
        first = self.task.first_class
        count = self.task.num_classes
        for number in self.pseudo.class_thresholds if self.pseudo else ():
            if number < first or (count is not None and number >= count):
                last = "" if count is None else f" to {count - 1}"
                raise ValueError(
                    f"pseudo.class_thresholds names class {number}, but the classes are numbered "
                    f"from {first}{last}"
                )

    @property
    def steps(self) -> int:
        """Number of updates, which an automatic length has once the images are counted."""
        if self.trainer.steps is None:
            raise RuntimeError("call `with_length` before the number of steps is read")
        return self.trainer.steps

    @property
    def images_per_step(self) -> int:
        """Human-labeled and pseudo-labeled images of one update."""
        return self.human.batch + (self.pseudo.batch if self.pseudo is not None else 0)

    @property
    def decay(self) -> float:
        """Decay per step of the moving averages of the losses."""
        if self.self_training.decay == "auto":
            return 1 - 1 / max(0.07 * self.steps, 1)
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
