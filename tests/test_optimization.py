import json

import keras
import numpy as np
import pytest

from official_selftrain.config import OptimizerConfig
from official_selftrain.engine.optimizers import WarmupSchedule, make_optimizer


def test_schedules_equal_release(golden):
    for case in json.loads((golden / "schedules/learning_rates.json").read_text()):
        rate = case["learning_rate"]
        schedule = WarmupSchedule(
            rate["type"],
            rate["init_learning_rate"],
            rate["warmup_learning_rate"],
            rate["warmup_steps"],
            case["total_steps"],
            rate.get("learning_rate_steps", ()),
            rate.get("learning_rate_levels", ()),
        )
        ours = [float(schedule(step)) for step in case["steps"]]
        np.testing.assert_allclose(ours, case["values"], rtol=1e-5, atol=1e-7)


def test_warmup_and_cosine_by_hand():
    schedule = WarmupSchedule("cosine", 1.0, 0.2, 10, 30)
    assert float(schedule(0)) == pytest.approx(0.2)
    assert float(schedule(5)) == pytest.approx(0.6)
    assert float(schedule(20)) == pytest.approx(0.5)
    assert float(schedule(30)) == pytest.approx(0.0, abs=1e-7)


def test_optimizer_takes_the_config():
    optimizer = make_optimizer(OptimizerConfig(momentum=0.8, learning_rate=2.0, warmup_steps=0), 10)
    assert optimizer.momentum == 0.8
    assert float(optimizer.learning_rate) == pytest.approx(2.0)


@pytest.mark.parametrize("kind", ["cosine", "step"])
def test_schedule_and_optimizer_are_described_and_made_again(kind):
    settings = {"schedule": kind, "momentum": 0.8, "learning_rate": 2.0, "warmup_steps": 3}
    steps = {"step_boundaries": (4, 6), "step_rates": (0.5, 0.25)} if kind == "step" else {}
    optimizer = make_optimizer(OptimizerConfig(**settings, **steps), 10)
    config = json.loads(json.dumps(keras.optimizers.serialize(optimizer)))
    again = keras.optimizers.deserialize(config)
    assert type(again) is type(optimizer) and again.momentum == 0.8
    for step in range(10):
        rates = [float(one._learning_rate(step)) for one in (optimizer, again)]
        assert rates[0] == rates[1]


def test_momentum_collects_gradients_and_not_steps():
    """By hand: v = 0.8 v + g and w = w - rate v, while the rate rises from 0.1 to 0.3."""
    settings = {"learning_rate": 0.3, "warmup_learning_rate": 0.1, "warmup_steps": 2}
    optimizer = make_optimizer(OptimizerConfig(momentum=0.8, **settings), 100)
    weight = keras.Variable([1.0, -2.0])
    optimizer.build([weight])
    gradients = ([1.0, 2.0], [-3.0, 0.5])
    for gradient in gradients:
        optimizer.apply([keras.ops.convert_to_tensor(gradient)])
    # v is (1, 2), then (0.8 - 3, 1.6 + 0.5); the rates are 0.1 and 0.2.
    np.testing.assert_allclose(optimizer.momentums[0], [-2.2, 2.1], rtol=1e-6)
    np.testing.assert_allclose(weight, [1 - 0.1 + 0.2 * 2.2, -2 - 0.2 - 0.2 * 2.1], rtol=1e-6)
