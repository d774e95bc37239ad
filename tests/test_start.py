"""A training that starts from a trained network of other classes."""

import types

import keras
import numpy as np
import pytest

from official_selftrain import config as config_lib
from official_selftrain.conversion import checkpoint
from official_selftrain.pipeline import start
from official_selftrain.tasks import make_task
from official_selftrain.utils.errors import UserError
from official_selftrain.utils.files import write_json

DETECTOR = {"backbone": "resnet10", "neck": "fpn", "neck_filters": 8, "head_convs": 1,
            "head_filters": 8, "image_size": (128, 128), "activation": "relu"}  # fmt: skip
SEGMENTER = {"kind": "segmentation", "backbone": "resnet10", "neck": "fpn", "neck_filters": 8,
             "head_convs": 1, "image_size": (128, 128)}  # fmt: skip
ANIMALS = {1: "cat", 2: "dog"}


def config_of(task, count, init=None, pseudo=None):
    return config_lib.config_from_dict(
        {
            "experiment": "start", "task": {**task, "num_classes": count}, "human": {},
            "pseudo": pseudo, "trainer": {"steps": 1, "init": str(init) if init else None},
            "optimizer": {"warmup_steps": 0},
        }
    )  # fmt: skip


def saved(folder, task, names, name="model.weights.h5"):
    """A network for the classes `names`, in a folder as a training leaves it."""
    count = max(names) + 1
    network = make_task(config_of(task, count).task).build_model()
    for variable in network.weights:
        if "seed_generator" not in variable.path:
            variable.assign(variable + 1.0)
    network.save(folder / name) if name.endswith(".keras") else network.save_weights(folder / name)
    if not name.endswith(".keras"):
        write_json(folder / "classes.json", {"num_classes": count, "names": names})
    return network


def check(config, names):
    start.check_start(config, types.SimpleNamespace(class_names=names))


def started(config, names):
    """The network that a training starts with, and the names of the layers that were left out."""
    keras.utils.set_random_seed(1)
    network = make_task(config.task).build_model()
    before = {layer.name: layer.get_weights() for layer in network.layers}
    check(config, names)
    start.initialize(network, config, names)
    after = {layer.name: layer.get_weights() for layer in network.layers if layer.count_params()}
    kept = [name for name in after if all(map(np.array_equal, before[name], after[name]))]
    return network, kept


@pytest.mark.parametrize(
    ("task", "layer"),
    [(DETECTOR, "retinanet.class_net.class-predict"), (SEGMENTER, "segmentation.conv2d")],
)
@pytest.mark.parametrize("name", ["model.weights.h5", "model.keras"])
def test_other_classes_leave_out_only_the_last_layer(tmp_path, caplog, task, layer, name):
    trained = saved(tmp_path, task, ANIMALS, name)
    names = {1: "car", 2: "bus", 3: "van"}
    network, kept = started(config_of(task, 4, tmp_path / name), names)
    assert kept == [layer]
    theirs = checkpoint.variables_by_name(trained)
    for key, variable in checkpoint.variables_by_name(network).items():
        if not key.startswith(layer.replace(".", "/")):
            np.testing.assert_array_equal(variable, theirs[key])
    assert "has a head for 3 classes, which are other ones than the 4 of the data" in caplog.text
    assert layer.replace(".", "/") in caplog.text and "task.num_classes=3" in caplog.text


def test_as_many_classes_of_other_names_leave_out_the_last_layer(tmp_path, caplog):
    saved(tmp_path, DETECTOR, ANIMALS)
    config = config_of(DETECTOR, 3, tmp_path)
    assert started(config, {1: "car", 2: "bus"})[1] == ["retinanet.class_net.class-predict"]
    assert "other ones than the 3 of the data" in caplog.text


