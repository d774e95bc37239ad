"""Scalars for TensorBoard."""

import functools
import logging

from official_selftrain.utils import extras
from official_selftrain.utils.errors import UserError


class Summaries:
    """Writes scalars for TensorBoard, where that is installed. A context manager.

    Args:
        folder: for the event files, or None to write nothing.
    """

    def __init__(self, folder):
        self._writer = None
        if folder is not None and _has_tensorboard():
            import tensorflow as tf

            self._writer = tf.summary.create_file_writer(str(folder))

    def write(self, step, scalars):
        """Writes `{name: value}` of a step."""
        if self._writer is None:
            return
        import tensorflow as tf

        with self._writer.as_default(step):
            for name, value in scalars.items():
                tf.summary.scalar(name, value)
        self._writer.flush()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self._writer is not None:
            self._writer.close()


@functools.cache  # so that it is logged once
def _has_tensorboard():
    try:
        extras.import_extra("tensorboard.summary.v2", "tensorboard", "a log for TensorBoard")
    except UserError as error:
        logging.info("%s. Without it the scalars are in history.jsonl only", error)
        return False
    return True
