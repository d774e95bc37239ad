"""Released checkpoints: conversion, and three training steps from their start."""

import gzip
import io
import json
import subprocess
import sys
import tarfile
import tempfile
import zipfile

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import concatenate_levels, load
from golden_networks import hashed_weight, set_hashed_weights

from official_selftrain import config as config_lib
from official_selftrain.applications import efficientnet
from official_selftrain.conversion import architecture, checkpoint, released_config
from official_selftrain.engine.optimizers import make_optimizer
from official_selftrain.ops import losses
from official_selftrain.pipeline import start
from official_selftrain.self_training import SelfTrainer
from official_selftrain.tasks import make_task
from official_selftrain.tasks.detection import DetectionTask
from official_selftrain.utils.errors import UserError

TINY = ["retinanet_spinenet_tiny", "segmentation_efficientnet_tiny"]


def checkpoint_folder(golden, name):
    return (golden / f"checkpoints/{name}/model.ckpt-3.data-00000-of-00001").parent


@pytest.fixture(scope="module", params=TINY)
def folder(request, golden):
    return checkpoint_folder(golden, request.param)


@pytest.fixture(scope="module")
def conversion(folder):
    return checkpoint.convert(folder, config_lib.load_file(folder / "case.json"), (256, 256))


# --- Conversion ------------------------------------------------------------------------------


def test_outputs_equal_the_released_checkpoint(conversion, folder):
    expected = load(folder / "inference.npz")
    outputs = conversion.model(expected["image"], training=False)
    if "logits" in outputs:
        pairs = [(outputs["logits"], expected["logits"])]
    else:
        pairs = [
            (outputs["class_logits"], concatenate_levels(expected, "cls", 4)),
            (outputs["box_deltas"], concatenate_levels(expected, "box", 4)),
        ]
    for ours, wanted in pairs:
        assert np.abs(np.asarray(ours) - wanted).max() <= 1e-3 * wanted.std() + 1e-5


def test_every_variable_is_accounted_for(conversion, folder):
    names = set(checkpoint.read_checkpoint(folder))
    assert set(conversion.mapped) | set(conversion.skipped) == names
    assert not set(conversion.mapped) & set(conversion.skipped)
    reasons = {
        "step counter": {"global_step"},
        "optimizer slot": {name for name in names if name.endswith("/Momentum")},
    }
    for reason, expected in reasons.items():
        assert {name for name, why in conversion.skipped.items() if why == reason} == expected


def test_the_names_alone_tell_the_architecture(conversion, folder):
    found = architecture.detect({n: a.shape for n, a in checkpoint.read_checkpoint(folder).items()})
    task = conversion.config.task.model_dump()
    sizes = found.pop("backbone_sizes")
    assert {key: task[key] for key in found} == found
    if "width" in sizes:
        assert sizes == {"width": 0.25, "depth": 1.0}
    else:
        assert sizes == {
            "endpoint_filters": 24,
            "filter_size_scale": 0.25,
            "resample_alpha": 0.5,
            "block_repeats": 1,
        }


PARTIAL = {
    "retinanet_spinenet_tiny": {
        "architecture": {"backbone": "spinenet"},
        "batch_norm_activation": {"activation": "swish"},
    },
    "segmentation_efficientnet_tiny": {
        "architecture": {"use_pyramid_fusion": True},
        "batch_norm_activation": {"batch_norm_epsilon": 1e-3},
        "segmentation_head": {"level": 2},
    },
}


def test_what_a_partial_config_leaves_open_is_read_off_the_checkpoint(conversion, folder):
    again = checkpoint.convert(folder, PARTIAL[folder.name], (256, 256))
    assert again.checksum == conversion.checksum
    x = np.random.default_rng(0).standard_normal((1, 256, 256, 3)).astype("float32")
    expected = conversion.model(x, training=False)
    for name, value in again.model(x, training=False).items():
        np.testing.assert_array_equal(value, expected[name])


def test_prefix_and_archive_read_as_the_folder(folder, tmp_path):
    whole = checkpoint.read_checkpoint(folder)
    with tarfile.open(tmp_path / "released.tar.gz", "w:gz") as archive:
        archive.add(folder, arcname="released")
    for path in (folder / "model.ckpt-3", tmp_path / "released.tar.gz"):
        arrays = checkpoint.read_checkpoint(path)
        assert arrays.keys() == whole.keys()
        np.testing.assert_array_equal(arrays["global_step"], 3)


