"""`run` in miniature, end to end: resumed, killed, and given wrong input."""

import itertools
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import keras
import numpy as np
import pytest
from helpers import assert_same_training, update_error
from mini import history, resolve, resolve_masks
from PIL import Image
from workers import finish, start_workers

from official_selftrain import cli, pipeline, teacher
from official_selftrain import config as config_lib
from official_selftrain.data import records
from official_selftrain.data.prepared import WITHOUT_LABELS, PreparedData, check_classes
from official_selftrain.engine import loop
from official_selftrain.engine.distribution import Distribution, JaxDistribution
from official_selftrain.pipeline import evaluation, preflight, report, start, training
from official_selftrain.pipeline.folder import environment, init_run_folder
from official_selftrain.pipeline.run import StageTimer
from official_selftrain.pipeline.workspace import Workspace
from official_selftrain.tasks import make_task
from official_selftrain.utils import files
from official_selftrain.utils.errors import TrainingInterrupted, UserError

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """An uninterrupted `run` with a control."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    config = resolve(data, "self_training.control=true")
    return config, folder, pipeline.run(config, folder)


def test_run_leaves_everything_a_reader_needs(finished):
    _, folder, results = finished
    assert list(results) == ["teacher", "student", "control"]
    for stage in results:
        for name in ("config.yaml", "history.jsonl", "metrics.json", "model.weights.h5"):
            assert (folder / stage / name).is_file()
        assert list((folder / stage / "tensorboard").iterdir())
    page = (folder / "report.html").read_text()
    for word in ("teacher", "student", "control", "square", "data:image/png;base64", "<svg"):
        assert word in page
    assert 'src="http' not in page and "<link" not in page
    assert (folder / "pictures-val.png").stat().st_size > 1000
    rows = [json.loads(line) for line in (folder / "student/history.jsonl").open()]
    assert [row["step"] for row in rows] == [2, 4]
    assert {"human_loss", "pseudo_loss", "ratio", "pseudo_label_density"} <= set(rows[0])


def test_class_count_comes_from_the_labels(finished):
    _, folder, _ = finished
    saved = config_lib.config_from_dict(config_lib.load_file(folder / "student/config.yaml"))
    assert saved.task.num_classes == 2
    assert saved.trainer.init.endswith("whole/teacher")


def test_finished_run_is_not_done_again(finished):
    config, folder, results = finished
    before = (folder / "student/model.weights.h5").stat().st_mtime_ns
    assert pipeline.run(config, folder) == results
    assert (folder / "student/model.weights.h5").stat().st_mtime_ns == before


def test_student_reads_the_teachers_labels_and_control_does_not(finished, tmp_path):
    """With the boxes of the labels moved, the student changes and the control does not."""
    config, folder, _ = finished
    again = tmp_path / "again"
    (again / "labels").mkdir(parents=True)
    for file in (folder / "labels").glob("pseudo-*.tfrecord"):
        moved = []
        for record in records.read([str(file)]):
            record.boxes[:] = [0.1, 0.1, 0.9, 0.9]
            moved.append(record)
        records.write(str(again / "labels" / file.name), moved)
    teacher_folder = str(folder / "teacher")
    labels = str(again / "labels/pseudo-*.tfrecord")
    for stage, stage_config in (
        ("student", config_lib.student_config(config, labels, teacher_folder)),
        ("control", config_lib.control_config(config, teacher_folder)),
    ):
        pipeline.train(stage_config, again / stage, evaluate_after=False)
    rows = {
        (stage, place): history(place / stage)
        for stage in ("student", "control")
        for place in (folder, again)
    }
    losses = {key: [row.get("pseudo_loss") for row in value] for key, value in rows.items()}
    assert losses["control", folder] == losses["control", again] == [None, None]
    for old, new in zip(losses["student", folder], losses["student", again], strict=True):
        assert abs(new - old) > 0.01 * old
    first, last = "ckpt-00000000.npz", "ckpt-00000004.npz"
    assert_same_training(again / "control", folder / "control", 0, 4)
    before, wanted, found = (
        dict(np.load(place / "student/checkpoints" / name))
        for place, name in ((folder, first), (folder, last), (again, last))
    )
    assert update_error(before, wanted, found)["optimizer"] > 0.1


def test_folder_of_another_run_is_refused(data, finished):
    _, folder, _ = finished
    told = r"differs in self_training.alpha \(1.0 before, 0.5 now\); `run --reuse=.*/whole --model"
    with pytest.raises(UserError, match=told):
        pipeline.run(resolve(data, "self_training.control=true,self_training.alpha=0.5"), folder)


def assert_refused(call, message):
    """In one line that matches `message`."""
    with pytest.raises(UserError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("unlabeled.images=nowhere", "no file matches .*nowhere': it does not exist"),
        ("task.num_classes=2,human.annotations=other.json", "class id 7, but task.num_classes=2"),
        ("unlabeled=null", "needs the section 'unlabeled'"),
        ("pseudo.images=unlabeled", "labels the images of `unlabeled` itself"),
    ],
)
def test_wrong_input_stops_a_run_in_one_line(data, tmp_path, override, message):
    content = json.loads((data / "train.json").read_text())
    content["categories"].append({"id": 7, "name": "other"})
    content["annotations"][0]["category_id"] = 7
    (data / "other.json").write_text(json.dumps(content))
    assert_refused(lambda: pipeline.run(resolve(data, override), tmp_path / "run"), message)


def test_a_threshold_that_keeps_no_box_stops_labeling_in_one_line(data, finished, tmp_path):
    _, folder, _ = finished
    config = resolve(data, "pseudo.score_threshold=0.999")
    assert_refused(
        lambda: pipeline.pseudo_label(config, tmp_path, folder / "teacher"),
        "keeps no box of 5 images; the highest score is",
    )


def test_labels_of_two_teachers_do_not_mix(data, finished, tmp_path):
    _, folder, _ = finished
    config = resolve(data)
    pipeline.pseudo_label(config, tmp_path, folder / "teacher")
    with pytest.raises(UserError, match="labels by another teacher"):
        pipeline.pseudo_label(config, tmp_path, folder / "student")


def test_images_without_any_label_cannot_teach(data, tmp_path):
    with pytest.raises(UserError, match="hold no box; is human.annotations given"):
        pipeline.run(resolve(data, "human.annotations=null"), tmp_path / "run")


def test_every_checkpoint_and_evaluation_that_is_due_ends_a_loop():
    def loop(**settings):
        values = {"steps": 600, "checkpoint_interval": 120, "steps_per_loop": 50, **settings}
        return training.steps_per_loop(config_lib.TrainerConfig(**values))

    assert loop() == 10  # 50 would pass 120 by
    assert loop(checkpoint_interval=200) == 50
    assert loop(checkpoint_interval=200, evaluation_interval=25) == 25


def test_training_starts_from_imagenet_when_told_so():
    overrides = ["task={backbone: efficientnet-lite0, neck: fpn, neck_filters: 8, num_classes: 2}"]
    overrides += ["task={image_size: [128, 128], head_filters: 8}", "trainer.init=imagenet"]
    config = config_lib.resolve("folder", overrides=[*overrides, "task.head_convs=1"])
    model = make_task(config.task).build_model()
    before = {layer.name: layer.get_weights() for layer in model.layers}
    start.initialize(model, config, {})
    for layer in model.layers:
        same = all(
            np.array_equal(a, b)
            for a, b in zip(before[layer.name], layer.get_weights(), strict=True)
        )
        learnt = layer.name.startswith("efficientnet") and layer.count_params() > 0
        assert same == (not learnt), layer.name
    with pytest.raises(UserError, match="spinenet49S has no such public weights"):
        config_lib.resolve("coco_spinenet49S", overrides=["trainer.init=imagenet"])


def test_batches_are_shared_out_evenly(data):
    """Silent error 3: a replica that gets no image turns all weights to NaN."""
    two = Distribution("any", 2)
    training.check_batches(resolve(data), two)
    with pytest.raises(UserError, match=r"pseudo.batch_size=3 .* by 2 .2 replicas.; use 4"):
        training.check_batches(resolve(data, "pseudo.batch_size=3"), two)
    parts = resolve(data, "trainer.micro_batches=2,self_training.separate_batch_norm=true")
    with pytest.raises(UserError, match="4 .2 replicas with 2 micro-batches each.; use 4"):
        training.check_batches(parts, two)
    with pytest.raises(UserError, match="micro_batches=2 needs the TensorFlow backend"):
        training.check_batches(parts, JaxDistribution())


def test_measured_images_are_not_to_be_labeled(data, tmp_path, caplog):
    """Evaluation images among the unlabeled are refused, among the labeled a warning."""
    with pytest.raises(UserError, match="6 images are both in 'evaluation' and in 'unlabeled'"):
        pipeline.run(resolve(data, "unlabeled.images=train"), tmp_path / "a")
    PreparedData(resolve(data), tmp_path / "b")
    assert "6 images are both in human and in evaluation" in caplog.text


def test_segmentation_runs_by_its_experiment_alone(masks, tmp_path):
    config = resolve_masks(masks, "self_training.control=true,human.policy=S4")
    results = pipeline.run(config, tmp_path)
    assert list(results) == ["teacher", "student", "control"]
    for metrics in results.values():
        both = [metrics[f"IoU/{name}"] for name in ("left", "right")]
        # All pixels are one or the other, so that one of them is found now and then.
        assert max(both) > 0 and metrics["mIoU"] == pytest.approx(sum(both) / 2)
    page = (tmp_path / "report.html").read_text()
    assert "mIoU" in page and "pixels ignored" in page and "left" in page
    report = json.loads((tmp_path / "labels/statistics.json").read_text())
    assert report["images"] == 5 and 0 <= report["ignored_share"] < 1
    assert pipeline.evaluate(
        config, tmp_path / "again", weights=tmp_path / "student"
    ) == pytest.approx(results["student"])
    assert pipeline.run(config, tmp_path) == results


def test_class_absent_from_the_labeled_images(masks, tmp_path, caplog):
    (masks / "more.txt").write_text("right\nleft\nmiddle\n")
    human = "human.class_list=more.txt,evaluation.class_list=more.txt"
    metrics = pipeline.train(config_lib.teacher_config(resolve_masks(masks, human)), tmp_path)
    assert "no labeled image holds 'middle'" in caplog.text
    assert metrics["IoU/middle"] == -1  # it is not in the truth either


def test_student_learns_the_distribution_of_the_teacher(masks, tmp_path):
    soft = "task.label_classes=2,pseudo.soft=true"
    results = pipeline.run(resolve_masks(masks, soft), tmp_path / "a")
    assert list(results) == ["teacher", "student"] and results["student"]["mIoU"] > 0
    fewer = resolve_masks(masks, "task.num_classes=3,task.label_classes=3,pseudo.soft=true")
    student = config_lib.student_config(fewer, f"{tmp_path}/a/labels/pseudo-*.tfrecord", None)
    with pytest.raises(UserError, match="task.label_classes=3: the labels hold 2 of 3 classes"):
        pipeline.train(student, tmp_path / "b")


def test_wrong_masks_stop_a_run_in_one_line(masks, tmp_path):
    with pytest.raises(UserError, match="6 images of human have no mask; is human.masks given?"):
        pipeline.run(resolve_masks(masks, "human={masks: null, class_list: null}"), tmp_path / "a")
    with pytest.raises(UserError, match="class_weights has 3 numbers for 2 classes"):
        pipeline.run(resolve_masks(masks, "task.class_weights=[1,1,1]"), tmp_path / "b")
    with pytest.raises(UserError, match="needs task.kind=segmentation and task.label_classes=2"):
        resolve_masks(masks, "pseudo.soft=true")
    with pytest.raises(UserError, match="resnet10 has no such public weights; .*efficientnet-l2$"):
        resolve_masks(masks, "trainer.init=imagenet++,pseudo=null")


def test_empty_unlabeled_folder(data, tmp_path):
    (data / "empty").mkdir()
    with pytest.raises(UserError, match="no usable image in .*empty"):
        pipeline.run(resolve(data, "unlabeled.images=empty"), tmp_path / "run")


def test_student_without_labels_and_training_without_images_say_so(data, tmp_path):
    with pytest.raises(UserError, match=r"pseudo.records is not set"):
        pipeline.train(resolve(data), tmp_path / "a")
    with pytest.raises(UserError, match="no labeled images"):
        pipeline.train(resolve(data, "human={images: null, annotations: null}"), tmp_path / "b")
    with pytest.raises(UserError, match="nowhere does not exist"):
        pipeline.train(resolve(data, "pseudo=null,trainer.init=nowhere"), tmp_path / "c")


def test_evaluate_command_gives_the_same_metrics(finished, tmp_path):
    _, folder, results = finished
    command = [sys.executable, "-m", "official_selftrain.evaluate"]
    weights_flag = f"--weights={folder / 'student'}"
    config_flag = f"--config_file={folder / 'student' / 'config.yaml'}"
    done = subprocess.run(
        [*command, config_flag, weights_flag, f"--model_dir={tmp_path}"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    saved = json.loads((tmp_path / "metrics.json").read_text())
    assert saved == pytest.approx(results["student"], abs=1e-6)


def test_images_that_keep_nothing_can_be_left_out(data, finished):
    config, folder, _ = finished
    student = config_lib.student_config(config, str(folder / "labels/pseudo-*.tfrecord"), "x")
    student = student.override({"pseudo.keep_empty": False, "pseudo.score_threshold": 0.0})
    prepared = PreparedData(student, folder / "data")
    student = prepared.with_num_classes(student)
    images, labels = next(
        iter(training.training_data(student, make_task(student.task), prepared, 0))
    )
    assert set(images) == {"human", "pseudo"}
    assert (np.asarray(labels["pseudo"]["classes"]) >= 0).any()


def test_sigterm_saves_and_the_rest_equals_uninterrupted(data, finished, tmp_path, monkeypatch):
    config, whole, _ = finished
    teacher = config_lib.teacher_config(config).override({"trainer.checkpoint_interval": 4})
    steps = loop.TensorFlowLoop.steps

    def ask_to_end(*arguments, **settings):
        os.kill(os.getpid(), signal.SIGTERM)
        return steps(*arguments, **settings)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(loop.TensorFlowLoop, "steps", ask_to_end)
    with pytest.raises(TrainingInterrupted, match="stopped at step 2 of 4, which is saved"):
        pipeline.train(teacher, tmp_path / "a")
    assert signal.getsignal(signal.SIGTERM) is before
    assert (tmp_path / "a/checkpoints/ckpt-00000002.npz").exists()
    monkeypatch.undo()
    pipeline.train(teacher, tmp_path / "a")
    assert_same_training(tmp_path / "a", whole / "teacher", 0, 4)


# --- What a folder is bound to -----------------------------------------------------------------


@pytest.fixture
def own(finished, data, tmp_path):
    """A copy of the finished run, without its file times, and of its data."""
    _, folder, results = finished
    place = tmp_path / "lr=0.1,batch=[2] \N{LATIN SMALL LETTER U WITH DIAERESIS}"
    shutil.copytree(folder, place, copy_function=shutil.copy)
    shutil.copytree(data, tmp_path / "data")
    return resolve(tmp_path / "data", "self_training.control=true"), place, results


@pytest.fixture
def no_training(monkeypatch):
    monkeypatch.setattr(training.Training, "run", lambda self: pytest.fail("it trains again"))


@pytest.fixture
def no_network(monkeypatch):
    """Metrics are counted calls: 0.01, 0.02, ..."""
    calls = itertools.count(1)
    monkeypatch.setattr(teacher, "load_predictor", lambda *_, **__: None)
    monkeypatch.setattr(evaluation, "measure", lambda *_: {"AP": next(calls) / 100})


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_a_copied_run_is_as_finished_and_reads_its_own_data(own, no_training):
    """With other times, in a folder whose name could be taken for a pattern."""
    config, folder, results = own
    os.utime(pathlib.Path(config.data_dir) / "unlabeled/0.png")
    assert pipeline.run(config, folder) == results
    saved = config_lib.config_from_dict(config_lib.load_file(folder / "student/config.yaml"))
    assert saved.pseudo.records == str(folder / "labels")
    assert saved.trainer.init == str(folder / "teacher")
    assert saved.data_dir == config.data_dir
    student = config_lib.student_config(config, str(folder / "labels"), None)
    for summary in PreparedData(student, folder / "data").summaries.values():
        assert all(str(folder) in file for file in summary["files"])


def test_a_run_is_taken_further_and_needs_the_old_folder_no_more(own, no_training, tmp_path):
    """All stages agree, so none is trained; then each is, whose settings differ, and no other."""
    config, old, results = own
    new = tmp_path / "new"
    assert pipeline.run(config, new, reuse=old) == results
    record = json.loads((new / "reused.json").read_text())
    stages = ("teacher", "labels", "student", "control")
    assert record == {"run": str(old), "stages": {name: str(old / name) for name in stages}}
    for name in ("model.weights.h5", "history.jsonl", "metrics.json", "made_of.json"):
        assert (new / "student" / name).read_bytes() == (old / "student" / name).read_bytes()
    assert not (new / "student/checkpoints").exists()
    assert f"reused from {old}/teacher" in (new / "report.html").read_text()

    (old / "teacher/metrics.json").write_text('{"AP": 0.5}')
    cases = {
        "pseudo.score_threshold=0.002": ("student", {"teacher", "labels"}),
        "pseudo.policy=S2": ("student", {"teacher", "labels"}),
        "task.nms.max_detections=4": ("student", {"teacher"}),  # other labels
        "self_training.rounds=2": ("student_2", {"teacher", "labels", "student"}),
    }
    for change, (trained, taken) in cases.items():
        place = tmp_path / change
        with pytest.raises(pytest.fail.Exception, match="it trains again"):
            pipeline.run(resolve(config.data_dir, change), place, reuse=old)
        assert set(json.loads((place / "reused.json").read_text())["stages"]) == taken
        assert (place / trained / "config.yaml").exists()
        measured = json.loads((place / "teacher/metrics.json").read_text())
        assert (measured["AP"] == 0.5) == ("task" not in change)  # measured again if it may differ

    shutil.rmtree(old)
    assert pipeline.run(config, new) == results
    with pytest.raises(pytest.fail.Exception, match="it trains again"):
        pipeline.run(resolve(config.data_dir, "self_training.rounds=2"), place)


def test_a_teacher_of_other_settings_or_data_is_not_reused(own, no_training, tmp_path):
    config, old, _ = own

    def run(*changes, place="new"):
        pipeline.run(resolve(config.data_dir, *changes), tmp_path / place, reuse=old)

    keep = r"add --params_override='\{self_training: \{teacher: \{trainer.steps: 4\}\}\}'$"
    with pytest.raises(UserError, match=rf"trainer.steps \(4 before, 6 now\); to change .* {keep}"):
        run("trainer.steps=6")
    with pytest.raises(pytest.fail.Exception, match="it trains again"):  # the student
        run("trainer.steps=6", "{self_training: {teacher: {trainer.steps: 4}}}")
    with pytest.raises(UserError, match=r"task.neck_filters .*; leave out --reuse to train"):
        run("task.neck_filters=16", place="other")
    flip(old / "teacher/model.weights.h5")
    with pytest.raises(UserError, match="its weights are damaged; leave out --reuse"):
        run(place="other")
    flip(old / "teacher/model.weights.h5")
    file = pathlib.Path(config.data_dir) / "train.json"
    content = json.loads(file.read_text())
    content["annotations"] = content["annotations"][:2]
    file.write_text(json.dumps(content))
    with pytest.raises(
        UserError, match=r"human: 6 images, 5 boxes .*before, .*2 boxes .*leave out"
    ):
        run(place="other")
    with pytest.raises(UserError, match="is --model_dir itself"):
        pipeline.run(config, old, reuse=old)
    with pytest.raises(
        UserError, match=r"no run whose teacher is finished: .*/train/teacher/model"
    ):
        pipeline.run(config, tmp_path / "third", reuse=tmp_path / "data/train")


def test_labels_that_are_edited_under_a_training_are_told(own, no_training):
    config, folder, _ = own
    file = pathlib.Path(config.data_dir) / "train.json"
    content = json.loads(file.read_text())
    content["annotations"] = content["annotations"][:2]
    file.write_text(json.dumps(content))
    before, now = r"human: 6 images, 5 boxes \(\w{8}\) before", r"6 images, 2 boxes \(\w{8}\) now"
    with pytest.raises(UserError, match=f"teacher was trained on other data .*{before}, {now}"):
        pipeline.run(config, folder)
    (folder / "teacher/model.weights.h5").unlink()  # in the middle of a training, too
    with pytest.raises(UserError, match=before):
        pipeline.run(config, folder)


def test_a_training_goes_on_with_other_data_only_before_its_first_step(own, no_training):
    _, folder, _ = own
    student = config_lib.config_from_dict(config_lib.load_file(folder / "student/config.yaml"))
    made_of = json.loads((folder / "student/made_of.json").read_text())
    made_of["pseudo"]["content"] = "of other labels"
    made_of["init"] = "of another teacher"
    (folder / "student/made_of.json").write_text(json.dumps(made_of))
    student = student.override({"data_dir": str(folder.parent / "data")})
    student = config_lib.student_config(student, str(folder / "labels"), str(folder / "teacher"))
    stage = Workspace.open(student, folder / "student")
    stage.prepare(place=folder / "data")
    with pytest.raises(UserError, match="pseudo: 5 images, .*of other.* before, 5 images"):
        training.train_stage(stage)  # what is finished needs no start
    (folder / "student/model.weights.h5").unlink()
    with pytest.raises(UserError, match="init: of another t before, "):
        training.train_stage(stage)
    for step in (2, 4):
        (folder / f"student/checkpoints/ckpt-{step:08d}.npz").unlink()
    with pytest.raises(pytest.fail.Exception, match="it trains again"):
        training.train_stage(stage)
    assert not list((folder / "student/checkpoints").iterdir())
    assert json.loads((folder / "student/made_of.json").read_text())["init"] != made_of["init"]


def test_damaged_files_are_made_again_alone(own, no_training, caplog, monkeypatch):
    """As a power cut leaves them: empty, or half written."""
    config, folder, results = own
    monkeypatch.setattr(evaluation, "measure", lambda *_: results["teacher"])
    before = {file: file.read_bytes() for file in folder.rglob("*.json*")}
    labels = folder / "labels/pseudo-00000.tfrecord"
    before[labels] = labels.read_bytes()
    for name in (
        "seconds.json", "teacher/metrics.json", "teacher/classes.json", "teacher/made_of.json",
        "labels/made_by.json", "labels/statistics.json", "labels/classes.json",
        "labels/pseudo-00000.tfrecord", "labels/pseudo-00000.tfrecord.json",
    ):  # fmt: skip
        (folder / name).write_bytes(b"")
    for name in ("student/history.jsonl", "comparison.json"):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])
    assert pipeline.run(config, folder) == results
    assert f"{labels} is damaged: it is labeled again" in caplog.text
    for name in ("labels/pseudo-00000.tfrecord", "labels/statistics.json", "teacher/classes.json"):
        assert (folder / name).read_bytes() == before[folder / name]


def test_weights_that_are_damaged_after_a_training_are_told(own, no_training):
    config, folder, _ = own
    flip(folder / "teacher/model.weights.h5")
    with pytest.raises(UserError, match="teacher/model.weights.h5 is not as .* delete it, and the"):
        pipeline.run(config, folder)


def test_a_damaged_shard_is_named_whoever_reads_it_and_made_again(own):
    config, folder, _ = own
    labels = folder / "labels"
    student = config_lib.student_config(config, str(labels), None)
    one = Distribution("any", 1)
    for name in ("human", "unlabeled", "evaluation", "pseudo"):
        prepared = PreparedData(student, folder / "data")
        file = pathlib.Path(prepared.files(name)[0])
        before = file.read_bytes()
        flip(file)
        with (
            pytest.raises(UserError, match=rf"{re.escape(str(file))} .*the same command|labels"),
            Workspace(student, folder, one, prepared).reading(),
        ):
            list(records.read([str(file)]))
        if name == "pseudo":
            assert teacher.unfinished([(prepared.files("unlabeled")[0], str(file))])
        else:
            PreparedData(student, folder / "data")
            assert file.read_bytes() == before
    place = Workspace(student, folder, one, prepared)
    with pytest.raises(UserError, match="^something else$"), place.reading():
        raise UserError("something else")


def test_settings_are_free_until_something_is_trained(data, tmp_path, caplog):
    first, second = resolve(data), resolve(data, "trainer.steps=3,human.on_bad_record=skip")
    init_run_folder(first, tmp_path)
    start = tmp_path / "checkpoints/ckpt-00000000.npz"
    start.parent.mkdir()
    start.touch()
    init_run_folder(second, tmp_path)
    assert "its settings are replaced: human.on_bad_record ('stop' before" in caplog.text
    saved = config_lib.config_from_dict(config_lib.load_file(tmp_path / "config.yaml"))
    assert saved == second and not start.exists()
    for trained in ("checkpoints/ckpt-00000002.npz", "teacher/model.weights.h5"):
        (tmp_path / trained).parent.mkdir(exist_ok=True)
        (tmp_path / trained).touch()
        with pytest.raises(UserError, match=r"differs in .*trainer.steps \(3 before, 4 now\)"):
            init_run_folder(first, tmp_path)
        (tmp_path / trained).unlink()
    init_run_folder(first, tmp_path)
    (tmp_path / "config.yaml").write_text("experiment: x\nfoo: 1\n")
    with pytest.raises(UserError, match="config.yaml: .*unknown key 'foo'"):
        init_run_folder(first, tmp_path)


@pytest.mark.parametrize(
    "work",
    [
        lambda config, folder: pipeline.run(config, folder),
        lambda config, folder: pipeline.train(config_lib.teacher_config(config), folder),
        lambda config, folder: pipeline.evaluate(config, folder, weights=folder, refresh=True),
        lambda config, folder: pipeline.pseudo_label(config, folder, folder),
        lambda config, folder: pipeline.check(config, folder),
        lambda config, folder: pipeline.write_report(config, folder),
    ],
    ids=["run", "train", "evaluate", "pseudo_label", "check", "report"],
)
def test_a_second_process_in_a_folder_ends_and_names_the_first(data, tmp_path, work):
    (tmp_path / "model.weights.h5").touch()
    for name in ("labels/statistics.json", "student/metrics.json"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    other = tmp_path / "a.0123456789ab.tmp"
    other.touch()  # of the first
    with (
        files.locked(tmp_path),
        pytest.raises(UserError, match=f"another process works in .*process {os.getpid()} on "),
    ):
        work(resolve(data), tmp_path)
    assert other.exists()


def test_the_header_of_a_config_needs_no_git(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "# keras " in environment() and "# git" not in environment()
    monkeypatch.undo()
    monkeypatch.setattr(
        config_lib, "PACKAGE", tmp_path / "somebody/else"
    )  # inside another checkout
    (tmp_path / ".git").mkdir()
    assert "# git" not in environment()


# --- Numbers of its own ------------------------------------------------------------------------


def test_metrics_of_other_data_or_weights_are_kept_apart(own, no_network, caplog):
    _, folder, results = own
    stage = folder / "student"
    caplog.set_level("INFO")
    saved = config_lib.config_from_dict(config_lib.load_file(stage / "config.yaml"))
    other = folder.parent / "other"
    shutil.copytree(folder.parent / "data/train", other / "pics")  # it has no labeled images
    shutil.copy(folder.parent / "data/train.json", other / "few.json")
    changed = {"evaluation.images": "pics", "evaluation.annotations": "few.json"}
    elsewhere = saved.override(changed | {"data_dir": str(other)})
    (stage / "best.weights.h5").write_bytes((stage / "model.weights.h5").read_bytes() + b"x")
    for config, weights in (
        (elsewhere, None),
        (saved.override({"task.nms.iou_threshold": 0.1}), None),
        (saved, folder / "teacher"),
        (saved, stage / "best.weights.h5"),
    ):
        caplog.clear()
        metrics = pipeline.evaluate(config, stage, weights=weights, refresh=True)
        assert json.loads((stage / "metrics.json").read_text()) == results["student"]
        assert "these metrics are not those of the run" in caplog.text
        file = max((stage / "evaluations").glob("*.json"), key=lambda file: file.stat().st_mtime_ns)
        assert str(file) in caplog.text
        assert json.loads(file.read_text())["metrics"] == metrics != results["student"]
    assert len(list((stage / "evaluations").glob("*.json"))) == 4
    assert pipeline.evaluate(saved, stage) == results["student"]
    # Its own weights on its own data; these may lie elsewhere now.
    moved = saved.override({"data_dir": str(folder.parent / "data")})
    refreshed = pipeline.evaluate(moved, stage, weights=stage, refresh=True)
    assert json.loads((stage / "metrics.json").read_text()) == refreshed == {"AP": 0.05}


def test_averaged_weights_are_measured_again_with_the_others(own, no_network):
    _, folder, _ = own
    (folder / "student/ema.weights.h5").touch()
    saved = config_lib.config_from_dict(config_lib.load_file(folder / "student/config.yaml"))
    metrics = pipeline.evaluate(saved, folder / "student", weights=folder / "student", refresh=True)
    assert metrics == {"AP": 0.01, "ema/AP": 0.02}


def test_all_trainings_of_a_run_are_measured_on_data_that_is_prepared_once(own, no_network):
    _, folder, _ = own
    saved = config_lib.config_from_dict(config_lib.load_file(folder / "student/config.yaml"))
    configs = dict.fromkeys(("control", "student", "teacher"), saved)
    assert pipeline.evaluate_stages(configs, folder)["teacher"] == {"AP": 0.03}
    assert not list(folder.glob("*/data")) and not list(folder.rglob("evaluations"))


def test_evaluation_reads_classes_beside_the_weights(own, no_network):
    config, folder, _ = own
    classes = folder / "student/classes.json"
    classes.write_text(json.dumps({"num_classes": 4, "names": {"1": "circle", "3": "square"}}))
    with pytest.raises(UserError, match="the weights and of evaluation differ: 1 'circle', 3 'sq"):
        pipeline.evaluate(config, folder.parent / "out", weights=folder / "student")
    classes.write_text(json.dumps({"num_classes": 4, "names": {"1": "square"}}))
    with pytest.raises(UserError, match="the weights know 4 classes .*but task.num_classes=2"):
        pipeline.evaluate(
            config.override({"task.num_classes": 2}), folder.parent / "out", weights=classes.parent
        )


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({1: "cat", 2: "dog"}, {2: "dog"}),
        ({1: "cat"}, {2: "dog"}),
        ({1: "x", 2: "x"}, {1: "x", 2: "x"}),
        ({}, {1: "cat"}),
    ],
)
def test_classes_of_two_sources_that_agree_are_taken(first, second):
    assert check_classes({"human": first, "evaluation": second}) is None


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({1: "cat", 2: "dog"}, {1: "dog", 2: "cat"}),
        ({1: "cat"}, {2: "cat"}),
        ({1: "cat"}, {1: "Cat"}),
        ({i: str(i) for i in range(500)}, {i: str(i - (i == 450)) for i in range(500)}),
    ],
)
def test_classes_of_two_sources_that_differ_are_named(first, second):
    with pytest.raises(UserError, match="the classes of human and of evaluation differ") as told:
        check_classes({"human": first, "evaluation": second})
    wrong = next(key for key in second if second[key] != first.get(key))
    assert f"{wrong} {second[wrong]!r}" in str(told.value) and len(str(told.value)) < 1500


def test_a_stage_has_the_class_count_of_the_data(data, tmp_path):
    config = resolve(data)
    workspace = Workspace.open(config, tmp_path)
    workspace.prepare(WITHOUT_LABELS)
    assert config.task.num_classes is None
    assert workspace.stage("teacher", config).config.task.num_classes == 2


def lost_boxes(config, prepared):
    return list(make_task(config.task).warnings(config, prepared))


def test_boxes_beyond_the_limit_are_counted(data, tmp_path):
    config = resolve(data, "task.max_instances=3")
    prepared = PreparedData(config, tmp_path)
    prepared.summaries["human"]["boxes_per_image"] = {"0": 9, "3": 5, "4": 2, "10": 1}
    assert lost_boxes(config, prepared) == [
        "3 images of human have more than task.max_instances=3 boxes: 9 of its 33 boxes are left "
        "out and count as background; task.max_instances=10 keeps all"
    ]
    assert not lost_boxes(config.override({"task.max_instances": 10}), prepared)


def test_boxes_of_the_teacher_count_above_their_threshold(data, tmp_path):
    image = next(records.read(PreparedData(resolve(data), tmp_path / "data").files("unlabeled")))
    boxes = np.tile([[0.1, 0.1, 0.5, 0.5]], (6, 1))
    scores = np.array([0.9, 0.8, 0.7, 0.6, 0.5, 0.4], "float32")
    labeled = image.relabeled("t", boxes=boxes, classes=[1] * 6, scores=scores)
    records.write(tmp_path / "p.tfrecord", [labeled])
    student = config_lib.student_config(resolve(data), str(tmp_path / "p.tfrecord"), None)
    student = student.override({"pseudo.score_threshold": 0.55, "task.num_classes": 2})
    prepared = PreparedData(student, tmp_path / "data")
    prepared.summaries["pseudo"]["boxes_per_image"] = {6: 1}
    assert "1 of its 4 boxes" in lost_boxes(student, prepared)[0]
    assert not lost_boxes(student.override({"pseudo.score_threshold": 0.65}), prepared)


def test_hints_name_the_key_of_their_section(data, tmp_path):
    shutil.copytree(data / "unlabeled", data / "broken")
    (data / "broken/0.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"\(unlabeled.on_bad_record=skip continues without it\)"):
        PreparedData(resolve(data, "unlabeled.images=broken"), tmp_path)


# --- Before and after --------------------------------------------------------------------------


def test_a_recipe_for_run_is_checked_before_there_are_labels(data, tmp_path, monkeypatch):
    seen = {}

    def look(trained, picture, stages):
        seen.update(stages)
        assert trained.config.human.batch_size == 4  # the teacher's
        return [("second step", "1 s")]

    monkeypatch.setattr(preflight, "look", look)
    task = SimpleNamespace(warnings=lambda *_: ())
    monkeypatch.setattr(
        preflight, "Training", lambda place: SimpleNamespace(config=place.config, task=task)
    )
    config = resolve(data, "self_training={control: true, rounds: 2}")
    assert pipeline.check(config, tmp_path)[-1] == ("second step", "1 s")
    assert {name: (stage.trainer.steps, stage.images_per_step) for name, stage in seen.items()} == {
        "teacher": (4, 4),
        "student": (4, 4),
        "student_2": (4, 4),
        "control": (4, 4),
    }
    rows = dict(preflight._stages(SimpleNamespace(config=seen["teacher"]), seen, 3600.0))
    assert rows["stage student"] == "4 steps of 4 images, 4.0 hours"
    assert rows["all stages"] == "16.0 hours, and the time to label the images"


def test_the_report_is_of_the_last_round_and_says_what_ran(own, monkeypatch):
    _, folder, results = own
    for name in ("labels", "student"):
        shutil.copytree(folder / name, folder / f"{name}_2")
    second = json.loads((folder / "labels_2/statistics.json").read_text())
    (folder / "labels_2/statistics.json").write_text(json.dumps(second | {"threshold": 0.25}))
    config = config_lib.config_from_dict(config_lib.load_file(folder / "config.yaml"))
    config = config.override({"self_training.rounds": 2, "description": "of the recipe"})
    config = config.override({"data_dir": str(folder.parent / "data")})
    results = results | {"student_2": results["student"]}
    drawn = {}
    monkeypatch.setattr(
        report, "_predictions", lambda workspace, stages, images: dict.fromkeys(stages, images)
    )
    monkeypatch.setattr(
        report.visualize,
        "contact_sheet",
        lambda rows, captions: drawn.update(dict.fromkeys(captions)) or Image.new("RGB", (4, 4)),
    )
    place = Workspace.open(config, folder)
    place.prepare(WITHOUT_LABELS)
    report.write(place, results, {"teacher": 1.0})
    page = (folder / "report.html").read_text()
    assert "<h1>mini: detection, resnet10 + fpn, 128 x 128 pixels</h1>" in page
    assert "of the recipe" not in page.partition("Configuration")[0]
    assert "6 labeled + 5 pseudo-labeled, threshold 0.25" in page and "<h3>labels_2" in page
    assert "student_2" in drawn and "pseudo labels (> 0.25)" in drawn
    assert "held-back labels" not in drawn  # the unlabeled images have none
    report.write(place, results, {"teacher": 2.0}, again=True)
    assert (folder / "report.html").read_text() == page.replace("<td>1</td>", "<td>2</td>", 1)
    (folder / "report.html").write_text(page)
    stamp = (folder / "report.html").stat().st_mtime_ns
    report.write(place, results, {"teacher": 3.0})  # nothing has changed
    assert (folder / "report.html").stat().st_mtime_ns == stamp
    (folder / "report.html").write_text(page[:1000])
    report.write(place, results, {"teacher": 1.0})
    assert (folder / "report.html").read_text() == page


def test_ctrl_c_says_in_which_stage(tmp_path):
    clock = StageTimer(tmp_path / "seconds.json")
    told = "in the stage labels; the same command resumes it"
    with pytest.raises(KeyboardInterrupt, match=told), clock("labels"):
        raise KeyboardInterrupt
    assert list(json.loads((tmp_path / "seconds.json").read_text())) == ["labels"]


# --- Labeling at scale ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shards(data):
    """The unlabeled images and 25 more names of them, as six TFRecord files of five."""
    images = sorted((data / "unlabeled").glob("*.png"))
    for shard in range(6):
        stream = (
            records.ImageRecord(10 * shard + i, path.read_bytes(), 100, 128, f"{shard}-{i}")
            for i, path in enumerate(images)
        )
        records.write(str(data / f"u-{shard}.tfrecord"), stream)
    return f"unlabeled={{images: null, records: {data}/u-*.tfrecord}}"


@pytest.mark.slow
def test_labeling_is_killed_goes_on_and_ends_on_beam(data, finished, shards, tmp_path):
    """Every image is labeled once, as in one go, and what was finished is left alone."""
    _, whole, _ = finished
    config = resolve(data, shards)
    expected, report = pipeline.pseudo_label(config, tmp_path / "whole", whole / "teacher")
    folder = tmp_path / "parts"
    command = [
        *(sys.executable, "-m", "official_selftrain.pseudo_label", f"--params_override={shards}"),
        *(f"--experiment={data}/recipe.py:mini", f"--data_dir={data}", f"--model_dir={folder}"),
        f"--weights={whole / 'teacher'}",
    ]
    for mark in (0, 2):
        process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
        while not (folder / f"pseudo-{mark:05d}.tfrecord").exists() and process.poll() is None:
            time.sleep(0.001)
        process.kill()
        process.wait()
    done = {file: file.stat().st_mtime_ns for file in folder.glob("*.tfrecord")}
    assert 3 <= len(done) < 6
    last = subprocess.run(
        [*command, "--beam=--runner=DirectRunner"], cwd=ROOT, capture_output=True, text=True
    )
    assert last.returncode == 0, last.stderr[-2000:]
    assert all(file.stat().st_mtime_ns == stamp for file, stamp in done.items())
    found = [str(file) for file in sorted(folder.glob("*.tfrecord"))]
    ids = [record.image_id for record in records.read(found)]
    assert ids == [10 * shard + i for shard in range(6) for i in range(5)]
    assert not list(folder.glob("*.tmp"))
    for a, b in zip(records.read(found), records.read(expected), strict=True):
        np.testing.assert_allclose(a.boxes, b.boxes, atol=1e-5)
        np.testing.assert_allclose(a.scores, b.scores, atol=1e-5)
    assert json.loads((folder / "statistics.json").read_text())["images"] == report["images"] == 30


@pytest.mark.slow
def test_two_workers_label_a_share_of_the_shards_each(data, finished, shards, tmp_path):
    _, whole, _ = finished
    expected, _ = pipeline.pseudo_label(resolve(data, shards), tmp_path / "one", whole / "teacher")
    weights_flag = [f"--weights={whole / 'teacher'}"]
    folder = tmp_path / "two"
    both = start_workers(data, folder, shards, command="pseudo_label", flags=weights_flag)
    assert finish(both) == [0, 0]
    for index in range(2):
        log = (tmp_path / f"worker{index}.log").read_text()
        assert "shard 3 of 3" in log and "shard 4" not in log
    found = records.read(sorted(str(file) for file in folder.glob("*.tfrecord")))
    for a, b in zip(found, records.read(expected), strict=True):
        assert a.image_id == b.image_id
        np.testing.assert_allclose(a.boxes, b.boxes, atol=1e-5)


def test_a_beam_pipeline_that_cannot_label_is_one_line(data, finished, shards, tmp_path):
    _, whole, _ = finished
    with pytest.raises(UserError, match="Apache Beam stopped: Unexpected pipeline runner: Nope"):
        pipeline.pseudo_label(
            resolve(data, shards), tmp_path, whole / "teacher", beam_args=["--runner=Nope"]
        )


def test_a_command_that_is_asked_to_end_says_where_to_go_on(monkeypatch, capsys):
    def command():
        raise TrainingInterrupted("stopped at step 2")

    monkeypatch.setattr(sys, "argv", ["train"])
    with pytest.raises(SystemExit) as left:
        cli.main(command)
    assert left.value.code == 143 and capsys.readouterr().err == "stopped at step 2\n"


@pytest.mark.slow
def test_killed_in_each_stage_and_repeated_equals_uninterrupted(data, finished, tmp_path):
    """kill -9 while training the teacher, labeling, and training the student."""
    _, whole, _ = finished
    folder = tmp_path / "killed"
    command = [
        sys.executable,
        "-m",
        "official_selftrain.run",
        f"--experiment={data}/recipe.py:mini",
        f"--data_dir={data}",
        f"--model_dir={folder}",
    ]
    marks = [
        folder / "teacher/checkpoints/ckpt-00000002.npz",
        folder / "labels/pseudo-00000.tfrecord",
        folder / "student/checkpoints/ckpt-00000002.npz",
    ]
    for mark in marks:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        while not mark.exists() and process.poll() is None:
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert mark.exists()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    for stage in ("teacher", "student"):
        steps = [json.loads(line)["step"] for line in (folder / stage / "history.jsonl").open()]
        assert steps == [2, 4]
        assert_same_training(folder / stage, whole / stage, 0, 4)
    keras.backend.clear_session()
