"""Which labeled images are used, which are held out, and what is left of the unlabeled ones."""

import json
import logging
import os

import numpy as np
import pytest
from helpers import png
from PIL import Image

from official_selftrain import config as config_lib
from official_selftrain.data import parts, records, sources
from official_selftrain.data.prepared import PreparedData
from official_selftrain.data.sources import readers
from official_selftrain.utils.errors import UserError

HUMAN, SELECTION = config_lib.HumanConfig, config_lib.SelectionConfig
# 40 images: half of class 1, 30 % of class 2, 10 % of class 3, 10 % without a label.
LABELS = [1] * 20 + [2] * 12 + [3] * 4 + [None] * 4
INDEX = [
    (f"{place}.png", place, f"digest {place}", [label] if label else [])
    for place, label in enumerate(LABELS)
]


def count(positions, label):
    return sum(LABELS[position] == label for position in positions)


def test_fractions_are_nested_stratified_and_drawn_by_their_seed():
    found = {f: parts.labeled(INDEX, HUMAN(fraction=f)) for f in (0.1, 0.25, 0.5, 1.0)}
    assert [len(positions) for positions in found.values()] == [4, 10, 20, 40]
    assert {*found[0.1]} < {*found[0.25]} < {*found[0.5]}
    assert found[1.0] == parts.labeled(INDEX, HUMAN()) == list(range(40))
    assert [count(found[0.1], label) for label in (1, 2, 3, None)] == [1, 1, 1, 1]
    assert [count(found[0.5], label) for label in (1, 2, 3, None)] == [10, 6, 2, 2]
    other = parts.labeled(INDEX, HUMAN(fraction=0.25, fraction_seed=1))
    assert other != found[0.25] and len(other) == 10


def test_a_fraction_of_no_image_is_refused():
    with pytest.raises(UserError, match=r"0.01 of 40 labeled images is not one image.*0.025"):
        parts.labeled(INDEX, HUMAN(fraction=0.01))


@pytest.mark.parametrize(
    ("images", "settings", "expected"),
    [
        (40, {"min_images": 4}, 4),  # a tenth
        (40, {"min_images": 6}, 6),  # at least
        (40, {"min_images": 4, "fraction": 0.9}, 10),  # at most a quarter
        (39, {"min_images": 10}, 0),
        (3, {}, 0),
        (1, {}, 0),
    ],
)
def test_how_many_images_are_held_out(images, settings, expected):
    chosen, why = parts.held_out(INDEX, range(images), SELECTION(**settings), set())
    assert len(chosen) == expected and bool(why) == (not expected)
    if why:
        assert why.startswith(f"{images} labeled images are fewer than")


def test_the_training_keeps_every_class_and_no_evaluation_image_or_copy_is_held_out():
    settings = SELECTION(min_images=10)
    chosen, _ = parts.held_out(INDEX, range(40), settings, set())
    assert all(count({*range(40)} - {*chosen}, label) for label in (1, 2, 3, None))
    assert 3 <= count(chosen, 1) <= 7 and chosen == sorted(chosen)
    assert chosen == parts.held_out(INDEX, range(40), settings, set())[0]
    assert chosen != parts.held_out(INDEX, range(40), SELECTION(min_images=10, seed=1), set())[0]
    copied = [*INDEX[:39], ("copy.png", 39, INDEX[chosen[0]][2], [1])]
    measured = {INDEX[chosen[1]][2]}
    others, _ = parts.held_out(copied, range(40), settings, measured)
    assert len(others) == 10 and not {*others} & {chosen[0], chosen[1], 39}


def test_too_few_images_beside_the_evaluation_or_without_labels_are_told():
    everything = {digest for _, _, digest, _ in INDEX}
    chosen, why = parts.held_out(INDEX, range(40), SELECTION(), everything)
    assert not chosen and why.startswith("40 labeled images are fewer than 96")
    chosen, why = parts.held_out(INDEX, range(40), SELECTION(min_images=5), everything)
    assert not chosen and why.startswith("only 0 of 40 labeled images")
    bare = [(name, number, digest, []) for name, number, digest, _ in INDEX]
    chosen, why = parts.held_out(bare, range(40), SELECTION(min_images=5), set())
    assert not chosen and why == "none of the 5 images that would be held out has a label"


