"""The networks of the released implementation, with the weights of their golden outputs.

The benchmarks use this module too, so it does not depend on pytest.
"""

import json
import zlib

import keras
import numpy as np

from official_selftrain import config
from official_selftrain.conversion import released_config
from official_selftrain.conversion.checkpoint import variables_by_name
from official_selftrain.tasks import make_task


def hashed_weight(name, shape, gain):
    """The weight of the golden cases: normal numbers seeded by the variable's name."""
    z = np.random.default_rng(zlib.crc32(name.encode("utf-8"))).standard_normal(shape)
    kind = name.rsplit("/", 1)[-1]
    if kind == "gamma":
        value = 1 + 0.1 * z
    elif kind in ("beta", "bias", "moving_mean"):
        value = 0.1 * z
    elif kind == "moving_variance":
        value = np.exp(0.2 * z)
    elif kind == "depthwise_kernel":
        value = z * np.sqrt(gain / (shape[0] * shape[1]))
    else:
        value = z * np.sqrt(gain / np.prod(shape[:-1]))
    return value.astype("float32")


def set_hashed_weights(model, gain):
    for name, variable in variables_by_name(model).items():
        variable.assign(hashed_weight(name, tuple(variable.shape), gain))


def golden_config(golden, base):
    """The golden configuration behind a name such as `projects/.../pascal_seg_X.yaml`."""
    if base.startswith("defaults"):
        name = "retinanet_default"
    elif "pascal" in base:
        name = "selftraining_pascal_" + base.split("pascal_seg_")[1].removesuffix(".yaml")
    elif "self_training" in base:
        name = "selftraining_coco_" + base.split("coco_")[1].removesuffix("_retinanet.yaml")
    else:
        name = "retinanet_" + base.split("/")[-1].removesuffix("_retinanet.yaml")
    return json.loads((golden / f"configs/{name}.json").read_text())


def task_config(golden, base, override, size):
    values = golden_config(golden, base)
    values["params"] = config.merge(values["params"], override)
    task = config.config_from_dict(released_config.experiment(values)).task
    # Any size that the network itself can bear, not only multiples of 128.
    return task.model_copy(update={"image_size": tuple(size), "stochastic_depth": None})


def network(golden, base, override, size):
    return make_task(task_config(golden, base, override, size)).build_model()


def golden_network(golden, case, size=None):
    info = json.loads((golden / f"forward/{case}.json").read_text())
    model = network(golden, info["base_config"], info["override"], size or info["input"][1:3])
    set_hashed_weights(model, info["gain"])
    return info, model


def with_stages(model, keys):
    """The model with the outputs of its stages under their golden names."""
    tensors = {layer.name: layer.output for layer in model.layers}
    stages = {}
    for key in keys:
        for name in stage_names(key, tensors):
            if name in tensors:
                stages[key] = tensors[name]
                break
        else:
            # Fails where a stage is not found, rather than leaving it out.
            assert key.split("_")[0] in ("image", "cls", "box", "logits", "backbone"), key
    return keras.Model(model.input, {**stages, **model.output}), sorted(stages)


def stage_names(key, tensors):
    """Layers whose output is a golden stage."""
    kind, _, level = key.partition("_")
    if kind == "fused":
        return ["segmentation.fused"]
    if kind == "aspp":
        return ["aspp.relu_5"]
    if kind != "endpoint":
        return []
    cells = [name.split(".")[1] for name in tensors if name.startswith("fpn_cells")]
    node = {"3": 7, "4": 8, "5": 9, "7": 10, "6": 11}[level]
    swish = sum(name.startswith("spinenet.swish") for name in tensors)
    return [
        f"fpn_cells.{max(cells, default=None)}.sub_policy{node - 5}.op_after_combine{node}.bn",
        f"fpn.p{level}-bn",
        f"spinenet.swish_{swish - 8 + int(level)}",
    ]


def per_level(expected, outputs):
    """Pairs `(golden key, golden array, ours)` of the RetinaNet outputs, level by level."""
    for key, name in (("cls", "class_logits"), ("box", "box_deltas")):
        start = 0
        for level in range(3, 8):
            wanted = expected[f"{key}_{level}"]
            depth = outputs[name].shape[-1]
            flat = wanted.reshape(wanted.shape[0], -1, depth)
            ours = np.asarray(outputs[name])[: len(flat), start : start + flat.shape[1]]
            start += flat.shape[1]
            yield f"{key}_{level}", flat, ours


def comparisons(expected, outputs, stages):
    """All pairs of golden and our arrays."""
    if "logits" in outputs:
        yield "logits", expected["logits"], np.asarray(outputs["logits"])[: len(expected["logits"])]
    else:
        yield from per_level(expected, outputs)
    for key in stages:
        yield key, expected[key], np.asarray(outputs[key])[: len(expected[key])]
