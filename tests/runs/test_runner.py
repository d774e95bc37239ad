"""`run` in miniature, end to end: resumed, killed, and given wrong input."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import keras
import numpy as np
import pytest
from mini import resolve, resolve_masks
from workers import finish, start_workers

from official_selftrain import checkpoints, cli, loop, runner, training
from official_selftrain import config as config_lib
from official_selftrain.data import records
from official_selftrain.distribution import Distribution
from official_selftrain.errors import Stopped, UserError
from official_selftrain.tasks import make_task

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """An uninterrupted `run` with a control."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    config = resolve(data, "self_training.control=true")
    return config, folder, runner.run(config, folder)


def weights(config, folder):
    config = runner.Data(config, folder.parent / "data").complete(config)
    model = make_task(config.task).build_model()
    checkpoints.load_weights(model, folder)
    return [np.asarray(w) for w in model.weights]


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
    assert {"human_loss", "pseudo_loss", "ratio", "pseudo_objects"} <= set(rows[0])


def test_class_count_comes_from_the_labels(finished):
    _, folder, _ = finished
    saved = config_lib.make(config_lib.load_file(folder / "student/config.yaml"))
    assert saved.task.num_classes == 2
    assert saved.trainer.init.endswith("whole/teacher")


def test_finished_run_is_not_done_again(finished):
    config, folder, results = finished
    before = (folder / "student/model.weights.h5").stat().st_mtime_ns
    assert runner.run(config, folder) == results
    assert (folder / "student/model.weights.h5").stat().st_mtime_ns == before


def test_student_reads_the_teachers_labels_and_control_does_not(finished):
    config, folder, _ = finished
    start = weights(config, folder / "teacher")
    student, control = (weights(config, folder / stage) for stage in ("student", "control"))
    assert any((a != b).any() for a, b in zip(student, control, strict=True))
    assert any((a != b).any() for a, b in zip(start, student, strict=True))


def test_folder_of_another_run_is_refused(data, finished):
    _, folder, _ = finished
    with pytest.raises(UserError, match=r"differs in self_training.alpha \(1.0 there, 0.5 now\)"):
        runner.run(resolve(data, "self_training.control=true,self_training.alpha=0.5"), folder)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("pseudo.score_threshold=0.999", "keeps no box of 5 images; the highest score is"),
        ("unlabeled.images=nowhere", "the image folder .*nowhere does not exist"),
        ("task.num_classes=2,human.annotations=other.json", "class id 7, but task.num_classes=2"),
        ("unlabeled=null", "needs the section 'unlabeled'"),
    ],
)
def test_wrong_input_stops_in_one_line(data, finished, override, message):
    content = json.loads((data / "train.json").read_text())
    content["categories"].append({"id": 7, "name": "other"})
    content["annotations"][0]["category_id"] = 7
    (data / "other.json").write_text(json.dumps(content))
    _, folder, _ = finished
    wrong = resolve(data, override)
    other = folder.parent / f"wrong-{abs(hash(override))}"
    with pytest.raises(UserError, match=message):
        if "threshold" in override:
            runner.pseudo_label(wrong, other, folder / "teacher")
        else:
            runner.run(wrong, other)


def test_labels_of_two_teachers_do_not_mix(data, finished, tmp_path):
    _, folder, _ = finished
    config = resolve(data)
    runner.pseudo_label(config, tmp_path, folder / "teacher")
    with pytest.raises(UserError, match="labels by another teacher"):
        runner.pseudo_label(config, tmp_path, folder / "student")


def test_images_without_any_label_cannot_teach(data, tmp_path):
    with pytest.raises(UserError, match="hold no box; is human.annotations given"):
        runner.run(resolve(data, "human.annotations=null"), tmp_path / "run")


def test_every_checkpoint_and_evaluation_that_is_due_ends_a_loop():
    def loop(**settings):
        values = {"steps": 600, "checkpoint_interval": 120, "steps_per_loop": 50, **settings}
        return training._steps_per_loop(config_lib.TrainerConfig(**values))

    assert loop() == 10  # 50 would pass 120 by
    assert loop(checkpoint_interval=200) == 50
    assert loop(checkpoint_interval=200, evaluation_interval=25) == 25


