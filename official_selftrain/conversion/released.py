"""The released TF1 checkpoints: their variable names, their configurations and their conversion.

Facts: spec of the released code, sections 9 (names) and 13 (configurations).
"""

import dataclasses
import gzip
import logging
import pathlib
import re
import shutil
import tarfile
import tempfile
import zlib
from typing import Annotated, Literal

import numpy as np
import pydantic

from official_selftrain import config as config_lib
from official_selftrain.utils.errors import UserError, did_you_mean

AVERAGE = "/ExponentialMovingAverage"
# Variables that a network for inference or training does not need, and why.
SKIPPED = {
    r".*/Momentum$": "optimizer slot",
    r".*/(Adam|Adam_1|RMSProp|RMSProp_1)$": "optimizer slot",
    rf".*{AVERAGE}$": "moving average of the weights",
    r"global_step$": "step counter",
    r"moving_normalizer$": "moving average of the loss normaliser",
    r"efficientnet-\w+/head/": "ImageNet classifier, unused by the task",
}


# --- Names -----------------------------------------------------------------------------------


def variables_by_name(model):
    """`{name in a released checkpoint: variable}` of a model built by this package."""
    return {
        released_name(layer, variable): variable
        for layer in model.layers
        for variable in layer.weights
        if "seed_generator" not in variable.path
    }


def released_name(layer, variable):
    leaf = variable.name
    if leaf == "kernel" and type(layer).__name__ == "DepthwiseConv2D":
        leaf = "depthwise_kernel"
    return layer.name.replace(".", "/") + "/" + leaf


# --- Configurations --------------------------------------------------------------------------

# Released defaults that no checkpoint tells.
_RATE = {"warmup_learning_rate": 0.0067, "warmup_steps": 500}
_DEFAULTS = {
    "detection": {
        "train": {
            "train_batch_size": 64,
            "total_steps": 22_500,
            "l2_weight_decay": 1e-4,
            "gradient_clip_norm": 0.0,
            "optimizer": {"type": "momentum", "momentum": 0.9},
            "learning_rate": {
                **_RATE,
                "type": "step",
                "init_learning_rate": 0.08,
                "learning_rate_steps": [15_000, 20_000],
                "learning_rate_levels": [0.008, 0.0008],
            },
        },
        "retinanet_parser": {
            "output_size": [640, 640],
            "aug_rand_hflip": True,
            "aug_scale_min": 1.0,
            "aug_scale_max": 1.0,
        },
    },
    "segmentation": {
        "architecture": {"use_pyramid_fusion": False},
        "train": {
            "train_batch_size": 64,
            "total_steps": 10_000,
            "l2_weight_decay": 1e-4,
            "gradient_clip_norm": 0.5,
            "optimizer": {"type": "momentum", "momentum": 0.9},
            "learning_rate": {**_RATE, "type": "cosine", "init_learning_rate": 0.02},
        },
        "segmentation_parser": {
            "output_size": [512, 512],
            "aug_rand_hflip": True,
            "aug_scale_min": 0.75,
            "aug_scale_max": 1.5,
        },
        "segmentation_head": {"level": 3},
    },
}
_PARTS = {"identity": "none", "fpn": "fpn", "nasfpn": "nasfpn"}


def _no_switch(value):
    if isinstance(value, bool):
        raise ValueError("a number is expected")
    return value


