"""How long a training is where that follows from its images, and how often it is evaluated."""

from official_selftrain.config.schema import Config

PASSES = 100  # images read for each labeled one, if neither steps nor epochs are given
SHORTEST, LONGEST, ROUNDED = 600, 20_000, 50  # steps
EVALUATIONS = 20  # of a training that a selection part decides on
WARMUP = 10  # the warmup is at most the tenth part of an automatic length


def default_steps(images: int, batch_size: int) -> int:
    """The steps of a training that gives neither steps nor epochs.

    They read 100 images for each labeled one, but are at least 600 and at most 20,000, rounded to a
    multiple of 50.

    Args:
        images: number of labeled images to train on.
        batch_size: images per step, pseudo-labeled ones included, so that student and control are
            equally long.
    """
    steps = ROUNDED * round(PASSES * images / batch_size / ROUNDED)
    return min(max(steps, SHORTEST), LONGEST)


def evaluation_interval(steps: int, steps_per_loop: int) -> int:
    """The steps between two evaluations, of which a training has about 20.

    It divides `steps_per_loop` or is a multiple of it, so that loops are not cut into short ones.

    Args:
        steps: of the training.
        steps_per_loop: steps between two reports.
    """
    wanted = steps / EVALUATIONS
    if wanted >= steps_per_loop:
        return steps_per_loop * round(wanted / steps_per_loop)
    divisors = [n for n in range(1, steps_per_loop + 1) if steps_per_loop % n == 0]
    return min(divisors, key=lambda divisor: abs(divisor - wanted))


def with_length(config: Config, images: int, selection: bool) -> Config:
    """A config whose length and intervals are numbers; one that has them comes back as it is.

    With an automatic length the warmup is at most a tenth of it, and checkpoints are at most as far
    apart as twenty evaluations would be.

    Args:
        config: of one training.
        images: number of labeled images to train on.
        selection: whether other labeled images are held out to choose the weights.
    """
    trainer, steps = config.trainer, config.trainer.steps
    changes: dict[str, object] = {}
    if steps is None:
        if trainer.epochs is None:
            steps = default_steps(images, config.images_per_step)
        else:
            steps = max(1, round(trainer.epochs * images / config.human.batch_size))
        interval = evaluation_interval(steps, trainer.steps_per_loop)
        changes = {
            "trainer.steps": steps,
            "trainer.epochs": None,
            "trainer.checkpoint_interval": min(trainer.checkpoint_interval, interval),
            "optimizer.warmup_steps": min(config.optimizer.warmup_steps, steps // WARMUP),
        }
    if selection and not trainer.evaluation_interval:
        changes["trainer.evaluation_interval"] = evaluation_interval(steps, trainer.steps_per_loop)
    return config.override(changes) if changes else config
