"""Globs, tar shards, and image files of every kind."""

import bz2
import contextlib
import gzip
import io
import lzma
import os
import pathlib
import shutil
import struct
import subprocess
import tarfile
import zlib

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, ImageOps

from official_selftrain.config import InputConfig, SourceConfig
from official_selftrain.data import records, sources
from official_selftrain.data.augmentation import geometry, policies
from official_selftrain.data.sources import stores
from official_selftrain.data.sources.record_errors import RecordErrors
from official_selftrain.utils.errors import UserError


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
    result = geometry.Augmentation(InputConfig(policy="S4"), (32, 32))(
        scene, tf.constant([0, 0], tf.int64)
    )
    assert result["image"].shape == (32, 32, 3)
    fitted = geometry.fit(scene, geometry.plan_resize((height, width), (32, 32)))
    assert fitted["image"].shape == (32, 32, 3)


def test_sixteen_bits_are_scaled_not_clipped():
    encoded, *_ = stores.check_image(KINDS["16 bit"], "x")
    found = np.asarray(Image.open(io.BytesIO(encoded)))[..., 0]
    expected = np.arange(48).reshape(6, 8) * 1365 // 257
    np.testing.assert_array_equal(found, expected)


def test_eight_bits_in_gray_or_rgb_are_kept_byte_for_byte():
    for kind in ("gray", "gray jpeg"):
        assert stores.check_image(KINDS[kind], kind)[0] == KINDS[kind]


def numbers(values, kind="TIFF", **settings):
    return encode(Image.fromarray(np.asarray(values).reshape(6, 8)), kind, **settings)


def gray_of(encoded):
    return np.asarray(Image.open(io.BytesIO(stores.check_image(encoded, "x")[0])))[..., 0]


RAMP = np.arange(48) / 47


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.float32(RAMP), np.rint(255 * RAMP)),
        (np.float32(0.3 * RAMP), np.rint(255 * 0.3 * RAMP)),
        (np.float32(255 * RAMP), np.rint(255 * RAMP)),
        (np.float32(60000 * RAMP), 60000 * RAMP // 257),
        (np.int32(np.rint(255 * RAMP)), np.rint(255 * RAMP)),
        (np.int32(np.rint(65535 * RAMP)), np.rint(65535 * RAMP) // 257),
        (np.zeros(48, "uint16"), np.zeros(48)),
        (np.zeros(48, "float32"), np.zeros(48)),
    ],
)
def test_more_bits_and_floats_are_scaled_by_their_plain_range(values, expected):
    assert np.abs(gray_of(numbers(values)).ravel() - expected).max() <= 1


@pytest.mark.parametrize(
    "values",
    [
        np.float32(RAMP - 0.5), np.float32(1.5 * RAMP), np.float32(900 * RAMP),
        np.float32(70000 * RAMP), np.float32(np.where(RAMP > 0.9, np.nan, RAMP)),
        np.float32(np.where(RAMP > 0.9, np.inf, RAMP)), np.int32(70000 * RAMP),
        np.int32(100 * RAMP - 50), np.uint16(4000 * RAMP), np.uint16(200 * RAMP),
    ],
)  # fmt: skip
def test_values_that_would_lose_the_picture_are_refused(values):
    with pytest.raises(UserError, match="image file x cannot be decoded: its gray values go from"):
        stores.check_image(numbers(values), "x")


@pytest.mark.parametrize("mode", ["LAB", "HSV", "PA", "LA", "CMYK", "RGBX"])
def test_color_spaces_keep_their_colors(mode):
    flat = Image.new("RGB", (8, 6), (200, 40, 60))
    if mode == "LAB":
        profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        image = ImageCms.applyTransform(
            flat, ImageCms.buildTransform(*profiles, inMode="RGB", outMode="LAB")
        )
    else:
        image = flat.convert(mode)
    expected = (87, 87, 87) if mode == "LA" else (200, 40, 60)
    try:
        encoded = encode(image, "TIFF")
    except OSError:
        pytest.skip(f"Pillow does not write {mode}")
    found = np.asarray(Image.open(io.BytesIO(stores.check_image(encoded, "x")[0])))
    assert np.abs(found[0, 0] - np.array(expected, int)).max() <= (11 if mode == "PA" else 4)


