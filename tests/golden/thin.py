"""Makes the golden numbers that travel with the repository out of the larger set.

    python tests/golden/thin.py ../shared/golden

Every kept number is the larger set's, to the bit. `load` of `conftest.py` reads both sets.
"""

import fnmatch
import json
import pathlib
import re
import shutil
import sys

import numpy as np

HERE = pathlib.Path(__file__).resolve().parent

# Results of which a sample proves as much as the whole: their keys, and about how many values of
# each are kept. What the tests feed in stays whole.
SAMPLED = {
    "augment/operations.npz": (".+__image", 400),
    "checkpoints/*/inference.npz": ("(?!image)", 400),
    "forward/*_moving_stats_after_one_update.npz": (".", 20),
    "forward/*.npz": ("(?!image)", 400),
    "parsers/*.npz": ("image$", 400),
    "resize/*.npz": ("output_image|label_out|normalized", 400),
}
LEFT_OUT = {"postprocess/detections.npz": "(v2|batched|raw)__"}  # no test reads them
WHOLE = [
    "anchors/*", "augment/*.json", "checkpoints/*/*.json", "checkpoints/*/train_batch.npz",
    "configs/*", "evaluation/*", "forward/*.json", "labels/*", "losses/*", "parsers/*.tfrecord",
    "postprocess/nms*", "postprocess/box*", "augment/horizontal_flip.npz", "schedules/*",
    "variables/*.json",
]  # fmt: skip
UNUSED = ["parsers/detection_eval.npz", "parsers/detection_predict.npz"]
# The detector's checkpoint would fill the whole space; its index has the names and shapes.
INDEX_OF = "checkpoints/retinanet_spinenet_tiny/model.ckpt-3.index"
CHECKPOINT = "checkpoints/segmentation_efficientnet_tiny/model.ckpt-3"


def stride(size, kept):
    """The least prime that leaves at most `kept` values and meets all channels in turn."""
    step = max(2, -(-size // kept))
    while size % step == 0 or any(step % divisor == 0 for divisor in range(2, step)):
        step += 1
    return step


def thin_arrays(source, target, sampled, left_out):
    """Writes every n-th value of the sampled arrays, and the seed of an image of noise."""
    arrays, thinned = {}, {}
    pattern, kept = sampled or ("$", 0)
    with np.load(source) as whole:
        seed = image_seed(source)
        for key in whole.files:
            value = whole[key]
            if left_out and re.match(left_out, key):
                continue
            if key == "image" and seed is not None:
                np.testing.assert_array_equal(value, noise(seed, value.shape))
                thinned[key] = {"shape": value.shape, "seed": seed}
            elif re.match(pattern, key) and value.size > kept:
                step = stride(value.size, kept)
                thinned[key] = {"shape": value.shape, "stride": step}
                arrays[key] = value.ravel()[::step]
            else:
                arrays[key] = value
    np.savez_compressed(target, thinned=json.dumps(thinned), **arrays)


def image_seed(source):
    """The seed of the image that a golden inference was given, None for other files."""
    if source.parent.name != "forward" or not source.name.endswith("_infer.npz"):
        return None
    case = source.name.removesuffix("_infer.npz")
    return json.loads(source.with_name(f"{case}.json").read_text())["image_seed"]


def noise(seed, shape):
    return np.random.default_rng(seed).standard_normal(shape).astype("float32")


def fill(arrays):
    """The arrays of a thinned file in their shapes; numbers that were not kept are masked.

    Whatever is computed with them leaves the masked numbers out, and nothing but masked numbers
    is never true: a comparison cannot pass for lack of numbers.
    """
    for key, how in json.loads(str(arrays.pop("thinned", "{}"))).items():
        if "seed" in how:
            arrays[key] = noise(how["seed"], how["shape"])
            continue
        whole = np.ma.array(np.zeros(how["shape"], arrays[key].dtype), mask=True)
        whole.flat[:: how["stride"]] = arrays[key]
        arrays[key] = whole
    return arrays


def thin_variables(source, target):
    """The list of variables without the optimizer's, which have the shapes of their own."""
    lines = source.read_text().splitlines(keepends=True)
    target.write_text("".join(line for line in lines if "/Momentum\t" not in line))


def thin_checkpoint(source, target):
    """The checkpoint without the large slots of the optimizer and the ImageNet classifier."""
    import tensorflow as tf

    reader = tf.train.load_checkpoint(str(source))
    arrays = {
        name: reader.get_tensor(name)
        for name, shape in reader.get_variable_to_shape_map().items()
        if not ("/head/" in name or (name.endswith("/Momentum") and np.prod(shape) > 64))
    }
    names = sorted(arrays)
    tensors = [tf.constant(arrays[name]) for name in names]
    tf.raw_ops.SaveV2(
        prefix=str(target), tensor_names=names, shape_and_slices=[""] * len(names), tensors=tensors
    )


def first(table, name):
    return next((entry for glob, entry in table.items() if fnmatch.fnmatch(name, glob)), None)


def main(source):
    for path in sorted(source.rglob("*")):
        name = path.relative_to(source).as_posix()
        target = HERE / name
        if path.is_dir() or path.name == "README.md" or name in UNUSED:
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        if name == INDEX_OF or any(fnmatch.fnmatch(name, glob) for glob in WHOLE):
            shutil.copyfile(path, target)
        elif name.startswith("variables/"):
            thin_variables(path, target)
        elif path.suffix == ".npz":
            thin_arrays(path, target, first(SAMPLED, name), first(LEFT_OUT, name))
    thin_checkpoint(source / CHECKPOINT, HERE / CHECKPOINT)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
