"""Translates a released YAML configuration into an experiment.

Source of the format: TensorFlow's TPU repository, `models/official/detection/configs`.
"""

import logging
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import pydantic

from official_selftrain import config as config_lib
from official_selftrain.conversion.architecture import describe
from official_selftrain.utils.errors import UserError, did_you_mean

Values = dict[str, Any]

# Defaults of the released code for settings that leave no trace in a checkpoint.
_RATE = {"warmup_learning_rate": 0.0067, "warmup_steps": 500}


_DEFAULTS: dict[str, dict[str, Any]] = {
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


def _no_switch(value: Any) -> Any:
    # pydantic would take true for 1.
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


# The settings that are read, with their types; a configuration may hold more.
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


def _group(name: str, fields: Mapping[str, Any]) -> type[pydantic.BaseModel]:
    """A pydantic model of nested `{key: type}`, all of which are optional."""
    # Released files hold many more keys; and pydantic would reserve names such as `model_id`.
    settings = pydantic.ConfigDict(extra="allow", protected_namespaces=())
    kinds: Values = {
        key: (_group(key, kind) if isinstance(kind, dict) else kind, None)
        for key, kind in fields.items()
    }
    return pydantic.create_model(name, __config__=settings, **kinds)


_Released = _group("Released", _SCHEMA)


def _explain(fault: Any) -> str:
    """One fault that pydantic has found, as text."""
    key = ".".join(str(part) for part in fault["loc"])
    message = fault["msg"].removeprefix("Value error, ")
    if fault["type"] == "model_type":
        message = "keys and values are expected"
    return f"{key}: {message} (given {str(fault['input'])[:60]!r})"


def _checked(values: Values) -> Values:
    """The values of a released configuration, converted to the types of the schema.

    Raises:
        UserError: naming the key of each fault.
    """
    try:
        # Only the given values, so that defaults can fill in the others.
        return _Released.model_validate(values).model_dump(exclude_unset=True)
    except pydantic.ValidationError as error:
        faults = [_explain(fault) for fault in error.errors()]
        # One wrong section can have dozens of faults.
        more = f"; and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise UserError(f"the released config: {'; '.join(faults[:5])}{more}") from None


def experiment(values: Values, found: Values | None = None) -> Values:
    """Translates a released configuration.

    Args:
        values: nested dicts, complete or not; also in the form `{"model": ..., "params": ...}`.
        found: result of `detect` for the checkpoint. Used for settings that `values` does not have,
            and for sizes that no released configuration can express, such as a width.

    Returns:
        Nested dicts for `config_from_dict`.

    Raises:
        UserError: for values of a wrong type, parts that this package does not have, or a
            checkpoint of another network.
    """
    values, model = _params(values)
    values = _checked(values)
    found = found or {}
    kind = {"retinanet": "detection", "segmentation": "segmentation"}.get(model or "")
    if model and kind is None:
        raise UserError(
            f"the config is for a {model!r} model; only retinanet and segmentation can be converted"
        )
    # A partial configuration may not say what it is for.
    kind = kind or found.get("kind") or "detection"
    if found and kind != found["kind"]:
        raise UserError(f"the config is for {kind}, but the checkpoint is for {found['kind']}")
    # The defaults depend on the kind, which the checkpoint may have decided.
    values = config_lib.merge(_DEFAULTS[kind], values)
    task = {"kind": kind, **_network(values, kind, found), **_head(values, kind, found)}
    train, parser = values["train"], _parser(values, kind)
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
        "optimizer": _optimizer(train),
        "trainer": {"steps": train["total_steps"]},
    }


def _optimizer(train: Values) -> Values:
    """The optimizer and its learning rate, from the section `train`."""
    rate = train["learning_rate"]
    step_schedule = rate["type"] == "step"
    if step_schedule and not {"learning_rate_steps", "learning_rate_levels"} <= rate.keys():
        raise UserError(
            "the released config: train.learning_rate.type is step, which also needs "
            "learning_rate_steps and learning_rate_levels"
        )
    _warn(
        {
            "train.optimizer.type": train["optimizer"]["type"] != "momentum",
            "train.frozen_variable_prefix": train.get("frozen_variable_prefix"),
        }
    )
    return {
        "momentum": train["optimizer"].get("momentum", 0.9),
        "l2": train["l2_weight_decay"],
        "clip_norm": train["gradient_clip_norm"],
        "schedule": rate["type"],
        "learning_rate": rate["init_learning_rate"],
        # Nothing in the release keeps a warmup shorter than the training; this package refuses it.
        "warmup_steps": min(rate["warmup_steps"], train["total_steps"]),
        "warmup_learning_rate": rate["warmup_learning_rate"],
        # A cosine configuration may still hold the steps of the file that it was copied from.
        "step_boundaries": rate["learning_rate_steps"] if step_schedule else (),
        "step_rates": rate["learning_rate_levels"] if step_schedule else (),
    }


