"""The prepared sources of a config: files, counts and class names, checked against each other."""

import itertools
import logging
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from official_selftrain.config import Config, with_batches, with_length
from official_selftrain.data import parts, records, sources
from official_selftrain.data.sources.record_errors import hints
from official_selftrain.utils.errors import Damaged, UserError
from official_selftrain.utils.files import matching, read_json_or_none, sha256
from official_selftrain.utils.types import StrPath

SOURCES = ("human", "unlabeled", "pseudo", "evaluation")
WITHOUT_LABELS = ("human", "unlabeled", "evaluation")  # for a run, which makes its labels itself
SHOWN_CLASSES = 30  # in messages
FEW = 20  # images that measure a result


class PreparedData:
    """The prepared sources of a config; `summaries[name]` as `sources.prepare` returns it.

    Where only some of the images of a source are used, its summary describes these. The labeled
    images that are held out of the training are the source `selection`, which is missing if there
    are none.

    Args:
        config: whose sources are prepared, where they are given.
        folder: where they are prepared.
        names: the sources that are needed.
        classes: `checkpoints.classes_of` the weights that are to be used, or None.
        again: whether most of it has been prepared before; the log does not repeat what it said.

    Raises:
        UserError: if anything is wrong with a source, or between two of them.
    """

    def __init__(
        self,
        config: Config,
        folder: StrPath,
        names: Sequence[str] = SOURCES,
        classes: Mapping[str, Any] | None = None,
        again: bool = False,
    ) -> None:
        self._info: Callable[..., None] = _silent if again else logging.info
        self._warn: Callable[..., None] = _silent if again else logging.warning
        self.folder = pathlib.Path(folder)
        self.classes = classes
        self.summaries = {}
        self.places = {}
        for name in _needed(config, names):
            source = getattr(config, name)
            if name == "evaluation" and splits_evaluation(config):
                continue
            if source is not None and source.given:
                self.places[name] = self.folder / name
                with hints(f"{name}."):
                    self.summaries[name] = sources.prepare(source, config.path, self.places[name])
        self.names = {
            name: {int(key): str(text) for key, text in summary["classes"].items()}
            for name, summary in self.summaries.items()
        }
        if classes is not None:
            self.names = {"the weights": classes["names"]} | self.names
        check_classes(self.names)
        # Of the whole sources: a part may lack a class, but means the same numbers.
        self.largest_class = max((s["largest_class"] for s in self.summaries.values()), default=0)
        self._take_parts(config)
        self._check_leaks()
        self._warn_of_leaks_into_selection()
        self._warn_of_absent_classes()

    def _take_parts(self, config):
        """Puts the parts of the labeled and the unlabeled images that are used in their place."""
        apart = config.unlabeled is not None and config.unlabeled.exclude_labeled
        split = splits_evaluation(config)
        if not (apart or split or config.human.fraction is not None or config.selection):
            return
        known = set()
        if "human" in self.summaries:
            known = self._take_labeled(config, split)
        known |= set(self._digests("evaluation"))
        if apart and "unlabeled" in self.summaries:
            digests = self._digests("unlabeled")
            rest = [place for place, digest in enumerate(digests) if digest not in known]
            if len(rest) < len(digests):
                self._info(
                    "%d of %d images of unlabeled are labeled or evaluated on, and left out of it",
                    len(digests) - len(rest), len(digests),
                )  # fmt: skip
            if not rest:
                raise UserError(
                    f"all {len(digests)} images of unlabeled are labeled or evaluated on, so none "
                    "is left for the teacher; give more images, or lower human.fraction"
                )
            self._take("unlabeled", "unlabeled_used", rest, of="unlabeled")

    def _take_labeled(self, config, split):
        """Takes the labeled images in use, and those that are held out; returns their digests."""
        index = list(sources.read_index(self.places["human"]))
        left = self._take_evaluation(config, index) if split else None
        used = parts.labeled(index, config.human, left)
        held_out, why = [], ""
        if config.selection is not None:
            measured = set(self._digests("evaluation"))
            held_out, why = parts.held_out(index, used, config.selection, measured)
        if why:
            self._warn(
                "no image is held out for selection, so that every training runs to its last step "
                "and keeps its last weights: %s", why,
            )  # fmt: skip
        if held_out:
            self._info(
                "selection: %d of %d labeled images are held out of the training%s",
                len(held_out), len(used),
                self._lacking(index, used, held_out, "which do not decide"),
            )  # fmt: skip
            self._take("selection", "selection", held_out, of="human")
        self._take("human", "human_used", sorted({*used} - {*held_out}), of="human")
        return {index[position][2] for position in used}

    def _take_evaluation(self, config, index):
        """Holds labeled images out to measure the result; returns the positions of the others."""
        everything = range(len(index))
        measured = parts.measured(index, config.evaluation.from_labeled)
        wanted = config.evaluation.images
        self._info(
            "%s%d of %d labeled images are held out to measure the result%s",
            f"no validation images at {config.path(wanted)}: " if wanted else "",
            len(measured), len(index),
            self._lacking(index, everything, measured, "which no result counts"),
        )  # fmt: skip
        if len(measured) < FEW:
            self._warn(
                "a result that is measured on %d %s is rough: differences of several points are "
                "chance", len(measured), "images" if len(measured) > 1 else "image",
            )  # fmt: skip
        self._take("evaluation", "evaluation", measured, of="human")
        return sorted({*everything} - {*measured})

    def _lacking(self, index, whole, part, consequence):
        """The end of a message, about the classes of labeled images that some of them lack."""
        lacking = {c for place in whole for c in index[place][3]}
        lacking -= {c for place in part for c in index[place][3]}
        return f"; they lack {self._listed(lacking)}, {consequence}" if lacking else ""

    def _take(self, name, prefix, positions, of):
        """Makes images of the source `of` the source `name`."""
        whole = self.summaries[of]
        if len(positions) == whole["images"]:
            return
        try:
            self.summaries[name] = sources.prepare_part(whole, positions, self.folder / prefix)
        except Damaged as error:
            raise UserError(sources.find_damage(self.places[of]) or str(error)) from None
        self.places[name] = self.folder / prefix

    def _digests(self, name):
        """The digest of each image of a source; none of one that is not prepared."""
        place = self.places.get(name)
        return [digest for _, _, digest, _ in sources.read_index(place)] if place else []

    def _check_leaks(self):
        """Refuses to label, or to learn from labels of, images that measure the result."""
        if "evaluation" not in self.summaries:
            return
        for name in ("unlabeled", "pseudo"):
            if name in self.summaries:
                sources.check_disjoint(
                    self.places["evaluation"],
                    self.places[name],
                    f"images that the result is measured on must not be labeled or learned from; "
                    f"leave them out of {name}, for example by {name}.exclude_lists"
                    + (" or unlabeled.exclude_labeled=true" if name == "unlabeled" else ""),
                )
        if "human" in self.summaries:
            shared = sources.shared_images(self.places["evaluation"], self.places["human"])
            if shared:
                self._warn(
                    "%d images are both in human and in evaluation, the first %r: the metrics will "
                    "be too good", len(shared), shared[0],
                )  # fmt: skip

    def _warn_of_leaks_into_selection(self):
        """Warns of held-out images from whose pseudo labels a student learns."""
        labeled = next((name for name in ("unlabeled", "pseudo") if name in self.summaries), "")
        shared = set(self._digests("selection")).intersection(self._digests(labeled))
        if shared:
            logging.warning(
                "%d images of selection are also in %s: they choose weights that have learned from "
                "them; unlabeled.exclude_labeled=true leaves them out", len(shared), labeled,
            )  # fmt: skip

    def _warn_of_absent_classes(self):
        """Warns of classes that no labeled image holds."""
        if "human" not in self.summaries:
            return

        def held(name):
            return {int(c) for c in self.summaries.get(name, {}).get("images_per_class", {})}

        absent = sorted((held("evaluation") | set(self.class_names)) - held("human"))
        if absent:
            self._warn(
                "no labeled image holds %s: teacher and student cannot learn it",
                self._listed(absent),
            )

    def _listed(self, classes):
        """The names of the first of some classes."""
        return ", ".join(repr(self.class_names.get(c, c)) for c in sorted(classes)[:10])

    def files(self, name: str) -> list[str]:
        """The TFRecord files of a source."""
        return self.summaries[name]["files"]

    @property
    def class_names(self) -> dict[int, str]:
        """`{class id: name}` of the weights, or of the first source that has names."""
        order = ("the weights", "human", "pseudo", "evaluation", "unlabeled")
        return next((names for name in order if (names := self.names.get(name))), {})

    def completed(self, config: Config) -> Config:
        """The config with all that follows from the data: classes, batches, rates and length.

        Raises:
            UserError: see `with_num_classes`.
        """
        config = self.with_num_classes(config)
        if "human" not in self.summaries:
            return config
        selection = config.selection is not None and "selection" in self.summaries
        images = self.summaries["human"]["images"]
        return with_length(with_batches(config, images), images, selection)

    def with_num_classes(self, config: Config) -> Config:
        """The config with the class count of the weights, or else of the data.

        Raises:
            UserError: if a label is outside the configured classes.
        """
        largest = max([*self.class_names, self.largest_class])
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
            message = sources.find_damage(self.places[name])
            if message:
                return message
        return None


def _silent(*_):
    """In place of a function that logs."""


def splits_evaluation(config: Config) -> bool:
    """Whether the images that measure the result are a part of the labeled ones.

    Raises:
        UserError: if their folder or their labels exist, but not both.
    """
    source = config.evaluation
    if source is None or source.from_labeled is None:
        return False
    places = [config.path(p) for p in (source.images, source.annotations, source.masks) if p]
    found = [place for place in places if matching(place)[1]]
    if found and len(found) < len(places):
        missing = next(place for place in places if place not in found)
        raise UserError(
            f"{found[0]} exists, but {missing} does not, and both are needed to measure the "
            f"result: add it, or rename {found[0]}, and {source.from_labeled:.0%} of the labeled "
            "images are held out instead"
        )
    return not found


def _needed(config, names):
    """The names of the sources, and of those that decide which of their images are used."""
    needed = set(names)
    if "unlabeled" in needed and config.unlabeled is not None and config.unlabeled.exclude_labeled:
        needed |= {"human", "evaluation"}
    if splits_evaluation(config) and needed & {"human", "evaluation"}:
        needed |= {"human", "evaluation"}
    if "human" in needed and config.selection is not None:
        needed |= {"evaluation"}
    return [name for name in SOURCES if name in needed]


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
