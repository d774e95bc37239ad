"""What a run says before it starts, and how long it will take, without training."""

import dataclasses
import itertools
from types import SimpleNamespace

import pytest

from official_selftrain import config as config_lib
from official_selftrain.pipeline import plan, report
from official_selftrain.pipeline.plan import Forecast, Stage

COUNTS = {"human": 50, "unlabeled": 300, "evaluation": 60}
CONFIG = config_lib.config_from_dict(
    {
        "experiment": "cards",
        "task": {"backbone": "resnet18", "neck": "fpn", "image_size": [256, 384]},
        "human": {"images": "a", "batch_size": 4},
        "unlabeled": {"images": "b"},
        "pseudo": {"batch_size": 4},
        "evaluation": {"images": "c"},
        "self_training": {"control": True, "teacher": {"trainer.steps": 450}},
        "optimizer": {"warmup_steps": 50, "learning_rate": 0.04},
        "trainer": {"steps": 200},
    }
)


@dataclasses.dataclass
class Place:
    """A workspace of which only what a forecast reads exists."""

    config: config_lib.Config
    distribution = SimpleNamespace(chief=True)
    data = SimpleNamespace(
        summaries={k: {"images": v} for k, v in COUNTS.items()}, completed=lambda config: config
    )

    @property
    def given(self):
        return self.config

    def stage(self, _, config):
        return Place(config)


@pytest.fixture
def said(caplog):
    caplog.set_level("INFO")
    return lambda: [record.getMessage() for record in caplog.records]


def test_a_run_says_what_it_will_do():
    place = Place(CONFIG)
    assert list(Forecast(plan.stages_of_run(place), place).rows()) == [
        ("images", "50 labeled, 300 unlabeled, 60 for evaluation"),
        ("network", "detection, resnet18 + fpn, 256 x 384 pixels"),
        ("start", "random weights"),
        ("teacher", "450 steps of 4 images, learning rate 0.04"),
        ("labels", "300 images, threshold 0.5"),
        ("student", "200 steps of 4 + 4 images, learning rate 0.04"),
        ("control", "200 steps of 8 images, learning rate 0.04"),
    ]
    two = Place(CONFIG.override({"self_training.rounds": 2, "self_training.control": False}))
    assert [stage.name for stage in plan.stages_of_run(two)] == [
        "teacher", "labels", "student", "labels_2", "student_2"
    ]  # fmt: skip


def test_what_follows_from_the_data_is_said_too(monkeypatch):
    settings = {"selection": {}, "pseudo.score_threshold": "auto", "trainer.init": "run/teacher"}
    place = Place(CONFIG.override({**settings, "trainer.evaluation_interval": 10}))

    def rows():
        return dict(Forecast(plan.stages_of_run(place), place).rows())

    assert rows()["labels"] == "300 images, automatic thresholds, for which no image is held out"
    assert rows()["control"] == "200 steps of 8 images, learning rate 0.04, measured every 10 steps"
    held_out = {**Place.data.summaries, "selection": {"images": 12}}
    monkeypatch.setattr(Place.data, "summaries", held_out)
    assert rows()["start"] == "run/teacher" and "12 held out for selection" in rows()["images"]
    assert rows()["labels"] == "300 images, thresholds with a precision of 80% on 12 images"
    assert rows()["student"] == (
        "at most 200 steps of 4 + 4 images, learning rate 0.04, measured every 10 steps"
    )


def test_the_work_of_a_stage_is_its_images_and_a_third_of_those_it_predicts():
    assert Stage("labels", CONFIG, labels=True).work(COUNTS) == 100
    views = CONFIG.override({"task.label_scales": [0.5, 1.0], "task.label_flip": True})
    assert Stage("labels", views, labels=True).work(COUNTS) == pytest.approx(
        250
    )  # 2 * (1/4 + 1) times as many
    assert Stage("student", CONFIG).work(COUNTS) == 200 * 8 + 20
    assert Stage("student", CONFIG).work(COUNTS, 150) == 50 * 8 + 20
    often = Stage("student", CONFIG.override({"trainer.evaluation_interval": 50}))
    assert often.work(COUNTS) == 200 * 8 + 4 * 20  # after 50, 100 and 150 steps, and at the end
    assert often.work(COUNTS, 100) == 100 * 8 + 2 * 20
    assert often.work(COUNTS, 200) == 20
    # Twelve held-out images, after 50, 100, 150 and 200 steps; twice with averaged weights.
    held_out = COUNTS | {"selection": 12}
    assert often.work(held_out) == 200 * 8 + 4 * 4 + 20
    both = Stage("student", often.config.override({"trainer.ema_decay": 0.9}))
    assert both.work(held_out, 150) == 50 * 8 + 2 * 4 + 20
    assert both.work(held_out, 200) == 20


def test_the_time_of_all_stages_is_told_after_two_steps_and_corrected(said, monkeypatch):
    place = Place(CONFIG)
    forecast = Forecast(plan.stages_of_run(place), place)
    clock = itertools.chain([0.0], itertools.repeat(448 * 2.0)).__next__
    monkeypatch.setattr(plan.time, "perf_counter", clock)
    forecast.pace("teacher", 2, 4.0)  # a second for each of 4 images
    each = "teacher 30 min, labels 2 min, student 27 min, control 27 min"  # 1812, 100, 1620, 1620 s
    assert said() == [
        f"to go: {each}: about 86 min in all",
        "this takes more than an hour: a smaller task.image_size, fewer trainer.steps or a faster "
        "device shorten it; Ctrl-C stops, and the same command resumes",
    ]
    forecast.reached(450)  # in half the time
    forecast.ended("teacher")
    assert said()[2:] == ["to go: labels 50 s, student 14 min, control 14 min: about 28 min in all"]
    forecast.ended("labels")
    forecast.ended("student")  # finished before: nothing new is known
    monkeypatch.undo()
    forecast.pace("control", 100, 0.8)
    assert said()[3:] == ["to go: control 82 s"]
    forecast.ended("control")
    assert len(said()) == 4


def test_the_verdict_of_a_report_is_in_points_of_the_shown_numbers():
    results = {
        "teacher": {"AP": 0.3954}, "student": {"AP": 0.5}, "student_2": {"AP": 0.3922},
        "control": {"AP": 0.3918},
    }  # fmt: skip
    text = report.verdict(CONFIG, results, COUNTS)
    assert text.startswith(
        "The student reaches 39.2 AP: level with the control (39.2) and 0.3 points below the "
        "teacher (39.5). It learned from 50 labeled and 300 pseudo-labeled images, and all were "
        "measured on 60. One run is no proof"
    )
    text = report.verdict(CONFIG, {"teacher": {"AP": 0.1}, "student": {"AP": 0.121}}, COUNTS)
    assert "12.1 AP: 2.1 points above the teacher (10.0)." in text
    assert "only a control can tell" in text
