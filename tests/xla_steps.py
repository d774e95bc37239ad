"""Train steps for the tests with XLA, and what a TPU needs of a program."""

import re

import backend_steps
import numpy as np
import pytest
import tensorflow as tf
from golden_networks import set_hashed_weights

from official_selftrain.config import OptimizerConfig
from official_selftrain.engine import loop
from official_selftrain.engine.distribution import Distribution
from official_selftrain.engine.optimizers import make_optimizer
from official_selftrain.self_training import SelfTrainer
from official_selftrain.tasks import make_task

# HLO instructions that talk to the host, or wait for another program.
HOST = {"infeed", "outfeed", "send", "recv", "send-done", "recv-done"}
ONE, COMPILED = (Distribution(tf.distribute.get_strategy(), 1, compile=c) for c in (False, True))


def assert_fit_for_a_tpu(function, *arguments):
    """Static shapes and no instruction on the host, in all computations of the program."""
    text = function.experimental_get_compiler_ir(*arguments)(stage="hlo")
    instructions = re.findall(r"^\s+(?:ROOT )?\S+ = (.+?) ([a-z-]+)\(", text, re.MULTILINE)
    assert len(instructions) > 100
    for shape, name in instructions:
        assert "<=" not in shape and "?" not in shape, (shape, name)
        assert name not in HOST, name
    for target in re.findall(r'custom_call_target="([^"]+)"', text):
        assert "callback" not in target.lower() and "host" not in target.lower(), target
    return {name for _, name in instructions}


def trainer(kind, precision="float32", rate=1e-4):
    task = make_task(backend_steps.TASKS[kind].model_copy(update={"precision": precision}))
    network = task.build_model()
    set_hashed_weights(network, 1.0)
    model = SelfTrainer(network, task, alpha=0.5, l2=1e-4, clip_norm=5.0, ema_decay=0.9)
    # The default is so small that rounding does not grow from step to step.
    settings = OptimizerConfig(learning_rate=rate, warmup_learning_rate=rate, warmup_steps=5)
    model.compile(make_optimizer(settings, 100, precision))
    model.optimizer.build(network.trainable_variables)
    return model


def batches(kind):
    rng = np.random.default_rng(0)
    while True:
        shape = (backend_steps.HALF, backend_steps.SIDE, backend_steps.SIDE, 3)
        images = {s: rng.standard_normal(shape).astype("float32") for s in ("human", "pseudo")}
        yield images, {source: backend_steps.labels(kind, rng) for source in images}


def dataset(kind):
    first = tf.nest.map_structure(tf.constant, next(batches(kind)))
    signature = tf.nest.map_structure(tf.TensorSpec.from_tensor, first)
    return tf.data.Dataset.from_generator(lambda: batches(kind), output_signature=signature)


def assert_train_step_compiles(kind, precision):
    """Forward, matching, losses, averages, gradients, clipping, loss scale, update, EMA."""
    rows = {}
    for distribution in (COMPILED, ONE)[: 2 if precision == "float32" else 1]:
        model = trainer(kind, precision)
        steps = loop.make_loop(model, dataset(kind), distribution)
        rows[distribution] = [steps.steps(2), steps.steps(2)]  # several steps in one call
        assert all(np.isfinite(row["loss"]) for row in rows[distribution])
    for compiled, plain in zip(*rows.values(), strict=False) if len(rows) == 2 else ():
        assert compiled == pytest.approx(plain, rel=1e-3)
    if precision != "mixed_float16":  # whose loss scale is a branch: the other two show the rest
        model = trainer(kind, precision)
        step = tf.function(model.train_step, jit_compile=True, autograph=False)
        data = tf.nest.map_structure(tf.constant, next(batches(kind)))
        names = assert_fit_for_a_tpu(step, data)
        assert {"convolution", "batch-norm-training"} <= names
