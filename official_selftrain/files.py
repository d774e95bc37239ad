"""Files that appear only when complete, and their checksums."""

import hashlib
import json
import os
import pathlib
import uuid

from official_selftrain.errors import UserError


def temporary_name(path):
    """A name beside `path` that no other process, here or on another machine, takes."""
    return f"{path}.{uuid.uuid4().hex[:12]}.tmp"


def write_text(path, text):
    """Writes a text file that appears only when complete.

    Raises:
        UserError: if it cannot be written, such as on a full disk.
    """
    temporary = pathlib.Path(temporary_name(path))
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {error.strerror}") from None


def read_text(path, what="file"):
    """The text of a file.

    Raises:
        UserError: if it is missing, not readable or not text; `what` says what it should have been.
    """
    try:
        return pathlib.Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot read the {what} {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"the {what} {path} is not UTF-8 text") from None


def read_json(path):
    return json.loads(pathlib.Path(path).read_text(encoding="utf-8"))


def write_json(path, values):
    write_text(path, json.dumps(values, indent=1))


def sha256(path):
    """Hexadecimal SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