_Int = Annotated[int, pydantic.BeforeValidator(_no_switch)]
_Float = Annotated[pydantic.FiniteFloat, pydantic.BeforeValidator(_no_switch)]
_PARSER = {
    "output_size": Annotated[list[_Int], pydantic.Field(min_length=2, max_length=2)],
    "aug_rand_hflip": bool,
    "aug_scale_min": _Float,
    "aug_scale_max": _Float,
    "aug_policy": str | None,
    "max_num_instances": _Int,
    "unmatched_threshold": _Float,
}
# What is read of a released configuration; it may hold more.
_SCHEMA = {
    "type": str,
    "architecture": {
        "backbone": str,
        "multilevel_features": Literal[tuple(_PARTS)],
        "num_classes": _Int,
        "min_level": _Int,
        "max_level": _Int,
        "use_aspp": bool,
        "use_pyramid_fusion": bool,
    },
    "batch_norm_activation": {
        "activation": Literal["relu", "swish"],
        "batch_norm_momentum": _Float,
        "batch_norm_epsilon": _Float,
        "batch_norm_trainable": bool,
        "use_sync_bn": bool,
    },
    "spinenet": {
        "model_id": str | int,
        "init_drop_connect_rate": _Float | None,
        "use_native_resize_op": bool,
    },
    "resnet": {"resnet_depth": _Int, "init_drop_connect_rate": _Float | None},
    "fpn": {"fpn_feat_dims": _Int, "use_separable_conv": bool, "use_batch_norm": bool},
    "nasfpn": {
        "fpn_feat_dims": _Int,
        "num_repeats": _Int,
        "use_separable_conv": bool,
        "use_sum_for_combination": bool,
        "block_fn": str,
        "activation": str | None,
    },
    "dropblock": {"dropblock_keep_prob": _Float | None, "dropblock_size": _Int | None},
    "retinanet_head": {
        "num_convs": _Int,
        "num_filters": _Int,
        "use_batch_norm": bool,
        "use_separable_conv": bool,
    },
    "segmentation_head": {
        "level": _Int,
        "num_convs": _Int,
        "upsample_factor": _Int,
        "use_batch_norm": bool,
        "use_separable_conv": bool,
    },
    "anchor": {"anchor_size": _Float, "num_scales": _Int, "aspect_ratios": list[_Float]},
    "retinanet_parser": _PARSER,
    "segmentation_parser": _PARSER,
    "retinanet_loss": {
        "focal_loss_alpha": _Float,
        "focal_loss_gamma": _Float,
        "huber_loss_delta": _Float,
        "box_loss_weight": _Float,
    },
    "postprocess": {
        "score_threshold": _Float,
        "nms_iou_threshold": _Float,
        "pre_nms_num_boxes": _Int,
        "max_total_size": _Int,
    },
    "train": {
        "train_batch_size": _Int,
        "total_steps": _Int,
        "l2_weight_decay": _Float,
        "gradient_clip_norm": _Float,
        "frozen_variable_prefix": str | None,
        "optimizer": {"type": str, "momentum": _Float},
        "learning_rate": {
            "type": Literal["step", "cosine"],
            "init_learning_rate": _Float,
            "warmup_learning_rate": _Float,
            "warmup_steps": _Int,
            "learning_rate_steps": list[_Int],
            "learning_rate_levels": list[_Float],
        },
    },
    "eval": {"eval_batch_size": _Int},
}


def _group(name, fields):
    """A pydantic model of nested `{key: type}`, none of which must be given."""
    settings = pydantic.ConfigDict(extra="allow", protected_namespaces=())
    kinds = {
        key: (_group(key, kind) if isinstance(kind, dict) else kind, None)
        for key, kind in fields.items()
    }
    return pydantic.create_model(name, __config__=settings, **kinds)


_Released = _group("Released", _SCHEMA)


def _explain(fault):
    key = ".".join(str(part) for part in fault["loc"])
    message = fault["msg"].removeprefix("Value error, ")
    if fault["type"] == "model_type":
        message = "keys and values are expected"
    return f"{key}: {message} (given {str(fault['input'])[:60]!r})"


def _checked(values):
    """The values of a released configuration, with the types that they must have.

    Raises:
        UserError: one line for all faults, each with its key.
    """
    try:
        return _Released.model_validate(values).model_dump(exclude_unset=True)
    except pydantic.ValidationError as error:
        faults = [_explain(fault) for fault in error.errors()]
        more = f"; and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise UserError(f"the released config: {'; '.join(faults[:5])}{more}") from None


