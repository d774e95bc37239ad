"""Named image files: a folder and its subfolders, a glob, or the members of tar files."""

import contextlib
import io
import os
import pathlib
import posixpath
import re
import shlex
import stat
import tarfile
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import TypeAlias

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from official_selftrain.data import png
from official_selftrain.data.records import LARGEST_IMAGE
from official_selftrain.data.sources.record_errors import LeftOut, RecordErrors
from official_selftrain.utils.errors import UserError, did_you_mean, one_line
from official_selftrain.utils.files import matching, read_bytes
from official_selftrain.utils.types import StrPath

with contextlib.suppress(Exception):  # the extra [heif]
    import pillow_heif

    pillow_heif.register_heif_opener()

# How to make formats readable that not every installation of Pillow can read.
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
# Formats that Pillow decodes itself. For others, such as EPS, it would start programs on files that
# come from anywhere.
LOSSLESS = ("PNG", "BMP", "DIB", "GIF", "TIFF", "PPM", "TGA")
FORMATS = tuple(Image.OPEN.keys() & {*LOSSLESS, "JPEG", "WEBP", "JPEG2000", "AVIF", "HEIF"})
WILDCARDS = set("*?[")
Size: TypeAlias = tuple[int, int]  # (height, width) in pixels
LARGEST_FILE = 2**29  # bytes of an image file
ORIENTATION = 0x0112  # the EXIF tag


def open_store(place: str) -> "Folder | Tars":
    """Opens the image files that a path means.

    Args:
        place: a folder; an image file, or a glob of them; or a `.tar` file, or a glob of them. A
            path that exists is never read as a glob.

    Raises:
        UserError: if there is no such folder or file, with the nearest name.
    """
    if os.path.isdir(place):
        return Folder(place, *walk(place, SUFFIXES))
    base, paths = matching(place)
    found, left_out = _sorted_out(base, paths)
    if not paths:
        raise UserError(f"no file matches {place!r}{_near(pathlib.Path(place))}")
    tars = [path for path in found if path.suffix.lower() == ".tar"]
    if not tars:
        return Folder(base, found, left_out)
    if len(tars) < len(found):
        raise UserError(
            f"{place!r} matches both tar files and images; give a pattern that matches one kind"
        )
    return Tars(tars, left_out)


def _sorted_out(base, paths):
    """Images and tars among the paths that match a glob, and what the others are."""
    found, left_out = [], {}
    for path in paths:
        hidden = any(part.startswith(".") for part in path.relative_to(base).parts)
        kind = "hidden files and folders" if hidden else _why_left_out(path, (*SUFFIXES, ".tar"))
        if kind or path.is_dir():
            _count(left_out, kind or "folders that match but are not entered", path)
        else:
            found.append(path)
    return found, left_out


def _near(path):
    """Names the nearest folder or file beside one that does not exist."""
    if WILDCARDS & set(path.name) or not path.parent.is_dir():
        return ""
    hint = did_you_mean(path.name, sorted(near.name for near in path.parent.iterdir()))
    return f": it does not exist{hint if len(hint) < 300 else ''}"


def walk(folder: StrPath, suffixes: Collection[str]) -> tuple[list[pathlib.Path], LeftOut]:
    """Finds the files below a folder, and below the folders that links in it lead to.

    Every folder is entered once, by its own name rather than by that of a link to it.

    Args:
        folder: path of an existing folder.
        suffixes: suffixes in lower case, with the dot; those of files may be in upper case.

    Returns:
        Sorted paths, and what else is there: hidden files and folders, other suffixes, broken
        links, pipes and devices.

    Raises:
        UserError: if the folder cannot be read.
    """
    found: list[pathlib.Path] = []
    left_out: LeftOut = {}
    entered: set[str] = set()
    # Linked folders come last, so that a folder that is found both ways keeps its own name.
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
    """The kind, in the plural, of a folder's entry that is left out, else None."""
    if entry.name.startswith("."):
        return "hidden files and folders"
    try:
        mode = os.stat(entry).st_mode
    except OSError:
        return "links that lead nowhere"
    if stat.S_ISDIR(mode):
        return None
    if not stat.S_ISREG(mode):
        return "pipes, sockets and devices"
    return other_suffix(entry.name, suffixes)