def test_of_several_frames_the_first_is_taken_and_the_others_are_counted():
    frames = [Image.new("RGB", (8, 6), color) for color in ("red", "blue", "green")]
    for kind in ("GIF", "TIFF", "PNG"):
        encoded = encode(frames[0], kind, save_all=True, append_images=frames[1:])
        problems = RecordErrors(skip=False)
        found, *_ = stores.check_image(encoded, "x", errors=problems)
        pixels = np.asarray(Image.open(io.BytesIO(found)).convert("RGB"))
        assert (pixels == (255, 0, 0)).all(), kind
        assert problems.left_out == {"further frames or pages of images": [1, "x"]}, kind
    stores.check_image(KINDS["gray"], "y", errors=problems)
    assert problems.left_out == {"further frames or pages of images": [1, "x"]}


def png_header(height, width):
    """A PNG that claims a size, without the pixels."""
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + body + struct.pack(
        ">I", zlib.crc32(body)
    ) + struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))  # fmt: skip


@pytest.mark.parametrize(
    ("encoded", "message"),
    [
        (b"", "it is empty$"),
        (b"text", "it is no image of a known format$"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "it is no image of a known format$"),
        (b"\x00\x05\x16\x07" + b"\0" * 40, "it is no image of a known format$"),
        (encode(RGB.resize((200, 200)), "JPEG")[:900], ".*truncated"),
        (encode(RGB)[:-30], "."),
        (encode(RGB, "WEBP")[:-30], "."),
        (encode(RGB, "GIF")[:-30], "."),
        (png_header(50_000, 50_000), "it has 2500000000 pixels, and .* 536,870,911; scale.*tiles"),
        (png_header(25_000, 25_000), "it has 25000 x 25000 pixels, and .* 536,870,911; scale"),
        (png_header(2**31 - 1, 2**31 - 1), "."),
        (png_header(0, 5), "."),
    ],
)
def test_broken_files_are_named(encoded, message):
    with pytest.raises(UserError, match=f"^the image file x cannot be decoded: {message}") as error:
        stores.check_image(encoded, "x")
    assert "0x" not in str(error.value)


def test_images_above_pillows_own_limit_are_read():
    assert Image.MAX_IMAGE_PIXELS == records.LARGEST_IMAGE > 178956970
    with pytest.raises(UserError, match="cannot be decoded: .*truncated"):
        stores.check_image(png_header(14000, 13500), "x")  # its pixels are missing, no more


# --- Orientation -----------------------------------------------------------------------------


def test_an_image_is_turned_as_it_is_shown_unless_told_otherwise():
    asked = []

    def shown(answer):
        return lambda *sizes: asked.append(sizes) or answer

    found, height, width, turned = stores.check_image(KINDS["turned"], "x", shown(False))
    assert (found, height, width, turned) == (KINDS["turned"], 6, 8, False)
    _, height, width, turned = stores.check_image(KINDS["turned"], "x", shown(True))
    assert (height, width, turned) == (8, 6, True)
    assert asked == [((6, 8), (8, 6))] * 2
    assert stores.check_image(KINDS["gray"], "x", shown(True))[3] is None
    assert len(asked) == 2


@pytest.mark.parametrize("orientation", range(12))
def test_every_orientation_is_that_of_pillow(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    encoded = encode(RGB, "PNG", exif=exif)
    found, height, width, turned = stores.check_image(encoded, "x")
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(encoded)))
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(found))), np.asarray(expected))
    assert (height, width) == expected.size[::-1]
    assert turned is (True if 2 <= orientation <= 8 else None)
    mask = encode(RGB.convert("L").point(lambda value: value % 3), "PNG", exif=exif)
    assert stores.mask_size(mask, "m") == (height, width)
    values = np.asarray(Image.open(io.BytesIO(stores.check_mask(mask, "m", height, width, {}))))
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(mask)))
    np.testing.assert_array_equal(values, np.asarray(expected))