def experiment(values, found=None):
    """Nested dicts of an experiment config from a released configuration.

    Args:
        values: a released configuration, whole or partial, as nested dicts; also in the form
            `{"model": ..., "params": ...}`.
        found: what `detect` saw in a checkpoint. It stands in for what `values` leaves open, and
            decides sizes that no released configuration can express, such as a width.

    Raises:
        UserError: for values of a wrong type, parts that the package does not have, or a checkpoint
            of something else.
    """
    values, model = _params(values)
    values = _checked(values)
    found = found or {}
    kind = {"retinanet": "detection", "segmentation": "segmentation"}.get(model)
    if model and kind is None:
        raise UserError(f"the config is of a {model!r} model; retinanet and segmentation convert")
    kind = kind or found.get("kind") or "detection"
    if found and kind != found["kind"]:
        raise UserError(f"the config is for {kind}, the checkpoint for {found['kind']}")
    values = config_lib.merge(_DEFAULTS[kind], values)
    task = {"kind": kind, **_network(values, kind, found), **_head(values, kind, found)}
    train, parser = values["train"], _parser(values)
    rate = train["learning_rate"]
    step_schedule = rate["type"] == "step"
    if step_schedule and not {"learning_rate_steps", "learning_rate_levels"} <= rate.keys():
        raise UserError(
            "the released config: train.learning_rate.type is step, which needs "
            "learning_rate_steps and learning_rate_levels beside it"
        )
    _warn(
        {
            "train.optimizer.type": train["optimizer"]["type"] != "momentum",
            "train.frozen_variable_prefix": train.get("frozen_variable_prefix"),
        }
    )
    return {
        "experiment": "converted",
        "description": "converted from a released configuration",
        "task": task,
        "human": {
            "batch_size": train["train_batch_size"],
            "flip": parser["aug_rand_hflip"],
            "jitter": (parser["aug_scale_min"], parser["aug_scale_max"]),
            **_policy(parser.get("aug_policy")),
        },
        "evaluation": {"batch_size": values.get("eval", {}).get("eval_batch_size", 8)},
        "optimizer": {
            "momentum": train["optimizer"].get("momentum", 0.9),
            "l2": train["l2_weight_decay"],
            "clip_norm": train["gradient_clip_norm"],
            "schedule": rate["type"],
            "learning_rate": rate["init_learning_rate"],
            "warmup_steps": min(rate["warmup_steps"], train["total_steps"]),
            "warmup_learning_rate": rate["warmup_learning_rate"],
            "step_boundaries": rate["learning_rate_steps"] if step_schedule else (),
            "step_rates": rate["learning_rate_levels"] if step_schedule else (),
        },
        "trainer": {"steps": train["total_steps"]},
    }


def _policy(name):
    """AutoAugment as the released code names it; S1 without."""
    return {"policy": "S2", "auto_augment": name, "as_released": True} if name else {}


def _params(values):
    model = values.get("model")
    values = values.get("params", values)
    if not isinstance(values, dict):
        raise UserError(f"the released config: params must hold keys and values; given {values!r}")
    model = model or values.get("type")
    if not isinstance(model, str | None):
        raise UserError(f"the released config: the model is a name, retinanet; given {model!r}")
    if model is None and ("segmentation_head" in values or "segmentation_loss" in values):
        model = "segmentation"
    if model is None and ("retinanet_head" in values or "retinanet_loss" in values):
        model = "retinanet"
    return values, model


def _network(values, kind, found):
    """The backbone, neck and batch norm of a released configuration."""
    architecture = values.get("architecture", {})
    norm = values.get("batch_norm_activation", {})
    backbone = architecture.get("backbone", found.get("backbone", "resnet"))
    if backbone == "spinenet":
        model_id = str(values.get("spinenet", {}).get("model_id", "")).replace("l", "L")
        backbone = f"spinenet{model_id}"
        if backbone not in config_lib.BACKBONES:  # left open, or of sizes that have no name
            backbone = found.get("backbone", f"spinenet{model_id or 49}")
    elif backbone == "resnet":
        depth = values.get("resnet", {}).get("resnet_depth")
        backbone = f"resnet{depth}" if depth else found.get("backbone", "resnet50")
    if backbone not in config_lib.BACKBONES:
        raise UserError(
            f"the backbone {backbone!r} is not in this package"
            f"{did_you_mean(backbone, config_lib.BACKBONES)}"
        )
    if found and backbone != found["backbone"]:
        raise UserError(f"the config is for {backbone}, the checkpoint holds {_describe(found)}")
    neck = _PARTS.get(architecture.get("multilevel_features"), found.get("neck", "fpn"))
    settings = values.get(neck, {})
    _refuse(
        {
            "architecture.min_level": architecture.get("min_level", 3) != 3,
            "architecture.max_level": architecture.get("max_level", 7) != 7,
            "nasfpn.block_fn": neck == "nasfpn" and settings.get("block_fn", "conv") != "conv",
            "nasfpn.activation": bool(neck == "nasfpn" and settings.get("activation")),
            "fpn.use_batch_norm": neck == "fpn" and not settings.get("use_batch_norm", True),
            "spinenet.use_native_resize_op": bool(
                values.get("spinenet", {}).get("use_native_resize_op")
            ),
        }
    )
    family = "resnet" if backbone.startswith("resnet") else "spinenet"
    depth = values.get(family, {}).get("init_drop_connect_rate")
    if backbone.startswith("efficientnet"):
        depth = 0.2  # the released builder takes its classification default
    drop = values.get("dropblock", {})
    return {
        "num_classes": architecture.get(
            "num_classes", found.get("num_classes", 91 if kind == "detection" else 21)
        ),
        "image_size": _parser(values)["output_size"],
        "backbone": backbone,
        "backbone_sizes": found.get("backbone_sizes"),
        "neck": neck,
        "neck_filters": settings.get("fpn_feat_dims", found.get("neck_filters", 256)),
        "neck_repeats": settings.get("num_repeats", found.get("neck_repeats", 5)),
        "neck_separable": settings.get("use_separable_conv", found.get("neck_separable", False)),
        "neck_sum_only": settings.get("use_sum_for_combination", False),
        "stochastic_depth": depth,
        "drop_block": (drop["dropblock_keep_prob"], drop.get("dropblock_size"))
        if drop.get("dropblock_keep_prob")
        else None,
        "activation": norm.get("activation", "relu"),
        "bn_momentum": norm.get("batch_norm_momentum", 0.997),
        "bn_epsilon": norm.get("batch_norm_epsilon", 1e-4),
        "bn_synchronized": norm.get("use_sync_bn", False),
        "bn_frozen": not norm.get("batch_norm_trainable", True),
    }