def other_suffix(name: str, suffixes: Collection[str]) -> str | None:
    """The kind, in the plural, of a file with another suffix than `suffixes`, else None."""
    suffix = pathlib.PurePath(name).suffix.lower()
    if suffix in suffixes:
        return None
    if not suffix[1:].isalnum() or not suffix.isascii() or len(suffix) > 8:
        return "files of other kinds"
    remedy = f" ({REMEDIES[suffix]})" if suffix in REMEDIES else ""
    return f"{suffix} files{remedy}"


def _count(left_out, kind, example):
    left_out.setdefault(kind, [0, str(example)])[0] += 1


class Folder:
    """Image files below a folder, named by their path below it."""

    def __init__(self, folder: StrPath, files: Iterable[pathlib.Path], left_out: LeftOut) -> None:
        self.folder, self.left_out = pathlib.Path(folder), left_out
        self.names = [str(path.relative_to(folder)) for path in files]
        self._found = set(self.names)

    @property
    def title(self) -> str:
        """The name of the data set in records."""
        return self.folder.name

    def __str__(self) -> str:
        return str(self.folder)

    def read(self, name: str) -> bytes:
        """Reads the bytes of a file.

        A file that was found in the folder may be a link to anywhere, but a name in a label file
        must not lead out of the folder: label files come from anywhere, too.

        Raises:
            UserError: if it does not exist, cannot be read or is outside the folder.
        """
        path = self.folder / _text(name)
        if name not in self._found and not self._holds(path):
            raise UserError(
                f"the image file {name!r} is outside the folder {self}; images are only read from "
                "this folder"
            )
        if "\0" not in name and not os.path.exists(path):
            raise UserError(f"the image file {path} does not exist")
        return read_bytes(path, "image file", LARGEST_FILE)

    def _holds(self, path):
        inside = os.path.join(os.path.realpath(self.folder), "")
        return "\0" in str(path) or os.path.realpath(path).startswith(inside)

    def fingerprints(self) -> list[str]:
        """A line per file that changes when the file does."""
        return [fingerprint(self.folder / name, name) for name in self.names]


def _text(name):
    """Returns the name.

    Raises:
        UserError: if it is not UTF-8, so that it could not be written as text.
    """
    try:
        name.encode()
    except UnicodeEncodeError:
        raw = name.encode("utf-8", "surrogateescape")
        raise UserError(f"the file name {raw!r} is not UTF-8 text; rename the file") from None
    return name


class Tars:
    """Image members of uncompressed tar files, found once and then read at their offsets.

    Of a member that is a link, the target in the same file is read.

    Raises:
        UserError: if a file is not a tar, is cut off or damaged, or if two members have the same
            name.
    """

    def __init__(self, files: Sequence[pathlib.Path], left_out: LeftOut) -> None:
        self.files, self.left_out = files, left_out
        self._places: dict[str, tuple[pathlib.Path, int | None, int]] = {}
        for file in files:
            for name, place in self._images(file, _members(file)):
                if name in self._places:
                    other = self._places[name][0]
                    where = f"twice in {file}" if other == file else f"in {other} and in {file}"
                    raise UserError(f"{name!r} is {where}; names must differ")
                self._places[name] = (file, *place)
        self.names = sorted(self._places)

    def _images(self, file, members):
        """(name, (offset, size)) of the members that are images."""
        regular = {name: member for name, member in members if member.isreg()}
        for name, member in members:
            if member.isdir():
                continue
            kind = _why_member_is_left_out(name, member)
            target = _target(name, member, dict(members)) if not kind else name
            if not kind and target not in regular:
                kind = "links to files outside their tar"
            if kind:
                _count(self.left_out, kind, f"{name} of {file}")
            else:
                yield name, _place(regular[target])

    @property
    def title(self) -> str:
        """The name of the data set in records."""
        return self.files[0].stem

    def __str__(self) -> str:
        return (
            f"{self.files[0]} and {len(self.files) - 1} more"
            if self.files[1:]
            else str(self.files[0])
        )

    def read(self, name: str) -> bytes:
        """Reads the bytes of a member.

        Raises:
            UserError: if there is no such member, or it cannot be read.
        """
        if name not in self._places:
            raise UserError(f"no member of {self} is named {name!r}")
        file, offset, size = self._places[_text(name)]
        if offset is None:
            raise UserError(f"{name!r} of {file} is a sparse member; pack it without --sparse")
        if size > LARGEST_FILE:
            raise UserError(f"{name!r} of {file} has {size:,} bytes; at most {LARGEST_FILE:,}")
        try:
            with open(file, "rb") as stream:
                stream.seek(offset)
                encoded = stream.read(size)
        except OSError as error:
            raise UserError(f"cannot read {name!r} of {file}: {error.strerror}") from None
        if len(encoded) < size:
            raise UserError(
                f"{file} ends in the middle of {name!r}; it was truncated after it was opened"
            )
        return encoded

    def fingerprints(self) -> list[str]:
        """A line per tar file that changes when the file does."""
        return [fingerprint(file, file.name) for file in self.files]


