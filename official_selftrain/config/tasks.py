"""Settings of the network and of its task: detection or segmentation."""

import difflib
from typing import Annotated, Any, ClassVar, Literal

import pydantic
from pydantic import Field

from official_selftrain.config.build import ConfigModel
from official_selftrain.config.networks import BackboneName
from official_selftrain.config.values import (
    BelowOne,
    Boxes,
    Candidates,
    Classes,
    Convs,
    Factor,
    Filters,
    Fraction,
    Level,
    Repeats,
    Scales,
    Side,
    Sigma,
    Weight,
    real,
    whole,
)


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

    eval_scales: Scales = Field(
        default=(1.0,),
        description=(
            "Scales, relative to image_size, at which an image is evaluated. The boxes of all are "
            "merged by NMS; the mean probability decides on a pixel."
        ),
    )
    eval_flip: bool = Field(default=False, description="Evaluate the mirrored image as well.")
    label_scales: Scales = Field(
        default=(1.0,), description="The same as eval_scales for pseudo labels."
    )
    label_flip: bool = Field(default=False, description="Label the mirrored image as well.")

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

    first_class: ClassVar[int] = 1  # 0 is the background, which no box has

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

    @pydantic.model_validator(mode="after")
    def _has_scales(self) -> "DetectionConfig":
        for name in ("eval_scales", "label_scales"):
            scales = getattr(self, name)
            if self.backbone.startswith("spinenet") and set(scales) != {1.0}:
                raise ValueError(
                    f"{name}={list(scales)}: a SpineNet has one image size; set it to [1.0], or "
                    "take another backbone"
                )
        return self


class SegmentationConfig(NetworkConfig):
    """Segmenter. The defaults are those of the released EfficientNet-B7 configuration."""

    misplaced: ClassVar[str] = (
        "settings of task.kind=segmentation, but this task is detection; start from an experiment "
        "of that kind"
    )

    first_class: ClassVar[int] = 0  # the background is a class of pixels

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
