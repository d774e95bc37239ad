"""From a config to a network."""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import keras

from official_selftrain.applications import efficientnet, resnet, spinenet
from official_selftrain.applications.layers import NormActivation
from official_selftrain.config import DetectionConfig, SegmentationConfig
from official_selftrain.models.fpn import FPN
from official_selftrain.models.nasfpn import NASFPN
from official_selftrain.models.retinanet import RetinaNet
from official_selftrain.models.segmenter import ASPP, Segmenter


def build_detector(config: DetectionConfig) -> keras.Model:
    """The `RetinaNet` that a config describes, with random weights.

    Args:
        config: with `num_classes` set.

    Raises:
        ValueError: if `num_classes` is not set, or if the network cannot take images of the
            config's size.
    """
    num_classes, norm = _num_classes(config), _norm_activation(config)
    with _dtype_policy(config.precision):
        return RetinaNet(
            _add_neck(build_backbone(config), config, norm),
            num_classes,
            num_convs=config.head_convs,
            num_filters=config.head_filters,
            norm=norm,
        )


def build_segmenter(config: SegmentationConfig) -> keras.Model:
    """The `Segmenter` that a config describes, with random weights.

    Args:
        config: with `num_classes` set.

    Raises:
        ValueError: if `num_classes` is not set, or if the network cannot take images of the
            config's size.
    """
    num_classes, norm = _num_classes(config), _norm_activation(config)
    with _dtype_policy(config.precision):
        backbone = build_backbone(config)
        return Segmenter(
            _add_neck(ASPP(backbone) if config.aspp else backbone, config, norm),
            num_classes,
            level=config.head_level,
            num_convs=config.head_convs,
            fusion=config.fusion,
            norm=norm,
        )


def build_backbone(config: DetectionConfig | SegmentationConfig) -> keras.Model:
    """The pyramid of a config's backbone, without its neck and with random weights."""
    norm = _norm_activation(config)
    options: dict[str, Any] = {
        "include_top": False,
        "input_shape": (*config.image_size, 3),
        "stochastic_depth": config.stochastic_depth,
    }
    own_sizes = config.backbone_sizes.model_dump() if config.backbone_sizes else None
    if config.backbone.startswith("spinenet"):
        options["sizes"] = spinenet.Variant(**own_sizes) if own_sizes else None
        variant = config.backbone.removeprefix("spinenet")
        return spinenet.SpineNet(variant, norm=norm, **options)
    if config.backbone.startswith("resnet"):
        depth = int(config.backbone.removeprefix("resnet"))
        return resnet.ResNet(depth, norm=norm, drop_block=config.drop_block, **options)
    variant = config.backbone.removeprefix("efficientnet-")
    sizes = efficientnet.VARIANTS[variant]
    # The released EfficientNets ignore the activation, momentum and epsilon of a configuration.
    norm = dataclasses.replace(
        efficientnet.released_norm(sizes), synchronized=norm.synchronized, trainable=norm.trainable
    )
    # A config gives only width and depth; all else stays that of the variant.
    sizes = dataclasses.replace(sizes, **(own_sizes or {}))
    return efficientnet.EfficientNet(variant, norm=norm, sizes=sizes, **options)


@contextlib.contextmanager
def _dtype_policy(name: str) -> Iterator[None]:
    # Keras has no context manager for it, and passing a policy to each layer would be easy to
    # forget for one of them.
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(name)
    try:
        yield
    finally:
        keras.config.set_dtype_policy(before)


def _num_classes(config: DetectionConfig | SegmentationConfig) -> int:
    if config.num_classes is None:
        raise ValueError(
            "The config has no `num_classes`, which a run takes from its data. Set it to the "
            "number of classes, including the background."
        )
    return config.num_classes


def _norm_activation(config):
    return NormActivation(
        activation=config.activation,
        momentum=config.bn_momentum,
        epsilon=config.bn_epsilon,
        synchronized=config.bn_synchronized,
        trainable=not config.bn_frozen,
    )


def _add_neck(backbone, config, norm):
    options = {"filters": config.neck_filters, "separable": config.neck_separable, "norm": norm}
    if config.neck == "fpn":
        return FPN(backbone, **options)
    if config.neck == "nasfpn":
        return NASFPN(
            backbone,
            repeats=config.neck_repeats,
            sum_only=config.neck_sum_only,
            drop_block=config.drop_block,
            **options,
        )
    return backbone  # a SpineNet is its own pyramid