def test_damaged_metadata_says_nothing_about_orientation():
    encoded = encode(RGB, "JPEG", exif=b"Exif\0\0junkjunkjunk")
    assert stores.check_image(encoded, "x") == (encoded, 6, 8, None)


# --- Masks -----------------------------------------------------------------------------------

IDS = np.arange(48, dtype="uint8").reshape(6, 8) % 3


def flat(*channels):
    return Image.fromarray(np.stack(channels, axis=-1))


def palette(colors=(0, 0, 0, 255, 0, 0, 0, 255, 0)):
    image = Image.fromarray(IDS, "P")
    image.putpalette(colors)
    return image


@pytest.mark.parametrize(
    "encoded",
    [
        encode(Image.fromarray(IDS)),
        encode(Image.fromarray(IDS), "BMP"),
        encode(Image.fromarray(IDS), "TIFF"),
        encode(Image.fromarray(IDS), "TIFF", compression="tiff_lzw"),
        encode(Image.fromarray(IDS), "WEBP", lossless=True),
        encode(palette()),
        encode(palette(), "GIF"),
        encode(flat(IDS, IDS, IDS)),
        encode(flat(IDS, IDS, IDS, np.full_like(IDS, 255))),
        encode(flat(IDS, np.full_like(IDS, 255))),
        encode(Image.fromarray(IDS.astype("uint16"))),
        encode(Image.fromarray(IDS.astype("int32")), "TIFF"),
        encode(Image.fromarray(IDS.astype("float32")), "TIFF"),
    ],
)
def test_masks_without_loss_give_their_class_ids(encoded):
    found = stores.check_mask(encoded, "m", 6, 8, {0: "a", 1: "b", 2: "c"})
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(found))), IDS)


def test_a_mask_of_one_bit_has_the_classes_0_and_1():
    mask = encode(Image.fromarray(IDS > 0))
    found = stores.check_mask(mask, "m", 6, 8, {0: "a", 1: "b"})
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(found))), IDS > 0)


@pytest.mark.parametrize(
    ("encoded", "message"),
    [
        (encode(Image.fromarray(IDS), "JPEG"), r"compressed with loss \(JPEG\).*as PNG"),
        (encode(Image.fromarray(IDS), "WEBP"), r"compressed with loss \(WEBP\)"),
        (encode(Image.fromarray(IDS), "TIFF", compression="jpeg"), "compressed with loss"),
        (encode(Image.fromarray(IDS), "JPEG2000"), "compressed with loss"),
        (encode(RGB), r"holds colors \(mode RGB\); a mask is a PNG"),
        (encode(flat(IDS, IDS, IDS, IDS)), "holds colors"),
        (encode(Image.fromarray(IDS).convert("CMYK"), "TIFF"), "holds colors"),
        (encode(Image.fromarray(IDS.astype("uint16") + 300)), "has the value 300; values are"),
        (encode(Image.fromarray(IDS.astype("int32") - 1), "TIFF"), "has the value -1;"),
        (encode(Image.fromarray(IDS.astype("float32") / 2), "TIFF"), "has the value 0.5;"),
        (encode(Image.fromarray(IDS * np.float32(np.nan)), "TIFF"), "has the value nan;"),
        (encode(Image.fromarray(IDS.T)), r"is 6 x 8 pixels, its image is 8 x 6; was one.*EXIF"),
        (encode(Image.fromarray(IDS[:5])), "is 8 x 5 pixels, its image is 8 x 6$"),
        (encode(Image.fromarray(IDS + 4)), "has the class id 4; known are 0 to 2"),
        (encode(palette(), "GIF", save_all=True, append_images=[RGB]), "has 2 frames or pages"),
        (encode(Image.fromarray(IDS))[:50], "cannot be decoded"),
        (png_header(50_000, 50_000), "cannot be decoded: it has 2500000000 pixels"),
        (b"", "cannot be decoded: it is empty"),
        (b"text", "cannot be decoded: it is no image of a known format"),
    ],
)
def test_masks_that_hold_no_class_ids_are_refused(encoded, message):
    with pytest.raises(UserError, match=f"the mask m {message}|the mask m is {message}"):
        stores.check_mask(encoded, "m", 6, 8, {0: "a", 1: "b", 2: "c"})