def test_training_starts_from_imagenet_when_told_so():
    overrides = ["task={backbone: efficientnet-lite0, neck: fpn, neck_filters: 8, num_classes: 2}"]
    overrides += ["task={image_size: [128, 128], head_filters: 8}", "trainer.init=imagenet"]
    config = config_lib.resolve("folder", overrides=[*overrides, "task.head_convs=1"])
    model = make_task(config.task).build_model()
    before = {layer.name: layer.get_weights() for layer in model.layers}
    training._initialize(model, config)
    for layer in model.layers:
        same = all(
            np.array_equal(a, b)
            for a, b in zip(before[layer.name], layer.get_weights(), strict=True)
        )
        learnt = layer.name.startswith("efficientnet") and layer.count_params() > 0
        assert same == (not learnt), layer.name
    with pytest.raises(UserError, match="spinenet49S has no public ImageNet weights"):
        config_lib.resolve("folder", overrides=["trainer.init=imagenet"])


def test_batches_are_shared_out_evenly(data):
    """Silent error 3: a replica that gets no image turns all weights to NaN."""
    two = Distribution("any", 2)
    training.check_batches(resolve(data), two)
    with pytest.raises(UserError, match=r"pseudo.batch_size=3 .* 2 replicas; take 4"):
        training.check_batches(resolve(data, "pseudo.batch_size=3"), two)
    parts = resolve(data, "trainer.micro_batches=2,self_training.separate_batch_norm=true")
    with pytest.raises(UserError, match="2 replicas with 2 micro-batches each; take 4"):
        training.check_batches(parts, two)
    with pytest.raises(UserError, match="micro_batches=2 needs the TensorFlow backend"):
        training.check_batches(parts, Distribution(None, 1))


def test_measured_images_are_not_to_be_labelled(data, tmp_path, caplog):
    """Evaluation images among the unlabelled are refused, among the labelled a warning."""
    with pytest.raises(UserError, match="6 images are both in 'evaluation' and in 'unlabeled'"):
        runner.run(resolve(data, "unlabeled.images=train"), tmp_path / "a")
    runner.Data(resolve(data), tmp_path / "b")
    assert "6 images are both in human and in evaluation" in caplog.text


def test_segmentation_runs_by_its_experiment_alone(masks, tmp_path):
    config = resolve_masks(masks, "self_training.control=true")
    results = runner.run(config, tmp_path)
    assert list(results) == ["teacher", "student", "control"]
    for metrics in results.values():
        assert {"mIoU", "IoU/left", "IoU/right"} <= set(metrics)
        assert 0 <= metrics["mIoU"] <= 1
    page = (tmp_path / "report.html").read_text()
    assert "mIoU" in page and "pixels ignored" in page and "left" in page
    report = json.loads((tmp_path / "labels/report.json").read_text())
    assert report["images"] == 5 and 0 <= report["ignored_share"] < 1
    assert runner.evaluate(
        config, tmp_path / "again", weights=tmp_path / "student"
    ) == pytest.approx(results["student"])
    assert runner.run(config, tmp_path) == results


def test_class_absent_from_the_labelled_images(masks, tmp_path, caplog):
    (masks / "more.txt").write_text("right\nleft\nmiddle\n")
    human = "human.class_list=more.txt,evaluation.class_list=more.txt"
    results = runner.run(resolve_masks(masks, human), tmp_path)
    assert "no labelled image holds 'middle'" in caplog.text
    assert results["student"]["IoU/middle"] == -1  # it is not in the truth either


def test_student_learns_the_distribution_of_the_teacher(masks, tmp_path):
    soft = "task.label_classes=2,pseudo.soft=true"
    results = runner.run(resolve_masks(masks, soft), tmp_path / "a")
    assert list(results) == ["teacher", "student"] and results["student"]["mIoU"] > 0
    fewer = resolve_masks(masks, "task.num_classes=3,task.label_classes=3,pseudo.soft=true")
    student = config_lib.student_config(fewer, f"{tmp_path}/a/labels/pseudo-*.tfrecord", None)
    with pytest.raises(UserError, match="task.label_classes=3: the labels hold 2 of 3 classes"):
        runner.train(student, tmp_path / "b")


def test_wrong_masks_stop_a_run_in_one_line(masks, tmp_path):
    with pytest.raises(UserError, match="6 images of human have no mask; is human.masks given?"):
        runner.run(resolve_masks(masks, "human={masks: null, class_list: null}"), tmp_path / "a")
    with pytest.raises(UserError, match="class_weights has 3 numbers for 2 classes"):
        runner.run(resolve_masks(masks, "task.class_weights=[1,1,1]"), tmp_path / "b")
    with pytest.raises(UserError, match="needs task.kind=segmentation and task.label_classes=2"):
        resolve_masks(masks, "pseudo.soft=true")
    with pytest.raises(UserError, match="starts from ImageNet"):
        runner.train(resolve_masks(masks, "trainer.init=imagenet++,pseudo=null"), tmp_path / "c")


