"""Named image files: a folder searched through, a glob, or the members of tar shards."""

import contextlib
import io
import os
import pathlib
import stat
import tarfile

import numpy as np
from PIL import Image, ImageOps

from official_selftrain.config import did_you_mean
from official_selftrain.data import records
from official_selftrain.errors import UserError

with contextlib.suppress(Exception):  # the extra [heif]
    import pillow_heif

    pillow_heif.register_heif_opener()

# What turns images of a suffix that not every installation reads into readable ones.
OPTIONAL = {
    ".avif": "pip install 'pillow>=11.3' reads them",
    ".heic": "pip install 'official_selftrain[heif]' reads them",
    ".heif": "pip install 'official_selftrain[heif]' reads them",
}
READABLE = Image.registered_extensions()
SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff",
    *(suffix for suffix in OPTIONAL if suffix in READABLE),
)  # fmt: skip
REMEDIES = {suffix: remedy for suffix, remedy in OPTIONAL.items() if suffix not in READABLE}
WILDCARDS = set("*?[")
ORIENTATION = 0x0112  # the EXIF tag


def open_store(place):
    """The store that a path means.

    Args:
        place: a folder; a glob of image files; or a `.tar` file, or a glob of them.

    Raises:
        UserError: if there is no such folder or file, naming the nearest.
    """
    if WILDCARDS & set(place) or place.endswith(".tar"):
        files = _glob(place)
        tars = [file for file in files if file.suffix == ".tar"]
        if not tars:
            return Folder(_fixed_part(place), [f for f in files if f.suffix.lower() in SUFFIXES])
        if len(tars) < len(files):
            raise UserError(f"{place!r} matches tar files and others; name one kind")
        return Tars(tars)
    folder = existing_folder(place)
    return Folder(folder, *walk(folder, SUFFIXES))


def walk(folder, suffixes):
    """Finds the files below a folder, and below the folders that are linked from there.

    Every folder is entered once, by its own name before that of a link to it.

    Args:
        folder: path of a folder that exists.
        suffixes: in lower case, with the dot; names may have them in upper case.

    Returns:
        Sorted list of `pathlib.Path`, and `{kind: [count, first]}` of what else lies there: hidden
        files and folders, other suffixes, links that lead nowhere, pipes and devices.

    Raises:
        UserError: if the folder cannot be read.
    """
    found, left_out, entered = [], {}, set()
    linked = [pathlib.Path(folder)]
    while linked:
        inside = [linked.pop(0)]
        while inside:
            here = inside.pop()
            real = os.path.realpath(here)
            if real in entered:
                _count(left_out, "links to folders that are read already", here)
                continue
            entered.add(real)
            try:
                entries = sorted(os.scandir(here), key=lambda entry: entry.name)
            except OSError as error:
                if len(entered) == 1:
                    raise UserError(f"cannot read the folder {here}: {error.strerror}") from None
                _count(left_out, "folders that cannot be read", here)
                continue
            for entry in entries:
                path = pathlib.Path(entry.path)
                kind = _why_left_out(entry, suffixes)
                if kind:
                    _count(left_out, kind, path)
                elif not entry.is_dir():
                    found.append(path)
                else:
                    (linked if entry.is_symlink() else inside).append(path)
    return sorted(found), left_out


def _why_left_out(entry, suffixes):
    """The kind, in the plural, of an entry of a folder that is not taken, else None."""
    if entry.name.startswith("."):
        return "hidden files and folders"
    try:
        mode = os.stat(entry.path).st_mode
    except OSError:
        return "links that lead nowhere"
    if stat.S_ISDIR(mode):
        return None
    if not stat.S_ISREG(mode):
        return "pipes, sockets and devices"
    return other_suffix(entry.name, suffixes)