def _head(values, kind, found):
    """The head, loss and postprocessing of a released configuration."""
    head = values.get("retinanet_head" if kind == "detection" else "segmentation_head", {})
    _refuse(
        {
            "head.use_batch_norm": not head.get("use_batch_norm", True),
            "head.use_separable_conv": head.get("use_separable_conv", False),
            "head.upsample_factor": head.get("upsample_factor", 1) != 1,
        }
    )
    default = 4 if kind == "detection" else 2
    convs = head.get("num_convs", found.get("head_convs", default))
    if kind == "segmentation":
        architecture = values.get("architecture", {})
        return {
            "head_convs": convs,
            "head_level": head["level"],
            "aspp": architecture.get("use_aspp", found.get("aspp", False)),
            "fusion": architecture["use_pyramid_fusion"],
        }
    anchor, parser = values.get("anchor", {}), _parser(values)
    loss, nms = values.get("retinanet_loss", {}), values.get("postprocess", {})
    _refuse(
        {
            "anchor.num_scales": anchor.get("num_scales", 3) != 3,
            "anchor.aspect_ratios": list(anchor.get("aspect_ratios", [1.0, 2.0, 0.5]))
            != [1.0, 2.0, 0.5],
            "retinanet_parser.unmatched_threshold": parser.get("unmatched_threshold", 0.5) != 0.5,
        }
    )
    return {
        "head_convs": convs,
        "head_filters": head.get("num_filters", found.get("head_filters", 256)),
        "anchor_size": anchor.get("anchor_size", 4.0),
        "max_instances": parser.get("max_num_instances", 100),
        "focal_alpha": loss.get("focal_loss_alpha", 0.25),
        "focal_gamma": loss.get("focal_loss_gamma", 1.5),
        "huber_delta": loss.get("huber_loss_delta", 0.1),
        "box_weight": loss.get("box_loss_weight", 50),
        "nms": {
            "score_threshold": nms.get("score_threshold", 0.05),
            "iou_threshold": nms.get("nms_iou_threshold", 0.5),
            "pre_nms": nms.get("pre_nms_num_boxes", 5000),
            "max_detections": nms.get("max_total_size", 100),
        },
    }


def _parser(values):
    return values.get("retinanet_parser", values.get("segmentation_parser", {}))


def _warn(settings):
    for name, value in settings.items():
        if value:
            logging.warning("the experiment leaves out %s of the released config", name)


def _refuse(settings):
    asked = [name for name, is_set in settings.items() if is_set]
    if asked:
        raise UserError(f"the config sets {', '.join(asked)}, which this package does not build")


# --- What the variables of a checkpoint tell -------------------------------------------------


def detect(shapes):
    """The architecture behind `{variable name: shape}`, in the terms of `config.NetworkConfig`.

    Raises:
        UserError: if no head or backbone of the released code is among the names, or a shape is of
            no network.
    """
    try:
        return _architecture(shapes)
    except (IndexError, KeyError, StopIteration, TypeError, ZeroDivisionError):
        raise UserError(
            "the variables of the checkpoint have shapes that no released network has; is it "
            "damaged, or of another program?"
        ) from None


