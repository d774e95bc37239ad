"""Which file a name means, and which labels belong to which image."""

import unicodedata

import pytest

from official_selftrain.data.sources import names
from official_selftrain.utils.errors import UserError

ON_DISK = [
    "a.jpg", "B.PNG", "q 2.jpg", "cam1/0001.png", "cam2/0001.png", "cam1/only.jpg",
    "site a/p 1.PNG", "Straße/café.jpg", "50%25.jpg", "frame.0001.jpg", "deep/er/x.png",
    "twin/t.jpg", "twin/t.png",
]  # fmt: skip
FOUND = [
    ("a.jpg", "a.jpg"),
    ("./a.jpg", "a.jpg"),
    (" a.jpg ", "a.jpg"),
    ("a.jpg\u200b", "a.jpg"),
    ("images/a.jpg", "a.jpg"),
    ("/data/upload/3/a.jpg", "a.jpg"),
    ("C:\\Users\\me\\images\\a.jpg", "a.jpg"),
    ("../images/a.jpg", "a.jpg"),
    ("https://host/bucket/q%202.jpg", "q 2.jpg"),
    ("/data/local-files/?d=cam1/0001.png", "cam1/0001.png"),
    ("A.JPG", "a.jpg"),
    ("a.jpeg", "a.jpg"),
    ("a", "a.jpg"),
    ("b.png", "B.PNG"),
    ("b", "B.PNG"),
    ("q%202.jpg", "q 2.jpg"),
    ("q\u00a02.jpg", "q 2.jpg"),
    ("q  2.jpg", "q 2.jpg"),
    ("cam2/0001.png", "cam2/0001.png"),
    ("cam2\\0001.png", "cam2/0001.png"),
    ("cam2/0001", "cam2/0001.png"),
    ("x/images/cam2/0001.jpg", "cam2/0001.png"),
    ("only.jpg", "cam1/only.jpg"),
    ("only", "cam1/only.jpg"),
    ("er/x.png", "deep/er/x.png"),
    ("site a\\p 1.PNG", "site a/p 1.PNG"),
    ("site%20a/p%201.png", "site a/p 1.PNG"),
    (unicodedata.normalize("NFD", "Straße/café.jpg"), "Straße/café.jpg"),
    (unicodedata.normalize("NFD", "café.jpg"), "Straße/café.jpg"),
    ("strasse/CAFÉ.jpg", "Straße/café.jpg"),
    ("50%25.jpg", "50%25.jpg"),
    ("50%.jpg", "50%25.jpg"),
    ("frame.0001.jpg", "frame.0001.jpg"),
    ("frame.0001", "frame.0001.jpg"),
    ("twin/t.png", "twin/t.png"),
]
NOT_FOUND = [
    "c.jpg", "", ".", "/", "frame", "cam3/0001.png", "cam3/only.jpg", "a.jpg/z", "1.png", "x\0.png",
    "\ud800.jpg", "images", "..", "a.tar", "cam1",
]  # fmt: skip


@pytest.mark.parametrize(("given", "expected"), FOUND)
def test_a_name_means_the_one_file_that_fits(given, expected):
    assert names.Names(ON_DISK, "photos").find(given) == expected


@pytest.mark.parametrize("given", NOT_FOUND)
def test_a_name_without_a_file_means_none(given):
    assert names.Names(ON_DISK, "photos").find(given) is None


@pytest.mark.parametrize("given", ["0001.png", "0001", "twin/t", "t.jpeg"])
def test_a_name_that_fits_two_files_is_refused_with_both(given):
    with pytest.raises(UserError, match=r"can mean '.*(0001|t)\....' or '.*(0001|t)\....' of ph"):
        names.Names(ON_DISK, "photos").find(given)


