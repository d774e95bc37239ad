"""Every network of the released code against its numbers: variables, outputs, statistics, cost."""

import json

import keras
import numpy as np
import pytest
from conftest import hashed_weight, load, set_hashed_weights

from official_selftrain import config
from official_selftrain.conversion import released_config
from official_selftrain.conversion.checkpoint import variables_by_name
from official_selftrain.models import multiply_adds
from official_selftrain.models.build import build_backbone
from official_selftrain.tasks import make_task

CASES = [
    "retinanet_spinenet49S_128",
    "retinanet_spinenet49S_160",
    pytest.param("retinanet_spinenet143_128", marks=pytest.mark.slow),
    "retinanet_resnet50_fpn_128",
    "segmentation_efficientnet-b0_nasfpn_128",
    "segmentation_efficientnet-b0_aspp_nasfpn_128",
    pytest.param("segmentation_efficientnet-b7_nasfpn_128", marks=pytest.mark.slow),
    pytest.param("segmentation_efficientnet-l2_nasfpn_128", marks=pytest.mark.huge),
]


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


@pytest.mark.parametrize("case", CASES)
def test_inference_equals_release(case, golden):
    _, model = golden_network(golden, case)
    expected = load(golden / f"forward/{case}_infer.npz")
    model, stages = with_stages(model, expected)
    outputs = model(expected["image"], training=False)
    for key, wanted, ours in comparisons(expected, outputs, stages):
        assert ours.shape == wanted.shape, key
        assert np.abs(ours - wanted).max() <= 1e-3 * wanted.std() + 1e-5, key


@pytest.mark.parametrize("case", CASES)
def test_backbone_equals_release(case, golden):
    info = json.loads((golden / f"forward/{case}.json").read_text())
    expected = load(golden / f"forward/{case}_infer.npz")
    levels = {key[-1]: value for key, value in expected.items() if key.startswith("backbone_")}
    # A SpineNet is its own pyramid, whose levels are among the endpoints.
    assert bool(levels) == ("spinenet" not in case)
    if not levels:
        return
    settings = task_config(golden, info["base_config"], info["override"], info["input"][1:3])
    model = build_backbone(settings)
    set_hashed_weights(model, info["gain"])
    outputs = model(expected["image"], training=False)
    assert set(outputs) == set(levels)
    for level, wanted in levels.items():
        ours = np.asarray(outputs[level])
        assert np.abs(ours - wanted).max() <= 1e-3 * wanted.std() + 1e-5, level


TRAINED = [
    "retinanet_spinenet49S_128",
    "retinanet_resnet50_fpn_128",
    "segmentation_efficientnet-b0_nasfpn_128",
]


@pytest.mark.parametrize("case", TRAINED)
def test_training_mode_and_statistics_equal_release(case, golden):
    info, model = golden_network(golden, case, size=(256, 256))
    expected = load(golden / f"forward/{case}_train.npz")
    staged, stages = with_stages(model, expected)
    outputs = staged(expected["image"], training=True)
    for key, wanted, ours in comparisons(expected, outputs, stages):
        allowed = wanted.std() * max(2e-3, 30 * info["train_sensitivity"][key])
        assert np.abs(ours - wanted).max() <= allowed, key

    statistics = load(golden / f"forward/{case}_moving_stats_after_one_update.npz")
    ours = {
        name: np.asarray(variable)
        for name, variable in variables_by_name(model).items()
        if "moving" in name
    }
    layers = {layer.name: layer for layer in model.layers}
    for key, wanted in statistics.items():
        name = key.replace("|", "/")
        if "/head/" in name:  # the ImageNet classifier, which our segmenters leave out
            continue
        if name.endswith("moving_variance"):
            # The golden run used the fused kernel, which stores the unbiased variance; ours is the
            # synchronized (biased) kind that the paper trained with.
            layer = layers[name.rsplit("/", 1)[0].replace("/", ".")]
            kept = layer.momentum * hashed_weight(name, wanted.shape, info["gain"])
            count = 4 * np.prod(layer.input.shape[1:3])
            wanted = kept + (wanted - kept) * (count - 1) / count
        np.testing.assert_allclose(ours.pop(name), wanted, rtol=2e-3, atol=1e-5, err_msg=name)
    assert not ours


# --- Variables and cost ------------------------------------------------------------------------

MODELS = [
    "retinanet_spinenet49S",
    "retinanet_spinenet49",
    "retinanet_spinenet96",
    "retinanet_spinenet143",
    "retinanet_spinenet190",
    "retinanet_resnet50_fpn",
    "retinanet_resnet50_nasfpn",
    "segmentation_efficientnet-b7_nasfpn",
    pytest.param("segmentation_efficientnet-l2_nasfpn", marks=pytest.mark.huge),
]


def released_list(golden, name):
    """`{variable: (shape, trainable)}` of a released checkpoint, without slots and step."""
    variables = {}
    for line in (golden / f"variables/{name}.txt").read_text().splitlines():
        variable, shape, _, trainable, _ = line.split("\t") if "\t" in line else [""] * 5
        if not (
            line.startswith("#") or variable == "global_step" or variable.endswith("/Momentum")
        ):
            variables[variable] = (shape, trainable == "1")
    return variables


def size(shape):
    return int(np.prod([int(side) for side in shape.split("x")]))


@pytest.mark.parametrize("name", MODELS)
def test_variables_and_cost_are_the_released_ones(name, golden):
    info = json.loads((golden / f"variables/{name}.stat.json").read_text())
    side = info["resolution"]
    override = {}
    if "resnet50_nasfpn" in name:
        override = {"architecture": {"multilevel_features": "nasfpn"}}
    base = "defaults" if "resnet50" in name else info["config"]
    model = network(golden, base, override, (side, side))
    listed = released_list(golden, name)
    head = {key: value for key, value in listed.items() if "/head/" in key}
    ours = {
        key: ("x".join(map(str, variable.shape)), variable.trainable)
        for key, variable in variables_by_name(model).items()
    }
    assert ours == {key: value for key, value in listed.items() if key not in head}
    trainable = sum(size(shape) for shape, is_trainable in ours.values() if is_trainable)
    unused = sum(size(shape) for shape, is_trainable in head.values() if is_trainable)
    assert trainable + unused == info["trainable_params"]
    # The released segmenters also compute the ImageNet classifier, at stride 32, to no use.
    cells = {"conv2d": (side // 32) ** 2, "dense": 1}
    cost = multiply_adds(model) + sum(
        size(shape) * cells[key.split("/")[-2]]
        for key, (shape, _) in head.items()
        if key.endswith("/kernel")
    )
    cost /= 1e9
    assert cost == pytest.approx(info["gmultiadds_per_image"], rel=0.01)