def _architecture(shapes):
    kind = _first(shapes, {"retinanet/": "detection", "segmentation/": "segmentation"})
    backbone = _first(shapes, {"spinenet/": "spinenet", "resnet": "resnet", "efficientnet-": "e"})
    if kind is None or backbone is None:
        raise UserError(
            "no released detector or segmenter: expected variables under spinenet/, resnet50/ or "
            "efficientnet-b7/ and retinanet/ or segmentation/; the checkpoint has "
            f"{', '.join(sorted({name.split('/')[0] for name in shapes})[:8])}"
        )
    found = {"kind": kind, "neck": "none"}
    if any(name.startswith("fpn_cells/") for name in shapes):
        found |= _nasfpn(shapes)
    elif any(name.startswith("fpn/") for name in shapes):
        filters = shapes.get("fpn/p3-bn/beta", (256,))[0]
        separable = "fpn/l3/pointwise_kernel" in shapes
        found |= {"neck": "fpn", "neck_filters": filters, "neck_separable": separable}
    found |= {"spinenet": _spinenet, "resnet": _resnet, "e": _efficientnet}[backbone](shapes)
    return found | (_retinanet(shapes) if kind == "detection" else _segmenter(shapes))


def _first(shapes, prefixes):
    for prefix, meaning in prefixes.items():
        if any(name.startswith(prefix) for name in shapes):
            return meaning
    return None


def _count(shapes, pattern):
    return len([name for name in shapes if re.fullmatch(pattern, name)])


def _retinanet(shapes):
    predict = shapes.get("retinanet/class_net/class-predict/bias", (0,))[0]
    return {
        "num_classes": predict // 9,
        "head_convs": _count(shapes, r"retinanet/class_net/class-\d+/kernel"),
        "head_filters": shapes.get("retinanet/class_net/class-0/bias", (256,))[0],
    }


def _segmenter(shapes):
    return {
        "num_classes": shapes.get("segmentation/conv2d/bias", (21,))[0],
        "head_convs": _count(shapes, r"segmentation/conv-\d+/kernel"),
        "aspp": any(name.startswith("aspp/") for name in shapes),
    }


def _nasfpn(shapes):
    first = "sub_policy0/op_after_combine5/bn/beta"
    return {
        "neck": "nasfpn",
        "neck_filters": shapes.get(f"fpn_cells/cell_0/{first}", (256,))[0],
        "neck_repeats": _count(shapes, rf"fpn_cells/cell_\d+/{first}"),
        "neck_separable": _count(shapes, r"fpn_cells/.*/pointwise_kernel") > 0,
    }


def _spinenet(shapes):
    from official_selftrain.applications import spinenet

    repeats = max(1, round((_count(shapes, r"spinenet/conv2d(_\d+)?/kernel") - 7) / 6))
    endpoints = shapes.get(f"spinenet/conv2d_{6 * repeats + 2}/kernel", (0,))[-1]
    block = "spinenet/sub_policy{}/scale_permuted_block_{}/conv2d/kernel"
    filters = {
        base: shapes.get(block.format(index, index + 2), (0,))[-1]
        for base, index in ((64, 0), (128, 2), (256, 3))
    }
    scale = max(count / base for base, count in filters.items())
    resampled = shapes.get(
        "spinenet/sub_policy0/resample_with_alpha_resample_0_0/conv2d/kernel", (1, 1, 1, 0)
    )
    sizes = spinenet.Variant(endpoints, scale, 0.5 if resampled[-1] < filters[64] else 1.0, repeats)
    for name, known in spinenet.VARIANTS.items():
        same = all(known.filters(level) == sizes.filters(level) for level in spinenet.FILTERS)
        rest = ("endpoint_filters", "resample_alpha", "block_repeats")
        if same and all(getattr(known, key) == getattr(sizes, key) for key in rest):
            return {"backbone": f"spinenet{name}"}
    return {"backbone": "spinenet49S", "backbone_sizes": dataclasses.asdict(sizes)}


def _resnet(shapes):
    name = next(name for name in shapes if name.startswith("resnet"))
    return {"backbone": name.split("/")[0]}