def _members(file):
    """(name, `tarfile.TarInfo`) of all members of a tar.

    `tarfile` silently ends at a cut between two members, at a damaged header, and before a second
    tar that was appended; here they are errors.
    """
    _refuse_compression(file)
    members, end = [], 0
    try:
        with tarfile.open(file, "r:") as archive:
            for member in archive:
                if archive.offset <= end:  # a header whose size is negative
                    raise tarfile.ReadError("the size of a member is damaged")
                end = archive.offset
                members.append((posixpath.normpath(member.name), member))
    except Exception as error:  # tarfile lets many kinds through
        raise UserError(f"{file} is not a complete, uncompressed tar: {error}") from None
    last = f"after {members[-1][0]!r}, its member number {len(members)}" if members else ""
    with open(file, "rb") as stream:
        stream.seek(end)
        block = stream.read(tarfile.BLOCKSIZE)
        if not block:
            raise UserError(
                f"{file} has no end mark: it was cut off {last}. Copy it again; if nothing is "
                f"missing, add the mark with: head -c 1024 /dev/zero >> {shlex.quote(str(file))}"
            )
        while block:
            if block.strip(b"\0"):
                raise UserError(
                    f"{file} continues {last} with something that is not a member: it is damaged "
                    "there, or several tar files were concatenated"
                )
            block = stream.read(2**20)
    return members


COMPRESSIONS = {
    b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd",
    b"PK\x03\x04": "zip", b"7z\xbc\xaf": "7z",
}  # fmt: skip


def _refuse_compression(file):
    # Members of a compressed tar cannot be read at their offsets.
    try:
        with open(file, "rb") as stream:
            start = stream.read(8)
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from None
    for magic, name in COMPRESSIONS.items():
        if start.startswith(magic):
            raise UserError(
                f"{file} is not a complete, uncompressed tar but compressed ({name}), so that its "
                "members cannot be read one by one; unpack it first"
            )


def _why_member_is_left_out(name, member):
    if any(part.startswith(".") for part in name.split("/")):
        return "hidden files and folders"
    if not (member.isreg() or member.islnk() or member.issym()):
        return "pipes, sockets and devices"
    return other_suffix(name, SUFFIXES)


def _target(name, member, members):
    """The name of the member that a link leads to; None if it leads out or round in a circle."""
    for _ in range(20):
        if member is None or not (member.islnk() or member.issym()):
            return name if member is not None else None
        folder = posixpath.dirname(name) if member.issym() else ""
        name = posixpath.normpath(posixpath.join(folder, member.linkname))
        member = members.get(name)
    return None


def _place(member):
    return (None if member.issparse() else member.offset_data), member.size


def fingerprint(file: StrPath, name: str | None = None) -> str:
    """A line that changes when a file does: its name, size and time of change.

    It does not depend on the folder, so that a source can be moved.

    Args:
        file: path of the file.
        name: its name within the source; None takes the last part of the path.

    Raises:
        UserError: if it cannot be read.
    """
    try:
        status = os.stat(file)
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from None
    return f"{name or os.path.basename(file)} {status.st_size} {status.st_mtime_ns}"


# --- Decoding --------------------------------------------------------------------------------


