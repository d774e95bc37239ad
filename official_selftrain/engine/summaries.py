"""Scalars for TensorBoard."""

from __future__ import annotations

import functools
import logging

from official_selftrain.utils import extras
from official_selftrain.utils.errors import UserError
from official_selftrain.utils.types import StrPath


class Summaries:
    """Context manager that writes scalars for TensorBoard, if that is installed.

    Args:
        folder: folder of the event files, or None to write nothing.
    """

    def __init__(self, folder: StrPath | None):
        self._writer = None
        if folder is not None and _has_tensorboard():
            import tensorflow as tf

            self._writer = tf.summary.create_file_writer(str(folder))

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """Writes the scalars `{name: value}` of a step."""
        if self._writer is None:
            return
        import tensorflow as tf

        with self._writer.as_default(step):
            for name, value in scalars.items():
                tf.summary.scalar(name, value)
        # Otherwise the curves of a running training would lag by minutes.
        self._writer.flush()

    def __enter__(self) -> Summaries:
        return self

    def __exit__(self, *_: object) -> None:
        if self._writer is not None:
            self._writer.close()


@functools.cache  # so that it is logged only once
def _has_tensorboard() -> bool:
    try:
        extras.import_extra("tensorboard.summary.v2", "tensorboard", "a log for TensorBoard")
    except UserError as error:
        logging.info("%s. Without it, scalars are written to history.jsonl only.", error)
        return False
    return True