@pytest.mark.parametrize(
    ("images", "fraction", "count"), [(40, 0.2, 8), (40, 0.01, 1), (2, 0.9, 1)]
)
def test_how_many_images_measure_the_result(images, fraction, count):
    chosen = parts.measured(INDEX[:images], fraction)
    assert len(chosen) == count and chosen == sorted(chosen)


def test_images_that_measure_are_labeled_and_have_no_copy_and_every_class_is_left():
    chosen = parts.measured(INDEX, 0.5)
    assert all(count({*range(40)} - {*chosen}, label) for label in (1, 2, 3, None))
    copied = [*INDEX, ("copy.png", 40, INDEX[chosen[0]][2], [1])]
    assert not {*parts.measured(copied, 0.5)} & {chosen[0], 40}
    with pytest.raises(UserError, match="of 1 labeled image none .* one is needed to learn from"):
        parts.measured(INDEX[:1], 0.2)
    with pytest.raises(UserError, match="of 2 labeled images none .* all of them are copies"):
        parts.measured([INDEX[0], INDEX[0]], 0.2)
    with pytest.raises(UserError, match="of 4 labeled images none .* none of the 1 that would"):
        parts.measured(INDEX[36:], 0.2)


def test_images_of_one_name_or_none_are_told_apart():
    nameless = [("", number, digest, classes) for _, number, digest, classes in INDEX]
    drawn = parts.order(nameless, range(40), seed=0)
    assert sorted(drawn) == list(range(40)) and drawn != list(range(40))


# --- Of real sources -------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """32 images with a box each, in shards of ten; those of class 3 are only in evaluation."""
    monkeypatch.setattr(readers, "IMAGES_PER_SHARD", 10)
    monkeypatch.chdir(tmp_path)
    for name, total in (("train", 32), ("val", 3)):
        (tmp_path / name).mkdir()
        images, boxes = [], []
        for place in range(total):
            value = place if name == "train" else 100 + place
            (tmp_path / f"{name}/{place}.png").write_bytes(png(value=value))
            with Image.open(tmp_path / f"{name}/{place}.png") as image:
                size = {"width": image.width, "height": image.height}
            images.append({"id": place, "file_name": f"{place}.png", **size})
            box = {"id": place, "image_id": place, "bbox": [0, 0, 4, 4], "area": 16}
            boxes.append({**box, "category_id": 3 if name == "val" else 1 + (place % 8 == 0)})
        categories = [{"id": n, "name": "abc"[n - 1]} for n in (1, 2, 3)]
        content = {"images": images, "annotations": boxes, "categories": categories}
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    return tmp_path


def config(**changes):
    labeled = {"images": "train", "annotations": "train.json"}
    settings = {
        "experiment": "x",
        "human": {**labeled, "fraction": 0.5, "batch_size": 2},
        "selection": {"min_images": 3},
        "unlabeled": {**labeled, "exclude_labeled": True},
        "evaluation": {"images": "val", "annotations": "val.json"},
        "optimizer": {"warmup_steps": 100},
    }
    return config_lib.config_from_dict({**settings, **changes})


def names(data, source):
    return [record.name for record in records.read(data.files(source))]


def test_the_parts_divide_one_folder(folder, caplog):
    with caplog.at_level(logging.INFO):
        data = PreparedData(config(), folder / "data")
    human, selection, rest = (names(data, n) for n in ("human", "selection", "unlabeled"))
    assert (len(human), len(selection), len(rest)) == (13, 3, 16)
    assert sorted([*human, *selection, *rest]) == sorted(f"{n}.png" for n in range(32))
    used = parts.labeled(list(sources.read_index(folder / "data/human")), config().human)
    assert sorted([*human, *selection]) == sorted(f"{n}.png" for n in used)
    for source, found in (("human", human), ("selection", selection), ("unlabeled", rest)):
        summary = data.summaries[source]
        assert summary["images"] == summary["boxes"] == len(found)
        assert summary["classes"] == {1: "a", 2: "b", 3: "c"}
    assert "selection: 3 of 16 labeled images are held out" in caplog.text
    assert "16 of 32 images of unlabeled are labeled or evaluated on" in caplog.text
    assert "no labeled image holds 'c'" in caplog.text
    # Half of 32 is nothing to count classes by; the whole source is.
    done = data.completed(config().override({"human.batch_size": 1}))
    assert done.task.num_classes == 4
    assert (done.trainer.steps, done.optimizer.warmup_steps) == (1300, 100)  # 100 * 13 / 1
    assert done.trainer.evaluation_interval == 50 and data.completed(done) == done


