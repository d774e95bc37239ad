"""Globs, tar shards, and image files of every kind."""

import io
import pathlib
import tarfile

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from official_selftrain.config import InputConfig, SourceConfig
from official_selftrain.data import augment, policies, records, sources
from official_selftrain.data.sources import stores
from official_selftrain.errors import UserError


def encode(image, kind="PNG", **settings):
    buffer = io.BytesIO()
    image.save(buffer, kind, **settings)
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path):
    for name in ("a/0.jpg", "a/1.jpg", "b/2.png", "b/notes.txt"):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"text" if name.endswith("txt") else encode(
            Image.new("RGB", (8, 6), (40 * int(path.stem), 0, 0)),
            "PNG" if name.endswith("png") else "JPEG",
        ))  # fmt: skip
    return tmp_path


def prepare(folder, images, **settings):
    source = SourceConfig(images=images, **settings)
    summary = sources.prepare(source, lambda p: str(folder / p), str(folder / "out/x"))
    return [record.name for record in records.read(summary["files"])]


def test_globs_find_images(folder):
    assert prepare(folder, "photos") == ["a/0.jpg", "a/1.jpg", "b/2.png"]
    assert prepare(folder, "photos/*/*.jpg") == ["a/0.jpg", "a/1.jpg"]
    assert prepare(folder, "photos/b/*") == ["2.png"]
    assert prepare(folder, "photos/**/*") == ["a/0.jpg", "a/1.jpg", "b/2.png"]
    with pytest.raises(UserError, match="no file matches .*bmp"):
        prepare(folder, "photos/*.bmp")


def pack(folder, name, members):
    with tarfile.open(folder / name, "w") as archive:
        for member in members:
            archive.add(folder / "photos" / member, member)


def test_tar_shards_equal_the_folder(folder):
    pack(folder, "s-0.tar", ["a/0.jpg", "b/notes.txt"])
    pack(folder, "s-1.tar", ["a/1.jpg", "b/2.png"])
    assert prepare(folder, "s-*.tar") == prepare(folder, "photos")
    store = stores.open_store(str(folder / "s-*.tar"))
    for name in store.names:
        assert store.read(name) == (folder / "photos" / name).read_bytes()
    assert prepare(folder, "s-0.tar") == ["a/0.jpg"]


def test_faults_of_tar_shards_are_named(folder):
    pack(folder, "s-0.tar", ["a/0.jpg", "b/2.png"])
    pack(folder, "s-1.tar", ["a/0.jpg"])
    with pytest.raises(UserError, match=r"'a/0.jpg' is in .*s-0.tar and in .*s-1.tar"):
        prepare(folder, "s-*.tar")
    whole = (folder / "s-0.tar").read_bytes()
    (folder / "s-1.tar").write_bytes(whole[:1000])
    with pytest.raises(UserError, match=r"s-1.tar"):
        prepare(folder, "s-1.tar")
    (folder / "s-1.tar").write_bytes(b"")
    with pytest.raises(UserError, match=r"s-1.tar is not a complete, uncompressed tar"):
        prepare(folder, "s-1.tar")


RGB = Image.fromarray(np.random.default_rng(0).integers(0, 255, (6, 8, 3), "uint8"))
EXIF = Image.Exif()
EXIF[0x0112] = 6  # a quarter turn

KINDS = {
    "gray": encode(RGB.convert("L")),
    "gray jpeg": encode(RGB.convert("L"), "JPEG"),
    "RGBA": encode(RGB.convert("RGBA")),
    "palette": encode(RGB.convert("P")),
    "CMYK": encode(RGB.convert("CMYK"), "JPEG"),
    "16 bit": encode(Image.fromarray(np.arange(48, dtype="uint16").reshape(6, 8) * 1365)),
    "bilevel": encode(RGB.convert("1")),
    "WebP": encode(RGB, "WEBP"),
    "BMP": encode(RGB, "BMP"),
    "TIFF": encode(RGB, "TIFF"),
    "GIF": encode(RGB, "GIF"),
    "turned": encode(RGB, "JPEG", exif=EXIF),
    "1 x 1": encode(Image.new("RGB", (1, 1))),
    "1 x 4000": encode(Image.new("RGB", (4000, 1))),
    "4000 x 30": encode(Image.new("RGB", (30, 4000))),
}


@pytest.mark.parametrize("kind", KINDS)
def test_images_of_every_kind_reach_the_network(kind):
    encoded, height, width, turned = stores.check_image(KINDS[kind], kind)
    assert turned is (True if kind == "turned" else None)
    record = records.ImageRecord(image_id=1, encoded=encoded, height=height, width=width)
    example = records.decode(records.to_example(record))
    assert example["image"].shape == (height, width, 3) and example["image"].dtype == tf.uint8
    if kind == "turned":
        assert (height, width) == (8, 6)
    scene = policies.make_scene(np.asarray(example["image"]))
    result = augment.Augmentation(InputConfig(policy="S4"), (32, 32))(
        scene, tf.constant([0, 0], tf.int64)
    )
    assert result["image"].shape == (32, 32, 3)
    fitted = augment.fit(scene, augment.plan_resize((height, width), (32, 32)))
    assert fitted["image"].shape == (32, 32, 3)


def test_sixteen_bits_are_scaled_not_clipped():
    encoded, *_ = stores.check_image(KINDS["16 bit"], "x")
    found = np.asarray(Image.open(io.BytesIO(encoded)))[..., 0]
    expected = np.arange(48).reshape(6, 8) * 1365 // 257
    np.testing.assert_array_equal(found, expected)


def test_eight_bits_in_gray_or_rgb_are_kept_byte_for_byte():
    for kind in ("gray", "gray jpeg"):
        assert stores.check_image(KINDS[kind], kind)[0] == KINDS[kind]


@pytest.mark.parametrize(
    ("encoded", "message"),
    [(b"", "x cannot be decoded: it is empty"), (b"text", "x cannot be decoded"),
     (encode(RGB.resize((200, 200)), "JPEG")[:900], "x cannot be decoded: .*truncated")],
)  # fmt: skip
def test_broken_files_are_named(encoded, message):
    with pytest.raises(UserError, match=message):
        stores.check_image(encoded, "x")


def test_relative_globs_work(folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert stores.open_store("photos/a/*.jpg").names == ["0.jpg", "1.jpg"]
    monkeypatch.chdir(folder / "photos/a")
    assert stores.open_store("*.jpg").names == ["0.jpg", "1.jpg"]
    assert pathlib.Path(stores.open_store("*.jpg").folder) == pathlib.Path()
