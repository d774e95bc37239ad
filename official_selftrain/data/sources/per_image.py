"""Label files that have the paths of their images: what VOC and YOLO share."""

import pathlib
from collections.abc import Mapping
from typing import Any

from official_selftrain.data.sources import names as name_lookup
from official_selftrain.data.sources.record_errors import LeftOut, RecordErrors
from official_selftrain.utils.errors import UserError


class PerImage:
    """A folder with one label file per image.

    Args:
        folder: path of the folder.
        paths: paths of the label files in it.
        left_out: what else is in it.
        class_names: `{class id: name}`, or {} if the user gave none.

    Attributes:
        class_names: as given, or the default names of the format.
        files: paths that the labels are read from.
        left_out: as given.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        paths: list[pathlib.Path],
        left_out: LeftOut,
        class_names: Mapping[int, str],
    ) -> None:
        self.folder, self.left_out, self.class_names = folder, left_out, class_names
        self.files: list[Any] = paths
        self._paths = paths

    def entries(self, names: name_lookup.Names, errors: RecordErrors) -> dict[str, Any]:
        """`{image name: path of its labels, or None}`.

        Args:
            names: names of the existing images.
            errors: receives an error about labels without an image.

        Raises:
            UserError: if it is ambiguous which labels belong to which image.
        """
        paths = {path.relative_to(self.folder).as_posix(): path for path in self._paths}
        found = name_lookup.pair(names, paths, str(self.folder))
        strangers = [
            label for label in paths.keys() - found.values() if not self._is_class_list(label)
        ]
        if strangers:
            first = min(strangers)
            hint = names.near(name_lookup.without_suffix(first))
            errors.add(
                UserError(
                    f"{len(strangers)} annotations in {self.folder} have no image, the first "
                    f"{first!r}{hint}"
                )
            )
        return {name: paths[found[name]] if name in found else None for name in names}

    def _is_class_list(self, label):
        return pathlib.PurePath(label).stem == "classes"