def test_composed_and_decomposed_names_are_both_kept():
    both = ["é.jpg", unicodedata.normalize("NFD", "é.jpg")]
    found = names.Names(both, "photos")
    assert [found.find(name) for name in both] == both and list(found) == both
    only = names.Names(both[1:], "photos")
    assert only.find(both[0]) == both[1]


def test_names_that_are_no_text_do_no_harm():
    strange = b"\xff\xfe.jpg".decode("utf-8", "surrogateescape")
    found = names.Names([strange, "a.jpg"], "photos")
    assert found.find(strange) == strange and found.find("b.jpg") is None
    assert "a.jpg" in found.near("aa.jpg")


PAIRS = [
    (["a.jpg"], ["a.png"], {"a.jpg": "a.png"}),
    (["cam1/1.png", "cam2/1.png"], ["cam1/1.png", "cam2/1.png"], "same"),
    (["cam1/1.png", "cam2/1.png"], ["cam1/1.txt"], {"cam1/1.png": "cam1/1.txt"}),
    (["images/1.png"], ["1.txt"], {"images/1.png": "1.txt"}),
    (["1.png"], ["deep/1.txt"], {"1.png": "deep/1.txt"}),
    (["a/1.png"], ["b/1.txt"], {"a/1.png": "b/1.txt"}),
    (["A.JPG", "a.jpg"], ["a.xml", "A.xml"], {"A.JPG": "A.xml", "a.jpg": "a.xml"}),
    (["im.1.jpg", "im.2.jpg"], ["im.2.txt"], {"im.2.jpg": "im.2.txt"}),
    (["a.jpg", "b.jpg"], ["a.jpg.txt"], {"a.jpg": "a.jpg.txt"}),
    (
        ["train/images/1.png", "valid/images/1.png"],
        ["train/labels/1.txt", "valid/labels/1.txt"],
        {"train/images/1.png": "train/labels/1.txt", "valid/images/1.png": "valid/labels/1.txt"},
    ),
    (
        ["images/cam1/1.png", "images/cam2/1.png"],
        ["masks/cam1/1.png", "masks/cam2/1.png"],
        {"images/cam1/1.png": "masks/cam1/1.png", "images/cam2/1.png": "masks/cam2/1.png"},
    ),
    ([unicodedata.normalize("NFD", "é.jpg")], ["é.png"], "first"),
    (["a.jpg"], [], {}),
    ([], ["a.txt"], {}),
    (["a.jpg"], ["b.txt"], {}),
]


@pytest.mark.parametrize(("images", "labels", "expected"), PAIRS)
def test_labels_belong_to_the_image_of_their_path_and_then_of_their_stem(images, labels, expected):
    if isinstance(expected, str):
        expected = dict(zip(images, labels, strict=True))
    assert names.pair(images, labels, "labels") == expected


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (["a.jpg", "a.png"], ["a.txt"], "'a.jpg' and 'a.png' would have the same labels, a.txt"),
        (
            ["x/a.jpg", "y/a.jpg"],
            ["a.txt"],
            "'x/a.jpg' and 'y/a.jpg' would have the same labels, a.txt",
        ),
        (["a.jpg"], ["a.png", "a.tif"], "'a.jpg' could have the labels 'a.png' or 'a.tif' of lab"),
        (["a.jpg"], ["x/a.txt", "y/a.txt"], "could have the labels 'x/a.txt' or 'y/a.txt'"),
        (
            ["x/a.jpg", "y/a.jpg"],
            ["x/a.txt", "z/a.txt"],
            "'y/a.jpg' and 'z/a.txt' .* the same stem",
        ),
    ],
)
def test_a_doubtful_pair_is_refused_with_both_names(images, labels, message):
    with pytest.raises(UserError, match=message):
        names.pair(images, labels, "labels")


def test_doubts_about_images_that_are_not_wanted_do_not_matter():
    found = names.pair(["a.jpg", "a.png", "b.jpg"], ["a.txt", "b.txt"], "labels", {"b.jpg"})
    assert found == {"b.jpg": "b.txt"}
