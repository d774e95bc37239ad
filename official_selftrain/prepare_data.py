"""Turns images and labels into sharded TFRecords, with a JSON summary and an index of the images.

python -m official_selftrain.prepare_data --images=DIR [--annotations=COCO.json] --output=OUT/train

The flags that say where the data comes from are the fields of a source in an experiment:
docs/data.md.
"""

import json

from absl import flags

from official_selftrain import cli, config
from official_selftrain.utils.errors import UserError

FLAGS = flags.FLAGS
# What of the summary is printed; PREFIX.json has the rest, such as each skipped record.
SHOWN = (
    "images", "boxes", "masks", "empty", "most_boxes", "turned", "classes", "left_out", "content",
)  # fmt: skip


def main():
    if not FLAGS.output:
        raise UserError("give --output=FOLDER/PREFIX")
    percentages = _percentages()
    if FLAGS.verify:
        from official_selftrain.data import sources

        print(f"{sources.verify(FLAGS.output)} files are as they were written")
        return
    source = config.model_from_dict(
        config.SourceConfig, {name: FLAGS[name].value for name in config.SourceConfig.model_fields}
    )
    if not source.given:
        raise UserError("say where the images are: --images, --records or --tfds")

    from official_selftrain.data import sources, splits
    from official_selftrain.data.sources.record_errors import hints

    if FLAGS.disjoint_from:
        next(sources.read_index(FLAGS.disjoint_from), None)  # a wrong name is told before the work
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
    define_source_flags()
    flags.DEFINE_string("output", None, "FOLDER/PREFIX of the files written")
    flags.DEFINE_list("splits", [], "percentages of nested labeled subsets to list, as 1,10,50")
    flags.DEFINE_integer("seed", 0, "of the splits and the preview", 0)
    flags.DEFINE_bool("stratified", False, "every subset keeps every class, in proportion")
    flags.DEFINE_integer(
        "preview", 0, "draw this many images and their S1 to S4 to PREFIX-preview.png", 0
    )
    flags.DEFINE_string(
        "disjoint_from", None, "PREFIX of another prepared source that must share no image"
    )
    flags.DEFINE_integer("workers", 0, "shards written at a time; 0: one a core", 0)
    flags.DEFINE_multi_string(
        "beam", [], "write with Apache Beam; an argument of its pipeline, repeatable"
    )
    flags.DEFINE_bool("verify", False, "only compare the files of --output with their checksums")
    cli.main(main)
