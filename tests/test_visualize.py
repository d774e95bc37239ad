import io
import sys

import numpy as np
import pytest
from helpers import mask_png, png, record
from PIL import Image, ImageDraw

from official_selftrain.data import records, visualize
from official_selftrain.pipeline import curves, report


def test_a_box_is_drawn_where_it_is():
    image = Image.new("RGB", (100, 50))
    drawn = np.asarray(visualize.draw_boxes(image, [[0.5, 0.2, 0.9, 0.6]], [1]))
    # Rows 25 to 44, columns 20 to 59; the text lies above the box.
    assert (drawn[44, 30] == (0x3C, 0xB4, 0x4B)).all()
    assert (drawn[35, 20] == (0x3C, 0xB4, 0x4B)).all()
    assert not drawn[35, 30].any() and not drawn[47].any()


GREEN, RED, BLUE = (0x3C, 0xB4, 0x4B), (0xE6, 0x19, 0x4B), (0x43, 0x63, 0xD8)


def test_the_best_box_is_drawn_over_the_others():
    boxes = [[0.2, 0.2, 0.8, 0.8]] * 3
    for scores, color in [([0.9, 0.5, 0.1], RED), ([0.1, 0.9, 0.5], GREEN), ([0, 0, 1], BLUE)]:
        drawn = visualize.draw_boxes(Image.new("RGB", (100, 100)), boxes, [0, 1, 2], scores)
        assert drawn.getpixel((20, 60)) == color


def test_text_of_a_box_at_the_border_is_inside_the_picture():
    image = Image.new("RGB", (100, 50), "white")
    width = ImageDraw.Draw(image).textlength("wwww 0.50")
    for box in ([0.0, 0.9, 0.5, 1.0], [0.98, 0.98, 1.0, 1.0], [0.4, 0.0, 0.6, 0.1]):
        drawn = np.asarray(visualize.draw_boxes(image, [box], [1], [0.5], {1: "wwww"}))
        # The text stands on a ground in the color of the class; its ends are not cut off.
        assert (drawn == GREEN).all(axis=-1).any(axis=0).sum() > width - 3


def test_boxes_without_a_part_in_the_picture_are_left_out():
    blank = Image.new("RGB", (40, 40), "white")
    for box in (
        [1.1, 1.1, 2.0, 2.0], [-2, -2, -1, -1.5], [0.8, 0.8, 0.2, 0.2], [0, np.nan, 1, 1],
        [1.0, 1.0, 1.0, 1.0], [0, 0, np.inf, 1],
    ):  # fmt: skip
        drawn = visualize.draw_boxes(blank, np.array([box]), [1], [0.5])
        np.testing.assert_array_equal(np.asarray(drawn), np.asarray(blank))
    whole = visualize.draw_boxes(blank, [[-5, -5, 5, 5]], [1])
    assert whole.getpixel((39, 39)) == whole.getpixel((0, 39)) == GREEN


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("cat", "cat"),
        ("Vélo", "Vélo"),
        (7, "7"),
        (None, "None"),
        (["a"], "['a']"),
        ("\u0160koda", "Skoda"),
        ("a\nb", "a?b (3)"),
        ("\u732b", "? (3)"),
        ("\u05e9\u05dc", "?? (3)"),
        ("\u202eabc", "?abc (3)"),
        ("\U0001f600", "? (3)"),
        ("\ud800", "? (3)"),
        ("\x1b[2J", "?[2J (3)"),
        ("\0", "? (3)"),
        ("", " (3)"),
        ("w" * 5000, "w" * 24 + ".."),
    ],
)
def test_any_class_name_is_drawn(name, text):
    assert visualize._drawable(name, 3) == text
    drawn = visualize.draw_boxes(Image.new("RGB", (60, 40)), [[0.3, 0, 1, 1]], [3], None, {3: name})
    assert np.asarray(drawn).any()


def test_class_ids_may_be_huge():
    classes = np.array([0, 255, 2**62])
    drawn = visualize.draw_boxes(Image.new("RGB", (90, 90)), [[0.2, 0.2, 0.9, 0.9]] * 3, classes)
    assert np.asarray(drawn).any()


def test_an_orientation_left_in_the_bytes_turns_no_picture():
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    Image.new("RGB", (60, 40)).save(buffer, "JPEG", exif=exif)
    assert visualize.draw_record(record(encoded=buffer.getvalue()), 60).size == (60, 40)


@pytest.mark.parametrize("masks", [False, True])
def test_sheet_without_pictures(tmp_path, masks):
    visualize.preview(tmp_path / "p.png", [], 12, masks=masks)
    assert Image.open(tmp_path / "p.png").height == visualize.CAPTION_HEIGHT


@pytest.mark.parametrize("problem", [ModuleNotFoundError("matplotlib"), OSError("libfreetype.so")])
def test_without_matplotlib_there_are_no_curves(monkeypatch, problem):
    class Broken:
        def find_spec(self, name, path=None, target=None):
            if name == "matplotlib":
                raise problem

    for name in [n for n in sys.modules if n.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    assert curves.curves({"a": []}, ["loss"]) is None
    assert curves.histogram([1, 2], [0.5]) is None


def test_threshold_leaves_boxes_out_and_empty_images_are_drawn():
    shown = [
        np.asarray(visualize.draw_record(record(encoded=png(40, 60)), 60, threshold=threshold))
        for threshold in (0.0, 0.5, 0.95)
    ]
    assert (shown[0] != shown[1]).any() and (shown[1] != shown[2]).any()
    assert len(np.unique(shown[2])) == 1
    empty = record(boxes=[], classes=[], scores=None, is_crowd=None)
    assert np.asarray(visualize.draw_record(empty, 60)).max() == 7


def test_sheet_of_uneven_pictures(tmp_path):
    records = [record(encoded=png(10 + 5 * i, 20), is_crowd=None) for i in range(5)]
    visualize.preview(tmp_path / "p.png", records, 5, {1: "fish"}, 0.5, side=40)
    sheet = Image.open(io.BytesIO((tmp_path / "p.png").read_bytes()))
    assert sheet.width == 4 * (40 + visualize.MARGIN)


def test_curves_and_histogram_are_inline_svg():
    rows = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0, "ratio": 1.0}]
    assert curves.curves({"a": rows}, ["loss", "ratio"]).startswith("<svg")
    assert curves.histogram([1, 2, 3], [0.5, 0.7]).startswith("<svg")


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
