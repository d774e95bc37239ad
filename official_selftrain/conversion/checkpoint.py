"""Reads, converts, and writes released TF1 checkpoints."""

from __future__ import annotations

import dataclasses
import gzip
import pathlib
import re
import shutil
import tarfile
import tempfile
import zlib
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from official_selftrain import config as config_lib
from official_selftrain.conversion.architecture import describe, detect
from official_selftrain.conversion.released_config import experiment
from official_selftrain.utils.errors import UserError, one_line
from official_selftrain.utils.types import StrPath

if TYPE_CHECKING:
    import keras

Arrays = dict[str, np.ndarray]
AVERAGE = "/ExponentialMovingAverage"
# Variables that this package's networks do not have, and what they are.
SKIPPED = {
    r".*/Momentum$": "optimizer slot",
    r".*/(Adam|Adam_1|RMSProp|RMSProp_1)$": "optimizer slot",
    rf".*{AVERAGE}$": "moving average of the weights",
    r"global_step$": "step counter",
    r"moving_normalizer$": "moving average of the loss normalizer",
    r"efficientnet-\w+/head/": "ImageNet classifier, unused by the task",
}


# --- Names -----------------------------------------------------------------------------------


def variables_by_name(model: keras.Model) -> dict[str, keras.Variable]:
    """The variables of a model of this package, by their names in a released checkpoint."""
    return {
        released_name(layer, variable): variable
        for layer in model.layers
        for variable in layer.weights
        if "seed_generator" not in variable.path
    }


def released_name(layer: keras.layers.Layer, variable: keras.Variable) -> str:
    """The name of a layer's variable in a released checkpoint.

    Layers are named after the released scopes, with dots, because Keras allows no slashes.
    """
    leaf = variable.name
    if leaf == "kernel" and type(layer).__name__ == "DepthwiseConv2D":
        leaf = "depthwise_kernel"
    return layer.name.replace(".", "/") + "/" + leaf


# --- Conversion ------------------------------------------------------------------------------


# Limits on archives, which may be hostile, in bytes. An EfficientNet-L2 with its optimizer slots
# has 6e9 bytes, and weights hardly compress.
LARGEST_CHECKPOINT = 16 * 2**30
LARGEST_RATIO, SMALL = 100, 16 * 2**20  # unpacked / packed size, above SMALL
LARGEST_READ = 16 * 2**20  # what `tarfile` may read into memory at once
MOST_MEMBERS = 10_000
_CHECKPOINT_FILE = r"checkpoint|.*\.index|.*\.data-\d{5}-of-\d{5}"


def read_checkpoint(path: StrPath) -> Arrays:
    """Reads a TF1 checkpoint.

    Args:
        path: a prefix, a folder with one checkpoint or a `checkpoint` file, or a `.tar.gz` of such
            a folder.

    Returns:
        `{variable name: array}`.

    Raises:
        UserError: if there is no checkpoint or more than one, if it is damaged, or if an archive
            unpacks to more bytes than a checkpoint could have.
    """
    path = pathlib.Path(path)
    if path.name.endswith((".tar.gz", ".tgz")):
        return _read_archive(path)
    if path.is_dir():
        path = _prefix_in(path, path)
    path = path.with_suffix("") if path.suffix == ".index" else path
    if not path.with_name(path.name + ".index").is_file():
        raise UserError(
            f"no checkpoint at {path}: expected {path.name}.index and {path.name}.data-*; "
            "give a prefix, a folder, or a .tar.gz"
        )
    return _read_arrays(path, path)


def _read_arrays(prefix: pathlib.Path, where: StrPath) -> Arrays:
    """The arrays of a checkpoint, which errors call `where`."""
    import tensorflow as tf

    try:
        reader = tf.train.load_checkpoint(str(prefix))
        shapes, types = reader.get_variable_to_shape_map(), reader.get_variable_to_dtype_map()
        # Object-based checkpoints of TF2 store a description of their objects as a string.
        names = [name for name, dtype in types.items() if dtype != tf.string]
        # A damaged index may hold shapes for which no memory suffices.
        wanted = sum(np.prod(shapes[name], dtype=float) * types[name].size for name in names)
        size = sum(f.stat().st_size for f in prefix.parent.glob(f"{_literal(prefix.name)}.data-*"))
        if wanted > size:
            raise UserError(f"{wanted:,.0f} bytes of weights in a file of {size:,}")
        return {name: reader.get_tensor(name) for name in names}
    except Exception as error:  # TensorFlow raises many kinds for damaged files
        reason = one_line(error).replace(str(prefix), prefix.name)
        raise UserError(
            f"the checkpoint {where} is damaged or incomplete ({reason}); download it again"
        ) from None


