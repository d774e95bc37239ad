"""Where a run works: its settings, folder, devices and data, each of them made once."""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from official_selftrain.config import Config
from official_selftrain.data.prepared import SOURCES, PreparedData
from official_selftrain.engine.distribution import Distribution, make_distribution
from official_selftrain.pipeline.folder import init_run_folder, working_in
from official_selftrain.tasks import task_type
from official_selftrain.utils.errors import Damaged, UserError
from official_selftrain.utils.types import StrPath


class Workspace:
    """The settings, folder, devices and data of a run, or of one stage of it.

    As a context manager it keeps other processes out of the folder.

    Attributes:
        config: `Config`; its class count and its length are set once the data is prepared.
        given: `Config` as it was given, for stages whose length follows from other settings.
        folder: `pathlib.Path` of the run or the stage.
        distribution: the devices of all workers.
        data: `PreparedData`, once it is prepared.
    """

    def __init__(
        self,
        config: Config,
        folder: StrPath,
        distribution: Distribution,
        data: PreparedData | None = None,
    ) -> None:
        self.config = self.given = config
        self.folder = pathlib.Path(folder)
        self.distribution = distribution
        self._data = data
        self._lock = contextlib.ExitStack()

    @classmethod
    def open(cls, config: Config, folder: StrPath) -> Workspace:
        """The workspace of a run, with the devices that `config.runtime` asks for.

        Raises:
            UserError: if this machine, or the Keras backend, cannot do what is asked for.
        """
        return cls(config, folder, make_distribution(config.runtime))

    def stage(self, name: str, config: Config) -> Workspace:
        """The workspace of a stage in the folder `name` of this one, on its devices and data.

        Raises:
            UserError: if the data of this one has labels outside the classes of `config`.
        """
        config = self.data.completed(config) if self.prepared else config
        return Workspace(config, self.folder / name, self.distribution, self._data)

    @property
    def prepared(self) -> bool:
        """Whether there is data: its own, or that of the run whose stage this is."""
        return self._data is not None

    @property
    def data(self) -> PreparedData:
        """The prepared sources."""
        if self._data is None:
            raise RuntimeError("call `prepare` before the data is read")
        return self._data

    def __enter__(self) -> Workspace:
        self._lock.enter_context(working_in(self.folder, self.distribution))
        return self

    def __exit__(self, *error: Any) -> None:
        self._lock.__exit__(*error)

    def claim(self) -> None:
        """Writes the settings into a new folder, or checks that an old one is of the same run.

        Raises:
            UserError: if the folder holds another run, naming what differs.
        """
        self.on_chief_first(lambda: init_run_folder(self.config, self.folder))

    def prepare(
        self,
        names: Sequence[str] = SOURCES,
        classes: dict[str, Any] | None = None,
        place: pathlib.Path | None = None,
    ) -> None:
        """Prepares the data, and sets the class count and the length that follow from it.

        Args:
            names: the sources that are needed.
            classes: `checkpoints.classes_of` the weights that are to be used, or None.
            place: where the data is prepared; by default in the folder `data` of this one.

        Raises:
            UserError: if anything is wrong with a source, between two of them, or for the task.
        """
        place, again = place or self.folder / "data", self.prepared
        self._data = self.on_chief_first(
            lambda: PreparedData(self.config, place, names, classes, again)
        )
        task_type(self.config.task).check_sources(self.data)
        self.config = self.data.completed(self.config)

    def on_chief_first(self, function: Callable[[], Any]) -> Any:
        """What `function` returns; the chief calls it first, because only it writes files."""
        return self.distribution.on_chief_first(function)

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Explains errors of TensorFlow that come from damaged data or from lost workers.

        Raises:
            UserError: in place of what TensorFlow raises.
        """
        try:
            with self.distribution.readable_worker_errors():
                yield
        except Exception as error:
            damage = self.data.damage() if _may_be_damage(error) else None
            if damage:
                raise UserError(damage) from None
            raise


def _may_be_damage(error):
    """Whether an error, or one that it was raised for, is TensorFlow's or reports damage."""
    import tensorflow as tf

    while error is not None and not isinstance(error, (tf.errors.OpError, Damaged)):
        error = error.__context__
    return error is not None
