import json
import subprocess
import sys

import pytest

from official_selftrain import config as config_lib
from official_selftrain.errors import UserError


def test_every_experiment_loads_and_survives_yaml(tmp_path):
    for name in config_lib.load_experiments():
        config = config_lib.resolve(name)
        file = tmp_path / f"{name}.yaml"
        file.write_text(config_lib.dump(config))
        assert config_lib.make(config_lib.load_file(file)) == config
        config_lib.teacher_config(config)


def test_override_forms_of_the_released_code(golden):
    for case in json.loads((golden / "configs/override_examples.json").read_text()):
        assert config_lib.parse_override(case["params_override"]) == case["parsed"]


def test_precedence(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("trainer: {steps: 7, seed: 3}")
    overrides = ["trainer.seed=4,optimizer.warmup_steps=1"]
    config = config_lib.resolve("demo", str(file), overrides)
    assert (config.trainer.steps, config.trainer.seed) == (7, 4)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trainer.step=3", "unknown key 'trainer.step'; did you mean 'steps'"),
        ("pseudo.score_treshold=0.3", "did you mean 'score_threshold'"),
        ("trainer.steps=2.5", "trainer.steps: .*integer"),
        ("self_training.alpha=fast", "self_training.alpha: .*given 'fast'"),
        ("self_training.alpha=-1", "greater than or equal to 0"),
        ("task.image_size=[100,128]", "divisible by 128"),
        ("runtime.strategy=pod", "'default', 'mirrored', 'multi_worker_mirrored'"),
        ("human.images=x", "one of records, images, tfds, embedded, not images and embedded"),
        ("optimizer.warmup_steps=5000", "more than trainer.steps"),
        ("human.jitter=[2.0,0.5]", "smallest scale comes first"),
        ("self_training.teacher={trainer.stps: 3}", "did you mean 'steps'"),
        ("trainer.steps", "key=value"),
        ("{trainer: {steps: 1, steps: 2}}", "'steps' twice"),
        ("nothing.yaml", "cannot read the config file"),
    ],
)
def test_mistakes_are_answered_with_the_key(override, message):
    with pytest.raises(UserError, match=message):
        config_lib.teacher_config(config_lib.resolve("demo", overrides=[override]))


def test_misspelt_experiment_names_the_nearest():
    with pytest.raises(UserError, match="did you mean 'demo'"):
        config_lib.resolve("dmeo")
    with pytest.raises(UserError, match="does not exist"):
        config_lib.resolve("nowhere.py:demo")


def test_experiment_of_ones_own_file(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "EXPERIMENTS = {'mine': {'human': {'images': 'x'}, 'trainer': {'steps': 5000}}}"
    )
    assert config_lib.resolve(f"{file}:mine").trainer.steps == 5000


def test_stage_configs():
    config = config_lib.resolve("demo")
    teacher = config_lib.teacher_config(config)
    assert teacher.pseudo is None
    assert teacher.trainer.steps == config.self_training.teacher["trainer.steps"]
    student = config_lib.student_config(config, "labels/*.tfrecord", "teacher")
    assert (student.pseudo.records, student.trainer.init) == ("labels/*.tfrecord", "teacher")
    control = config_lib.control_config(config, "teacher")
    assert control.pseudo is None
    assert control.trainer == student.trainer
    assert control.human.batch_size == student.human.batch_size + student.pseudo.batch_size


def test_automatic_decay_is_for_short_runs():
    config = config_lib.resolve("demo", overrides=["trainer.steps=1000"])
    assert config.decay == pytest.approx(1 - 1 / 70)
    assert config.override({"self_training.decay": 0.9997}).decay == 0.9997


@pytest.mark.parametrize("arguments", [["--experiment=list"], ["--experiment=demoo"]])
def test_list_and_typo_answer_without_tensorflow(arguments):
    command = [sys.executable, "-X", "importtime", "-m", "official_selftrain.train", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    modules = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "absl.flags" in modules
    assert not modules & {"tensorflow", "keras"}
    assert "demo" in done.stdout + done.stderr