def test_a_stage_by_itself_makes_the_same_parts(folder):
    whole = PreparedData(config(), folder / "data")
    alone = PreparedData(config(), folder / "alone", ("unlabeled", "evaluation", "human"))
    labels = PreparedData(config(), folder / "labels", ("unlabeled",))
    for data in (alone, labels):
        assert data.summaries["unlabeled"]["content"] == whole.summaries["unlabeled"]["content"]
        assert data.summaries["selection"]["content"] == whole.summaries["selection"]["content"]
    assert "selection" not in PreparedData(config(), folder / "val", ("evaluation",)).summaries


def test_killed_between_the_parts_it_ends_alike(folder, monkeypatch):
    whole = PreparedData(config(), folder / "whole")
    write, calls = records.write, []

    def stop_at_the_second_part(path, stream):
        calls.append(path)
        if "human_used" in str(path):
            raise KeyboardInterrupt
        return write(path, stream)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(records, "write", stop_at_the_second_part)
        PreparedData(config(), folder / "data")
    kept = folder / "data/selection-00000-of-00002.tfrecord"
    before = os.stat(kept).st_mtime_ns
    data = PreparedData(config(), folder / "data")
    assert os.stat(kept).st_mtime_ns == before
    for name in ("human", "selection", "unlabeled"):
        assert data.summaries[name]["content"] == whole.summaries[name]["content"]


def test_tfrecords_and_masks_are_divided_too(folder):
    PreparedData(config(), folder / "data")
    files = {"records": "data/human-*.tfrecord", "fraction": 0.5, "batch_size": 2}
    data = PreparedData(config(human=files), folder / "again")
    whole = PreparedData(config(), folder / "data")
    for name in ("human", "selection", "unlabeled"):
        assert names(data, name) == names(whole, name)
    assert data.class_names == {1: "a", 2: "b", 3: "c"}
    (folder / "masks").mkdir()
    for place in range(32):
        with Image.open(folder / f"train/{place}.png") as image:
            mask = np.full((image.height, image.width), place % 2, "uint8")
        Image.fromarray(mask).save(folder / f"masks/{place}.png")
    labeled = {"images": "train", "masks": "masks", "fraction": 0.75}
    data = PreparedData(config(human=labeled, evaluation=None), folder / "masks_data")
    assert data.summaries["selection"]["masks"] == 3 and data.summaries["human"]["masks"] == 21


def test_damage_of_a_part_and_of_its_source_is_mended(folder):
    data = PreparedData(config(), folder / "data")
    content = data.summaries["selection"]["content"]
    file = folder / "data/selection-00000-of-00002.tfrecord"
    file.write_bytes(file.read_bytes()[:-20])
    assert "the same command writes them again" in data.damage()
    assert PreparedData(config(), folder / "data").summaries["selection"]["content"] == content
    whole = folder / "data/human-00000-of-00004.tfrecord"
    status = whole.stat()
    damaged = bytearray(whole.read_bytes())
    damaged[8] ^= 1  # the checksum of the first length; size and time stay
    whole.write_bytes(damaged)
    os.utime(whole, ns=(status.st_atime_ns, status.st_mtime_ns))
    other = config(human={**config().human.model_dump(), "fraction_seed": 1})
    with pytest.raises(UserError, match="human-00000.* has changed since it was written"):
        PreparedData(other, folder / "data")
    PreparedData(other, folder / "data")