# --- What a folder or a tar holds ------------------------------------------------------------


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(KINDS["1 x 1"])


def test_a_walk_enters_links_once_and_counts_what_it_leaves_out(tmp_path):
    outside, top = tmp_path / "outside", tmp_path / "top"
    touch(outside, "cam/3.png", "cam/4.PNG", "5.jpeg")
    touch(top, "b/0.jfif", "b/1.JPG", "a.d/2.jpe", "z/6.tif", "b/._0.jpg", ".cache/7.jpg")
    touch(top, "b/Thumbs.db", "b/0.txt", "b/1.txt", "b/8.jpg~", "b/README")
    (top / "a_link_to_z").symlink_to("z")  # the folder itself comes first, whatever the order
    (top / "cam1").symlink_to(outside / "cam")
    (top / "5.jpeg").symlink_to(outside / "5.jpeg")
    (top / "round").symlink_to("..")
    (top / "gone.jpg").symlink_to("nowhere")
    os.mkfifo(top / "pipe.jpg")
    found, left_out = stores.walk(top, stores.SUFFIXES)
    assert [str(path.relative_to(top)) for path in found] == [
        "5.jpeg", "a.d/2.jpe", "b/0.jfif", "b/1.JPG", "cam1/3.png", "cam1/4.PNG",
        "round/outside/5.jpeg", "z/6.tif",
    ]  # fmt: skip
    counts = {kind: count for kind, (count, _) in left_out.items()}
    assert counts == {
        "hidden files and folders": 2, ".db files": 1, ".txt files": 2, "files of other kinds": 2,
        "links that lead nowhere": 1, "pipes, sockets and devices": 1,
        "links to folders that are read already": 3,
    }  # fmt: skip
    assert left_out[".txt files"][1] == str(top / "b/0.txt")


def test_a_folder_that_cannot_be_read_is_counted_or_named(tmp_path, monkeypatch):
    touch(tmp_path, "a/0.jpg", "locked/1.jpg")
    real = os.scandir

    def scandir(path):
        if "locked" in str(path):
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    found, left_out = stores.walk(tmp_path, stores.SUFFIXES)
    assert len(found) == 1 and left_out["folders that cannot be read"][0] == 1
    with pytest.raises(UserError, match="cannot read the folder .*locked: Permission denied"):
        stores.walk(tmp_path / "locked", stores.SUFFIXES)


def test_kinds_that_need_another_package_are_named_with_it(monkeypatch):
    monkeypatch.setattr(stores, "REMEDIES", {".heic": "pip install it"})
    assert stores.other_suffix("a.HEIC", (".jpg",)) == ".heic files (pip install it)"
    assert stores.other_suffix("a.jpg", (".jpg",)) is None
    assert stores.other_suffix("a.0001-long-suffix", (".jpg",)) == "files of other kinds"


def test_avif_is_read_where_pillow_can():
    if ".avif" not in stores.SUFFIXES:
        pytest.skip("this Pillow has no AVIF")
    assert stores.check_image(encode(RGB, "AVIF"), "x")[1:] == (6, 8, None)


