"""The released configurations, value by value."""

import json
import pathlib
import re
import shutil

import mini
import pytest

from official_selftrain import config as config_lib
from official_selftrain.data import numpy_inputs, parts
from official_selftrain.data.prepared import WITHOUT_LABELS, PreparedData


@pytest.mark.parametrize("variant", ["49S", "49", "96", "143", "190"])
def test_spinenet_recipes_equal_the_released_configs(variant, golden):
    file = golden / f"configs/retinanet_spinenet{variant}.json"
    released = json.loads(file.read_text())["params"]
    ours = config_lib.resolve(f"coco_spinenet{variant}")
    task, optimizer = ours.task, ours.optimizer
    parser, head = released["retinanet_parser"], released["retinanet_head"]
    norm, train = released["batch_norm_activation"], released["train"]
    loss, post = released["retinanet_loss"], released["postprocess"]
    rate = train["learning_rate"]
    pairs = [
        (task.num_classes, released["architecture"]["num_classes"]),
        (list(task.image_size), parser["output_size"]),
        (task.backbone, "spinenet" + released["spinenet"]["model_id"]),
        (task.stochastic_depth, released["spinenet"]["init_drop_connect_rate"]),
        ((task.head_convs, task.head_filters), (head["num_convs"], head["num_filters"])),
        (task.activation, norm["activation"]),
        (task.bn_momentum, norm["batch_norm_momentum"]),
        (task.bn_epsilon, norm["batch_norm_epsilon"]),
        (task.bn_synchronized, norm["use_sync_bn"]),
        (task.anchor_size, released["anchor"]["anchor_size"]),
        (task.max_instances, parser["max_num_instances"]),
        (task.focal_alpha, loss["focal_loss_alpha"]),
        (task.focal_gamma, loss["focal_loss_gamma"]),
        (task.huber_delta, loss["huber_loss_delta"]),
        (task.box_weight, loss["box_loss_weight"]),
        (task.nms.score_threshold, post["score_threshold"]),
        (task.nms.iou_threshold, post["nms_iou_threshold"]),
        (task.nms.pre_nms, post["pre_nms_num_boxes"]),
        (task.nms.max_detections, post["max_total_size"]),
        (ours.human.batch_size, train["train_batch_size"]),
        (ours.human.flip, parser["aug_rand_hflip"]),
        (ours.human.jitter, (parser["aug_scale_min"], parser["aug_scale_max"])),
        (optimizer.momentum, train["optimizer"]["momentum"]),
        (optimizer.l2, train["l2_weight_decay"]),
        (optimizer.clip_norm, train["gradient_clip_norm"]),
        (optimizer.schedule, rate["type"]),
        (optimizer.learning_rate, rate["init_learning_rate"]),
        (optimizer.warmup_steps, rate["warmup_steps"]),
        (optimizer.warmup_learning_rate, rate["warmup_learning_rate"]),
        (list(optimizer.step_boundaries), rate["learning_rate_steps"]),
        (pytest.approx(list(optimizer.step_rates)), rate["learning_rate_levels"]),
        (ours.trainer.steps, train["total_steps"]),
        (ours.evaluation.batch_size, released["eval"]["eval_batch_size"]),
    ]
    for mine, theirs in pairs:
        assert mine == theirs