def test_network_starts_from_the_averages_in_a_classifiers_checkpoint(tmp_path):
    """Noisy Student's checkpoints hold the classifier, with moving averages of its weights."""
    sizes = efficientnet.Variant(width=0.25, depth=0.3)
    classifier = efficientnet.EfficientNet(
        "b0", sizes=sizes, input_shape=(64, 64, 3), classes=5, weights=None
    )
    raw = checkpoint.variables_by_name(classifier)
    arrays = {name: np.full(v.shape, 2.0, "float32") for name, v in raw.items()}
    arrays |= {
        f"{name}/ExponentialMovingAverage": np.full(v.shape, 1 + index, "float32")
        for index, (name, v) in enumerate(raw.items())
        if "moving" not in name
    }
    prefix = str(tmp_path / "model.ckpt")
    tf.raw_ops.SaveV2(
        prefix=prefix,
        tensor_names=list(arrays),
        shape_and_slices=[""] * len(arrays),
        tensors=list(arrays.values()),
    )
    config = {
        "num_classes": 3, "image_size": (128, 128), "backbone": "efficientnet-b0",
        "backbone_sizes": {"width": 0.25, "depth": 0.3}, "neck": "fpn", "neck_filters": 8,
    }  # fmt: skip
    recipe = config_lib.config_from_dict(
        {
            "experiment": "pascal", "task": {**config, "kind": "segmentation"}, "human": {},
            "optimizer": {"warmup_steps": 0}, "trainer": {"steps": 1, "init": prefix},
        }
    )  # fmt: skip
    model = make_task(recipe.task).build_model()
    before = {n: np.array(v) for n, v in checkpoint.variables_by_name(model).items()}
    assert checkpoint.is_checkpoint(prefix) and checkpoint.is_checkpoint(tmp_path)
    assert not checkpoint.is_checkpoint(tmp_path / "absent.tar.gz")
    start.initialize(model, recipe, {})
    order = list(raw)
    for name, variable in checkpoint.variables_by_name(model).items():
        if not name.startswith("efficientnet-b0/"):
            np.testing.assert_array_equal(variable, before[name])
        else:
            expected = 2.0 if "moving" in name else 1 + order.index(name)
            np.testing.assert_array_equal(variable, np.full(variable.shape, expected))
    config["backbone_sizes"] = {"width": 0.5, "depth": 0.3}
    other = make_task(config_lib.SegmentationConfig(**config)).build_model()
    with pytest.raises(UserError, match="misshapen efficientnet-b0/"):
        checkpoint.load_backbone(other, "efficientnet-b0", prefix)


@pytest.mark.parametrize("variant", ["49S", "49", "96", "143", "190"])
def test_spinenets_are_told_apart_by_their_shapes(variant, golden):
    lines = (golden / f"variables/retinanet_spinenet{variant}.txt").read_text().splitlines()[1:]
    rows = [line.split("\t") for line in lines]
    shapes = {r[0]: () if r[1] == "scalar" else tuple(map(int, r[1].split("x"))) for r in rows}
    found = architecture.detect(shapes)
    assert (found["backbone"], found["num_classes"]) == (f"spinenet{variant}", 91)
    assert "backbone_sizes" not in found


def test_back_to_tf1_and_forth_keeps_every_weight(conversion, folder, tmp_path):
    checkpoint.write_checkpoint(conversion.model, tmp_path / "model.ckpt")
    arrays = checkpoint.read_checkpoint(tmp_path / "model.ckpt")
    assert sorted(arrays) == conversion.mapped
    values = config_lib.load_file(folder / "case.json")
    again = checkpoint.convert(tmp_path, values, (256, 256))
    assert (again.checksum, again.skipped) == (conversion.checksum, {})


def altered(model, tmp_path, change):
    """A checkpoint of `model` after `change` of its `{name: array}`."""
    arrays = {n: np.asarray(v) for n, v in checkpoint.variables_by_name(model).items()}
    change(arrays)
    tf.raw_ops.SaveV2(
        prefix=str(tmp_path / "model.ckpt"),
        tensor_names=list(arrays),
        shape_and_slices=[""] * len(arrays),
        tensors=list(arrays.values()),
    )
    return tmp_path / "model.ckpt"


