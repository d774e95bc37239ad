"""Which stages of a finished run are taken over, and with which files, without training."""

import types

import pytest

from official_selftrain import config as config_lib
from official_selftrain.pipeline import folder, labeling, reuse
from official_selftrain.utils.files import write_json, write_text

SUMMARY = {"content": "c", "images": 9, "boxes": 9, "masks": 0}


def config_of(*overrides):
    return config_lib.resolve("demo", overrides=["task.num_classes=4", *overrides])


def finished(place, config, data):
    """A folder as a training leaves it; the weights are a text."""
    place.mkdir(parents=True)
    write_text(place / "config.yaml", config_lib.dump(config))
    for name in ("model.weights.h5", "best.weights.h5", "metrics.json", "history.jsonl"):
        (place / name).write_text("{}")
    write_json(place / "made_of.json", folder.content_now(config, data) | {"init": None})


def data_of(*sources):
    return types.SimpleNamespace(summaries=dict.fromkeys(sources, SUMMARY))


@pytest.mark.parametrize(
    ("before", "after", "name", "values"),
    [
        ("{1: 0.3, 2: 0.4}", "{1: 0.3}", "pseudo.class_thresholds.2", (0.4, None)),
        ("{}", "{2: 0.4}", "pseudo.class_thresholds.2", (None, 0.4)),
        ("{1: 0.3}", "{1: 0.5}", "pseudo.class_thresholds.1", (0.3, 0.5)),
    ],
)
def test_thresholds_of_classes_that_only_one_side_has_are_differences(before, after, name, values):
    before, after = (config_of(f"pseudo.class_thresholds={text}") for text in (before, after))
    assert folder.differences(before, after) == [(name, *values)]
    assert folder.differences(before, before) == []


@pytest.mark.parametrize("selected", [False, True])
def test_settings_of_an_evaluation_count_where_it_chooses_the_weights(tmp_path, selected):
    overrides = ["selection={}"] * selected + ["pseudo=null"]
    data = data_of("human", "evaluation", *(["selection"] * selected))
    config = config_of(*overrides)
    finished(tmp_path / "teacher", config, data)

    def differing(*changes):
        settings, other = reuse.training_differences(
            config_of(*overrides, *changes), data, tmp_path / "teacher"
        )
        assert not other
        return [name for name, _, _ in settings]

    assert differing() == differing("task.label_flip=true", "evaluation.batch_size=1") == []
    assert differing("task.eval_flip=true") == ["task.eval_flip"] * selected


@pytest.mark.parametrize("selected", [False, True])
def test_weights_that_selection_images_have_chosen_stay_the_best(tmp_path, selected):
    """Other evaluation images are measured again, but did not choose them."""
    data = data_of("human", "evaluation", "selection")
    config = config_of("selection={}", "pseudo=null")
    finished(tmp_path / "old/teacher", config, data)
    best = {"step": 4} | ({"converged": True} if selected else {})
    write_json(tmp_path / "old/teacher/best.json", best)
    (tmp_path / "new").mkdir()
    place = tmp_path / "new/teacher"
    place.mkdir()
    other = data.summaries | {"evaluation": {**SUMMARY, "content": "d"}}
    stage = types.SimpleNamespace(
        folder=place, config=config, data=types.SimpleNamespace(summaries=other)
    )
    reuse.Reuse(tmp_path / "new", tmp_path / "old")._take_training(stage)
    taken = {file.name for file in place.iterdir()}
    assert {"model.weights.h5", "history.jsonl"} <= taken and "metrics.json" not in taken
    assert ({"best.json", "best.weights.h5"} <= taken) == selected
    assert (folder.chosen(place) is not None) == selected


def test_labels_of_an_older_version_are_the_same_if_its_settings_are(tmp_path):
    task = config_of().task.model_dump(mode="json")
    older = {key: value for key, value in task.items() if key != "label_flip"}
    write_json(tmp_path / "made_by.json", {"weights": "w", "task": older})
    assert labeling.made_before(tmp_path, config_of()) == {"weights": "w", "task": task}
    write_json(tmp_path / "made_by.json", ["damaged"])
    assert labeling.made_before(tmp_path, config_of()) == {}
