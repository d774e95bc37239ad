import io

import numpy as np
from helpers import mask_png, png, record
from PIL import Image

from official_selftrain import report, visualize
from official_selftrain.data import records


def test_a_box_is_drawn_where_it_is():
    image = Image.new("RGB", (100, 50))
    drawn = np.asarray(visualize.draw_boxes(image, [[0.5, 0.2, 0.9, 0.6]], [1]))
    # Rows 25 to 44, columns 20 to 59; the text lies above the box.
    assert (drawn[44, 30] == (0x3C, 0xB4, 0x4B)).all()
    assert (drawn[35, 20] == (0x3C, 0xB4, 0x4B)).all()
    assert not drawn[35, 30].any() and not drawn[47].any()


def test_threshold_leaves_boxes_out_and_empty_images_are_drawn():
    shown = [
        np.asarray(visualize.draw_record(record(encoded=png(40, 60)), 60, None, threshold))
        for threshold in (0.0, 0.5, 0.95)
    ]
    assert (shown[0] != shown[1]).any() and (shown[1] != shown[2]).any()
    assert len(np.unique(shown[2])) == 1
    visualize.draw_record(record(boxes=[], classes=[], scores=None, is_crowd=None), 60)


def test_sheet_of_uneven_pictures(tmp_path):
    records = [record(encoded=png(10 + 5 * i, 20), is_crowd=None) for i in range(5)]
    visualize.preview(tmp_path / "p.png", records, 5, {1: "fish"}, 0.5, side=40)
    sheet = Image.open(io.BytesIO((tmp_path / "p.png").read_bytes()))
    assert sheet.width == 4 * (40 + visualize.MARGIN)


def test_curves_and_histogram_are_inline_svg():
    rows = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0, "ratio": 1.0}]
    assert visualize.curves({"a": rows}, ["loss", "ratio"]).startswith("<svg")
    assert visualize.histogram([1, 2, 3], 0.5).startswith("<svg")


def test_masks_are_laid_over_and_background_is_clear():
    mask = np.zeros((4, 6), "uint8")
    mask[0], mask[1] = 1, 255
    drawn = np.asarray(visualize.draw_mask(Image.new("RGB", (6, 4)), mask, opacity=1.0))
    assert (drawn[0] == (0x3C, 0xB4, 0x4B)).all()
    assert (drawn[1] == 255).all() and not drawn[2:].any()


def test_pictures_come_from_images_at_equal_distances(tmp_path):
    file = str(tmp_path / "a.tfrecord")
    records.write(file, [record(image_id=index) for index in range(20)])
    assert [r.image_id for r in report._spread([file], 20)] == [0, 3, 6, 9, 12, 15]
    assert [r.image_id for r in report._spread([file], 4)] == [0, 1, 2, 3, 4, 5]  # never closer


def test_sheet_of_augmentations_has_a_column_a_policy(tmp_path):
    images = [
        record(encoded=png(40, 60), height=40, width=60, is_crowd=None, mask=mask_png(40, 60, i))
        for i in range(2)
    ] + [record(encoded=png(), boxes=[], classes=[], scores=None, is_crowd=None, mask=b"")]
    visualize.augmentation_sheet(tmp_path / "s.png", images, 3, side=64)
    sheet = Image.open(tmp_path / "s.png")
    assert sheet.size == (5 * (64 + visualize.MARGIN), visualize.CAPTION_HEIGHT + 3 * 68)
