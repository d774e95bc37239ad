r"""Turns images and labels into sharded TFRecords, with a JSON summary and an index of the images.

The flags in the group "Source" are the fields of a source in an experiment.

Examples:
  python -m official_selftrain.prepare_data --images=data/images --annotations=data/train.json \
      --output=out/train
  python -m official_selftrain.prepare_data --images=data/images --masks=data/masks \
      --output=out/train --splits=1,10,50 --preview=8
  python -m official_selftrain.prepare_data --output=out/train --verify

Documentation: docs/data.md
"""

import json

from absl import flags

from official_selftrain import cli, config
from official_selftrain.utils.errors import UserError

FLAGS = flags.FLAGS
# The part of the summary that is printed. PREFIX.json has all of it, with each skipped record.
SHOWN = (
    "images", "boxes", "masks", "empty", "most_boxes", "turned", "classes", "left_out", "content",
)  # fmt: skip


def main() -> None:
    """Runs the command; its flags are parsed."""
    cli.require("output")
    percentages = _percentages()
    if FLAGS.verify:
        from official_selftrain.data import sources

        print(f"files whose checksums match: {sources.verify(FLAGS.output)} (all)")
        return
    source = config.model_from_dict(
        config.SourceConfig, {name: FLAGS[name].value for name in config.SourceConfig.model_fields}
    )
    if not source.given:
        raise UserError("no source is given: use --images, --records, --tfds or --builtin")

    from official_selftrain.data import sources, splits
    from official_selftrain.data.sources.record_errors import hints

    if FLAGS.disjoint_from:
        # Fails now on a wrong name, not after all images have been read.
        next(sources.read_index(FLAGS.disjoint_from), None)
    with hints("--"):
        summary = sources.prepare(
            source, str, FLAGS.output, workers=FLAGS.workers or None, beam_args=FLAGS.beam or None
        )
    if FLAGS.disjoint_from:
        sources.check_disjoint(FLAGS.disjoint_from, FLAGS.output, "the two must not overlap")
    names = {int(key): name for key, name in summary["classes"].items()}
    lists = {}
    if percentages:
        images = [(name, classes) for name, _, _, classes in sources.read_index(FLAGS.output)]
        lists = splits.write(images, FLAGS.output, percentages, FLAGS.seed, FLAGS.stratified, names)
    if FLAGS.preview:
        _preview(summary["files"], names)
    shown = {key: summary[key] for key in SHOWN}
    shown |= {"skipped": len(summary["skipped"]), "files": len(summary["files"])}
    print(json.dumps(shown | ({"splits": list(lists.values())} if lists else {})))


def _percentages():
    try:
        return [float(text) for text in FLAGS.splits]
    except ValueError:
        raise UserError(
            f"--splits takes percentages such as 1,10,50; given {','.join(FLAGS.splits)!r}"
        ) from None


def _preview(files, names):
    from official_selftrain.data import records, visualize

    path = f"{FLAGS.output}-preview.png"
    visualize.augmentation_sheet(path, records.read(files), FLAGS.preview, names, FLAGS.seed)


def define_source_flags() -> None:
    """Defines a flag for each field of a source, whose description is its help."""
    for name, field in config.SourceConfig.model_fields.items():
        text, default = str(field.description), field.default
        if field.examples:
            text += f" Example: {field.examples[0]}"
        if isinstance(default, bool):
            flags.DEFINE_bool(name, default, text)
        elif isinstance(default, tuple):
            flags.DEFINE_list(name, list(default), text)
        elif choices := config.choices(field):
            flags.DEFINE_enum(name, default, choices, text)
        else:
            flags.DEFINE_string(name, default, text)


if __name__ == "__main__":
    with cli.group("Source"):
        define_source_flags()
    with cli.group("Output"):
        flags.DEFINE_string(
            "output", None, "FOLDER/PREFIX of the files to write. Example: out/train"
        )
        flags.DEFINE_list(
            "splits", [], "Percentages of nested labeled subsets to list. Example: 1,10,50"
        )
        flags.DEFINE_bool(
            "stratified", False, "Whether every subset keeps the proportions of the classes."
        )
        flags.DEFINE_integer("seed", 0, "Seed of the splits and the preview. Example: 1", 0)
        flags.DEFINE_integer(
            "preview",
            0,
            "Number of images to draw, each with its policies S1 to S4, in PREFIX-preview.png. "
            "Example: 8",
            0,
        )
        flags.DEFINE_string(
            "disjoint_from",
            None,
            "FOLDER/PREFIX of a prepared source that must have no image in common with this one. "
            "Example: out/val",
        )
        flags.DEFINE_bool(
            "verify", False, "Only compares the files of --output with their checksums."
        )
    with cli.group("Speed"):
        flags.DEFINE_integer(
            "workers", 0, "Shards written at the same time; 0 means one per core. Example: 4", 0
        )
        flags.DEFINE_multi_string(
            "beam",
            [],
            "Writes with Apache Beam; each value is an argument of its pipeline. "
            "Example: --runner=DirectRunner",
        )
    cli.main(main)