@pytest.mark.parametrize(
    ("place", "names"),
    [
        ("trip [2023]/train", ["0.png", "1.png"]),
        ("trip [2023]", ["train/0.png", "train/1.png", "val/2.png"]),
        ("trip [2023]/*/*.png", ["train/0.png", "train/1.png", "val/2.png"]),
        ("trip [2023]/v*", []),
        ("a,b", ["0.png"]),
        ("what*", ["0.png"]),
        ("what*/[01].png", ["0.png"]),
        ("a,b/0.png", ["0.png"]),
        ("**/0.png", ["a,b/0.png", "trip [2023]/train/0.png", "what*/0.png"]),
        ("*/train/**/?.png", ["trip [2023]/train/0.png", "trip [2023]/train/1.png"]),
        ("trip [2023]/**", ["train/0.png", "train/1.png", "val/2.png"]),
    ],
)
def test_a_path_that_exists_is_that_path(tmp_path, place, names):
    touch(tmp_path, "trip [2023]/train/0.png", "trip [2023]/train/1.png", "trip [2023]/val/2.png")
    touch(tmp_path, "a,b/0.png", "what*/0.png", "what*/.hidden.png")
    assert stores.open_store(str(tmp_path / place)).names == names


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("photso", "no file matches .*photso': it does not exist; did you mean 'photos'"),
        ("photos/*.bmp", r"no file matches .*bmp'$"),
        ("photos/nothing/*.jpg", "no file matches"),
        ("nothing/at/all", "no file matches"),
        ("*", "matches both tar files and images; give a pattern"),
        ("a\0b", "no file matches"),
    ],
)
def test_places_where_nothing_is_are_named(tmp_path, place, message):
    touch(tmp_path, "photos/0.jpg", "x.tar", "y.jpg")
    with pytest.raises(UserError, match=message):
        stores.open_store(f"{tmp_path}/{place}")


def test_what_a_glob_matches_but_is_not_taken_is_counted(tmp_path):
    touch(tmp_path, "a.jpg", ".b.jpg", "c.txt", "d/e.jpg", ".f/g.jpg")
    assert stores.open_store(f"{tmp_path}/*").left_out == {
        "hidden files and folders": [2, f"{tmp_path}/.b.jpg"],
        ".txt files": [1, f"{tmp_path}/c.txt"],
        "folders that match but are not entered": [1, f"{tmp_path}/d"],
    }
    assert stores.open_store(f"{tmp_path}/**/*.jpg").names == ["a.jpg", "d/e.jpg"]


# --- Reading ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gone.jpg", "the image file .*gone.jpg does not exist"),
        ("/dev/zero", "'/dev/zero' is outside the folder"),
        ("../secret.png", r"'../secret.png' is outside the folder .*photos"),
        ("sub/../../secret.png", "is outside the folder"),
        (".way_out/secret.png", "is outside the folder"),
        ("device.jpg", "device.jpg is outside|'device.jpg' is outside"),
        ("pipe.jpg", "not a regular file"),
        ("sub", "not a regular file|Is a directory"),
        ("a\0b.jpg", "not a possible file name"),
        ("a" * 300 + ".jpg", "cannot read|does not exist"),
        ("\udcff\udcfe.jpg", r"file name b'\\xff\\xfe.jpg' is not UTF-8 text; rename"),
    ],
)
def test_names_of_label_files_stay_in_the_folder(tmp_path, name, message):
    photos = tmp_path / "photos"
    touch(tmp_path, "photos/sub/0.png", "secret.png")
    (photos / ".way_out").symlink_to("..")
    (photos / "device.jpg").symlink_to("/dev/zero")
    os.mkfifo(photos / "pipe.jpg")
    store = stores.open_store(str(photos))
    with pytest.raises(UserError, match=message):
        store.read(name)
    assert store.read("sub/0.png") == store.read(str(photos / "sub/../sub/0.png"))


def test_a_large_file_is_refused_before_it_is_read(tmp_path):
    with open(tmp_path / "a.jpg", "wb") as file:
        file.truncate(stores.LARGEST_FILE + 1)
    with pytest.raises(UserError, match="a.jpg has 536,870,913 bytes; at most 536,870,912 are"):
        stores.open_store(str(tmp_path)).read("a.jpg")


def test_fingerprints_do_not_depend_on_the_place(tmp_path):
    touch(tmp_path, "a/sub/0.png")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    first, second = (stores.open_store(str(tmp_path / name)) for name in "ab")
    assert first.fingerprints() == second.fingerprints() and first.fingerprints()[0].startswith(
        "sub/0.png "
    )


# --- Tars ------------------------------------------------------------------------------------


