"""Encoded images in memory: PNG bytes from pixels, and pixels from PNG or JPEG bytes."""

import io

import numpy as np
from PIL import Image


def decode(encoded: bytes) -> Image.Image:
    """Opens the bytes of a PNG, or of any other format that Pillow knows.

    Only the header is read here. Pillow decodes the pixels when they are first asked for, such as
    by `np.asarray`, so that the size of an image costs little.

    Raises:
        PIL.UnidentifiedImageError: if the bytes are not an image.
    """
    return Image.open(io.BytesIO(encoded))


def encode(pixels: np.ndarray | Image.Image) -> bytes:
    """PNG bytes of pixels, uint8 `[H, W, 3]` or `[H, W]`, or of a Pillow image."""
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
