"""Reads the weights in a PyTorch file without PyTorch, and without running code from the file."""

import collections
import pickle

import numpy as np

from official_selftrain.utils.types import StrPath


def read_state_dict(path: StrPath) -> dict[str, np.ndarray]:
    """Reads a state dict in the file format that PyTorch had before version 1.6.

    Args:
        path: the file, a sequence of pickles followed by the numbers of each storage.

    Returns:
        `{name: array}`. The tensors may have any strides in the file; the arrays are contiguous.

    Raises:
        ValueError: if the file holds anything but tensors of float32 or int64, or if a tensor lies
            outside of its storage.
    """
    with open(path, "rb") as file:
        for _ in range(3):  # magic number, protocol version, type sizes
            _StateDict(file).load()
        tensors = _StateDict(file).load()
        data = {}
        types = {key: kind for key, kind, *_ in (tensor[0] for tensor in tensors.values())}
        for key in _StateDict(file).load():
            count = int(np.frombuffer(file.read(8), "<i8")[0])
            dtype = np.dtype(types[key])
            data[key] = np.frombuffer(file.read(count * dtype.itemsize), dtype)
    return {name: _strided(data[storage[0]], *rest) for name, (storage, *rest) in tensors.items()}


def _strided(data, offset, shape, strides):
    # Checked here because `as_strided` would read whatever memory lies there.
    last = offset + sum((side - 1) * stride for side, stride in zip(shape, strides, strict=True))
    if min((offset, *shape, *strides)) < 0 or (np.prod(shape) and last >= len(data)):
        raise ValueError(
            f"A tensor lies outside of its storage: offset {offset}, shape {tuple(shape)}, strides "
            f"{tuple(strides)}, but {len(data)} numbers. The file is damaged."
        )
    strides = [stride * data.itemsize for stride in strides]
    return np.lib.stride_tricks.as_strided(data[offset:], shape, strides).copy()


_ALLOWED = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): lambda *tensor: tensor[:4],
    ("torch", "FloatStorage"): "<f4",
    ("torch", "LongStorage"): "<i8",
}


class _StateDict(pickle.Unpickler):
    """Unpickles a state dict as `{name: (storage, offset, shape, strides)}`, and nothing else.

    A pickle can call any function, so only those of a state dict are known.
    """

    def find_class(self, module, name):
        if (module, name) not in _ALLOWED:
            raise ValueError(
                f"The file holds {module}.{name}, which no state dict needs. It may be malicious."
            )
        return _ALLOWED[module, name]

    def persistent_load(self, saved):
        _, kind, key, *_ = saved
        return key, kind
