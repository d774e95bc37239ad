"""Measures how much memory evaluations and trainings leave behind in a process (Linux).

    python benchmarks/memory.py [--network=resnet18] [--trainings=10] [--evaluations=50]

Trains on the built-in digits and prints the resident memory after each evaluation during one
training, then after each of several trainings, which are evaluated at their end. The line of
training k thus shows what k trainings leave behind.
"""

import argparse
import logging
import pathlib
import tempfile

import harness

NETWORKS = {
    "demo": "trainer.init=null",  # SpineNet-49 in miniature, 128 px
    "segmentation": "task.eval_scales=[0.5,1.0]",  # two scales, for which a second network is built
    "resnet18": (
        "task={backbone: resnet18, backbone_sizes: null, neck: fpn, neck_filters: 64,"
        " head_filters: 64, image_size: [256, 256]}"
    ),
}


def settings(network, steps, interval):
    from official_selftrain import config

    name = "demo_segmentation" if network == "segmentation" else "demo"
    trainer = f"{{steps: {steps}, steps_per_loop: 1, evaluation_interval: {interval}}}"
    overrides = [NETWORKS[network], f"trainer={trainer}", "optimizer.warmup_steps=0"]
    overrides.append("human.batch_size=4,pseudo=null,unlabeled=null")
    return config.resolve(name, overrides=overrides)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", choices=NETWORKS, default="demo")
    parser.add_argument("--trainings", type=int, default=10)
    parser.add_argument("--evaluations", type=int, default=50)
    arguments = parser.parse_args()

    from official_selftrain.pipeline import training
    from official_selftrain.pipeline.workspace import Workspace

    logging.getLogger().setLevel(logging.ERROR)
    evaluate = training.Training._evaluate

    def evaluate_and_print(self, step):
        result = evaluate(self, step)
        print(f"evaluation {step:3d} {harness.resident_megabytes():6.0f} MB", flush=True)
        return result

    training.Training._evaluate = evaluate_and_print
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(scratch)
        config = settings(arguments.network, 3, 0)
        workspace = Workspace.open(config, folder)
        workspace.prepare()
        if arguments.evaluations:
            once = settings(arguments.network, arguments.evaluations + 1, 1)
            training.train_stage(workspace.stage("evaluations", once), evaluate_after=False)
        for number in range(arguments.trainings):
            training.train_stage(workspace.stage(f"training-{number}", config))
            print(f"training {number:5d} {harness.resident_megabytes():6.0f} MB", flush=True)


if __name__ == "__main__":
    main()
