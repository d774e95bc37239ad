"""Files that appear only when complete, and their checksums."""

import hashlib
import os
import pathlib

from official_selftrain.errors import UserError


def write_text(path, text):
    """Writes a text file that appears only when complete.

    Raises:
        UserError: if it cannot be written, such as on a full disk.
    """
    temporary = pathlib.Path(f"{path}.tmp")
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


def sha256(path):
    """Hexadecimal SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