@pytest.mark.parametrize("kind", ["renamed", "misshapen"])
def test_a_variable_that_does_not_fit_is_named(conversion, folder, tmp_path, kind):
    victim = next(name for name in conversion.mapped if name.endswith("conv2d_1/kernel"))

    def change(arrays):
        array = arrays.pop(victim)
        arrays.update({victim + "2": array} if kind == "renamed" else {victim: array[..., :-1]})

    path = altered(conversion.model, tmp_path, change)
    with pytest.raises(UserError) as error:
        checkpoint.convert(path, config_lib.load_file(folder / "case.json"), (256, 256))
    wanted = [f"missing {victim}", f"unexpected {victim}2"]
    for line in wanted if kind == "renamed" else [f"misshapen {victim}"]:
        assert line in str(error.value)


def test_wrong_class_count_is_named(conversion, folder):
    values = config_lib.load_file(folder / "case.json")
    values["params"]["architecture"]["num_classes"] = 7
    with pytest.raises(UserError, match="misshapen .*in the checkpoint, .*in the network"):
        checkpoint.convert(folder, values, (256, 256))


def test_another_variant_is_refused(golden):
    folder = checkpoint_folder(golden, "retinanet_spinenet_tiny")
    values = config_lib.load_file(golden / "configs/retinanet_spinenet49.json")
    with pytest.raises(UserError, match="config is for spinenet49, but the checkpoint looks like"):
        checkpoint.convert(folder, values)
    with pytest.raises(UserError, match="for segmentation, but the checkpoint is for detection"):
        checkpoint.convert(folder, {"type": "segmentation"})


def test_input_size_that_the_network_cannot_bear_is_refused(folder):
    with pytest.raises(UserError, match="divisible by"):
        checkpoint.convert(folder, config_lib.load_file(folder / "case.json"), (250, 256))


