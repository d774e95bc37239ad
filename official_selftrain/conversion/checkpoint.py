"""The released TF1 checkpoints: their variable names, read, written and converted."""

import dataclasses
import gzip
import pathlib
import re
import shutil
import tarfile
import tempfile
import zlib

import numpy as np

from official_selftrain import config as config_lib
from official_selftrain.conversion.architecture import describe, detect
from official_selftrain.conversion.released_config import experiment
from official_selftrain.utils.errors import UserError

AVERAGE = "/ExponentialMovingAverage"
# Variables that a network for inference or training does not need, and why.
SKIPPED = {
    r".*/Momentum$": "optimizer slot",
    r".*/(Adam|Adam_1|RMSProp|RMSProp_1)$": "optimizer slot",
    rf".*{AVERAGE}$": "moving average of the weights",
    r"global_step$": "step counter",
    r"moving_normalizer$": "moving average of the loss normalizer",
    r"efficientnet-\w+/head/": "ImageNet classifier, unused by the task",
}


# --- Names -----------------------------------------------------------------------------------


def variables_by_name(model):
    """`{name in a released checkpoint: variable}` of a model built by this package."""
    return {
        released_name(layer, variable): variable
        for layer in model.layers
        for variable in layer.weights
        if "seed_generator" not in variable.path
    }


def released_name(layer, variable):
    leaf = variable.name
    if leaf == "kernel" and type(layer).__name__ == "DepthwiseConv2D":
        leaf = "depthwise_kernel"
    return layer.name.replace(".", "/") + "/" + leaf


# --- Conversion ------------------------------------------------------------------------------


# An EfficientNet-L2 with its optimizer slots has 6e9 bytes, and weights hardly compress.
LARGEST_CHECKPOINT = 16 * 2**30
LARGEST_RATIO, SMALL = 100, 16 * 2**20
LARGEST_READ = 16 * 2**20
MOST_MEMBERS = 10_000
_CHECKPOINT_FILE = r"checkpoint|.*\.index|.*\.data-\d{5}-of-\d{5}"


def read_checkpoint(path):
    """`{variable name: array}` of a TF1 checkpoint.

    Args:
        path: a prefix, a folder with one checkpoint or a `checkpoint` file, or a `.tar.gz` of one.

    Raises:
        UserError: if there is none, several, or it is damaged; if an archive unpacks to much more
            than a checkpoint would.
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
            "give a prefix, a folder or a .tar.gz"
        )
    return _read_arrays(path, path)


def _read_arrays(prefix, where):
    """The arrays of a checkpoint, called `where` in errors."""
    import tensorflow as tf

    try:
        reader = tf.train.load_checkpoint(str(prefix))
        shapes, types = reader.get_variable_to_shape_map(), reader.get_variable_to_dtype_map()
        names = [name for name, dtype in types.items() if dtype != tf.string]
        # A damaged index may tell shapes that no memory holds.
        wanted = sum(np.prod(shapes[name], dtype=float) * types[name].size for name in names)
        there = sum(f.stat().st_size for f in prefix.parent.glob(f"{_literal(prefix.name)}.data-*"))
        if wanted > there:
            raise UserError(f"{wanted:,.0f} bytes of weights in a file of {there:,}")
        return {name: reader.get_tensor(name) for name in names}
    except Exception as error:  # TensorFlow raises many kinds for damaged files
        reason = _one_line(error).replace(str(prefix), prefix.name)
        raise UserError(
            f"the checkpoint {where} is damaged or cut short ({reason}); fetch it again"
        ) from None


def _literal(name):
    """A name as a pattern that matches it alone."""
    return re.sub(r"([*?[])", r"[\1]", name)


def _one_line(error):
    return " ".join(str(error).split())[:200] or type(error).__name__


def is_checkpoint(path):
    """Whether `path` is a prefix, a folder or an archive for `read_checkpoint`."""
    path = pathlib.Path(path)
    if path.is_dir():
        return any(path.glob("*.index"))
    archive = path.is_file() and path.name.endswith((".tar.gz", ".tgz", ".index"))
    return archive or path.with_name(path.name + ".index").is_file()


def load_backbone(model, backbone, path):
    """Starts a network's backbone from a TF1 checkpoint that has it, such as Noisy Student's.

    Where the checkpoint has moving averages of the weights, these are taken, as for evaluation.

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
    _refuse_misfits(wanted, found, [])
    for name, variable in wanted.items():
        variable.assign(found[name])


