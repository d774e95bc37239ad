"""Files that appear only when complete, checksums, and errors on one line."""

import hashlib

import pytest

from official_selftrain.utils import errors, files
from official_selftrain.utils.errors import UserError, one_line


def test_a_file_is_replaced_only_when_the_block_succeeds(tmp_path):
    path = tmp_path / "a.txt"
    with pytest.raises(KeyError), files.replacing(path, ".h5") as temporary:
        assert temporary.name.endswith(".tmp.h5")
        temporary.write_text("half")
        raise KeyError
    assert list(tmp_path.iterdir()) == []
    with files.replacing(path) as temporary:
        temporary.write_text("whole")
        assert not path.exists()
    assert [file.read_text() for file in tmp_path.iterdir()] == ["whole"]


def test_a_folder_is_replaced_with_all_that_was_in_it(tmp_path):
    path = tmp_path / "model"
    for content in ("old", "new"):
        with files.replacing(path) as temporary:
            temporary.mkdir()
            (temporary / content).write_text(content)
    assert [file.name for file in path.iterdir()] == ["new"]
    with pytest.raises(KeyError), files.replacing(path) as temporary:
        temporary.mkdir()
        raise KeyError
    assert list(tmp_path.iterdir()) == [path]


def test_a_name_that_is_taken_by_a_folder_is_one_error(tmp_path):
    (tmp_path / "a.txt").mkdir()
    with pytest.raises(UserError, match="cannot write .*a.txt: Is a directory"):
        files.write_text(tmp_path / "a.txt", "text")
    assert [file.name for file in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize("size", [0, 5, 2**20, 2**20 + 3])
def test_sha256_equals_hashlib_without_functions_of_python_3_11(size, tmp_path, monkeypatch):
    monkeypatch.delattr(hashlib, "file_digest", raising=False)
    data = bytes(range(256)) * (size // 256) + b"x" * (size % 256)
    (tmp_path / "a").write_bytes(data)
    assert files.sha256(tmp_path / "a") == hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize(
    ("error", "limit", "text"),
    [
        (ValueError("two\n  lines"), 200, "two lines"),
        (ValueError("x" * 9), 4, "xxxx"),
        ("x" * 300, None, "x" * 300),
        (EOFError(), 200, "EOFError"),
    ],
)
def test_errors_fit_on_one_line(error, limit, text):
    assert one_line(error, limit) == text


@pytest.mark.parametrize("links", [True, False])
def test_a_linked_or_copied_file_stays_when_the_first_is_replaced(tmp_path, monkeypatch, links):
    if not links:  # as on another disk
        monkeypatch.setattr(files.os, "link", lambda *_: (_ for _ in ()).throw(OSError(18, "disk")))
    first, second = tmp_path / "first", tmp_path / "second"
    first.write_text("labels")
    second.write_text("of before")
    files.link_or_copy(first, second)
    assert first.stat().st_nlink == (2 if links else 1)
    files.write_text(first, "other labels")
    assert second.read_text() == "labels" and len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    ("seconds", "text"), [(40.2, "40 s"), (720, "12 min"), (5760, "96 min"), (9360, "2.6 h")]
)
def test_durations_read_well(seconds, text):
    assert errors.duration(seconds) == text
