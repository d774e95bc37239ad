"""Turns images and labels into sharded TFRecords, with a JSON summary.

python -m official_selftrain.prepare_data --images=DIR [--annotations=COCO.json] --output=OUT/train
"""

import json

from absl import flags

from official_selftrain import cli, config
from official_selftrain.errors import UserError

FLAGS = flags.FLAGS


def main():
    if not FLAGS.images or not FLAGS.output:
        raise UserError("give --images, a folder of images, and --output=FOLDER/PREFIX")
    source = config.SourceConfig(
        images=FLAGS.images,
        annotations=FLAGS.annotations,
        image_list=FLAGS.image_list,
        on_bad_record="skip" if FLAGS.skip_bad_records else "stop",
    )

    from official_selftrain import visualize
    from official_selftrain.data import records, sources

    summary = sources.prepare(source, str, FLAGS.output)
    if FLAGS.preview:
        names = {int(key): name for key, name in summary["classes"].items()}
        shown = records.read(summary["files"])
        visualize.preview(f"{FLAGS.output}-preview.png", shown, FLAGS.preview, names)
    shown = {key: summary[key] for key in ("images", "boxes", "empty", "classes")}
    print(json.dumps(shown | {"skipped": len(summary["skipped"]), "files": len(summary["files"])}))


if __name__ == "__main__":
    flags.DEFINE_string("images", None, "folder of images, searched through")
    flags.DEFINE_string("annotations", None, "COCO JSON; without it the images have no labels")
    flags.DEFINE_string("image_list", None, "text file of names or stems to take, one a line")
    flags.DEFINE_string("output", None, "FOLDER/PREFIX of the files written")
    flags.DEFINE_bool("skip_bad_records", False, "go on without bad images, counting them")
    flags.DEFINE_integer("preview", 0, "also draw this many images to PREFIX-preview.png", 0)
    cli.main(main)