def _literal(name: str) -> str:
    """A glob pattern that matches only `name`."""
    return re.sub(r"([*?[])", r"[\1]", name)


def is_checkpoint(path: StrPath) -> bool:
    """Whether `path` is a prefix, a folder, or an archive for `read_checkpoint`."""
    path = pathlib.Path(path)
    if path.is_dir():
        return any(path.glob("*.index"))
    archive = path.is_file() and path.name.endswith((".tar.gz", ".tgz", ".index"))
    return archive or path.with_name(path.name + ".index").is_file()


def load_backbone(model: keras.Model, backbone: str, path: StrPath) -> None:
    """Loads a network's backbone from a TF1 checkpoint, such as Noisy Student's.

    Moving averages of the weights are preferred if the checkpoint has them, because the released
    accuracy is theirs.

    Args:
        model: a network with the backbone.
        backbone: the first part of its variables' names, such as "efficientnet-b7".
        path: see `read_checkpoint`.

    Raises:
        UserError: if a variable of the backbone is missing or has another shape.
    """
    arrays = read_checkpoint(path)
    averages = {
        name.removesuffix(AVERAGE): array
        for name, array in arrays.items()
        if name.endswith(AVERAGE)
    }
    inside = f"{backbone}/"
    wanted = {n: v for n, v in variables_by_name(model).items() if n.startswith(inside)}
    found = {name: array for name, array in (arrays | averages).items() if name in wanted}
    # The rest of the checkpoint, the classifier's head and its optimizer, is not an error.
    _refuse_misfits(wanted, found, [])
    for name, variable in wanted.items():
        variable.assign(found[name])


def _prefix_in(folder: pathlib.Path, where: pathlib.Path) -> pathlib.Path:
    """The only checkpoint of a folder, or the one that its `checkpoint` file calls the newest."""
    prefixes = sorted(file.with_suffix("") for file in folder.rglob("*.index"))
    if len(prefixes) == 1:
        return prefixes[0]
    for state in sorted(folder.rglob("checkpoint")):
        text = state.read_bytes().decode("utf-8", "replace") if state.is_file() else ""
        newest = re.search(r'^model_checkpoint_path: "(.*)"', text, re.MULTILINE)
        # Only the name counts: the file may hold an absolute path of another machine.
        prefix = state.with_name(pathlib.PurePath(newest[1]).name) if newest else None
        if prefix in prefixes:
            return prefix
    names = ", ".join(str(prefix.relative_to(folder)) for prefix in prefixes[:10]) or "none"
    raise UserError(
        f"{where} must hold one TF1 checkpoint, NAME.index and NAME.data-* (found: {names})"
        + ("; unpack it and give the prefix of one of them" if prefixes else "")
    )


def _read_archive(path: pathlib.Path) -> Arrays:
    with tempfile.TemporaryDirectory() as folder:
        try:
            others = _unpack(path, pathlib.Path(folder))
        except UserError as error:
            raise UserError(f"cannot unpack {path}: {error}") from None
        except Exception as error:  # tarfile, gzip and zlib raise many kinds for damaged files
            raise UserError(
                f"cannot unpack {path}: {getattr(error, 'strerror', None) or one_line(error)}; "
                "download it again"
            ) from None
        try:
            prefix = _prefix_in(pathlib.Path(folder), path)
        except UserError as error:
            also = f"; the archive holds {', '.join(map(repr, others[:5]))}" if others else ""
            raise UserError(f"{error}{also}") from None
        return _read_arrays(prefix, f"{prefix.relative_to(folder)} of {path}")