def member(name, data=b"", kind=tarfile.REGTYPE, link=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, link, len(data)
    return info, data


def tar(path, *members, form=tarfile.PAX_FORMAT):
    with tarfile.open(path, "w", format=form) as archive:
        for info, data in members:
            archive.addfile(info, io.BytesIO(data))
    return str(path)


IMAGE = KINDS["gray"]


def test_linked_members_are_read_through_their_target(tmp_path):
    place = tar(
        tmp_path / "s.tar",
        member("./store/3f2a", IMAGE),
        member("a/0.jpg", kind=tarfile.LNKTYPE, link="./store/3f2a"),
        member("a/1.jpg", kind=tarfile.SYMTYPE, link="../store/3f2a"),
        member("a/2.jpg", kind=tarfile.SYMTYPE, link="1.jpg"),
        member("a/3.jpg", kind=tarfile.SYMTYPE, link="/etc/passwd"),
        member("a/4.jpg", kind=tarfile.SYMTYPE, link="4.jpg"),
        member("a/5.jpg", kind=tarfile.FIFOTYPE),
        member("a/._6.jpg", IMAGE),
        member("./a/7.JFIF", IMAGE),
        member("a/notes.txt", b"text"),
        member("a", kind=tarfile.DIRTYPE),
    )
    store = stores.open_store(place)
    assert store.names == ["a/0.jpg", "a/1.jpg", "a/2.jpg", "a/7.JFIF"]
    assert {store.read(name) for name in store.names} == {IMAGE}
    assert store.left_out == {
        "files of other kinds": [1, f"store/3f2a of {place}"],
        "links to files outside their tar": [2, f"a/3.jpg of {place}"],
        "pipes, sockets and devices": [1, f"a/5.jpg of {place}"],
        "hidden files and folders": [1, f"a/._6.jpg of {place}"],
        ".txt files": [1, f"a/notes.txt of {place}"],
    }


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
@pytest.mark.parametrize("cut", [512 * 2, 512 * 2 * 3, 700, 512, 512 * 7 + 100])
def test_a_tar_that_was_cut_anywhere_is_refused(tmp_path, form, cut):
    members = [member(f"{i}.png", IMAGE) for i in range(6)]
    place = tmp_path / "s.tar"
    tar(place, *members, form=form)
    assert len(stores.open_store(str(place)).names) == 6
    content = place.read_bytes()
    place.write_bytes(content[:cut])
    with pytest.raises(UserError, match="s.tar (has no end mark|is not a complete|continues)"):
        stores.open_store(str(place))


def test_the_end_mark_of_a_tar_can_be_added_as_the_message_says(tmp_path):
    place = tmp_path / "s 1.tar"
    tar(place, member("0.png", IMAGE), member("1.png", IMAGE))
    place.write_bytes(place.read_bytes()[: 2 * 1024])
    with pytest.raises(UserError, match="no end mark: it was cut off after '1.png', its mem") as e:
        stores.open_store(str(place))
    subprocess.run(str(e.value).split("with: ")[1], shell=True, check=True)
    assert stores.open_store(str(place)).names == ["0.png", "1.png"]


def damaged_header(content):
    return content[:1024] + b"\xff" * 512 + content[1536:]


def negative_size(content):
    """A size field in base 256 that points backwards, with its checksum mended."""
    header = bytearray(content[1024:1536])
    header[124:136] = b"\xff" * 8 + struct.pack(">i", -1024)
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return content[:1024] + bytes(header) + content[1536:]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            damaged_header,
            "continues after '0.png', its member number 1 with something that is not a member",
        ),
        (negative_size, "is not a complete, uncompressed tar|continues"),
        (
            lambda content: content + content,
            "continues after '2.png'.*several tar files were concatenated",
        ),
        (gzip.compress, r"s.tar is not .* but compressed \(gzip\).*unpack it first"),
        (bz2.compress, r"compressed \(bzip2\)"),
        (lzma.compress, r"compressed \(xz\)"),
        (lambda content: b"PK\x03\x04" + content, r"compressed \(zip\)"),
        (lambda content: b"", "is not a complete, uncompressed tar: empty file"),
        (lambda content: b"no tar" * 1000, "is not a complete, uncompressed tar"),
    ],
)
def test_damaged_and_compressed_tars_are_told(tmp_path, change, message):
    place = tmp_path / "s.tar"
    tar(place, *(member(f"{i}.png", IMAGE) for i in range(3)))
    place.write_bytes(change(place.read_bytes()))
    with pytest.raises(UserError, match=message):
        stores.open_store(str(place))


