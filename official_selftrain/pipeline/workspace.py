"""Prepared data, and what its reading meets: damage, and workers that are gone."""

import contextlib

from official_selftrain.data.prepared import SOURCES, PreparedData
from official_selftrain.utils.errors import Damaged, UserError


def prepare(config, folder, distribution, names=SOURCES, classes=None):
    """The `PreparedData` of a config; the chief alone writes it."""
    return distribution.on_chief_first(lambda: PreparedData(config, folder, names, classes))


@contextlib.contextmanager
def reading(data, distribution):
    """Explains what a stage meets if another worker is gone, or a file of its data damaged.

    Raises:
        UserError: in place of what TensorFlow raises then.
    """
    try:
        with distribution.readable_worker_errors():
            yield
    except Exception as error:
        damage = data.damage() if _may_be_of_damage(error) else None
        if damage:
            raise UserError(damage) from None
        raise


def _may_be_of_damage(error):
    """Whether an error is one of TensorFlow's or of damage, or was raised on account of one."""
    import tensorflow as tf

    while error is not None and not isinstance(error, (tf.errors.OpError, Damaged)):
        error = error.__context__
    return error is not None