def _unpack(path: pathlib.Path, folder: pathlib.Path) -> list[str]:
    """Unpacks only the files of a checkpoint and returns the names of the other files."""
    most = min(LARGEST_CHECKPOINT, LARGEST_RATIO * path.stat().st_size + SMALL)
    with open(path, "rb") as file:
        compressed = file.peek(2)[:2] == b"\x1f\x8b"  # some browsers unzip downloads
        stream: Any = _Bounded(gzip.GzipFile(fileobj=file) if compressed else file, most)
        others = []
        with tarfile.open(fileobj=stream, mode="r:") as archive:
            for number, member in enumerate(archive):
                # The size in the header: a sparse file unpacks to more bytes than the archive has.
                stream.count(member.size)
                if number >= MOST_MEMBERS:
                    raise UserError(f"it holds more than {MOST_MEMBERS:,} files")
                name = pathlib.PurePosixPath(member.name)
                if not (member.isfile() and re.fullmatch(_CHECKPOINT_FILE, name.name)):
                    others.append(member.name)
                elif name.is_absolute() or ".." in name.parts:
                    raise UserError(f"the path {member.name!r} leaves the archive's folder")
                else:
                    target = folder / name
                    target.parent.mkdir(parents=True, exist_ok=True)
                    source: Any = archive.extractfile(member)  # None for folders only
                    with source, open(target, "wb") as copy:
                        shutil.copyfileobj(source, copy, 2**20)
    return others


class _Bounded:
    """A stream for `tarfile` that refuses long reads and positions beyond `most` bytes.

    A small archive could otherwise unpack to more than the memory or the disk holds.
    """

    def __init__(self, stream: Any, most: int):
        self.stream, self.most, self.counted = stream, most, 0
        self.tell = stream.tell

    def read(self, size: int = -1) -> bytes:
        """Reads `size` bytes."""
        if not 0 <= size <= LARGEST_READ:
            raise UserError(f"a name or header has {size:,} bytes; this is not a checkpoint")
        self._check(self.tell() + size)
        return self.stream.read(size)

    def seek(self, position: int) -> int:
        """Moves to a position."""
        self._check(position)
        return self.stream.seek(position)

    def count(self, size: int) -> None:
        """Counts the bytes that a file will have, which can exceed those in the archive."""
        self.counted += size
        self._check(self.counted)

    def _check(self, size: int) -> None:
        if size > self.most:
            raise UserError(
                f"it unpacks to more than {self.most:,} bytes, which is not plausible for a "
                "checkpoint of its size"
            )


@dataclasses.dataclass(frozen=True)
class Conversion:
    """The result of `convert`.

    Attributes:
        model: the Keras model with the weights.
        config: the matching experiment.
        mapped: names of the loaded variables, sorted.
        skipped: `{name: reason}` of the variables that were not loaded.
        checksum: CRC-32 of the loaded arrays, in the order of their names.
    """

    model: keras.Model
    config: config_lib.Config
    mapped: list[str]
    skipped: dict[str, str]
    checksum: int


def convert(
    checkpoint: StrPath,
    config_values: dict[str, Any],
    image_size: tuple[int, int] | None = None,
) -> Conversion:
    """Converts a released TF1 checkpoint to a Keras model.

    Args:
        checkpoint: see `read_checkpoint`.
        config_values: the released configuration as nested dicts, complete or not. Missing values
            are recognized by the variables' names and shapes if possible; otherwise they are the
            released defaults.
        image_size: `(height, width)` of the network's input in pixels; None takes the config's.

    Raises:
        UserError: if the checkpoint is damaged, or its variables are not those of the network.
    """
    from official_selftrain.tasks import make_task

    arrays = read_checkpoint(checkpoint)
    found = detect({name: array.shape for name, array in arrays.items()})
    config = config_lib.config_from_dict(experiment(config_values, found))
    if image_size is not None and not any(side % 128 for side in image_size):
        config = config.override({"task.image_size": image_size})
    # Not `changed`: SpineNet works with multiples of 8, which training refuses.
    size = image_size or config.task.image_size
    try:
        model = make_task(config.task.model_copy(update={"image_size": tuple(size)})).build_model()
    except ValueError as error:
        raise UserError(f"cannot build the network: {error}") from None
    mapped, skipped = assign(model, arrays, found)
    checksum = 0
    for name in mapped:
        checksum = zlib.crc32(np.ascontiguousarray(arrays[name]).tobytes(), checksum)
    return Conversion(model, config, mapped, skipped, checksum)


