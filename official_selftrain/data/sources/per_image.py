"""Labels in one file an image, with its path: what VOC and YOLO share."""

import pathlib

from official_selftrain.data.sources import names as name_lookup
from official_selftrain.utils.errors import UserError


class PerImage:
    """A folder of label files.

    Args:
        folder: path.
        paths: of the label files in it.
        left_out: `{kind: [count, first]}` of what else is in it.
        class_names: `{class id: name}`, or {} where the user gave none.

    Attributes:
        class_names: as given, or the default ones of the format.
        files: what the labels are read from.
        left_out: as given.
    """

    def __init__(self, folder, paths, left_out, class_names):
        self.folder, self.left_out, self.class_names = folder, left_out, class_names
        self.files, self._paths = paths, paths

    def entries(self, names, errors):
        """`{image name: path of its labels or None}`.

        Args:
            names: `names.Names` of the images that there are.
            errors: takes the labels without an image.

        Raises:
            UserError: if it is not clear which labels belong to which image.
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