def _policy(name: str | None) -> Values:
    """AutoAugment by its released name; the default policy S1 without a name."""
    return {"policy": "S2", "auto_augment": name, "as_released": True} if name else {}


def _params(values: Values) -> tuple[Values, str | None]:
    """The settings, and the name of the model if the configuration has or implies one."""
    model = values.get("model")
    values = values.get("params", values)
    if not isinstance(values, dict):
        raise UserError(f"the released config: params must be keys and values; given {values!r}")
    model = model or values.get("type")
    if not isinstance(model, str | None):
        raise UserError(f"the released config: the model must be a name; given {model!r}")
    if model is None and ("segmentation_head" in values or "segmentation_loss" in values):
        model = "segmentation"
    if model is None and ("retinanet_head" in values or "retinanet_loss" in values):
        model = "retinanet"
    return values, model


def _network(values: Values, kind: str, found: Values) -> Values:
    """Settings of the network except for its head."""
    backbone = _backbone(values, found)
    # The released defaults, COCO and PASCAL with the background.
    classes = 91 if kind == "detection" else 21
    return {
        "num_classes": _section(values, "architecture").get(
            "num_classes", found.get("num_classes", classes)
        ),
        "image_size": _parser(values, kind)["output_size"],
        "backbone": backbone,
        "backbone_sizes": found.get("backbone_sizes"),
        **_neck(values, found),
        **_regularization(values, backbone),
        **_norm(values),
    }


def _backbone(values: Values, found: Values) -> str:
    """The name of the backbone, one of `config.BACKBONES`."""
    backbone = _section(values, "architecture").get("backbone", found.get("backbone", "resnet"))
    if backbone == "spinenet":
        # The released 143l is called 143L in this package.
        model_id = str(_section(values, "spinenet").get("model_id", "")).replace("l", "L")
        backbone = f"spinenet{model_id}"
        if backbone not in config_lib.BACKBONES:  # not given, or without a name
            backbone = found.get("backbone", f"spinenet{model_id or 49}")
    elif backbone == "resnet":
        depth = _section(values, "resnet").get("resnet_depth")
        backbone = f"resnet{depth}" if depth else found.get("backbone", "resnet50")
    if backbone not in config_lib.BACKBONES:
        raise UserError(
            f"this package does not have the backbone {backbone!r}"
            f"{did_you_mean(backbone, config_lib.BACKBONES)}"
        )
    if found and backbone != found["backbone"]:
        raise UserError(
            f"the config is for {backbone}, but the checkpoint looks like {describe(found)}"
        )
    return backbone


def _neck(values: Values, found: Values) -> Values:
    architecture = _section(values, "architecture")
    neck: str = found.get("neck", "fpn")
    if "multilevel_features" in architecture:
        neck = _PARTS[architecture["multilevel_features"]]
    settings = _section(values, neck)
    _refuse(
        {
            "architecture.min_level": architecture.get("min_level", 3) != 3,
            "architecture.max_level": architecture.get("max_level", 7) != 7,
            "nasfpn.block_fn": neck == "nasfpn" and settings.get("block_fn", "conv") != "conv",
            "nasfpn.activation": neck == "nasfpn" and settings.get("activation"),
            "fpn.use_batch_norm": neck == "fpn" and not settings.get("use_batch_norm", True),
            "spinenet.use_native_resize_op": _section(values, "spinenet").get(
                "use_native_resize_op"
            ),
        }
    )
    return {
        "neck": neck,
        "neck_filters": settings.get("fpn_feat_dims", found.get("neck_filters", 256)),
        "neck_repeats": settings.get("num_repeats", found.get("neck_repeats", 5)),
        "neck_separable": settings.get("use_separable_conv", found.get("neck_separable", False)),
        "neck_sum_only": settings.get("use_sum_for_combination", False),
    }