def assign(
    model: keras.Model, arrays: Arrays, found: dict[str, Any] | None = None
) -> tuple[list[str], dict[str, str]]:
    """Loads arrays into a model; every name on both sides is accounted for.

    Args:
        model: the network.
        arrays: `{released name: array}`.
        found: result of `detect`, for error messages.

    Returns:
        Names of the loaded variables, sorted; `{name: reason}` of the skipped ones.

    Raises:
        UserError: if variables are missing, unexpected, or have another shape.
    """
    variables = variables_by_name(model)
    skipped = {
        name: reason
        for name in arrays
        if name not in variables and (reason := _reason_to_skip(name)) is not None
    }
    _refuse_misfits(variables, arrays, set(arrays) - set(variables) - set(skipped), found)
    for name, variable in variables.items():
        variable.assign(arrays[name])
    return sorted(variables), skipped


def _refuse_misfits(
    variables: Mapping[str, keras.Variable],
    arrays: Arrays,
    unexpected: Collection[str],
    found: dict[str, Any] | None = None,
) -> None:
    """Raises a `UserError` that lists all variables that do not match."""
    faults = [f"missing {name}" for name in sorted(set(variables) - set(arrays))]
    faults += [f"unexpected {name} {tuple(arrays[name].shape)}" for name in sorted(unexpected)]
    faults += [
        f"misshapen {name}: {tuple(arrays[name].shape)} in the checkpoint, "
        f"{tuple(variable.shape)} in the network"
        for name, variable in variables.items()
        if name in arrays and tuple(variable.shape) != tuple(arrays[name].shape)
    ]
    if faults:
        seems = f"; its variables look like {describe(found)}" if found else ""
        more = f"; and {len(faults) - 20} more" if len(faults) > 20 else ""
        raise UserError(
            f"the checkpoint does not fit the network of the config ({len(faults)} variables)"
            f"{seems}: " + "; ".join(faults[:20]) + more
        )


def _reason_to_skip(name: str) -> str | None:
    for pattern, reason in SKIPPED.items():
        if re.match(pattern, name):
            return reason
    return None


def forward_summary(model: keras.Model) -> dict[str, tuple[float, float]]:
    """Runs a network on one image of standard normal noise, always the same.

    Returns:
        `{output name: (mean, standard deviation)}`.

    Raises:
        UserError: if an output is NaN or infinite.
    """
    shape = (1, *model.input.shape[1:])
    image = np.random.default_rng(0).standard_normal(shape).astype("float32")
    outputs = model(image, training=False)
    summary = {}
    for name, value in outputs.items():
        value = np.asarray(value)
        if not np.isfinite(value).all():
            raise UserError(
                f"the output {name} of the converted network is not finite; the checkpoint may be "
                "damaged or of a training that diverged"
            )
        summary[name] = (float(value.mean()), float(value.std()))
    return summary


def write_checkpoint(model: keras.Model, prefix: StrPath) -> None:
    """Writes a model as a name-based TF1 checkpoint, which `read_checkpoint` can read.

    Args:
        model: a network of this package.
        prefix: path of the checkpoint without suffix.

    Raises:
        UserError: if it cannot be written.
    """
    import tensorflow as tf

    variables = variables_by_name(model)
    try:
        pathlib.Path(prefix).parent.mkdir(parents=True, exist_ok=True)
        # The savers of TF2 write object-based checkpoints, which TF1 cannot restore by name.
        tf.raw_ops.SaveV2(
            prefix=str(prefix),
            tensor_names=list(variables),
            shape_and_slices=[""] * len(variables),
            tensors=[tf.convert_to_tensor(variable) for variable in variables.values()],
        )
    except (OSError, tf.errors.OpError) as error:
        raise UserError(f"cannot write the checkpoint {prefix}: {one_line(error)}") from None


def load_model(file: StrPath) -> keras.Model:
    """Loads the network of a `.keras` file. Code that the file may contain is not executed.

    Raises:
        UserError: if the file is missing, damaged, or holds something else.
    """
    import keras

    import official_selftrain.applications.layers  # noqa: F401  registers the layers of the model

    if not pathlib.Path(file).is_file():
        raise UserError(f"the model {file} does not exist")
    try:
        model = keras.saving.load_model(file, compile=False, safe_mode=True)
    except Exception as error:  # Keras and zipfile raise many kinds for damaged files
        reason = one_line(f"{type(error).__name__}: {error}", 300)
        raise UserError(
            f"{file} is not a network that convert_checkpoint wrote, or is damaged ({reason})"
        ) from None
    if not (isinstance(model, keras.Model) and model.weights):
        raise UserError(f"{file} holds a {type(model).__name__}, which is not a network")
    return model
