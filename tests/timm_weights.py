"""Weights and an image that are made of names, for the comparison with timm.

`benchmarks/timm_parity.py` uses this module where only timm is installed, so it needs only NumPy.
"""

import zlib

import numpy as np


def hashed_tensor(name, shape):
    """Numbers as in a trained network of PyTorch, seeded by the name of the tensor."""
    z = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
    if name.endswith("running_var"):
        value = np.exp(0.2 * z)
    elif len(shape) > 1:
        value = z / np.sqrt(np.prod(shape[1:]))  # a larger factor explodes in deep networks
    else:
        value = 0.1 * z + name.endswith("weight")
    return value.astype("float32")


def checksum(shapes):
    """CRC-32 of the names and shapes of all tensors of weights."""
    lines = sorted(f"{name} {list(shape)}" for name, shape in shapes.items())
    return zlib.crc32("\n".join(lines).encode())


def image(size=128):
    """A normalized image `[1, size, size, 3]` of noise."""
    return np.random.default_rng(0).standard_normal((1, size, size, 3)).astype("float32")


def probes(levels):
    """A few numbers of each level: `{level: [mean, deviation, 6 values]}` of `[1, h, w, C]`."""
    found = {}
    for level, x in levels.items():
        x = np.asarray(x, "float64")
        places = np.random.default_rng(int(level)).integers(0, x.size, 6)
        found[level] = [float(v) for v in (x.mean(), x.std(), *x.reshape(-1)[places])]
    return found