def _regularization(values: Values, backbone: str) -> Values:
    """Stochastic depth and DropBlock."""
    family = "resnet" if backbone.startswith("resnet") else "spinenet"
    depth = _section(values, family).get("init_drop_connect_rate")
    if backbone.startswith("efficientnet"):
        depth = 0.2  # the released builder ignores the config and takes that of classification
    drop = _section(values, "dropblock")
    keep = drop.get("dropblock_keep_prob")
    return {
        "stochastic_depth": depth,
        "drop_block": (keep, drop.get("dropblock_size")) if keep else None,
    }


def _norm(values: Values) -> Values:
    """Batch norm and the activation after it."""
    norm = _section(values, "batch_norm_activation")
    return {
        "activation": norm.get("activation", "relu"),
        "bn_momentum": norm.get("batch_norm_momentum", 0.997),
        "bn_epsilon": norm.get("batch_norm_epsilon", 1e-4),
        "bn_synchronized": norm.get("use_sync_bn", False),
        "bn_frozen": not norm.get("batch_norm_trainable", True),
    }


def _head(values: Values, kind: str, found: Values) -> Values:
    """Settings of the head, the loss, and the postprocessing."""
    detection = kind == "detection"
    head = _section(values, "retinanet_head" if detection else "segmentation_head")
    _refuse(
        {
            "head.use_batch_norm": not head.get("use_batch_norm", True),
            "head.use_separable_conv": head.get("use_separable_conv", False),
            "head.upsample_factor": head.get("upsample_factor", 1) != 1,
        }
    )
    convs = head.get("num_convs", found.get("head_convs", 4 if detection else 2))
    if not detection:
        architecture = values["architecture"]
        return {
            "head_convs": convs,
            "head_level": head["level"],
            "aspp": architecture.get("use_aspp", found.get("aspp", False)),
            "fusion": architecture["use_pyramid_fusion"],
        }
    return {
        "head_convs": convs,
        "head_filters": head.get("num_filters", found.get("head_filters", 256)),
        **_anchors(values),
        **_detection_loss(values),
        "nms": _nms(values),
    }


def _anchors(values: Values) -> Values:
    anchor, parser = _section(values, "anchor"), values["retinanet_parser"]
    ratios = [1.0, 2.0, 0.5]
    _refuse(
        {
            "anchor.num_scales": anchor.get("num_scales", 3) != 3,
            "anchor.aspect_ratios": list(anchor.get("aspect_ratios", ratios)) != ratios,
            "retinanet_parser.unmatched_threshold": parser.get("unmatched_threshold", 0.5) != 0.5,
        }
    )
    return {
        "anchor_size": anchor.get("anchor_size", 4.0),
        "max_instances": parser.get("max_num_instances", 100),
    }


def _detection_loss(values: Values) -> Values:
    loss = _section(values, "retinanet_loss")
    return {
        "focal_alpha": loss.get("focal_loss_alpha", 0.25),
        "focal_gamma": loss.get("focal_loss_gamma", 1.5),
        "huber_delta": loss.get("huber_loss_delta", 0.1),
        "box_weight": loss.get("box_loss_weight", 50),
    }


def _nms(values: Values) -> Values:
    nms = _section(values, "postprocess")
    return {
        "score_threshold": nms.get("score_threshold", 0.05),
        "iou_threshold": nms.get("nms_iou_threshold", 0.5),
        "pre_nms": nms.get("pre_nms_num_boxes", 5000),
        "max_detections": nms.get("max_total_size", 100),
    }


def _section(values: Values, name: str) -> Values:
    return values.get(name, {})


def _parser(values: Values, kind: str) -> Values:
    """The section of the task's own parser; a configuration may hold those of both."""
    return values[{"detection": "retinanet_parser", "segmentation": "segmentation_parser"}[kind]]


def _warn(settings: Mapping[str, Any]) -> None:
    """Logs the settings, `{name: whether it is set}`, that change training but not the network."""
    for name, value in settings.items():
        if value:
            logging.warning("the experiment does not use %s of the released config", name)


def _refuse(settings: Mapping[str, Any]) -> None:
    """Raises a `UserError` for settings, `{name: whether it is set}`, of other networks."""
    asked = [name for name, is_set in settings.items() if is_set]
    if asked:
        raise UserError(
            f"the config sets {', '.join(asked)}, which the networks of this package do not support"
        )
