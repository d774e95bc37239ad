"""The prepared sources of a config: files, counts and class names, checked against each other."""

import itertools
import logging
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from official_selftrain.config import Config
from official_selftrain.data import records, sources
from official_selftrain.data.sources.record_errors import hints
from official_selftrain.utils.errors import UserError
from official_selftrain.utils.files import read_json_or_none, sha256
from official_selftrain.utils.types import StrPath

SOURCES = ("human", "unlabeled", "pseudo", "evaluation")
WITHOUT_LABELS = ("human", "unlabeled", "evaluation")  # for a run, which makes its labels itself
SHOWN_CLASSES = 30  # in messages


class PreparedData:
    """The prepared sources of a config; `summaries[name]` as `sources.prepare` returns it.

    Args:
        config: whose sources are prepared, where they are given.
        folder: where they are prepared.
        names: the sources that are needed.
        classes: `checkpoints.classes_of` the weights that are to be used, or None.

    Raises:
        UserError: if anything is wrong with a source, or between two of them.
    """

    def __init__(
        self,
        config: Config,
        folder: StrPath,
        names: Sequence[str] = SOURCES,
        classes: Mapping[str, Any] | None = None,
    ) -> None:
        self.folder = pathlib.Path(folder)
        self.classes = classes
        self.summaries = {}
        for name in names:
            source = getattr(config, name)
            if source is not None and source.given:
                with hints(f"{name}."):
                    summary = sources.prepare(source, config.path, self.folder / name)
                self.summaries[name] = summary
        self.names = {
            name: {int(key): str(text) for key, text in summary["classes"].items()}
            for name, summary in self.summaries.items()
        }
        if classes is not None:
            self.names = {"the weights": classes["names"]} | self.names
        check_classes(self.names)
        self._check_leaks()
        self._warn_of_absent_classes()

    def _check_leaks(self):
        """Refuses to label, or to learn from labels of, images that measure the result."""
        if "evaluation" not in self.summaries:
            return
        for name in ("unlabeled", "pseudo"):
            if name in self.summaries:
                sources.check_disjoint(
                    self.folder / "evaluation",
                    self.folder / name,
                    f"images that the result is measured on must not be labeled or learned from; "
                    f"leave them out of {name}, for example by {name}.exclude_lists",
                )
        if "human" in self.summaries:
            shared = sources.shared_images(self.folder / "evaluation", self.folder / "human")
            if shared:
                logging.warning(
                    "%d images are both in human and in evaluation, the first %r: the metrics will "
                    "be too good", len(shared), shared[0],
                )  # fmt: skip

    def _warn_of_absent_classes(self):
        """Warns of classes that no labeled image holds."""
        if "human" not in self.summaries:
            return

        def held(name):
            return {int(c) for c in self.summaries.get(name, {}).get("images_per_class", {})}

        absent = sorted((held("evaluation") | set(self.class_names)) - held("human"))
        if absent:
            logging.warning(
                "no labeled image holds %s: teacher and student cannot learn it",
                ", ".join(repr(self.class_names.get(c, c)) for c in absent[:10]),
            )

    def files(self, name: str) -> list[str]:
        """The TFRecord files of a source."""
        return self.summaries[name]["files"]

    @property
    def class_names(self) -> dict[int, str]:
        """`{class id: name}` of the weights, or of the first source that has names."""
        order = ("the weights", "human", "pseudo", "evaluation", "unlabeled")
        return next((names for name in order if (names := self.names.get(name))), {})

    def with_num_classes(self, config: Config) -> Config:
        """The config with the class count of the weights, or else of the data.

        Raises:
            UserError: if a label is outside the configured classes.
        """
        labels = [s["largest_class"] for s in self.summaries.values()]
        largest = max([*self.class_names, *labels], default=0)
        count = config.task.num_classes
        if self.classes is not None:
            known = self.classes["num_classes"]
            if count not in (None, known):
                raise UserError(
                    f"the weights know {known} classes (with the background), but "
                    f"task.num_classes={count}"
                )
            count = known
        if count is None:
            return config.override({"task.num_classes": largest + 1})
        if largest >= count:
            raise UserError(
                f"the data has class id {largest}, but task.num_classes={count} "
                f"allows 1 to {count - 1} (0 is the background)"
            )
        return config.override({"task.num_classes": count})

    def damage(self) -> str | None:
        """A message on the first damaged file of the sources, all of which are read, or None.

        A shard that can be written again is deleted, so that the same command does so.
        """
        for name in self.summaries:
            for file in self.files(name) if name == "pseudo" else ():
                proof = read_json_or_none(records.proof_file(file))
                if proof and proof["sha256"] != sha256(file):
                    return (
                        f"the labels {file} are damaged: the command that wrote them (`run`, "
                        "`pseudo_label`) labels this file again"
                    )
            message = sources.find_damage(self.folder / name)
            if message:
                return message
        return None


def check_classes(names: Mapping[str, Mapping[int, str]]) -> None:
    """Refuses sources that give the same name different ids, or the same id different names.

    Args:
        names: `{source: {class id: name}}`.

    Raises:
        UserError: with the names and ids of both.
    """
    for (first, a), (second, b) in itertools.combinations(names.items(), 2):
        pairs, known = set(a.items()), set(a.values())
        wrong = [
            key
            for key, name in b.items()
            if (key, name) not in pairs and (key in a or name in known)
        ]
        if wrong:
            raise UserError(
                f"the classes of {first} and of {second} differ: {_listed(a, wrong)} in {first}, "
                f"{_listed(b, wrong)} in {second}; give each class the same id and name in both "
                "(class_list, or the categories of the annotations)"
            )


def _listed(names, first):
    order = sorted(names, key=lambda key: (len(names) > SHOWN_CLASSES and key not in first, key))
    shown = [f"{key} {names[key]!r}" for key in order[:SHOWN_CLASSES]]
    more = len(names) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more > 0 else "")