def _prefix_in(folder, where):
    """The one checkpoint of a folder, or the newest as its `checkpoint` file tells."""
    prefixes = sorted(file.with_suffix("") for file in folder.rglob("*.index"))
    if len(prefixes) == 1:
        return prefixes[0]
    for state in sorted(folder.rglob("checkpoint")):
        text = state.read_bytes().decode("utf-8", "replace") if state.is_file() else ""
        newest = re.search(r'^model_checkpoint_path: "(.*)"', text, re.MULTILINE)
        # It may have been written elsewhere, with the path that it had there.
        prefix = state.with_name(pathlib.PurePath(newest[1]).name) if newest else None
        if prefix in prefixes:
            return prefix
    names = ", ".join(str(prefix.relative_to(folder)) for prefix in prefixes[:10]) or "none"
    raise UserError(
        f"{where} must hold one TF1 checkpoint, NAME.index and NAME.data-* (found: {names})"
        + ("; unpack it, and give the prefix of one" if prefixes else "")
    )


def _read_archive(path):
    with tempfile.TemporaryDirectory() as folder:
        try:
            others = _unpack(path, pathlib.Path(folder))
        except UserError as error:
            raise UserError(f"cannot unpack {path}: {error}") from None
        except Exception as error:  # tarfile, gzip and zlib raise many kinds for damaged files
            raise UserError(
                f"cannot unpack {path}: {getattr(error, 'strerror', None) or _one_line(error)}; "
                "fetch it again"
            ) from None
        try:
            prefix = _prefix_in(pathlib.Path(folder), path)
        except UserError as error:
            also = f"; the archive holds {', '.join(map(repr, others[:5]))}" if others else ""
            raise UserError(f"{error}{also}") from None
        return _read_arrays(prefix, f"{prefix.relative_to(folder)} of {path}")


def _unpack(path, folder):
    """Unpacks the files of a checkpoint, and nothing else; returns the names of the others."""
    most = min(LARGEST_CHECKPOINT, LARGEST_RATIO * path.stat().st_size + SMALL)
    with open(path, "rb") as file:
        compressed = file.peek(2)[:2] == b"\x1f\x8b"  # browsers unzip some downloads
        stream = _Bounded(gzip.GzipFile(fileobj=file) if compressed else file, most)
        others = []
        with tarfile.open(fileobj=stream, mode="r:") as archive:
            for number, member in enumerate(archive):
                stream.count(member.size)
                if number >= MOST_MEMBERS:
                    raise UserError(f"it holds more than {MOST_MEMBERS:,} files")
                name = pathlib.PurePosixPath(member.name)
                if not (member.isfile() and re.fullmatch(_CHECKPOINT_FILE, name.name)):
                    others.append(member.name)
                elif name.is_absolute() or ".." in name.parts:
                    raise UserError(f"{member.name!r} lies outside of the archive's folder")
                else:
                    target = folder / name
                    target.parent.mkdir(parents=True, exist_ok=True)
                    with archive.extractfile(member) as source, open(target, "wb") as copy:
                        shutil.copyfileobj(source, copy, 2**20)
    return others


class _Bounded:
    """A stream that refuses to grow beyond `most` bytes, or to be held in memory at once."""

    def __init__(self, stream, most):
        self.stream, self.most, self.counted = stream, most, 0
        self.tell = stream.tell

    def read(self, size=-1):
        if not 0 <= size <= LARGEST_READ:
            raise UserError(f"a name or header in it has {size:,} bytes; it is no checkpoint")
        self._check(self.tell() + size)
        return self.stream.read(size)

    def seek(self, position):
        self._check(position)
        return self.stream.seek(position)

    def count(self, size):
        """Counts the bytes of a file, which may be more than the archive holds of it."""
        self.counted += size
        self._check(self.counted)

    def _check(self, size):
        if size > self.most:
            raise UserError(
                f"it unpacks to more than {self.most:,} bytes, which no checkpoint of its size does"
            )