def _efficientnet(shapes):
    from official_selftrain.applications import efficientnet

    scope = next(name for name in shapes if name.startswith("efficientnet-")).split("/")[0]
    blocks = _count(shapes, rf"{scope}/blocks_\d+/depthwise_conv2d/depthwise_kernel")
    channels = [shapes.get(f"{scope}/stem/conv2d/kernel", (0,))[-1]]
    for index in range(blocks):
        path = f"{scope}/blocks_{index}"
        project = shapes.get(f"{path}/conv2d_1/kernel") or shapes.get(f"{path}/conv2d/kernel", (0,))
        channels.append(project[-1])

    def fits(sizes):
        expected = [sizes.channels(32)]
        for stage, repeats, *_ in efficientnet.STAGES:
            expected += [sizes.channels(stage)] * sizes.repeats(repeats)
        return expected == channels

    known = efficientnet.VARIANTS.get(scope.removeprefix("efficientnet-"))
    if known is None or fits(known):
        return {"backbone": scope}
    for depth in (known.depth, *(step / 10 for step in range(10, 60))):
        for width in (step / 20 for step in range(1, 100)):
            if fits(efficientnet.Variant(width, depth)):
                return {"backbone": scope, "backbone_sizes": {"width": width, "depth": depth}}
    return {"backbone": scope}


# --- Conversion ------------------------------------------------------------------------------


# An EfficientNet-L2 with its optimizer slots has 6e9 bytes, and weights hardly compress.
LARGEST_CHECKPOINT = 16 * 2**30
LARGEST_RATIO, SMALL = 100, 16 * 2**20
LARGEST_READ = 16 * 2**20
MOST_MEMBERS = 10_000
_CHECKPOINT_FILE = r"checkpoint|.*\.index|.*\.data-\d{5}-of-\d{5}"


def read_checkpoint(path):
    """`{variable name: array}` of a TF1 checkpoint.

    Args:
        path: a prefix, a folder with one checkpoint or a `checkpoint` file, or a `.tar.gz` of one.

    Raises:
        UserError: if there is none, several, or it is damaged; if an archive unpacks to much more
            than a checkpoint would.
    """
    path = pathlib.Path(path)
    if path.name.endswith((".tar.gz", ".tgz")):
        return _read_archive(path)
    if path.is_dir():
        path = _prefix_in(path, path)
    path = path.with_suffix("") if path.suffix == ".index" else path
    if not path.with_name(path.name + ".index").is_file():
        raise UserError(
            f"no checkpoint at {path}: expected {path.name}.index and {path.name}.data-*; "
            "give a prefix, a folder or a .tar.gz"
        )
    return _read_arrays(path, path)


def _read_arrays(prefix, where):
    """The arrays of a checkpoint, called `where` in errors."""
    import tensorflow as tf

    try:
        reader = tf.train.load_checkpoint(str(prefix))
        shapes, types = reader.get_variable_to_shape_map(), reader.get_variable_to_dtype_map()
        names = [name for name, dtype in types.items() if dtype != tf.string]
        # A damaged index may tell shapes that no memory holds.
        wanted = sum(np.prod(shapes[name], dtype=float) * types[name].size for name in names)
        there = sum(f.stat().st_size for f in prefix.parent.glob(f"{_literal(prefix.name)}.data-*"))
        if wanted > there:
            raise UserError(f"{wanted:,.0f} bytes of weights in a file of {there:,}")
        return {name: reader.get_tensor(name) for name in names}
    except Exception as error:  # TensorFlow raises many kinds for damaged files
        reason = _one_line(error).replace(str(prefix), prefix.name)
        raise UserError(
            f"the checkpoint {where} is damaged or cut short ({reason}); fetch it again"
        ) from None


def _literal(name):
    """A name as a pattern that matches it alone."""
    return re.sub(r"([*?[])", r"[\1]", name)


def _one_line(error):
    return " ".join(str(error).split())[:200] or type(error).__name__


def is_checkpoint(path):
    """Whether `path` is a prefix, a folder or an archive for `read_checkpoint`."""
    path = pathlib.Path(path)
    if path.is_dir():
        return any(path.glob("*.index"))
    archive = path.is_file() and path.name.endswith((".tar.gz", ".tgz", ".index"))
    return archive or path.with_name(path.name + ".index").is_file()


def load_backbone(model, backbone, path):
    """Starts a network's backbone from a TF1 checkpoint that has it, such as Noisy Student's.

    Where the checkpoint has moving averages of the weights, these are taken, as for evaluation.

    Args:
        model: a network with the backbone.
        backbone: the first part of its variables' names, such as "efficientnet-b7".
        path: see `read_checkpoint`.

    Raises:
        UserError: if a variable of the backbone is missing or has another shape.
    """
    arrays = read_checkpoint(path)
    averages = {
        name.removesuffix(AVERAGE): array
        for name, array in arrays.items()
        if name.endswith(AVERAGE)
    }
    inside = f"{backbone}/"
    wanted = {n: v for n, v in variables_by_name(model).items() if n.startswith(inside)}
    found = {name: array for name, array in (arrays | averages).items() if name in wanted}
    _refuse_misfits(wanted, found, [])
    for name, variable in wanted.items():
        variable.assign(found[name])


