"""What evaluations and trainings leave in the memory of a process (Linux).

    python benchmarks/memory.py [--network=resnet18] [--trainings=10] [--evaluations=50]

Trains on the built-in digits, and prints the resident memory after each evaluation on the way of
one training, then after each of several trainings, which are evaluated at their end. Training k
then shows what k trainings leave behind.
"""

import argparse
import logging
import os
import pathlib
import tempfile

NETWORKS = {
    "demo": "trainer.init=null",  # SpineNet-49 in miniature, 128 px
    "segmentation": "task.eval_scales=[0.5,1.0]",  # two scales: a network of its own predicts
    "resnet18": (
        "task={backbone: resnet18, backbone_sizes: null, neck: fpn, neck_filters: 64,"
        " head_filters: 64, image_size: [256, 256]}"
    ),
}


def resident():
    """Megabytes of this process that are in memory."""
    pages = pathlib.Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE") / 2**20


def settings(network, steps, interval):
    from official_selftrain import config

    name = "demo_segmentation" if network == "segmentation" else "demo"
    trainer = f"{{steps: {steps}, steps_per_loop: 1, evaluation_interval: {interval}}}"
    overrides = [NETWORKS[network], f"trainer={trainer}", "optimizer.warmup_steps=0"]
    overrides.append("human.batch_size=4,pseudo=null,unlabeled=null")
    return config.resolve(name, overrides=overrides)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--network", choices=NETWORKS, default="demo")
    parser.add_argument("--trainings", type=int, default=10)
    parser.add_argument("--evaluations", type=int, default=50)
    arguments = parser.parse_args()

    from official_selftrain.pipeline import training
    from official_selftrain.pipeline.workspace import Workspace

    logging.getLogger().setLevel(logging.ERROR)
    evaluate = training.Training._evaluate

    def evaluate_and_tell(self, step):
        result = evaluate(self, step)
        print(f"evaluation {step:3d} {resident():6.0f} MB", flush=True)
        return result

    training.Training._evaluate = evaluate_and_tell
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
            print(f"training {number:5d} {resident():6.0f} MB", flush=True)


if __name__ == "__main__":
    main()