def test_empty_unlabelled_folder(data, tmp_path):
    (data / "empty").mkdir()
    with pytest.raises(UserError, match="no usable image in .*empty"):
        runner.run(resolve(data, "unlabeled.images=empty"), tmp_path / "run")


def test_student_without_labels_and_training_without_images_say_so(data, tmp_path):
    with pytest.raises(UserError, match=r"pseudo.records is not set"):
        runner.train(resolve(data), tmp_path / "a")
    with pytest.raises(UserError, match="no labelled images"):
        runner.train(resolve(data, "human={images: null, annotations: null}"), tmp_path / "b")
    with pytest.raises(UserError, match="nowhere does not exist"):
        runner.train(resolve(data, "pseudo=null,trainer.init=nowhere"), tmp_path / "c")


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
    prepared = runner.Data(student, folder / "data")
    student = prepared.complete(student)
    images, labels = next(
        iter(training.training_data(student, make_task(student.task), prepared, 0))
    )
    assert set(images) == {"human", "pseudo"}
    assert (np.asarray(labels["pseudo"]["classes"]) >= 0).any()


def test_sigterm_saves_and_the_rest_equals_uninterrupted(data, finished, tmp_path, monkeypatch):
    config, whole, _ = finished
    teacher = config_lib.teacher_config(config).override({"trainer.checkpoint_interval": 4})
    run = loop.TensorFlowLoop.run

    def ask_to_end(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return run(*arguments)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(loop.TensorFlowLoop, "run", ask_to_end)
    with pytest.raises(Stopped, match="stopped at step 2, which is saved"):
        runner.train(teacher, tmp_path / "a")
    assert signal.getsignal(signal.SIGTERM) is before
    assert (tmp_path / "a/checkpoints/ckpt-00000002.npz").exists()
    monkeypatch.undo()
    runner.train(teacher, tmp_path / "a")
    for a, b in zip(
        weights(config, whole / "teacher"), weights(config, tmp_path / "a"), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


# --- Labelling at scale ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shards(data):
    """The unlabelled images and 25 more names of them, as six TFRecord files of five."""
    images = sorted((data / "unlabeled").glob("*.png"))
    for shard in range(6):
        stream = (
            records.ImageRecord(10 * shard + i, path.read_bytes(), 100, 128, f"{shard}-{i}")
            for i, path in enumerate(images)
        )
        records.write(str(data / f"u-{shard}.tfrecord"), stream)
    return f"unlabeled={{images: null, records: {data}/u-*.tfrecord}}"


@pytest.mark.slow
def test_labelling_is_killed_goes_on_and_ends_on_beam(data, finished, shards, tmp_path):
    """Every image is labelled once, as in one go, and what was finished is left alone."""
    _, whole, _ = finished
    config = resolve(data, shards)
    expected, report = runner.pseudo_label(config, tmp_path / "whole", whole / "teacher")
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
    assert json.loads((folder / "report.json").read_text())["images"] == report["images"] == 30


@pytest.mark.slow
def test_two_workers_label_a_share_of_the_shards_each(data, finished, shards, tmp_path):
    _, whole, _ = finished
    expected, _ = runner.pseudo_label(resolve(data, shards), tmp_path / "one", whole / "teacher")
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
        runner.pseudo_label(
            resolve(data, shards), tmp_path, whole / "teacher", beam_args=["--runner=Nope"]
        )


def test_a_command_that_is_asked_to_end_says_where_to_go_on(monkeypatch, capsys):
    def command():
        raise Stopped("stopped at step 2")

    monkeypatch.setattr(sys, "argv", ["train"])
    with pytest.raises(SystemExit) as left:
        cli.main(command)
    assert left.value.code == 143 and capsys.readouterr().err == "stopped at step 2\n"


@pytest.mark.slow
def test_killed_in_each_stage_and_repeated_equals_uninterrupted(data, finished, tmp_path):
    """kill -9 while training the teacher, labelling, and training the student."""
    config, whole, _ = finished
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
        for a, b in zip(
            weights(config, whole / stage), weights(config, folder / stage), strict=True
        ):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    keras.backend.clear_session()
