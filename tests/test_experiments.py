"""The released configurations, value by value."""

import json

import pytest

from official_selftrain import config as config_lib


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