def check_image(
    encoded: bytes,
    where: str,
    shown: Callable[[Size, Size], bool] | None = None,
    errors: RecordErrors | None = None,
) -> tuple[bytes, int, int, bool | None]:
    """Decodes an image to find corrupt files, and converts what not every decoder can read.

    JPEG and PNG of 8 bits in gray or RGB are kept byte for byte. Everything else (CMYK, palettes,
    transparency, 16 bits, other formats), and an image that is turned, becomes an RGB PNG. Only the
    first frame or page is used.

    Args:
        encoded: bytes of an image file.
        where: its name in errors.
        shown: function (stored (height, width), turned (height, width)) that tells whether an
            image with an EXIF orientation is to be turned; None always turns. It is not called for
            images without an orientation.
        errors: counts images with several frames.

    Returns:
        (bytes, height, width, turned): the size in pixels, and whether the image was turned, None
        if it has no orientation.

    Raises:
        UserError: if it cannot be decoded, or is too large.
    """
    with _decoding("image file", encoded, where):
        image = _opened(encoded)
        turned = True if _orientation(image) else None
        if turned and shown is not None:
            turned = bool(shown(image.size[::-1], _shown_size(image)))
        if errors is not None and _frames(image) > 1:
            errors.leave_out("further frames or pages of images", where)
        # Decoding now finds a corrupt file before a training does, hours later.
        image.load()
        if image.format in ("JPEG", "MPO", "PNG") and image.mode in ("RGB", "L") and not turned:
            return encoded, image.height, image.width, turned
        image = _rgb(ImageOps.exif_transpose(image) if turned else image)
        return png.encode(np.asarray(image)), image.height, image.width, turned


@contextlib.contextmanager
def _decoding(what, encoded, where):
    """Turns whatever a decoder raises into an error that names the file."""
    try:
        yield
    except Exception as error:  # decoders raise nearly every kind
        reason = one_line(error, 300)
        if isinstance(error, UnidentifiedImageError):
            remedy = REMEDIES.get(pathlib.PurePath(str(where)).suffix.lower())
            reason = "it is no image of a known format" + (f" ({remedy})" if remedy else "")
        if isinstance(error, Image.DecompressionBombError):
            size = re.search(r"\d+( x \d+)?", reason).group()
            reason = (
                f"it has {size} pixels, and TensorFlow reads at most {LARGEST_IMAGE:,}; scale it, "
                "or cut it into tiles"
            )
        if isinstance(error, MemoryError):
            reason = "there is not enough memory for it"
        reason = "it is empty" if not encoded else reason
        raise UserError(f"the {what} {where} cannot be decoded: {reason}") from None


def _opened(encoded):
    """An image of which only the header has been read."""
    image = Image.open(io.BytesIO(encoded), formats=FORMATS)
    if image.width * image.height > LARGEST_IMAGE:
        raise Image.DecompressionBombError(f"{image.width} x {image.height}")
    return image


def _orientation(image):
    """The EXIF orientation, 2 to 8, of an image that is not stored upright; else None."""
    try:
        found = image.getexif().get(ORIENTATION)
    except Exception:  # damaged metadata says nothing
        return None
    return found if found in range(2, 9) else None


def _shown_size(image):
    """(height, width) of an image turned as its orientation says."""
    return image.size if (_orientation(image) or 1) >= 5 else image.size[::-1]


def _frames(image):
    """Number of frames or pages; the further pictures of an MPO belong to the first."""
    return 1 if image.format == "MPO" else getattr(image, "n_frames", 1)


def _rgb(image):
    """Eight bits in RGB, from every mode; PIL's own conversion would clip more bits to white."""
    if image.mode.startswith("I") or image.mode == "F":
        image = Image.fromarray(_eight_bits(np.asarray(image), image.mode))
    if image.mode == "LAB":
        profiles = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        image = ImageCms.applyTransform(
            image, ImageCms.buildTransform(*profiles, inMode="LAB", outMode="RGB")
        )
    return image.convert("RGB")