@pytest.mark.parametrize("names", [ANIMALS, {1: "cat"}, {}])
def test_the_same_classes_take_everything(tmp_path, caplog, names):
    """Also if the data holds only some of them."""
    saved(tmp_path, DETECTOR, ANIMALS)
    assert started(config_of(DETECTOR, 3, tmp_path), names)[1] == []
    assert not caplog.text


def test_the_same_names_in_another_order_are_refused(tmp_path):
    saved(tmp_path, DETECTOR, ANIMALS)
    with pytest.raises(UserError, match="classes of trainer.init=.* and of human differ"):
        check(config_of(DETECTOR, 3, tmp_path), {1: "dog", 2: "cat"})


def test_a_student_must_have_the_classes_of_its_teacher(tmp_path):
    saved(tmp_path, DETECTOR, ANIMALS)
    labels = {"records": "pseudo-*.tfrecord"}
    with pytest.raises(UserError, match="classes of trainer.init=.* and of human differ"):
        check(config_of(DETECTOR, 3, tmp_path, labels), {1: "car", 2: "bus"})
    with pytest.raises(UserError, match="knows 3 classes .*, but the data has 5; if .*=3"):
        check(config_of(DETECTOR, 5, tmp_path, labels), ANIMALS)
    check(config_of(DETECTOR, 3, tmp_path, labels), ANIMALS)


def test_a_network_with_other_layers_is_refused(tmp_path):
    saved(tmp_path, DETECTOR, ANIMALS)
    wider = {**DETECTOR, "head_filters": 16}
    with pytest.raises(UserError, match="do not fit this network or are damaged"):
        started(config_of(wider, 4, tmp_path), {})
    saved(tmp_path, DETECTOR, ANIMALS, "model.keras")
    with pytest.raises(UserError, match=r"does not fit the network of this experiment: retinanet/"):
        started(config_of(wider, 4, tmp_path / "model.keras"), {})
    with pytest.raises(UserError, match=r"fpn/.* is nothing in the file and"):
        started(config_of(SEGMENTER, 3, tmp_path / "model.keras"), {})


@pytest.mark.parametrize(
    ("changes", "init", "message"),
    [
        ({"backbone": "spinenet49", "neck": "none"}, "imagenet", "spinenet49 has no such public"),
        ({"backbone": "efficientnet-b8"}, "imagenet++", "b8 has no such .*efficientnet-b7, .*-l2$"),
        ({"backbone": "resnet50", "activation": "swish"}, "imagenet", "set task.activation=relu"),
        ({"backbone": "resnet50", "activation": "swish"}, "x.safetensors", "activation=relu"),
        ({"backbone": "efficientnet-b0", "backbone_sizes": {"width": 0.5, "depth": 1.0}},
         "imagenet", "published sizes"),
    ],
)  # fmt: skip
def test_names_that_cannot_start_a_network_are_refused(changes, init, message):
    with pytest.raises(UserError, match=message):
        config_of({**DETECTOR, **changes}, 3, init)


def test_what_a_start_needs_is_missed_before_the_data_is_read(tmp_path, monkeypatch):
    config = config_of(DETECTOR | {"backbone": "resnet50"}, 3, "imagenet")
    config = config.override({"human.records": "x"})
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"official_selftrain\[hub\]"):
        start.check_startable(config)
    start.check_startable(config, finished=True)
    for name in ("no.safetensors", "no.keras"):
        with pytest.raises(UserError, match="does not exist"):
            start.check_startable(config.override({"trainer.init": str(tmp_path / name)}))


def test_every_task_names_its_layer_of_classes():
    for task in (DETECTOR, SEGMENTER):
        task = make_task(config_of(task, 3).task)
        other = make_task(task.config.model_copy(update={"num_classes": 5}))
        here, there = (checkpoint.variables_by_name(x.build_model()) for x in (task, other))
        differ = {key for key in here if here[key].shape != there[key].shape}
        layer = task.class_layer.replace(".", "/")
        assert differ == {f"{layer}/kernel", f"{layer}/bias"}