@pytest.mark.parametrize("model", ["b7", "l2"])
def test_pascal_recipes_equal_the_released_configs(model, golden):
    """All but the steps, jitter and policy, where the paper differs from the release."""
    file = golden / f"configs/selftraining_pascal_efficientnet-{model}-nasfpn.json"
    released = json.loads(file.read_text())["params"]
    ours = config_lib.resolve(f"pascal_{model}_imagenetpp_s4_selftrain_aug")
    task, optimizer = ours.task, ours.optimizer
    architecture, head = released["architecture"], released["segmentation_head"]
    norm, train = released["batch_norm_activation"], released["train"]
    rate, nasfpn = train["learning_rate"], released["nasfpn"]
    pairs = [
        (task.num_classes, architecture["num_classes"]),
        (list(task.image_size), released["segmentation_parser"]["output_size"]),
        (task.backbone, architecture["backbone"]),
        (task.aspp, architecture["use_aspp"]),
        (task.fusion, architecture["use_pyramid_fusion"]),
        (task.neck_filters, nasfpn["fpn_feat_dims"]),
        (task.neck_repeats, nasfpn["num_repeats"]),
        (task.neck_separable, nasfpn["use_separable_conv"]),
        ((task.head_level, task.head_convs), (head["level"], head["num_convs"])),
        (task.activation, norm["activation"]),
        (task.bn_momentum, norm["batch_norm_momentum"]),
        (task.bn_epsilon, norm["batch_norm_epsilon"]),
        (task.bn_synchronized, norm["use_sync_bn"]),
        (task.loss_size == "mask", released["segmentation_loss"]["use_groundtruth_dimension"]),
        (task.label_smoothing, released["segmentation_loss"]["label_smoothing"]),
        (ours.human.flip, released["segmentation_parser"]["aug_rand_hflip"]),
        (optimizer.momentum, train["optimizer"]["momentum"]),
        (optimizer.l2, train["l2_weight_decay"]),
        (optimizer.clip_norm, train["gradient_clip_norm"]),
        (optimizer.schedule, rate["type"]),
        (optimizer.learning_rate, rate["init_learning_rate"]),
        (optimizer.warmup_steps, rate["warmup_steps"]),
        (optimizer.warmup_learning_rate, rate["warmup_learning_rate"]),
        (ours.evaluation.batch_size, released["eval"]["eval_batch_size"]),
    ]
    for mine, theirs in pairs:
        assert mine == theirs
    assert task.label_scales == (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
    batch = {"b7": 256, "l2": 128}[model]
    assert (ours.human.batch_size, ours.pseudo.batch_size) == (batch, batch)
    teacher = config_lib.teacher_config(ours)
    assert (teacher.human.batch_size, teacher.pseudo) == (256, None)
    assert ours.trainer.steps == {"b7": 40_000, "l2": 20_000}[model]


# Table 11 by init and policy, the human-labeled aug set of table 8, table 14, table 6.
PASCAL = {
    "b7_random": (28.4, 41.5),
    "b7_imagenet": (80.2, 81.4),
    "b7_imagenetpp": (83.9, 85.2),
    "b7_imagenetpp_{}_human_aug": (84.7, 84.8),
    "b7_imagenetpp_{}_selftrain_imagenet": (85.0, 86.0),
    "b7_imagenetpp_{}_selftrain_coco": (85.3, 86.6),
    "b7_imagenetpp_{}_selftrain_aug": (85.6, 86.7),
    "l2_imagenetpp": (None, 88.7),
    "l2_imagenetpp_{}_selftrain_aug": (None, 90.0),
}


def test_every_cell_of_the_pascal_tables_is_an_experiment():
    found = {
        name: values["published"]
        for name, values in config_lib.load_experiments().items()
        if name.startswith("pascal_")
    }
    expected = {}
    for name, values in PASCAL.items():
        name = name if "{}" in name else name + "_{}"
        for policy, value in zip(("s1", "s4"), values, strict=True):
            if value is not None:
                expected["pascal_" + name.format(policy)] = value
    assert found == expected
    for name in found:
        config = config_lib.resolve(name)
        assert config.human.policy == name.split("_")[3].upper()


def test_every_experiment_is_found_by_a_plain_search():
    folder = pathlib.Path(__file__).parents[1] / "experiments"
    texts = [file.read_text() for file in folder.glob("*.py")]
    for name in config_lib.load_experiments():
        assert sum(f'"{name}": ' in text for text in texts) == 1, name


@pytest.fixture
def own(tmp_path, monkeypatch):
    """train/ train.json train_masks/ classes.txt unlabeled/, and no val."""
    mini.write_boxes(tmp_path)
    mini.write_masks(tmp_path)
    (tmp_path / "masks").rename(tmp_path / "train_masks")
    monkeypatch.chdir(tmp_path)
    return tmp_path


RECIPES = [("folder", "boxes"), ("folder_masks", "mask")]
RECIPES += [(f"{name}_gpu", label) for name, label in RECIPES]


@pytest.mark.parametrize(("name", "label"), RECIPES)
def test_own_boxes_and_masks_are_read_from_the_documented_folders(own, name, label):
    shutil.copytree(own / "train", own / "val")
    shutil.copytree(own / "train_masks", own / "val_masks")
    shutil.copy(own / "train.json", own / "val.json")
    config = config_lib.resolve(name)
    human, evaluation, unlabeled = (
        numpy_inputs.read_records(source)
        for source in (config.human, config.evaluation, config.unlabeled)
    )
    assert (len(human), len(evaluation), len(unlabeled)) == (6, 6, 5)
    for record in (*human, *evaluation):
        assert getattr(record, label) is not None


@pytest.mark.parametrize(("name", "label"), RECIPES)
def test_own_images_need_nothing_to_measure_on(own, name, label):
    config = config_lib.resolve(name)
    data = PreparedData(config, own / "data", WITHOUT_LABELS)
    counts = {source: summary["images"] for source, summary in data.summaries.items()}
    assert counts == {"human": 5, "unlabeled": 5, "evaluation": 1}
    stages = config_lib.stages(config, data.completed)
    assert list(stages) == ["teacher", "student", "control"]
    assert {done.images_per_step for done in stages.values()} == {8}
    assert {done.steps for done in stages.values()} == {800}
    rates = {stage: done.optimizer.learning_rate for stage, done in stages.items()}
    teacher, student = (0.16, 0.16) if label == "boxes" else (0.15, 0.05)  # of 16 images
    expected = {"teacher": teacher / 2, "student": student / 2, "control": student / 2}
    assert rates == pytest.approx(expected)
    policies = stages["teacher"].human.policy, stages["student"].pseudo.policy
    assert policies == ("S1", "S1" if label == "boxes" else "S4")
    assert stages["teacher"].trainer.init == "imagenet"
    assert config.pseudo.score_threshold == "auto" and config.unlabeled.exclude_labeled
    assert (config.pseudo.agnostic_nms_iou == 0.5) == (label == "boxes")


def test_the_page_on_small_data_tells_what_the_code_chooses():
    page = pathlib.Path(__file__).parents[1] / "docs/small_data.md"
    rows = re.findall(r"^\| [\d,]+ \| .*$", page.read_text(encoding="utf-8"), re.M)
    assert len(rows) == 7
    for row in rows:
        cells = row.replace(",", "").replace("–", "0").strip("| ").split("|")
        total, measure, select, train, batch, steps = map(int, cells)
        index = [(f"{place}.jpg", place, str(place), [1]) for place in range(total)]
        measured = parts.measured(index, 0.2)
        left = sorted({*range(total)} - {*measured})
        held_out, _ = parts.held_out(index, left, config_lib.SelectionConfig(), set())
        assert (len(measured), len(held_out)) == (measure, select)
        assert len(left) - len(held_out) == train
        assert config_lib.default_batch_size(train) == batch
        assert config_lib.default_steps(train, batch) == steps