def _prefix_in(folder, where):
    """The one checkpoint of a folder, or the newest as its `checkpoint` file tells."""
    prefixes = sorted(file.with_suffix("") for file in folder.rglob("*.index"))
    if len(prefixes) == 1:
        return prefixes[0]
    for state in sorted(folder.rglob("checkpoint")):
        text = state.read_bytes().decode("utf-8", "replace") if state.is_file() else ""
        newest = re.search(r'^model_checkpoint_path: "(.*)"', text, re.MULTILINE)
        # It may have been written elsewhere, with the path that it had there.
        prefix = state.with_name(pathlib.PurePath(newest[1]).name) if newest else None
        if prefix in prefixes:
            return prefix
    names = ", ".join(str(prefix.relative_to(folder)) for prefix in prefixes[:10]) or "none"
    raise UserError(
        f"{where} must hold one TF1 checkpoint, NAME.index and NAME.data-* (found: {names})"
        + ("; unpack it, and give the prefix of one" if prefixes else "")
    )


def _read_archive(path):
    with tempfile.TemporaryDirectory() as folder:
        try:
            others = _unpack(path, pathlib.Path(folder))
        except UserError as error:
            raise UserError(f"cannot unpack {path}: {error}") from None
        except Exception as error:  # tarfile, gzip and zlib raise many kinds for damaged files
            raise UserError(
                f"cannot unpack {path}: {getattr(error, 'strerror', None) or _one_line(error)}; "
                "fetch it again"
            ) from None
        try:
            prefix = _prefix_in(pathlib.Path(folder), path)
        except UserError as error:
            also = f"; the archive holds {', '.join(map(repr, others[:5]))}" if others else ""
            raise UserError(f"{error}{also}") from None
        return _read_arrays(prefix, f"{prefix.relative_to(folder)} of {path}")


def _unpack(path, folder):
    """Unpacks the files of a checkpoint, and nothing else; returns the names of the others."""
    most = min(LARGEST_CHECKPOINT, LARGEST_RATIO * path.stat().st_size + SMALL)
    with open(path, "rb") as file:
        compressed = file.peek(2)[:2] == b"\x1f\x8b"  # browsers unzip some downloads
        stream = _Bounded(gzip.GzipFile(fileobj=file) if compressed else file, most)
        others = []
        with tarfile.open(fileobj=stream, mode="r:") as archive:
            for number, member in enumerate(archive):
                stream.count(member.size)
                if number >= MOST_MEMBERS:
                    raise UserError(f"it holds more than {MOST_MEMBERS:,} files")
                name = pathlib.PurePosixPath(member.name)
                if not (member.isfile() and re.fullmatch(_CHECKPOINT_FILE, name.name)):
                    others.append(member.name)
                elif name.is_absolute() or ".." in name.parts:
                    raise UserError(f"{member.name!r} lies outside of the archive's folder")
                else:
                    target = folder / name
                    target.parent.mkdir(parents=True, exist_ok=True)
                    with archive.extractfile(member) as source, open(target, "wb") as copy:
                        shutil.copyfileobj(source, copy, 2**20)
    return others


class _Bounded:
    """A stream that refuses to grow beyond `most` bytes, or to be held in memory at once."""

    def __init__(self, stream, most):
        self.stream, self.most, self.counted = stream, most, 0
        self.tell = stream.tell

    def read(self, size=-1):
        if not 0 <= size <= LARGEST_READ:
            raise UserError(f"a name or header in it has {size:,} bytes; it is no checkpoint")
        self._check(self.tell() + size)
        return self.stream.read(size)

    def seek(self, position):
        self._check(position)
        return self.stream.seek(position)

    def count(self, size):
        """Counts the bytes of a file, which may be more than the archive holds of it."""
        self.counted += size
        self._check(self.counted)

    def _check(self, size):
        if size > self.most:
            raise UserError(
                f"it unpacks to more than {self.most:,} bytes, which no checkpoint of its size does"
            )


@dataclasses.dataclass(frozen=True)
class Conversion:
    """What became of a checkpoint.

    Attributes:
        model: the Keras model with the weights.
        config: `config.Config` of the matching experiment.
        mapped: names of the variables that were loaded.
        skipped: `{name: reason}` of those that were not.
        checksum: CRC-32 over the loaded arrays in the order of their names.
    """

    model: object
    config: object
    mapped: list
    skipped: dict
    checksum: int