def test_images_of_selection_that_are_labeled_as_well_are_told(folder, caplog):
    unlabeled = {"images": "train"}
    data = PreparedData(config(unlabeled=unlabeled), folder / "data")
    assert data.summaries["unlabeled"]["images"] == 32
    assert "3 images of selection are also in unlabeled" in caplog.text


def test_evaluation_images_leave_unlabeled_and_nothing_left_is_an_error(folder, caplog):
    labeled = {"images": "train", "annotations": "train.json", "image_list": "val.txt"}
    (folder / "val.txt").write_text("0.png\n1.png\n2.png\n3.png\n")
    data = PreparedData(config(evaluation=labeled), folder / "data")
    assert not {*names(data, "unlabeled"), *names(data, "selection")} & {
        f"{n}.png" for n in range(4)
    }
    human = {"images": "train", "annotations": "train.json"}
    with pytest.raises(UserError, match="all 32 images of unlabeled are labeled or evaluated on"):
        PreparedData(config(human=human), folder / "all")


# What a recipe says: its images may be missing.
SPLIT = {"images": "test", "annotations": "test.json", "from_labeled": 0.25}


def test_without_evaluation_images_some_labeled_ones_measure(folder, caplog):
    changed = config(evaluation=SPLIT, selection={"min_images": 2})
    with caplog.at_level(logging.INFO):
        data = PreparedData(changed, folder / "data")
    measured, human, selection, rest = (
        names(data, n) for n in ("evaluation", "human", "selection", "unlabeled")
    )
    # 32 = 8 to measure + (half of 24: 2 held out and 10) + 12 without their labels
    assert [len(part) for part in (measured, human, selection, rest)] == [8, 10, 2, 12]
    everything = [*measured, *human, *selection, *rest]
    assert sorted(everything) == sorted(f"{n}.png" for n in range(32))
    assert "no validation images at test: 8 of 32 labeled images are held out to me" in caplog.text
    assert "measured on 8 images is rough" in caplog.text
    content = data.summaries["evaluation"]["content"]
    for other in (0.25, None):
        human = {**changed.human.model_dump(), "fraction": other, "fraction_seed": 7}
        other = config(evaluation=SPLIT, human=human, unlabeled={"images": "val"})
        same = PreparedData(other, "other")
        assert same.summaries["evaluation"]["content"] == content
    alone = PreparedData(changed, folder / "alone", ("evaluation",))
    assert alone.summaries["evaluation"]["content"] == content


def test_existing_evaluation_images_measure_and_half_of_them_is_an_error(folder, caplog):
    (folder / "test").mkdir()
    with pytest.raises(UserError, match="test exists, but test.json does not, .* 25% of the lab"):
        PreparedData(config(evaluation=SPLIT), folder / "data")
    (folder / "test").rmdir()
    (folder / "test.json").write_text((folder / "val.json").read_text())
    with pytest.raises(UserError, match="test.json exists, but test does not, .* rename test.json"):
        PreparedData(config(evaluation=SPLIT), folder / "data")
    (folder / "val").rename(folder / "test")
    data = PreparedData(config(evaluation=SPLIT), folder / "data")
    assert sorted(names(data, "evaluation")) == ["0.png", "1.png", "2.png"]
    assert "validation" not in caplog.text


def test_a_stage_of_a_run_does_not_repeat_what_was_said(folder, caplog):
    PreparedData(config(evaluation=SPLIT), folder / "data")
    assert caplog.records
    caplog.clear()
    PreparedData(config(evaluation=SPLIT), folder / "data", again=True)
    assert not caplog.records


def test_without_these_settings_nothing_is_written_or_changed(folder):
    plain = {"images": "train", "annotations": "train.json"}
    settings = {"human": plain, "unlabeled": {"images": "val"}, "evaluation": None}
    data = PreparedData(config(selection=None, **settings), folder / "data")
    assert (
        data.files("human")
        == sources.prepare(config_lib.SourceConfig(**plain), str, folder / "data/human")["files"]
    )
    assert not list((folder / "data").glob("*_used*"))
    few = PreparedData(config(selection={}, **settings), folder / "data")
    assert few.files("human") == data.files("human") and "selection" not in few.summaries
    assert few.completed(config(selection={}, **settings)).trainer.evaluation_interval == 0