@dataclasses.dataclass(frozen=True)
class Conversion:
    """What became of a checkpoint.

    Attributes:
        model: the Keras model with the weights.
        config: `config.Config` of the matching experiment.
        mapped: names of the variables that were loaded.
        skipped: `{name: reason}` of those that were not.
        checksum: CRC-32 over the loaded arrays in the order of their names.
    """

    model: object
    config: object
    mapped: list
    skipped: dict
    checksum: int


def convert(checkpoint, config_values, image_size=None):
    """A released TF1 checkpoint as a Keras model.

    Args:
        checkpoint: see `read_checkpoint`.
        config_values: the released configuration, whole or partial, as nested dicts. What it leaves
            open goes by the variable names and, where they do not tell, by the released defaults.
        image_size: `(height, width)` of the network; None takes the config's.

    Returns:
        `Conversion`.

    Raises:
        UserError: if the checkpoint is damaged, or its variables are not those of the network.
    """
    from official_selftrain.tasks import make_task

    arrays = read_checkpoint(checkpoint)
    found = detect({name: array.shape for name, array in arrays.items()})
    config = config_lib.config_from_dict(experiment(config_values, found))
    if image_size is not None and not any(side % 128 for side in image_size):
        config = config.override({"task.image_size": image_size})
    # SpineNet itself bears sizes that training does not, multiples of 8: so not `changed`.
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


def assign(model, arrays, found=None):
    """Loads `{released name: array}` into a model; every name on both sides is accounted for.

    Returns:
        Names loaded, sorted, and `{name: reason}` of those skipped.

    Raises:
        UserError: naming missing, unexpected and misshapen variables.
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


def _refuse_misfits(variables, arrays, unexpected, found=None):
    faults = [f"missing {name}" for name in sorted(set(variables) - set(arrays))]
    faults += [f"unexpected {name} {tuple(arrays[name].shape)}" for name in sorted(unexpected)]
    faults += [
        f"misshapen {name}: {tuple(arrays[name].shape)} there, {tuple(variable.shape)} here"
        for name, variable in variables.items()
        if name in arrays and tuple(variable.shape) != tuple(arrays[name].shape)
    ]
    if faults:
        seems = f"; by its names the checkpoint is {describe(found)}" if found else ""
        more = f"; and {len(faults) - 20} more" if len(faults) > 20 else ""
        raise UserError(
            f"the checkpoint does not fit the network of the config ({len(faults)} variables)"
            f"{seems}: " + "; ".join(faults[:20]) + more
        )


def _reason_to_skip(name):
    for pattern, reason in SKIPPED.items():
        if re.match(pattern, name):
            return reason
    return None


def forward_summary(model):
    """Mean and deviation of each output for one image of normal noise, `{name: (mean, std)}`."""
    shape = (1, *model.input.shape[1:])
    image = np.random.default_rng(0).standard_normal(shape).astype("float32")
    outputs = model(image, training=False)
    summary = {}
    for name, value in outputs.items():
        value = np.asarray(value)
        if not np.isfinite(value).all():
            raise UserError(f"the converted network returns {name} that are not finite")
        summary[name] = (float(value.mean()), float(value.std()))
    return summary


def write_checkpoint(model, prefix):
    """Writes a model as a TF1 name-based checkpoint, from which `read_checkpoint` reads it back.

    Raises:
        UserError: if it cannot be written.
    """
    import tensorflow as tf

    variables = variables_by_name(model)
    try:
        pathlib.Path(prefix).parent.mkdir(parents=True, exist_ok=True)
        tf.raw_ops.SaveV2(
            prefix=str(prefix),
            tensor_names=list(variables),
            shape_and_slices=[""] * len(variables),
            tensors=[tf.convert_to_tensor(variable) for variable in variables.values()],
        )
    except (OSError, tf.errors.OpError) as error:
        raise UserError(f"cannot write the checkpoint {prefix}: {_one_line(error)}") from None