def other_suffix(name, suffixes):
    """The kind of a file whose suffix is not one of `suffixes`, else None."""
    suffix = pathlib.PurePath(name).suffix.lower()
    if suffix in suffixes:
        return None
    if not suffix[1:].isalnum() or not suffix.isascii() or len(suffix) > 8:
        return "files of other kinds"
    remedy = f" ({REMEDIES[suffix]})" if suffix in REMEDIES else ""
    return f"{suffix} files{remedy}"


def _count(left_out, kind, example):
    left_out.setdefault(kind, [0, str(example)])[0] += 1


def existing_folder(folder):
    """`folder` as a path.

    Raises:
        UserError: if it does not exist, naming the nearest.
    """
    folder = pathlib.Path(folder)
    if not folder.is_dir():
        parent = folder.parent
        near = [p.name for p in parent.iterdir() if p.is_dir()] if parent.is_dir() else []
        raise UserError(
            f"the image folder {folder} does not exist{did_you_mean(folder.name, near)}"
        )
    return folder


def _fixed_part(place):
    """The folder above the first wildcard of a glob."""
    parts = pathlib.Path(place).parts
    fixed = next((i for i, part in enumerate(parts) if WILDCARDS & set(part)), len(parts) - 1)
    return pathlib.Path(*parts[:fixed]) if fixed else pathlib.Path()


def _glob(place):
    folder = _fixed_part(place)
    pattern = str(pathlib.Path(place).relative_to(folder)) if str(folder) != "." else place
    files = sorted(path for path in folder.glob(pattern) if path.is_file())
    if not files:
        raise UserError(f"no file matches {place!r}")
    return files


class Folder:
    """Files below a folder, named by their path from it."""

    def __init__(self, folder, files, left_out=None):
        self.folder, self.left_out = folder, left_out or {}
        self.names = [str(path.relative_to(folder)) for path in files]

    @property
    def title(self):
        return self.folder.name

    def __str__(self):
        return str(self.folder)

    def read(self, name):
        """Bytes of a file.

        Raises:
            UserError: if it does not exist or cannot be read.
        """
        try:
            return (self.folder / name).read_bytes()
        except FileNotFoundError:
            raise UserError(f"the image file {self.folder / name} does not exist") from None
        except OSError as error:
            raise UserError(f"cannot read {self.folder / name}: {error.strerror}") from None

    def stamps(self):
        """A line for each file that changes when the file does."""
        return [stamp(self.folder / name) for name in self.names]


class Tars:
    """Image members of uncompressed tar files, found once and then read at their offsets.

    Raises:
        UserError: if a file is no tar, is cut off, or if two members have one name.
    """

    def __init__(self, files):
        self.files, self.left_out = files, {}
        self._places = {}
        for file in files:
            try:
                with tarfile.open(file, "r:") as archive:
                    members = [m for m in archive if m.isfile()]
            except (tarfile.TarError, OSError) as error:
                raise UserError(f"{file} is not a complete, uncompressed tar: {error}") from None
            size = file.stat().st_size
            for member in members:
                if pathlib.Path(member.name).suffix.lower() not in SUFFIXES:
                    continue
                if member.offset_data + member.size > size:
                    raise UserError(f"{file} breaks off in {member.name!r}; copy it again")
                name = member.name.removeprefix("./")
                if name in self._places:
                    other = self._places[name][0]
                    raise UserError(f"{name!r} is in {other} and in {file}; names must differ")
                self._places[name] = (str(file), member.offset_data, member.size)
        self.names = sorted(self._places)

    @property
    def title(self):
        return self.files[0].stem

    def __str__(self):
        return (
            f"{self.files[0]} and {len(self.files) - 1} more"
            if self.files[1:]
            else str(self.files[0])
        )

    def read(self, name):
        """Bytes of a member."""
        if name not in self._places:
            raise UserError(f"no member of {self} is called {name!r}")
        file, offset, size = self._places[name]
        try:
            with open(file, "rb") as stream:
                stream.seek(offset)
                return stream.read(size)
        except OSError as error:
            raise UserError(f"cannot read {name!r} of {file}: {error.strerror}") from None

    def stamps(self):
        return [stamp(file) for file in self.files]


