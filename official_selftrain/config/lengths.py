"""Batches, learning rate and length of a training where they follow from its images."""

from official_selftrain.config.schema import Config

PASSES = 100  # images read for each labeled one, if neither steps nor epochs are given
SHORTEST, LONGEST, ROUNDED = 800, 20_000, 50  # steps
EVALUATIONS = 20  # of a training that a selection part decides on
WARMUP = 10  # the warmup is at most the tenth part of an automatic length
FEW, MANY = 100, 2000  # labeled images


def default_batch_size(images: int) -> int:
    """The images per step of a training with automatic batches, pseudo-labeled ones included.

    They are 16; but 8 with fewer than 100 labeled images, which learn more from more steps than
    from larger ones, and 32 with more than 2,000, which the largest number of steps would else show
    too rarely.

    Args:
        images: number of labeled images to train on.
    """
    return 8 if images < FEW else 16 if images <= MANY else 32


def with_batches(config: Config, images: int) -> Config:
    """A config whose batch sizes are numbers, and whose learning rates hold for them.

    A quarter of a student's automatic batch is human-labeled, and the rest pseudo-labeled.

    Args:
        config: of one training; one that has such numbers comes back as it is.
        images: number of labeled images to train on.
    """
    if config.human.batch_size == "auto":
        batch = default_batch_size(images)
        sizes = {"human.batch_size": batch}
        if config.pseudo is not None:
            sizes = {"human.batch_size": batch // 4, "pseudo.batch_size": batch - batch // 4}
        config = config.override(sizes)
    optimizer = config.optimizer
    if optimizer.base_batch_size is None:
        return config
    factor = config.images_per_step / optimizer.base_batch_size
    return config.override(
        {
            "optimizer.base_batch_size": None,
            "optimizer.learning_rate": optimizer.learning_rate * factor,
            "optimizer.warmup_learning_rate": optimizer.warmup_learning_rate * factor,
            "optimizer.step_rates": [rate * factor for rate in optimizer.step_rates],
        }
    )


def default_steps(images: int, batch_size: int) -> int:
    """The steps of a training that gives neither steps nor epochs.

    They read 100 images for each labeled one, but are at least 800 and at most 20,000, rounded to a
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
            steps = max(1, round(trainer.epochs * images / config.human.batch))
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
