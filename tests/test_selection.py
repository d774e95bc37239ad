"""What the evaluations on held-out images decide: when to stop, and whether it has converged."""

from types import SimpleNamespace

import keras
import numpy as np
import pytest

from official_selftrain.engine import checkpoints
from official_selftrain.pipeline import folder, selection

RECORD = {"metric": "AP", "step": 30, "value": 0.4, "averaged": True}


def test_evaluations_since_the_best_one():
    assert selection.stale([]) == 0
    assert selection.stale([0.1, 0.3, 0.2]) == 1
    assert selection.stale([0.3, 0.3, 0.3]) == 2  # as good is no better
    assert selection.stale([0.0, 0.009, 0.0, 0.0]) == 0  # chance
    assert selection.stale([0.0, 0.01, 0.0, 0.0]) == 2


def test_the_best_before_and_in_the_last_quarter():
    assert selection.last_quarter([0.1, 0.4, 0.3, 0.2, 0.1, 0.2, 0.5, 0.3]) == (0.4, 0.5)
    assert selection.last_quarter([0.1, 0.2, 0.3]) == (0.2, 0.3)
    assert selection.last_quarter([0.3]) == (0.0, 0.3)
    assert selection.last_quarter([]) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("values", "stopped", "converged"),
    [
        ([0.1, 0.2, 0.3, 0.305], False, True),  # 1.7 % more
        ([0.1, 0.2, 0.3, 0.307], False, False),  # 2.3 % more
        ([0.1, 0.2, 0.3, 0.1], False, True),
        ([0.1, 0.5, 0.4, 0.3], True, True),
        ([0.001, 0.001, 0.001, 0.001], False, False),
        ([0.4], False, False),
    ],
)
def test_converged(values, stopped, converged):
    assert selection.outcome(values, stopped)["converged"] == converged


@pytest.mark.parametrize(
    ("values", "stopped", "text"),
    [
        ([0.1, 0.2, 0.3, 0.31], False, "selection AP was still rising at the last step (30.0 -> 3"),
        ([0.0, 0.0], False, "had not converged: the selection AP was still 0.0 at the last step"),
        ([0.3, 0.4, 0.3, 0.2], True, "teacher had converged: its last evaluations brought nothing"),
        (
            [0.3, 0.4, 0.4, 0.401],
            False,
            "raised the selection AP by less than 2% (40.0 -> 40.1); its weights are the averaged "
            "ones of step 30, with a selection AP of 40.0",
        ),
    ],
)
def test_it_is_said_in_words(values, stopped, text):
    assert text in selection.sentence("teacher", RECORD | selection.outcome(values, stopped))


def test_the_history_gives_the_evaluations_back():
    rows = [
        {"step": 1, "loss": 2.0},
        {"step": 2, "selection_AP": 0.1, "selection_ema_AP": 0.2},
        {"step": 4, "selection_AP": 0.3},
        {"step": 6, "AP": 0.9},
    ]
    assert selection.values(rows, "AP") == [0.2, 0.3]
    assert selection.values(rows, "mIoU") == []


@pytest.mark.parametrize(
    ("values", "step", "kept"), [([0.0, 0.004, 0.0], 6, 2), ([0.0, 0.1], 4, 1)]
)
def test_as_long_as_nothing_is_learned_the_last_weights_count(tmp_path, values, step, kept):
    student = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, use_bias=False)])
    training = SimpleNamespace(
        folder=tmp_path,
        task=SimpleNamespace(headline="AP"),
        config=SimpleNamespace(selection=SimpleNamespace(patience=5), steps=6),
        trainer=SimpleNamespace(student=student),
    )
    student.set_weights([np.full((1, 1), 1.0)])
    checkpoints.save_best(student, tmp_path, 4, "AP", max(values), averaged=True)
    student.set_weights([np.full((1, 1), 2.0)])
    chosen = selection.Selection(training)
    chosen.values = values
    chosen.finish()
    best = folder.chosen(tmp_path)
    assert (best["step"], best["averaged"]) == (step, step == 4)
    student.load_weights(tmp_path / "model.weights.h5")
    assert student.get_weights()[0] == kept