def stamp(file):
    """Path, size and time of a file.

    Raises:
        UserError: if it cannot be read.
    """
    try:
        stat = os.stat(file)
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from None
    return f"{file} {stat.st_size} {stat.st_mtime_ns}"


# --- Decoding --------------------------------------------------------------------------------


def check_image(encoded, where, shown=None):
    """An image as every decoder reads it, after it was decoded once to find corrupt files.

    JPEG and PNG of 8 bits in gray or RGB are kept byte for byte; everything else (CMYK, palettes,
    transparency, 16 bits, other formats), and what is turned, becomes an RGB PNG.

    Args:
        encoded: bytes of an image file.
        where: its name in errors.
        shown: whether an image with an EXIF orientation is taken as it is shown, that is turned:
            function (stored (height, width), turned (height, width)) -> bool. None always turns.
            It is not called for images without an orientation.

    Returns:
        (bytes, height, width, turned): `turned` tells whether an orientation was applied, and is
        None without one.

    Raises:
        UserError: if it cannot be decoded.
    """
    try:
        image = Image.open(io.BytesIO(encoded))
        kind = image.format
        turned = _orientation(image)
        if turned is not None and shown is not None:
            turned = bool(shown(image.size[::-1], _turned_size(image)))
        image.load()
        if kind in ("JPEG", "PNG") and image.mode in ("RGB", "L") and not turned:
            return encoded, image.height, image.width, turned
        image = _eight_bits(ImageOps.exif_transpose(image) if turned else image)
    except UserError:
        raise
    except Exception as error:
        reason = "it is empty" if not encoded else error
        raise UserError(f"the image file {where} cannot be decoded: {reason}") from None
    encoded = records.encode_png(np.asarray(image.convert("RGB")))
    return encoded, image.height, image.width, turned


def _orientation(image):
    """True for an image with an EXIF orientation other than upright, else None."""
    return True if image.getexif().get(ORIENTATION, 1) in range(2, 9) else None


def _turned_size(image):
    """(height, width) of an image with an orientation as it is shown."""
    sideways = image.getexif()[ORIENTATION] >= 5
    return image.size if sideways else image.size[::-1]


def _eight_bits(image):
    """Gray images of 16 bits are scaled; PIL's own conversion would clip them to white."""
    if image.mode.startswith("I"):
        return Image.fromarray((np.asarray(image, "int64").clip(0, 65535) // 257).astype("uint8"))
    return image


def check_mask(encoded, where, height, width, names):
    """A mask as gray PNG bytes, after a check.

    Args:
        encoded: bytes of a PNG, gray or with a palette, whose values are class ids.
        where: its name in errors.
        height, width: of its image.
        names: `{class id: name}`; empty where the classes are not known.

    Raises:
        UserError: if it cannot be decoded, has colours in place of class ids, another size than the
            image, or an unknown class id.
    """
    try:
        image = Image.open(io.BytesIO(encoded))
        image.load()
    except Exception as error:
        raise UserError(f"the mask {where} cannot be decoded: {error}") from None
    if image.mode not in ("L", "P", "1"):
        raise UserError(
            f"the mask {where} holds colours (mode {image.mode}); a mask is a PNG, gray or with a "
            "palette, whose values are class ids and 255 for ignored pixels"
        )
    if (image.height, image.width) != (height, width):
        raise UserError(
            f"the mask {where} is {image.width} x {image.height} pixels, its image is {width} x "
            f"{height}"
        )
    pixels = np.asarray(image).astype("uint8")
    present = np.flatnonzero(np.bincount(pixels.ravel(), minlength=256)[:255])
    unknown = [int(value) for value in present if names and int(value) not in names]
    if unknown:
        raise UserError(
            f"the mask {where} has the class id {unknown[0]}; known are 0 to {max(names)}, and 255 "
            "for ignored pixels"
        )
    return records.encode_png(pixels)