def test_truncated_missing_and_foreign_checkpoints_are_refused(folder, tmp_path):
    data = (folder / "model.ckpt-3.data-00000-of-00001").read_bytes()
    (tmp_path / "model.ckpt.data-00000-of-00001").write_bytes(data[: len(data) // 2])
    (tmp_path / "model.ckpt.index").write_bytes((folder / "model.ckpt-3.index").read_bytes())
    with pytest.raises(UserError, match="damaged or incomplete"):
        checkpoint.read_checkpoint(tmp_path / "model.ckpt")
    with pytest.raises(UserError, match="no checkpoint at"):
        checkpoint.read_checkpoint(tmp_path / "other")
    with pytest.raises(UserError, match="not a released detector or segmenter"):
        architecture.detect({"dense/kernel": (3, 4)})
    (tmp_path / "half.tar.gz").write_bytes(b"\x1f\x8b\x08no archive")
    with pytest.raises(UserError, match="cannot unpack"):
        checkpoint.read_checkpoint(tmp_path / "half.tar.gz")


# --- Files from outside ----------------------------------------------------------------------


def write_checkpoint(prefix, **arrays):
    tf.raw_ops.SaveV2(
        prefix=str(prefix),
        tensor_names=list(arrays),
        shape_and_slices=[""] * len(arrays),
        tensors=list(arrays.values()),
    )


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A folder with a checkpoint of two variables."""
    folder = tmp_path_factory.mktemp("small")
    write_checkpoint(folder / "model.ckpt", a=np.arange(600.0), step=np.int64(7))
    return folder


def pack(path, *files, mode="w:gz", **members):
    """An archive of files, and of members `{name: bytes or TarInfo}`."""
    with tarfile.open(path, mode) as archive:
        for file in files:
            archive.add(file, file.name)
        for name, content in members.items():
            member = content if isinstance(content, tarfile.TarInfo) else tarfile.TarInfo(name)
            data = b"" if isinstance(content, tarfile.TarInfo) else content
            member.size = member.size or len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def entry(name, kind, target=""):
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member


@pytest.mark.parametrize("mode", ["w:gz", "w"])
def test_only_the_files_of_a_checkpoint_are_unpacked(small, tmp_path, mode):
    others = {
        "../model.pb": b"out",
        "link": entry("link", tarfile.SYMTYPE, "/etc/hostname"),
        "device.index": entry("device.index", tarfile.CHRTYPE),
        "photo.jpg": b"x",
    }
    archive = pack(tmp_path / "a.tar.gz", *small.iterdir(), mode=mode, **others)
    arrays = checkpoint.read_checkpoint(archive)
    assert sorted(arrays) == ["a", "step"] and arrays["a"][-1] == 599
    assert [file.name for file in tmp_path.iterdir()] == ["a.tar.gz"]


def test_an_archive_without_a_checkpoint_names_what_it_holds(tmp_path):
    archive = pack(tmp_path / "a.tar.gz", **{"photo.jpg": b"x", "labels.json": b"{}"})
    with pytest.raises(UserError) as error:
        checkpoint.read_checkpoint(archive)
    assert str(error.value).startswith(f"{archive} must hold one TF1 checkpoint")
    assert "'photo.jpg', 'labels.json'" in str(error.value) and "\n" not in str(error.value)


def test_errors_of_an_archive_name_it_and_not_the_temporary_folder(small, tmp_path):
    index = (small / "model.ckpt.index").read_bytes()
    cases = [
        {"run/m.index": index},
        {"run/m.index": index[:40], "run/m.data-00000-of-00001": b"x"},
        {"a.index": index, "b.index": index},
    ]
    for number, members in enumerate(cases):
        archive = pack(tmp_path / f"{number}.tar.gz", **members)
        with pytest.raises(UserError) as error:
            checkpoint.read_checkpoint(archive)
        assert str(archive) in str(error.value)
        assert tempfile.gettempdir() not in str(error.value).replace(str(tmp_path), "")


def header(name, size, kind=tarfile.REGTYPE):
    member = entry(name, kind)
    member.size = size
    return member.tobuf(tarfile.GNU_FORMAT)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (header("a.index", 10**12), "unpacks to more than"),
        (header("sparse.bin", 10**12), "unpacks to more than"),
        (header("././@LongLink", 10**9, tarfile.GNUTYPE_LONGNAME), "a name or header has"),
        (header("x", 10**9, tarfile.XHDTYPE), "a name or header has"),
        (header("z.bin", 200 * 2**20) + bytes(200 * 2**20), "unpacks to more than"),
        (header("../../a.index", 0), "leaves the archive"),
        (header("/tmp/a.index", 0), "leaves the archive|must hold"),  # tarfile may strip the slash
        (b"\0" * 5000, "must hold one TF1 checkpoint"),
        (b"no archive at all" * 100, "cannot unpack .*download it again"),
        (b"".join(header(f"{i}.txt", 0) for i in range(10_100)), "more than 10,000 files"),
    ],
)
def test_archives_are_unpacked_within_limits(tmp_path, content, message):
    archive = tmp_path / "a.tar.gz"
    with gzip.open(archive, "wb", compresslevel=1) as file:
        file.write(content)
    with pytest.raises(UserError, match=message):
        checkpoint.read_checkpoint(archive)


def test_a_cut_archive_is_told(small, tmp_path):
    whole = pack(tmp_path / "a.tar.gz", *small.iterdir()).read_bytes()
    for part in (0, 1, 10, 100, len(whole) // 2, len(whole) - 100):
        (tmp_path / "cut.tar.gz").write_bytes(whole[:part])
        with pytest.raises(UserError, match=r"cut\.tar\.gz"):
            checkpoint.read_checkpoint(tmp_path / "cut.tar.gz")
    with pytest.raises(UserError, match="No such file"):
        checkpoint.read_checkpoint(tmp_path / "absent.tar.gz")


def test_of_several_checkpoints_the_newest_is_taken_or_all_are_named(small, tmp_path):
    for file in small.iterdir():
        for name in ("model.ckpt-1", "model.ckpt-2"):
            copy = tmp_path / file.name.replace("model.ckpt", name)
            copy.write_bytes(file.read_bytes())
    with pytest.raises(UserError, match=r"found: model\.ckpt-1, model\.ckpt-2"):
        checkpoint.read_checkpoint(tmp_path)
    state = tmp_path / "checkpoint"
    state.write_text('model_checkpoint_path: "/elsewhere/model.ckpt-2"\n')  # copied from there
    assert checkpoint._prefix_in(tmp_path, tmp_path).name == "model.ckpt-2"
    for text in ("", "model_checkpoint_path: 5", 'model_checkpoint_path: "gone"', "\0\xff"):
        state.write_text(text)
        with pytest.raises(UserError, match="must hold one"):
            checkpoint.read_checkpoint(tmp_path)


def test_flipped_bits_of_a_checkpoint_are_told_in_one_line(small, tmp_path):
    names = ["model.ckpt.index", "model.ckpt.data-00000-of-00001"]
    rng = np.random.default_rng(0)
    for trial in range(60):
        for name in names:
            data = bytearray((small / name).read_bytes())
            if name == names[trial % 2]:
                data[rng.integers(len(data))] ^= 1 << rng.integers(8)
            (tmp_path / name).write_bytes(data)
        try:
            arrays = checkpoint.read_checkpoint(tmp_path)
        except UserError as error:
            assert "\n" not in str(error)
        else:  # a bit that carries nothing
            np.testing.assert_array_equal(arrays["a"], np.arange(600.0))


@pytest.mark.parametrize(
    "shapes",
    [
        {"retinanet/class_net/class-predict/bias": (), "resnet50/conv2d/kernel": (7, 7, 3, 64)},
        {"retinanet/x": (1,), "spinenet/conv2d_8/kernel": ()},
        {"segmentation/conv2d/bias": (), "efficientnet-b0/stem/conv2d/kernel": (3,)},
        {"retinanet/x": (), "fpn/p3-bn/beta": (), "resnet50/x": ()},
    ],
)
def test_shapes_of_no_network_are_told(shapes):
    with pytest.raises(UserError, match="shapes that no released network has"):
        architecture.detect(shapes)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"train": 5}, "train: keys and values are expected (given '5')"),
        ({"train": None}, "train: keys and values"),
        ({"architecture": [1]}, "architecture: keys and values are expected (given '[1]')"),
        ({"architecture": {"multilevel_features": "bifpn"}}, "'fpn' or 'nasfpn' (given 'bifpn')"),
        ({"architecture": {"backbone": 7}}, "architecture.backbone"),
        ({"architecture": {"num_classes": "many"}}, "architecture.num_classes"),
        ({"train": {"total_steps": True}}, "train.total_steps: a number is expected"),
        ({"train": {"l2_weight_decay": float("nan")}}, "train.l2_weight_decay"),
        ({"train": {"optimizer": "momentum"}}, "train.optimizer: keys and values"),
        ({"train": {"learning_rate": {"type": "linear"}}}, "train.learning_rate.type"),
        ({"train": {"learning_rate": {"learning_rate_steps": 9}}}, "learning_rate_steps"),
        (
            {"type": "segmentation", "train": {"learning_rate": {"type": "step"}}},
            "needs learning_rate_steps and learning_rate_levels",
        ),
        ({"retinanet_parser": {"output_size": 640}}, "retinanet_parser.output_size"),
        ({"retinanet_parser": {"output_size": [640, 640, 3]}}, "at most 2 items"),
        ({"anchor": {"aspect_ratios": "1"}}, "anchor.aspect_ratios"),
        ({"batch_norm_activation": {"activation": "gelu"}}, "batch_norm_activation.activation"),
        ({"dropblock": {"dropblock_keep_prob": 0.9}}, "drop_block"),
        ({"spinenet": {"init_drop_connect_rate": "some"}}, "spinenet.init_drop_connect_rate"),
        ({"eval": {"eval_batch_size": 0}}, "evaluation.batch_size"),
        ({"params": 5}, "params must be keys and values"),
        ({"model": ["retinanet"]}, "the model must be a name"),
        ({"type": {}}, "the model must be a name"),
        ({5: 5}, "Keys should be strings"),
    ],
)
def test_a_released_config_of_wrong_types_names_the_key(values, message):
    with pytest.raises(UserError) as error:
        config_lib.config_from_dict(released_config.experiment(values))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_parts_that_do_not_exist_here_are_refused_by_name():
    with pytest.raises(UserError, match="head.use_separable_conv"):
        released_config.experiment({"retinanet_head": {"use_separable_conv": True}})
    with pytest.raises(UserError, match="'mask_rcnn' model"):
        released_config.experiment({"type": "mask_rcnn"})


def test_each_task_reads_the_parser_of_its_own():
    """A released configuration may hold the sections of other models too."""
    values = {
        "retinanet_parser": {"output_size": [256, 384]},
        "segmentation_parser": {"output_size": [512, 640]},
    }
    for model, size in (("retinanet", [256, 384]), ("segmentation", [512, 640])):
        found = released_config.experiment({"type": model, **values})
        assert found["task"]["image_size"] == size


def test_command_writes_a_model_that_a_fresh_process_loads(golden, tmp_path):
    folder = checkpoint_folder(golden, "retinanet_spinenet_tiny")
    output = tmp_path / "model.keras"
    command = [
        *(sys.executable, "-m", "official_selftrain.convert_checkpoint"),
        *(f"--checkpoint={folder}", f"--config_file={folder / 'case.json'}"),
        *(f"--output={output}", "--image_size=256"),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "loaded 737 variables, checksum" in done.stdout
    task = config_lib.resolve(config_file=tmp_path / "model.yaml").task
    assert (task.num_classes, task.image_size) == (4, (256, 256))
    back = [*command[:3], f"--checkpoint={output}", f"--output={tmp_path / 'back'}"]
    done = subprocess.run(back, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(checkpoint.read_checkpoint(tmp_path / "back")) == 737
    script = (
        "import sys, keras, numpy, official_selftrain\n"
        "model = keras.models.load_model(sys.argv[1])\n"
        "with numpy.load(sys.argv[2]) as case:\n"
        "    outputs = model(case['image'])\n"
        "    print(outputs['class_logits'].shape[1], float(outputs['class_logits'][0, 0, 0]))\n"
    )
    arguments = [sys.executable, "-c", script, output, folder / "inference.npz"]
    done = subprocess.run(arguments, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    count, first = done.stdout.split()
    assert int(count) == 9 * (32**2 + 16**2 + 8**2 + 4**2 + 2**2)
    expected = load(folder / "inference.npz")["cls_3"]
    assert float(first) == pytest.approx(expected[0, 0, 0, 0], abs=1e-3 * float(expected.std()))


def keras_file(path, **changes):
    """A `.keras` file of a small network with some of its members replaced; None leaves one out."""
    keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)]).save(path)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    members |= changes
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            if content is not None:
                archive.writestr(name, content)
    return path


def class_config(module, name, **config):
    return json.dumps({"module": module, "class_name": name, "config": config}).encode()


RUN_CODE = "import pathlib; pathlib.Path('ran').touch()"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"config.json": b"[1, 2]"}, "not a network"),
        ({"config.json": b"{}"}, "not a network"),
        ({"config.json": b"null"}, "not a network"),
        ({"config.json": b"{"}, "not a network"),
        ({"config.json": b"[" * 100_000}, "not a network"),
        ({"config.json": None}, "not a network"),
        ({"model.weights.h5": None}, "not a network"),
        ({"model.weights.h5": b"text"}, "not a network"),
        ({"config.json": class_config("keras.layers", "Dense", units=2)}, "not a network"),
        ({"config.json": class_config("os", "system", command="touch ran")}, "not a network"),
        ({"config.json": class_config("builtins", "exec", source=RUN_CODE)}, "not a network"),
        (
            {"config.json": class_config("subprocess", "Popen", args=["touch", "ran"])},
            "not a network",
        ),
        (
            {"config.json": class_config("keras.layers", "Lambda", function=RUN_CODE)},
            "not a network",
        ),
    ],
)
def test_strange_keras_files_are_told_in_one_line_and_run_nothing(
    changes, message, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    file = keras_file(tmp_path / "model.keras", **changes)
    with pytest.raises(UserError) as error:
        checkpoint.load_model(str(file))
    assert message in str(error.value) and "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["model.keras"]


def test_damaged_keras_files_are_told_in_one_line(tmp_path):
    whole = keras_file(tmp_path / "model.keras").read_bytes()
    rng = np.random.default_rng(0)
    for trial in range(30):
        data = bytearray(whole)
        if trial % 2:
            data = data[: rng.integers(len(data))]
        else:
            data[rng.integers(len(data))] ^= 255
        (tmp_path / "damaged.keras").write_bytes(data)
        try:
            checkpoint.load_model(str(tmp_path / "damaged.keras"))
        except UserError as error:
            assert "damaged.keras" in str(error) and "\n" not in str(error)
    for name in ("absent.keras", "."):
        with pytest.raises(UserError, match="does not exist"):
            checkpoint.load_model(str(tmp_path / name))


# --- Configurations --------------------------------------------------------------------------


def test_the_released_augmentation_policy_is_kept(golden):
    values = config_lib.load_file(golden / "configs/retinanet_autoaugment.json")
    human = config_lib.config_from_dict(released_config.experiment(values)).human
    assert (human.policy, human.auto_augment, human.as_released) == ("S2", "v0", True)
    assert human.scale_jitter == (0.8, 1.2)


def test_every_released_configuration_becomes_an_experiment(golden):
    files = [f for f in (golden / "configs").glob("*.json") if "override" not in f.name]
    assert len(files) > 9
    for file in files:
        made = config_lib.config_from_dict(released_config.experiment(config_lib.load_file(file)))
        assert made.task.num_classes == (21 if made.task.kind == "segmentation" else 91)


@pytest.mark.parametrize("model", ["retinanet", "segmentation"])
def test_an_empty_configuration_means_the_released_defaults(model, golden):
    whole = config_lib.load_file(golden / f"configs/{model}_default.json")
    assert released_config.experiment({"type": model}) == released_config.experiment(whole)


def test_the_later_of_two_equal_keys_wins_as_in_the_released_pascal_files(tmp_path):
    file = tmp_path / "pascal.yaml"
    norm = "batch_norm_activation: {{activation: swish, batch_norm_epsilon: {}}}\n"
    file.write_text("type: segmentation\n" + norm.format(1) + "batch_norm_activation: {}\n")
    values = config_lib.load_file(file, last_wins=True)
    assert config_lib.config_from_dict(released_config.experiment(values)).task.activation == "relu"
    with pytest.raises(UserError, match="'batch_norm_activation' twice"):
        config_lib.load_file(file)


# --- Three training steps from the golden start ----------------------------------------------


class GoldenBoxes(DetectionTask):
    """Takes the matched targets that the released model received."""

    def loss_sums(self, outputs, labels):
        return self.loss_sums_of_targets(outputs, *labels["targets"])


class GoldenMasks:
    """The loss of the Pascal configs: masks sub-sampled to the logits."""

    def loss_sums(self, outputs, labels):
        total, count = losses.segmentation_loss_sum(outputs["logits"], labels["masks"][:, ::4, ::4])
        return {"total": total}, count

    def normalizer(self, count):
        return count

    def label_density(self, labels):
        return 0.0


@pytest.fixture(scope="module", params=TINY)
def steps(request, golden):
    """Rows of three steps, variables after the first, what the release had, and the student."""
    folder = golden / f"checkpoints/{request.param}"
    info = config_lib.load_file(folder / "case.json")
    index = tf.train.load_checkpoint(str(folder / "model.ckpt-3"))
    found = architecture.detect(
        {name: tuple(shape) for name, shape in index.get_variable_to_shape_map().items()}
    )
    made = config_lib.config_from_dict(released_config.experiment(info, found))
    task = made.task.model_copy(update={"image_size": (256, 256), "stochastic_depth": None})
    student = make_task(task).build_model()
    set_hashed_weights(student, info["gain"])
    optimizer = made.optimizer
    boxes = task.kind == "detection"
    golden_task = GoldenBoxes(task) if boxes else GoldenMasks()
    model = SelfTrainer(student, golden_task, l2=optimizer.l2, clip_norm=optimizer.clip_norm)
    model.compile(optimizer=make_optimizer(optimizer, made.trainer.steps))
    model.optimizer.build(student.trainable_variables)
    case = {k.replace("__", "_"): v for k, v in load(folder / "train_batch.npz").items()}
    if boxes:
        targets = (
            concatenate_levels(case, "cls_targets", 1)[..., 0],
            concatenate_levels(case, "box_targets", 4),
            case["num_positives"],
        )
        labels = {"targets": tuple(map(tf.constant, targets))}
    else:
        labels = {"masks": tf.constant(case["masks"][..., 0].astype("int32"))}
    data = ({"human": tf.constant(case["image"])}, {"human": labels})
    step, rows, after = tf.function(model.train_step), [], None
    for index in range(3):
        rate = float(model.optimizer.learning_rate)
        scalars = {name: float(value) for name, value in step(data).items()}
        rows.append({**scalars, "learning_rate": rate})
        for tracker in model.trackers.values():
            tracker.reset_state()
        if index == 0:
            variables = checkpoint.variables_by_name(student)
            after = {name: np.array(variable) for name, variable in variables.items()}
            names = {id(variable): name for name, variable in variables.items()}
            for variable, slot in zip(
                student.trainable_variables, model.optimizer.momentums, strict=True
            ):
                after[names[id(variable)] + "/Momentum"] = np.array(slot)
    expected = json.loads((folder / "train_steps.json").read_text())
    return rows, after, expected, info["gain"], optimizer.l2


UNUSED = {  # kernels of the ImageNet classifier, which the release regularizes all the same
    "efficientnet-b0/head/conv2d/kernel": (1, 1, 80, 320),
    "efficientnet-b0/head/dense/kernel": (320, 1000),
}


def unused_squares(expected, gain):
    """Sum of the squared kernels of the ImageNet classifier, 0 for the detector."""
    sums = expected["sum_and_l2norm_of_every_variable_after_step_1"]
    kernels = [hashed_weight(n, shape, gain) for n, shape in UNUSED.items() if n in sums]
    return sum((kernel.astype("float64") ** 2).sum() for kernel in kernels)


def test_losses_and_gradient_norm_equal_release(steps):
    """The first step, and the loss after one update.

    Noise of 1e-6 in the images changes the loss of the detector by 6e-7 before the first update,
    by 1.3e-4 after it, and by 4e-3 after the second: rounding alone does as much. So the loss after
    one update may differ by 30 times its noise, and that after two proves nothing.
    """
    rows, _, expected, gain, l2 = steps
    extra = unused_squares(expected, gain)
    for index, tolerance in enumerate((1e-3, 30 * 1.3e-4)):
        row = rows[index]
        assert row["human_loss"] == pytest.approx(expected["model_loss"][index], rel=tolerance)
        total = row["loss"] + 0.5 * l2 * extra
        assert total == pytest.approx(expected["total_loss"][index], rel=tolerance)
    norm = np.sqrt(rows[0]["gradient_norm"] ** 2 + l2**2 * extra)
    assert norm == pytest.approx(expected["global_grad_norm_before_clip"][0], rel=1e-2)


def test_learning_rates_and_regularization_equal_release_in_every_step(steps):
    rows, _, expected, gain, l2 = steps
    extra = unused_squares(expected, gain)
    for index, row in enumerate(rows):
        assert row["learning_rate"] == pytest.approx(expected["learning_rate"][index], rel=1e-6)
        regularization = row["loss"] - row["human_loss"] + 0.5 * l2 * extra
        wanted = expected["total_loss"][index] - expected["model_loss"][index]
        # The four losses are float32 numbers below 8, which are rounded by at most 2.4e-7 each.
        assert regularization == pytest.approx(wanted, abs=1e-6)


def test_weights_and_momentum_after_a_step_equal_release(steps):
    _, after, expected, _, _ = steps
    sums = expected["sum_and_l2norm_of_every_variable_after_step_1"]
    assert set(after) == {name for name in sums if "/head/" not in name} - {"global_step"}
    for name, value in after.items():
        norm = np.sqrt((value.astype("float64") ** 2).sum())
        # The golden run stored the unbiased moving variance; see test_golden.
        tolerance = 1e-2 if name.endswith("moving_variance") else 1e-3
        tolerance = 5e-2 if name.endswith("/Momentum") else tolerance
        # A bias in front of a batch norm has no gradient but rounding errors.
        assert norm == pytest.approx(sums[name][1], rel=tolerance, abs=1e-6), name
