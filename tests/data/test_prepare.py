"""Shards: in parallel, resumable after any interruption, checksummed; Beam; leaks."""

import dataclasses
import functools
import gzip
import io
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time
import zlib

import numpy as np
import pytest
from helpers import png, record
from PIL import Image

from official_selftrain.config import SourceConfig
from official_selftrain.data import records, sources
from official_selftrain.data.sources import readers
from official_selftrain.utils import files
from official_selftrain.utils.errors import UserError

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Ten images in shards of three."""
    monkeypatch.setattr(readers, "IMAGES_PER_SHARD", 3)
    (tmp_path / "images").mkdir()
    for index in range(10):
        (tmp_path / f"images/{index}.png").write_bytes(png(value=20 * index))
    return tmp_path


def prepare(folder, name="out/all", workers=2, beam_args=None, **settings):
    source = SourceConfig(**{"images": "images", **settings})
    path = lambda p: str(folder / p)  # noqa: E731
    return sources.prepare(source, path, path(name), workers=workers, beam_args=beam_args)


def stamps(summary):
    return {file: os.stat(file).st_mtime_ns for file in summary["files"]}


def test_threads_write_what_one_writes(folder):
    several, one = prepare(folder), prepare(folder, "one/all", workers=1)
    assert [pathlib.Path(f).name for f in several["files"]] == [
        f"all-{i:05d}-of-00004.tfrecord" for i in range(4)
    ]
    assert several["sha256"] == one["sha256"]
    assert [r.name for r in records.read(several["files"])] == [f"{i}.png" for i in range(10)]
    index = list(sources.read_index(folder / "out/all"))
    assert [name for name, *_ in index] == [f"{i}.png" for i in range(10)]
    left = {path.name for path in (folder / "out").iterdir()}
    shards = [pathlib.Path(file).name for file in several["files"]]
    tallies = [f"{shard}.json" for shard in shards]  # the proofs that shards are whole
    assert left == {*shards, *tallies, ".all.lock", "all.index.tsv", "all.json"}


def test_a_fault_keeps_what_is_done_but_a_mended_source_is_read_again(folder):
    (folder / "images/9.png").write_bytes(b"broken")
    with pytest.raises(UserError, match="9.png cannot be decoded"):
        prepare(folder, workers=1)
    done = {p: p.stat().st_mtime_ns for p in (folder / "out").glob("*.tfrecord")}
    assert len(done) == 3 and not (folder / "out/all.json").exists()
    # The source is another one now, so that nothing old is used.
    (folder / "images/9.png").write_bytes(png(value=180))
    summary = prepare(folder, workers=1)
    assert summary["images"] == 10
    assert all(path.stat().st_mtime_ns != stamp for path, stamp in done.items())


def test_finished_shards_are_not_written_again(folder, monkeypatch):
    whole = prepare(folder)
    before = stamps(whole)
    shutil.rmtree(folder / "out")
    original = records.write

    def stop_at_the_third(path, stream):
        if "00002-of" in path:
            raise KeyboardInterrupt
        return original(path, stream)

    monkeypatch.setattr(records, "write", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        prepare(folder, workers=1)
    monkeypatch.setattr(records, "write", original)
    first = {p: p.stat().st_mtime_ns for p in (folder / "out").glob("*.tfrecord")}
    assert 2 <= len(first) < 4
    resumed = prepare(folder)
    assert resumed == whole
    for path, stamp in first.items():
        assert path.stat().st_mtime_ns == stamp != before[str(path)]


@pytest.mark.slow
def test_killed_at_any_moment_it_goes_on_and_ends_alike(tmp_path):
    (tmp_path / "images").mkdir()
    for index in range(1600):
        (tmp_path / f"images/{index:04d}.png").write_bytes(png(64, 64, index % 256))
    command = [
        sys.executable, "-m", "official_selftrain.prepare_data", f"--images={tmp_path}/images",
        "--workers=1",
    ]  # fmt: skip
    subprocess.run([*command, f"--output={tmp_path}/whole/x"], check=True, cwd=ROOT)
    expected = json.loads((tmp_path / "whole/x.json").read_text())
    output = tmp_path / "killed/x"
    for shards in (1, 2, 3):
        process = subprocess.Popen([*command, f"--output={output}"], cwd=ROOT)
        while len(list(output.parent.glob("*.tfrecord"))) < shards and process.poll() is None:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (tmp_path / "killed/x.json").exists()
    subprocess.run([*command, f"--output={output}"], check=True, cwd=ROOT)
    found = json.loads((tmp_path / "killed/x.json").read_text())
    assert found["sha256"] == expected["sha256"] and found["images"] == 1600
    assert not list(output.parent.glob("*.tmp")) and len(list(output.parent.glob("x-*"))) == 8


def test_shards_of_an_earlier_source_are_removed(folder):
    prepare(folder)
    for name in ("tfrecord", "tfrecord.json", "tfrecord.0123456789ab.tmp"):
        (folder / f"out/all-00007-of-00009.{name}").write_text("left by a kill")
    for index in range(4, 10):
        (folder / f"images/{index}.png").unlink()
    assert len(prepare(folder)["files"]) == 2
    assert len(list((folder / "out").glob("*.tfrecord*"))) == 4


def test_a_changed_or_missing_shard_is_found(folder):
    summary = prepare(folder)
    assert sources.verify(folder / "out/all") == 4
    file = pathlib.Path(summary["files"][1])
    content = bytearray(file.read_bytes())
    content[100] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match="00001-of-00004.tfrecord has changed since"):
        sources.verify(folder / "out/all")
    file.unlink()
    with pytest.raises(UserError, match="cannot read .*00001-of-00004"):
        sources.verify(folder / "out/all")
    assert prepare(folder)["sha256"] == summary["sha256"]  # writes it again
    assert sources.verify(folder / "out/all") == 4


def test_duplicate_names_of_coco_are_refused(folder):
    images = [{"id": i, "file_name": "0.png"} for i in range(2)]
    (folder / "x.json").write_text(json.dumps({"images": images, "categories": []}))
    with pytest.raises(UserError, match="two images have the file name '0.png'"):
        prepare(folder, annotations="x.json")


def test_output_that_cannot_be_written_is_named(folder):
    (folder / "file").write_text("")
    with pytest.raises(UserError, match="cannot write to the folder .*file: "):
        prepare(folder, "file/all")


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system takes root")
def test_full_disk_loses_nothing(folder):
    """A file system of 1 MB; after making room, the finished shards are kept."""
    disk = folder / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("tmpfs cannot be mounted here")
    try:
        for index in range(10):
            noise = np.random.default_rng(index).integers(0, 255, (200, 200, 3), "uint8")
            Image.fromarray(noise).save(folder / f"images/{index}.png")  # 120 kB each
        with pytest.raises(UserError, match=r"cannot write .*disk/all-0000.*"):
            prepare(folder, "disk/all", workers=1)
        assert not list(disk.glob("*.tmp"))
        done = {p: p.stat().st_mtime_ns for p in disk.glob("*.tfrecord")}
        assert done
        subprocess.run(["mount", "-o", "remount,size=8m", str(disk)], check=True)
        summary = prepare(folder, "disk/all", workers=1)
        assert summary["images"] == 10
        assert all(path.stat().st_mtime_ns == stamp for path, stamp in done.items())
    finally:
        subprocess.run(["umount", str(disk)], check=True)


# --- TFRecords as a source -------------------------------------------------------------------


def test_truncated_images_inside_shards_are_skipped_where_allowed(folder):
    summary = prepare(folder)
    bad = list(records.read(summary["files"][:1]))
    buffer = io.BytesIO()
    Image.effect_noise((60, 40), 90).save(buffer, "JPEG")
    bad[1] = dataclasses.replace(bad[1], encoded=buffer.getvalue()[:-200])
    records.write(summary["files"][0], bad)
    pattern = str(folder / "out/all-*.tfrecord")
    # Used in place, nothing is decoded: the training names the record.
    assert prepare(folder, "copy/x", images=None, records=pattern)["images"] == 10
    skipped = prepare(folder, "copy/y", images=None, records=pattern, on_bad_record="skip")
    assert skipped["images"] == 9 and "1.png of" in skipped["skipped"][0]
    assert "copy/y-00000-of-00004.tfrecord" in skipped["files"][0]


def test_records_are_not_overwritten_by_their_copy(folder):
    prepare(folder)
    pattern = str(folder / "out/all-*.tfrecord")
    with pytest.raises(UserError, match="would overwrite the records it reads"):
        prepare(folder, images=None, records=pattern, on_bad_record="skip")
    assert sources.verify(folder / "out/all") == 4


def test_a_shard_that_breaks_off_is_named(folder):
    summary = prepare(folder)
    file = pathlib.Path(summary["files"][2])
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(UserError, match="00002-of-00004.tfrecord breaks off at record 2"):
        prepare(folder, "copy/x", images=None, records=str(folder / "out/all-*.tfrecord"))


# --- Damage, moves and other processes -------------------------------------------------------


def flip(file):
    """Changes a byte, keeping size and time."""
    times = os.stat(file)
    content = bytearray(pathlib.Path(file).read_bytes())
    content[100] ^= 1
    pathlib.Path(file).write_bytes(content)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


@pytest.mark.parametrize(
    ("break_it", "told"),
    [
        (lambda file: file.write_bytes(b""), "is damaged and is written again"),
        (lambda file: file.write_bytes(file.read_bytes()[:-1]), "is damaged and is written again"),
        (lambda file: file.write_bytes(b"x" * file.stat().st_size), "is damaged and is written"),
        (lambda file: file.unlink(), "is missing and is written again"),
        (lambda file: pathlib.Path(f"{file}.json").write_text(""), "not valid JSON.*made again"),
        (lambda file: pathlib.Path(f"{file}.json").write_text('{"sou'), "not valid JSON.*again"),
        (lambda file: pathlib.Path(f"{file}.json").write_text("[]"), None),
        (lambda file: pathlib.Path(f"{file}.json").unlink(), None),
    ],
)
def test_a_damaged_shard_is_made_again_alone(folder, caplog, break_it, told):
    summary = prepare(folder)
    before = stamps(summary)
    file = pathlib.Path(summary["files"][1])
    break_it(file)
    assert prepare(folder) == summary
    changed = [f for f, time in stamps(summary).items() if time != before[f]]
    assert changed == [str(file)] and sources.verify(folder / "out/all") == 4
    if told:
        assert re.search(f"00001-of-00004.tfrecord.*{told}", caplog.text)


@pytest.mark.parametrize("content", [b"", b"{", b"null", b"[1]", b'{"files": 3}', b"\xff\xfe\x00"])
@pytest.mark.parametrize("name", ["all.json", "all.index.tsv"])
def test_a_damaged_summary_or_index_is_made_again_without_reading_images(folder, name, content):
    summary = prepare(folder)
    before, file = stamps(summary), folder / "out" / name
    whole = file.read_bytes()
    file.write_bytes(content)
    with pytest.raises(UserError, match=name):
        sources.verify(folder / "out/all") if name.endswith("json") else list(
            sources.read_index(folder / "out/all")
        ) or pytest.fail()
    assert prepare(folder) == summary
    assert file.read_bytes() == whole and stamps(summary) == before


def test_silent_damage_is_found_by_checksum_and_mended(folder):
    summary = prepare(folder)
    assert sources.find_damage(str(folder / "out/all")) is None
    for index in (1, 3):
        flip(summary["files"][index])
    assert prepare(folder) == summary  # size and time are as they were: not read through each time
    message = sources.find_damage(str(folder / "out/all"))
    assert re.search("00001-of-00004.*has changed.*00003-of-00004.*has changed", message)
    assert message.endswith("; the same command writes them again")
    assert prepare(folder) == summary and sources.verify(folder / "out/all") == 4


def test_damaged_records_of_others_are_named_and_kept(folder):
    files = prepare(folder)["files"]
    prepare(folder, "copy/x", images=None, records=str(folder / "out/all-*.tfrecord"))
    flip(files[0])
    message = sources.find_damage(str(folder / "copy/x"))
    assert "all-00000-of-00004.tfrecord has changed" in message and "copy them again" in message
    assert os.path.exists(files[0])


@pytest.mark.parametrize("keep_times", [True, False])
def test_a_folder_can_be_moved_or_copied(folder, tmp_path_factory, keep_times):
    summary = prepare(folder)
    place = tmp_path_factory.mktemp("elsewhere") / "moved"
    copy = shutil.copytree if keep_times else functools.partial(
        shutil.copytree, copy_function=shutil.copyfile
    )  # fmt: skip
    copy(folder, place)
    if not keep_times:  # images keep their times, or the source would be read again
        for image in (folder / "images").iterdir():
            shutil.copystat(image, place / "images" / image.name)
    shutil.rmtree(folder / "out")
    before = {f: f.stat().st_mtime_ns for f in (place / "out").glob("*.tfrecord")}
    moved = prepare(place)
    assert moved["content"] == summary["content"] and moved["fingerprint"] == summary["fingerprint"]
    assert all(file.startswith(str(place)) for file in moved["files"])
    assert {f: f.stat().st_mtime_ns for f in before} == before
    assert sources.read_summary(str(place / "out/all")) == moved
    listed = json.loads((place / "out/all.json").read_text())["files"]
    assert listed[0] == "all-00000-of-00004.tfrecord"


def test_content_is_the_identity_of_the_data_not_of_the_files(folder):
    first = prepare(folder)
    os.utime(folder / "images/3.png")
    touched = prepare(folder)
    assert touched["content"] == first["content"] and touched["fingerprint"] != first["fingerprint"]
    (folder / "images/3.png").write_bytes(png(value=77))
    assert prepare(folder)["content"] != first["content"]


def test_another_process_is_named_but_other_sources_go_on(folder):
    with files.locked(folder / "out", ".all.lock"):
        with pytest.raises(UserError, match=f"another process works in .*process {os.getpid()}"):
            prepare(folder)
        assert prepare(folder, "out/other")["images"] == 10
    prepare(folder)
    with files.locked(folder / "out", ".all.lock"):  # finished work is only read
        assert prepare(folder)["images"] == 10


def test_shards_of_others_are_not_overwritten(folder):
    (folder / "out").mkdir()
    stranger = folder / "out/all-00003-of-00256.tfrecord"
    stranger.write_bytes(b"somebody's")
    with pytest.raises(
        UserError, match="all-00003-of-00256.tfrecord was not written by prepare_data"
    ):
        prepare(folder)
    assert stranger.read_bytes() == b"somebody's"
    files_ = prepare(folder, "out/mine")["files"]
    shutil.copy(files_[0], folder / "out/set-00000-of-00002.tfrecord")
    shutil.copy(files_[1], folder / "out/set-00001-of-00002.tfrecord")
    with pytest.raises(UserError, match="would overwrite the records it reads"):
        prepare(folder, "out/set", images=None, records="out/set-00000-of-00002.tfrecord")
    assert len(list((folder / "out").glob("set-*"))) == 2


# --- What the summary tells ------------------------------------------------------------------

ODD = ["a b.png", " two  spaces.png", "tab\t.png", "line\nbreak.png", "back\\slash\\n.png",
       "\x1b[31mred.png", "e\u0301.png", "\u2028.png", "\x85.png", "😀.png"]  # fmt: skip


def test_names_are_never_altered(folder):
    for name in ODD:
        (folder / "images" / name).write_bytes(png())
    summary = prepare(folder)
    expected = sorted([*ODD, *(f"{i}.png" for i in range(10))])
    assert sorted(record.name for record in records.read(summary["files"])) == expected
    assert sorted(name for name, *_ in sources.read_index(folder / "out/all")) == expected
    assert len((folder / "out/all.index.tsv").read_bytes().splitlines()) == 20


def test_a_name_that_is_no_text_is_a_bad_record(folder):
    with open(os.path.join(os.fsencode(folder / "images"), b"\xff\xfe.png"), "wb") as file:
        file.write(png())
    with pytest.raises(UserError, match=r"b'\\xff\\xfe.png' is not UTF-8 text; rename the file"):
        prepare(folder)
    summary = prepare(folder, on_bad_record="skip")
    assert summary["images"] == 10 and "is not UTF-8" in summary["skipped"][0]


def test_what_is_left_out_and_skipped_is_told_in_few_lines(folder, caplog):
    for index in range(40):
        (folder / f"images/bad_{index:02d}.png").write_bytes(b"broken")
    (folder / "images/._0.png").write_bytes(b"x")
    (folder / "images/notes.txt").write_text("x")
    (folder / "images/gone.png").symlink_to("nowhere")
    summary = prepare(folder, on_bad_record="skip")
    assert summary["images"] == 10 and len(summary["skipped"]) == 40
    assert summary["left_out"] == {
        ".txt files": [1, str(folder / "images/notes.txt")],
        "hidden files and folders": [1, str(folder / "images/._0.png")],
        "links that lead nowhere": [1, str(folder / "images/gone.png")],
    }
    lines = [line for line in caplog.messages if "skipped" in line or "left out" in line]
    assert len(lines) == 7 and "bad_00.png" in lines[0]
    assert re.match("skipped 40 in total; .*out/all.json lists them", lines[5])
    assert re.match(
        r"left out of .*all: 1 hidden files and folders \(the first: .*\._0.png\); 1 ", lines[6]
    )
    caplog.clear()
    assert prepare(folder, on_bad_record="skip") == summary and not caplog.messages


def coco(folder, boxes):
    """Labels with so many boxes for each image, the last of each a crowd."""
    content = {
        "images": [{"id": i, "file_name": f"{i}.png"} for i in range(10)],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
        "annotations": [
            {"id": 100 * i + k, "image_id": i, "category_id": 1 + k % 2, "bbox": [0, 0, 2, 2],
             "iscrowd": int(k == count - 1)}
            for i, count in enumerate(boxes) for k in range(count)
        ],
    }  # fmt: skip
    (folder / "x.json").write_text(json.dumps(content))


def test_boxes_per_image_are_counted_without_crowds(folder):
    coco(folder, [0, 0, 1, 3, 3, 150, 0, 0, 0, 0])
    summary = prepare(folder, annotations="x.json")
    assert summary["boxes_per_image"] == {0: 7, 2: 2, 149: 1}
    assert (summary["most_boxes"], summary["boxes"]) == (149, 157)
    assert sources.read_summary(folder / "out/all") == summary


def test_masks_of_0_and_255_are_refused_with_the_remedy(folder):
    (folder / "masks").mkdir()
    for index in range(10):
        mask = np.zeros((4, 6), "uint8")
        mask[:, 3:] = 255 * (index > 0)
        Image.fromarray(mask).save(folder / f"masks/{index}.png")
    with pytest.raises(UserError, match="no class but 0, and 9 of 10 contain 255.*write 1 instead"):
        prepare(folder, masks="masks")
    Image.fromarray(np.eye(4, 6, dtype="uint8")).save(folder / "masks/0.png")
    assert prepare(folder, masks="masks")["images_per_class"] == {0: 10, 1: 1}


def test_class_names_come_with_tfrecords(folder):
    coco(folder, [1, 2, 1, 1, 1, 1, 1, 1, 1, 1])
    files_ = prepare(folder, annotations="x.json")["files"]
    named = prepare(folder, "a/x", images=None, records="out/all-*.tfrecord")
    assert named["classes"] == {1: "cat", 2: "dog"}
    (folder / "alone").mkdir()
    shutil.copy(files_[0], folder / "alone/y.tfrecord")
    found = prepare(folder, "b/x", images=None, records="alone/y.tfrecord")
    assert found["classes"] == {}
    classes = {"num_classes": 3, "names": {"1": "Katze", "2": "Hund"}}
    (folder / "alone/classes.json").write_text(json.dumps(classes))
    found = prepare(folder, "b/x", images=None, records="alone/y.tfrecord")
    assert found["classes"] == {1: "Katze", 2: "Hund"}
    (folder / "list.txt").write_text("chat\nchien\n")
    found = prepare(folder, "c/x", images=None, records="alone/y.tfrecord", class_list="list.txt")
    assert found["classes"] == {1: "chat", 2: "chien"}


def test_texts_in_records_name_the_classes_unless_they_contradict_each_other(folder):
    boxes = {"boxes": [[0, 0, 1, 1]] * 2, "classes": [1, 4], "scores": None, "is_crowd": None}
    write = lambda name, *texts: records.write(  # noqa: E731
        folder / name, [record(texts=text, mask=b"", **boxes) for text in texts]
    )
    write("a.tfrecord", ("cat", "dog"), ("cat", ""), ())
    write("b.tfrecord", ("cat", "cow"))
    assert prepare(folder, images=None, records="a.tfrecord")["classes"] == {1: "cat", 4: "dog"}
    with pytest.raises(UserError, match="class 4 is called 'dog' in some .* and 'cow' in others"):
        prepare(folder, "out/b", images=None, records="a.tfrecord,b.tfrecord")


@pytest.mark.parametrize("pack", [gzip.compress, zlib.compress])
def test_compressed_records_are_unpacked(folder, pack):
    file = pathlib.Path(prepare(folder)["files"][0])
    (folder / "x.tfrecord").write_bytes(pack(file.read_bytes()))
    summary = prepare(folder, "copy/x", images=None, records="x.tfrecord")
    assert pathlib.Path(summary["files"][0]).read_bytes() == file.read_bytes()


def test_a_damaged_record_is_skipped_and_counted(folder):
    file = prepare(folder)["files"][0]
    content = pathlib.Path(file).read_bytes()
    flip(file)
    os.utime(file)
    pattern = str(folder / "out/all-*.tfrecord")
    with pytest.raises(UserError, match="record 0 of .*all-00000-of-00004.tfrecord is damaged"):
        prepare(folder, "copy/x", images=None, records=pattern)
    summary = prepare(folder, "copy/x", images=None, records=pattern, on_bad_record="skip")
    assert summary["images"] == 9 and "record 0 of" in summary["skipped"][0]
    pathlib.Path(file).write_bytes(b"x" + content)  # its first length is damaged
    summary = prepare(folder, "copy/x", images=None, records=pattern, on_bad_record="skip")
    assert summary["images"] == 7 and "breaks off at record 0" in summary["skipped"][0]


def test_an_empty_shard_is_counted(folder):
    prepare(folder)
    (folder / "out/more.tfrecord").write_bytes(b"")
    summary = prepare(folder, "copy/x", images=None, records="out/all-*,out/more.tfrecord")
    assert summary["left_out"] == {
        "TFRecord files without a record": [1, str(folder / "out/more.tfrecord")]
    }


# --- Beam ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_beam_writes_what_threads_write(folder):
    pytest.importorskip("apache_beam")
    expected = prepare(folder)
    found = prepare(folder, "beam/all", beam_args=["--runner=DirectRunner"])
    assert found["sha256"] == expected["sha256"]
    assert {k: v for k, v in found.items() if k != "files"} == {
        k: v for k, v in expected.items() if k != "files"
    }


def test_a_pipeline_that_cannot_start_is_one_line(folder):
    pytest.importorskip("apache_beam")
    with pytest.raises(UserError, match="Apache Beam stopped: Unexpected pipeline runner: Nope"):
        prepare(folder, "beam/all", beam_args=["--runner=Nope"])


@pytest.mark.slow
def test_faults_in_beam_workers_come_back_as_one_line(folder):
    pytest.importorskip("apache_beam")
    (folder / "images/4.png").write_bytes(b"broken")
    with pytest.raises(UserError, match="4.png cannot be decoded.*on_bad_record=skip"):
        prepare(folder, "beam/all", beam_args=["--runner=DirectRunner"])
    found = prepare(folder, "beam/all", beam_args=["--runner=DirectRunner"], on_bad_record="skip")
    assert found["images"] == 9 and len(found["skipped"]) == 1


# --- Leaks -----------------------------------------------------------------------------------


def test_images_in_two_sources_are_refused(folder):
    (folder / "val").mkdir()
    for index in (3, 7):
        shutil.copy(folder / f"images/{index}.png", folder / f"val/renamed_{index}.png")
    prepare(folder)
    prepare(folder, "out/val", images="val")
    assert sources.shared_images(folder / "out/val", folder / "out/all") == ["3.png", "7.png"]
    with pytest.raises(UserError, match=r"2 images are both in 'val' and in 'all', the first '3"):
        sources.check_disjoint(folder / "out/val", folder / "out/all", "why")
    (folder / "out_list.txt").write_text("3\n7\n")
    prepare(folder, "out/rest", exclude_lists=("out_list.txt",))
    sources.check_disjoint(folder / "out/val", folder / "out/rest", "why")
