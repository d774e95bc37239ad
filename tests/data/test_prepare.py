"""Shards: in parallel, resumable after any interruption, checksummed; Beam; leaks."""

import dataclasses
import io
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from helpers import png
from PIL import Image

from official_selftrain.config import SourceConfig
from official_selftrain.data import records, sources
from official_selftrain.data.sources import readers
from official_selftrain.errors import UserError

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
