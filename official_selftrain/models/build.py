"""From a config to a network."""

import dataclasses

import keras

from official_selftrain.applications import efficientnet, resnet, spinenet
from official_selftrain.applications.layers import NormActivation
from official_selftrain.models.fpn import FPN
from official_selftrain.models.nasfpn import NASFPN
from official_selftrain.models.retinanet import RetinaNet
from official_selftrain.models.segmenter import ASPP, Segmenter


def build_model(config):
    """The network of a `config.DetectionConfig` or `config.SegmentationConfig`."""
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(config.precision)
    try:
        return _build(config)
    finally:
        keras.config.set_dtype_policy(before)


def _build(config):
    norm = _norm(config)
    backbone = build_backbone(config)
    if config.kind == "segmentation":
        backbone = ASPP(backbone) if config.aspp else backbone
        pyramid = _neck(config, backbone, norm)
        return Segmenter(
            pyramid, config.num_classes, config.head_level, config.head_convs, config.fusion, norm
        )
    return RetinaNet(
        _neck(config, backbone, norm),
        config.num_classes,
        num_convs=config.head_convs,
        num_filters=config.head_filters,
        norm=norm,
    )


def _norm(config):
    return NormActivation(
        config.activation,
        config.bn_momentum,
        config.bn_epsilon,
        config.bn_synchronized,
        not config.bn_frozen,
    )


def build_backbone(config):
    """The pyramid of a `config.NetworkConfig`, before its neck."""
    norm = _norm(config)
    options = {
        "include_top": False,
        "input_shape": (*config.image_size, 3),
        "stochastic_depth": config.stochastic_depth,
    }
    own = config.backbone_sizes and config.backbone_sizes.model_dump()
    if config.backbone.startswith("spinenet"):
        sizes = own and spinenet.Variant(**own)
        variant = config.backbone.removeprefix("spinenet")
        return spinenet.SpineNet(variant, norm=norm, sizes=sizes, **options)
    if config.backbone.startswith("resnet"):
        depth = int(config.backbone.removeprefix("resnet"))
        return resnet.ResNet(depth, norm=norm, drop_block=config.drop_block, **options)
    variant = config.backbone.removeprefix("efficientnet-")
    sizes = efficientnet.VARIANTS[variant]
    norm = dataclasses.replace(
        efficientnet.released_norm(sizes), synchronized=norm.synchronized, trainable=norm.trainable
    )
    if own:
        sizes = dataclasses.replace(sizes, **own)
    return efficientnet.EfficientNet(variant, norm=norm, sizes=sizes, **options)


def _neck(config, backbone, norm):
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
    return backbone
