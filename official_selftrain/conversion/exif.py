"""The EXIF orientation of an image, read and applied by TensorFlow inside a SavedModel."""

from collections.abc import Callable

import tensorflow as tf

from official_selftrain.utils.types import Tensor

# The files are parsed by hand, because a SavedModel runs where Pillow may not be installed.


def upright(image: Tensor, orientation: Tensor) -> Tensor:
    """Rotates and mirrors an image `[H, W, 3]` according to its EXIF orientation, 1 to 8.

    Returns:
        `[H, W, 3]`, or `[W, H, 3]` for the orientations 5 to 8.
    """

    def when(orientations, turn, image):
        asked = tf.reduce_any(orientation == tf.constant(orientations))
        return tf.cond(asked, lambda: turn(image), lambda: image)

    image = when([5, 6, 7, 8], lambda x: tf.transpose(x, [1, 0, 2]), image)
    image = when([2, 3, 6, 7], lambda x: tf.reverse(x, [1]), image)
    return when([3, 4, 7, 8], lambda x: tf.reverse(x, [0]), image)


def exif_orientation(encoded: Tensor) -> Tensor:
    """Reads the EXIF orientation of an image file.

    As in Pillow, the XMP packet of a JPEG file counts if EXIF has no orientation.

    Args:
        encoded: scalar string, the bytes of a JPEG or PNG file.

    Returns:
        int32 scalar, 1 to 8; 1 if there is none or it is damaged.
    """
    is_png = tf.strings.substr(encoded, 0, 8) == b"\x89PNG\r\n\x1a\n"
    value = tf.cond(
        is_png, lambda: _orientation_in_png(encoded), lambda: _orientation_in_jpeg(encoded)
    )
    return tf.where((value >= 1) & (value <= 8), tf.cast(value, tf.int32), 1)


def _orientation_in_png(encoded: Tensor) -> Tensor:
    """The orientation, 0 for none."""
    # Chunks need no parsing: these four letters do not occur by chance before a TIFF header.
    parts = tf.strings.split(encoded, "eXIf", maxsplit=1)
    return _orientation_in_tiff(tf.concat([parts, [b""]], axis=0)[1])


def _orientation_in_jpeg(encoded: Tensor) -> Tensor:
    """The orientation in the first EXIF segment or else the first XMP segment; 0 for none."""
    number, size = _reader(encoded)

    def before_the_pixels(place, exif, xmp):
        ends = tf.constant([0xD9, 0xDA], tf.int64)
        return (number(place, 1) == 0xFF) & ~tf.reduce_any(number(place + 1, 1) == ends)

    def step(place, exif, xmp):
        segment = (number(place, 2) == 0xFFE1) & (place + 4 < size)
        head = number(place + 4, 4)
        exif = tf.where(segment & (head == 0x45786966) & (exif == 0), place, exif)  # "Exif"
        xmp = tf.where(segment & (head == 0x68747470) & (xmp == 0), place, xmp)  # "http"
        length = tf.where(number(place + 1, 1) == 0xFF, -one, number(place + 2, 2))  # or padding
        return place + 2 + length, exif, xmp

    def content(place, skipped):
        start = tf.minimum(place + 4 + skipped, size)
        length = tf.maximum(number(place + 2, 2) - 2 - skipped, 0)
        return tf.where(place > 0, tf.strings.substr(encoded, start, length), b"")

    zero, one = tf.constant(0, tf.int64), tf.constant(1, tf.int64)
    start = tf.where(number(zero, 2) == 0xFFD8, 2 * one, size)
    _, exif, xmp = tf.while_loop(before_the_pixels, step, (start, zero, zero))
    value = _orientation_in_tiff(content(exif, 6))
    return tf.where(value > 0, value, _orientation_in_xmp(content(xmp, 0)))


def _orientation_in_tiff(tiff: Tensor) -> Tensor:
    """The value of tag 274, the orientation, in the first directory of a TIFF; 0 for none."""
    number, size = _reader(tiff)
    head = tf.strings.substr(tiff, 0, 4)
    little = head == b"II*\0"
    directory = number(tf.constant(4, tf.int64), 4, little)
    count = tf.minimum(number(directory, 2, little), size // 12)
    entries = directory + 2 + 12 * tf.range(count)
    kind = number(entries + 2, 2, little)
    short, long = kind == 3, kind == 4
    found = (number(entries, 2, little) == 274) & (number(entries + 4, 4, little) == 1)
    found &= (short | long) & (entries + 12 <= size) & (little | (head == b"MM\0*"))
    values = tf.where(short, number(entries + 8, 2, little), number(entries + 8, 4, little))
    return tf.concat([[0], values[found]], axis=0)[-1]


def _orientation_in_xmp(packet: Tensor) -> Tensor:
    """The orientation in an XMP packet; 0 for none."""
    digit = tf.strings.regex_replace(packet, r"^\C*?tiff:Orientation(?:=\"|>)([0-9])\C*$", r"\1")
    number, size = _reader(digit)
    return tf.where(size == 1, number(tf.constant(0, tf.int64), 1) - ord("0"), 0)


def _reader(text: Tensor) -> tuple[Callable[..., Tensor], Tensor]:
    """Reads numbers from a string.

    Returns:
        A function (int64 positions, width in bytes, little endian) -> unsigned numbers as int64,
        where bytes beyond the end are 0; and the length of the string.
    """
    size = tf.cast(tf.strings.length(text), tf.int64)
    data = tf.concat([tf.io.decode_raw(text, tf.uint8), [0]], axis=0)

    def number(places, width, little=False):
        at = tf.minimum(places[..., None] + tf.range(width, dtype=tf.int64), size)
        powers = 256 ** tf.range(width, dtype=tf.int64)
        powers = tf.where(little, powers, powers[::-1])
        return tf.reduce_sum(tf.cast(tf.gather(data, at), tf.int64) * powers, axis=-1)

    return number, size