def convert(checkpoint, config_values, image_size=None):
    """A released TF1 checkpoint as a Keras model.

    Args:
        checkpoint: see `read_checkpoint`.
        config_values: the released configuration, whole or partial, as nested dicts. What it leaves
            open goes by the variable names and, where they do not tell, by the released defaults.
        image_size: `(height, width)` of the network; None takes the config's.

    Returns:
        `Conversion`.

    Raises:
        UserError: if the checkpoint is damaged, or its variables are not those of the network.
    """
    from official_selftrain.models import build_model

    arrays = read_checkpoint(checkpoint)
    found = detect({name: array.shape for name, array in arrays.items()})
    config = config_lib.make(experiment(config_values, found))
    if image_size is not None and not any(side % 128 for side in image_size):
        config = config.override({"task.image_size": image_size})
    # SpineNet itself bears sizes that training does not, multiples of 8: so not `changed`.
    size = image_size or config.task.image_size
    try:
        model = build_model(config.task.model_copy(update={"image_size": tuple(size)}))
    except ValueError as error:
        raise UserError(f"cannot build the network: {error}") from None
    mapped, skipped = assign(model, arrays, found)
    checksum = 0
    for name in mapped:
        checksum = zlib.crc32(np.ascontiguousarray(arrays[name]).tobytes(), checksum)
    return Conversion(model, config, mapped, skipped, checksum)


def assign(model, arrays, found=None):
    """Loads `{released name: array}` into a model; every name on both sides is accounted for.

    Returns:
        Names loaded, sorted, and `{name: reason}` of those skipped.

    Raises:
        UserError: naming missing, unexpected and misshapen variables.
    """
    variables = variables_by_name(model)
    skipped = {
        name: reason
        for name in arrays
        if name not in variables and (reason := _reason_to_skip(name)) is not None
    }
    _refuse_misfits(variables, arrays, set(arrays) - set(variables) - set(skipped), found)
    for name, variable in variables.items():
        variable.assign(arrays[name])
    return sorted(variables), skipped


def _refuse_misfits(variables, arrays, unexpected, found=None):
    faults = [f"missing {name}" for name in sorted(set(variables) - set(arrays))]
    faults += [f"unexpected {name} {tuple(arrays[name].shape)}" for name in sorted(unexpected)]
    faults += [
        f"misshapen {name}: {tuple(arrays[name].shape)} there, {tuple(variable.shape)} here"
        for name, variable in variables.items()
        if name in arrays and tuple(variable.shape) != tuple(arrays[name].shape)
    ]
    if faults:
        seems = f"; by its names the checkpoint is {_describe(found)}" if found else ""
        more = f"; and {len(faults) - 20} more" if len(faults) > 20 else ""
        raise UserError(
            f"the checkpoint does not fit the network of the config ({len(faults)} variables)"
            f"{seems}: " + "; ".join(faults[:20]) + more
        )


def _reason_to_skip(name):
    for pattern, reason in SKIPPED.items():
        if re.match(pattern, name):
            return reason
    return None


def _describe(found):
    return ", ".join(f"{key} {value}" for key, value in found.items() if value is not None)


def forward_summary(model):
    """Mean and deviation of each output for one image of normal noise, `{name: (mean, std)}`."""
    shape = (1, *model.input.shape[1:])
    image = np.random.default_rng(0).standard_normal(shape).astype("float32")
    outputs = model(image, training=False)
    summary = {}
    for name, value in outputs.items():
        value = np.asarray(value)
        if not np.isfinite(value).all():
            raise UserError(f"the converted network returns {name} that are not finite")
        summary[name] = (float(value.mean()), float(value.std()))
    return summary


def write_checkpoint(model, prefix):
    """Writes a model as a TF1 name-based checkpoint, from which `read_checkpoint` reads it back.

    Raises:
        UserError: if it cannot be written.
    """
    import tensorflow as tf

    variables = variables_by_name(model)
    try:
        pathlib.Path(prefix).parent.mkdir(parents=True, exist_ok=True)
        tf.raw_ops.SaveV2(
            prefix=str(prefix),
            tensor_names=list(variables),
            shape_and_slices=[""] * len(variables),
            tensors=[tf.convert_to_tensor(variable) for variable in variables.values()],
        )
    except (OSError, tf.errors.OpError) as error:
        raise UserError(f"cannot write the checkpoint {prefix}: {_one_line(error)}") from None