def _eight_bits(values, mode):
    """Gray values of more bits or of floats, scaled where their range leaves no doubt.

    Raises:
        UserError: if the picture would be lost, because the range is none of 0 to 1 (floats), 0 to
            255 (floats and 32 bits) and 0 to 65535.
    """
    low, high = values.min(), values.max()
    if mode == "F" and low >= 0 and high <= 1:
        return np.rint(values * 255).astype("uint8")
    if mode in ("F", "I") and low >= 0 and 16 <= high <= 255:
        return np.rint(values).astype("uint8")
    if low >= 0 and (4096 <= high <= 65535 or high == 0):
        return (values // 257).astype("uint8")
    raise UserError(
        f"its gray values go from {low:g} to {high:g}, and how these become 8 bits is not clear; "
        "scale them to 0 to 65535, or to 8 bits"
    )


def mask_size(encoded: bytes, where: str) -> Size:
    """(height, width) in pixels of a mask, turned as its EXIF orientation says, from its header.

    Raises:
        UserError: if it cannot be decoded.
    """
    with _decoding("mask", encoded, where):
        return _shown_size(_opened(encoded))


def check_mask(
    encoded: bytes, where: str, height: int, width: int, names: Mapping[int, str]
) -> bytes:
    """Checks a mask and returns it as a gray PNG.

    Args:
        encoded: bytes of a losslessly compressed image file, gray or with a palette, whose values
            are class ids. RGB is accepted if all three channels are equal, and more bits if all
            values are integers up to 255. It is turned as its EXIF orientation says.
        where: its name in errors.
        height, width: size of its image in pixels.
        names: `{class id: name}`; empty if the classes are not known.

    Raises:
        UserError: if it cannot be decoded, is compressed with loss, has colors instead of class
            ids, another size than the image, or an unknown class id.
    """
    with _decoding("mask", encoded, where):
        image = _opened(encoded)
        size = _shown_size(image)
        if size == (height, width):  # nothing else is worth decoding
            image.load()
    if size != (height, width):
        hint = "; was one of them turned (EXIF)?" if size == (width, height) else ""
        raise UserError(
            f"the mask {where} is {size[1]} x {size[0]} pixels, its image is {width} x "
            f"{height}{hint}"
        )
    _refuse_loss(image, encoded, where)
    pixels = _class_ids(image, where)
    present = np.flatnonzero(np.bincount(pixels.ravel(), minlength=256)[:255])
    unknown = [int(value) for value in present if names and int(value) not in names]
    if unknown:
        raise UserError(
            f"the mask {where} has the class id {unknown[0]}; known are 0 to {max(names)}, and 255 "
            "for ignored pixels"
        )
    return png.encode(pixels)


def _refuse_loss(image, encoded, where):
    lossy = (
        image.format not in (*LOSSLESS, "WEBP")
        or (image.format == "WEBP" and b"VP8L" not in encoded[:4096])
        or image.info.get("compression") in ("jpeg", "tiff_jpeg", "webp")
    )
    if lossy:
        raise UserError(
            f"the mask {where} is compressed with loss ({image.format}), which changes class ids; "
            "save masks as PNG where they are made (a copy of this file keeps the loss)"
        )
    if _frames(image) > 1:
        raise UserError(f"the mask {where} has {_frames(image)} frames or pages; a mask has one")


def _class_ids(image, where):
    """`[H, W]` uint8 of the values of a mask."""
    if _orientation(image):
        image = ImageOps.exif_transpose(image)
    values = np.asarray(image)
    if values.ndim == 3:
        opaque = image.mode in ("RGB", "LA", "RGBA") and (
            image.mode == "RGB" or (values[..., -1] == 255).all()
        )
        colors = values[..., :-1] if image.mode in ("LA", "RGBA") else values
        if not opaque or (colors != colors[..., :1]).any():
            raise UserError(
                f"the mask {where} holds colors (mode {image.mode}); a mask is a PNG, gray or "
                "with a palette, whose values are class ids and 255 for ignored pixels"
            )
        values = colors[..., 0]
    if values.dtype != "uint8":
        wrong = values[~((values >= 0) & (values <= 255) & (values == np.rint(values)))]
        if wrong.size:
            raise UserError(
                f"the mask {where} has the value {wrong[0]:g}; values are class ids, whole numbers "
                "from 0 to 254, and 255 for ignored pixels"
            )
    return np.ascontiguousarray(values).astype("uint8")