@pytest.mark.parametrize(
    "names", [("a.png", "a.png"), ("./a.png", "a.png"), ("b//a.png", "b/a.png")]
)
def test_two_members_of_one_name_are_refused(tmp_path, names):
    place = tar(tmp_path / "s.tar", *(member(name, IMAGE) for name in names))
    with pytest.raises(UserError, match=r"'(b/)?a.png' is twice in .*s.tar; names must differ"):
        stores.open_store(place)


def test_sparse_members_are_told_as_such(tmp_path):
    (tmp_path / "0.png").write_bytes(IMAGE)
    with open(tmp_path / "0.png", "ab") as file:
        file.truncate(10**6)
    command = ["tar", "--sparse", "-cf", "s.tar", "0.png"]
    if subprocess.run(command, cwd=tmp_path, check=False).returncode:
        pytest.skip("this tar knows no sparse files")
    store = stores.open_store(str(tmp_path / "s.tar"))
    with pytest.raises(UserError, match="'0.png' of .*s.tar is a sparse member; pack it without"):
        store.read("0.png")


def test_a_tar_that_shrinks_later_is_named(tmp_path):
    place = tmp_path / "s.tar"
    store = stores.open_store(tar(place, member("0.png", IMAGE)))
    place.write_bytes(place.read_bytes()[:600])
    with pytest.raises(UserError, match="s.tar ends in the middle of '0.png'"):
        store.read("0.png")


# --- Any bytes -------------------------------------------------------------------------------


def mutated(data, drawn):
    """Some bytes of a file changed, some cut off."""
    content = bytearray(data)
    for place, value in drawn:
        content[place % len(content)] = value
    return bytes(content)


CHANGES = st.lists(st.tuples(st.integers(0, 2**16), st.integers(0, 255)), max_size=8)
QUICK = settings(max_examples=60, deadline=None, derandomize=True)


@QUICK
@given(kind=st.sampled_from(sorted(KINDS)), changes=CHANGES, end=st.integers(1, 2**11))
def test_changed_images_give_an_image_or_a_user_error(kind, changes, end):
    encoded = mutated(KINDS[kind], changes)[:end]
    with contextlib.suppress(UserError):
        found, height, width, _ = stores.check_image(encoded, "x")
        assert Image.open(io.BytesIO(found)).size == (width, height)
    with contextlib.suppress(UserError):
        stores.check_mask(encoded, "x", 6, 8, {})


TAR = io.BytesIO()
with tarfile.open(fileobj=TAR, mode="w") as archive:
    for info, data in (
        member("a/0.png", IMAGE), member("é" * 70 + ".png", IMAGE),
        member("1.png", kind=tarfile.LNKTYPE, link="a/0.png"),
    ):  # fmt: skip
        archive.addfile(info, io.BytesIO(data))


@QUICK
@given(changes=CHANGES, end=st.integers(1, len(TAR.getvalue())))
def test_changed_tars_give_images_or_a_user_error(tmp_path_factory, changes, end):
    place = tmp_path_factory.getbasetemp() / "fuzzed.tar"
    place.write_bytes(mutated(TAR.getvalue(), changes)[:end])
    with contextlib.suppress(UserError):
        store = stores.open_store(str(place))
        for name in store.names:
            store.read(name)


@QUICK
@given(st.binary(max_size=200))
def test_any_bytes_are_an_image_or_a_user_error(content):
    with contextlib.suppress(UserError):
        stores.check_image(content, "x")


def test_relative_globs_work(folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert stores.open_store("photos/a/*.jpg").names == ["0.jpg", "1.jpg"]
    monkeypatch.chdir(folder / "photos/a")
    assert stores.open_store("*.jpg").names == ["0.jpg", "1.jpg"]
    assert pathlib.Path(stores.open_store("*.jpg").folder) == pathlib.Path()
