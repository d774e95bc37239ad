"""Reading and writing files safely, finding them, their checksums, and locks on folders."""

import contextlib
import fnmatch
import hashlib
import json
import logging
import os
import pathlib
import re
import shlex
import shutil
import socket
import stat
import sys
import uuid
from collections.abc import Iterator
from typing import Any

from official_selftrain.utils.errors import UserError
from official_selftrain.utils.types import StrPath

LARGEST_TEXT = 4 * 2**30  # bytes; the largest annotation file of COCO has 0.7e9


@contextlib.contextmanager
def replacing(path: StrPath, suffix: str = "") -> Iterator[pathlib.Path]:
    """Context manager for writing a file or a folder that appears only when it is complete.

    The block writes to the temporary path that it gets. When the block ends, that becomes `path`,
    in place of what was there before; when the block raises, it is removed and `path` is untouched.

    Args:
        path: of the file or folder.
        suffix: ending of the temporary name, for libraries that choose the format by it.

    Yields:
        A path beside `path` that no other process uses, on this machine or on another one.

    Raises:
        UserError: if the complete file cannot be renamed to `path`.
    """
    temporary = pathlib.Path(f"{path}.{uuid.uuid4().hex[:12]}.tmp{suffix}")
    try:
        yield temporary
        try:
            _move(temporary, pathlib.Path(path))
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}") from None
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        temporary.unlink(missing_ok=True)


def _move(temporary, path):
    """Gives a complete file or folder its name.

    The content of a file reaches the disk before its name does: after a power cut there is the old
    file or the new one, never an empty one.
    """
    if temporary.is_dir():
        if path.is_dir():  # no system call swaps two folders
            shutil.rmtree(path)
        temporary.rename(path)
        return
    with open(temporary, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)
    with contextlib.suppress(OSError):  # some file systems cannot sync a folder
        folder = os.open(os.path.dirname(os.path.abspath(path)), os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_text(path: StrPath, text: str) -> None:
    """Writes a UTF-8 text file that appears only when it is complete.

    Raises:
        UserError: if it cannot be written, such as when the disk is full.
    """
    try:
        with replacing(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None


def read_bytes(path: StrPath, what: str = "file", limit: int = LARGEST_TEXT) -> bytes:
    """The bytes of a regular file.

    Devices and pipes, which might never end, are refused before they are read.

    Args:
        path: of the file.
        what: what errors call it, such as "class list".
        limit: largest size in bytes.

    Raises:
        UserError: if the file is missing, not readable, not a regular file or too large.
    """
    try:
        with open(path, "rb", opener=_open_without_waiting) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise UserError(f"the {what} {path} is not a regular file (a device or a pipe?)")
            if status.st_size > limit:
                raise UserError(
                    f"the {what} {path} has {status.st_size:,} bytes; at most {limit:,} are read"
                )
            return file.read()
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"the {what} {path!r} is not a possible file name: {error}") from None
    except OSError as error:
        raise UserError(f"cannot read the {what} {path}: {error.strerror}") from None


def _open_without_waiting(path: str, flags: int) -> int:
    """Opens a file for `open`; a pipe that nobody writes to would otherwise block the process."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def read_text(path: StrPath, what: str = "file") -> str:
    """The text of a UTF-8 file, with or without a byte order mark, or of a UTF-16 file with one.

    Args:
        path: of the file.
        what: what errors call it, such as "class list".

    Raises:
        UserError: if the file is missing, not readable or not text.
    """
    data = read_bytes(path, what)
    encoding = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        raise UserError(
            f"the {what} {path} is not UTF-8 text (byte {error.start} is "
            f"{data[error.start]:#04x}); save it as UTF-8"
        ) from None


def read_json(path: StrPath, what: str = "file") -> Any:
    """The content of a JSON file.

    Args:
        path: of the file.
        what: what errors call it, such as "annotations".

    Raises:
        UserError: if the file is missing, not readable or not valid JSON.
    """
    text = read_text(path, what)
    try:
        return json.loads(text)
    except RecursionError:
        raise UserError(f"the {what} {path} is nested too deeply to be read") from None
    except ValueError as error:  # also raised for numbers of thousands of digits
        raise UserError(f"the {what} {path} is not valid JSON: {error}") from None


def read_json_or_none(path: StrPath) -> Any:
    """The content of a JSON file that can be made again; None if it is missing or damaged."""
    if not os.path.exists(path):
        return None
    try:
        return read_json(path)
    except UserError as error:
        logging.warning("%s; it is made again", error)
        return None


def matching(pattern: StrPath) -> tuple[pathlib.Path, list[pathlib.Path]]:
    """The paths that a path or a glob stands for.

    A path that exists is taken as it is, even if it contains brackets or stars. Otherwise its
    leading folders that exist are taken as they are and the rest is a pattern, in which `**` stands
    for any number of folders, including linked ones.

    Returns:
        The folder below which the pattern was expanded, and a sorted list of the paths found, among
        which hidden ones may be.

    Raises:
        UserError: if a folder cannot be read.
    """
    path = pathlib.Path(pattern)
    if path.exists():
        return path.parent, [path]
    base = next(folder for folder in path.parents if folder.exists() or folder == folder.parent)
    return base, sorted(set(_expand(base, path.relative_to(base).parts)))


def _expand(folder: pathlib.Path, parts: tuple[str, ...]) -> list[pathlib.Path]:
    # `glob` would take brackets in the names of existing folders for patterns, and does not follow
    # linked folders in `**`.
    if not parts:
        return [folder]
    part, rest = parts[0], parts[1:]
    if part == "**":
        return [path for below in _folders(folder) for path in _expand(below, rest or ("*",))]
    near = [path for path in _listed(folder) if fnmatch.fnmatchcase(path.name, part)]
    return [path for inside in near for path in _expand(inside, rest)]


def _folders(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """A folder and all folders below it, each once, even if links form a cycle."""
    waiting, entered = [folder], set()
    while waiting:
        current = waiting.pop(0)
        real = os.path.realpath(current)
        if real not in entered:
            entered.add(real)
            yield current
            waiting += sorted(path for path in _listed(current) if path.is_dir())


def _listed(folder: pathlib.Path) -> list[pathlib.Path]:
    """The content of a folder, empty if it is something else."""
    if not folder.is_dir():
        return []
    try:
        return list(folder.iterdir())
    except OSError as error:
        raise UserError(f"cannot read the folder {folder}: {error.strerror}") from None


def write_json(path: StrPath, values: Any) -> None:
    """Writes a JSON file that appears only when it is complete; see `write_text` for errors."""
    write_text(path, json.dumps(values, indent=1))


def link_or_copy(source: StrPath, target: StrPath) -> None:
    """Gives a file that is only ever replaced a second name, or copies it to another disk.

    Either way it stays when the first name is deleted.

    Raises:
        UserError: if the disk is full or not writable.
    """
    pathlib.Path(target).unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        copy(source, target)


def copy(source: StrPath, target: StrPath) -> None:
    """Copies a file, which appears only when it is complete.

    Raises:
        UserError: if the disk is full or not writable.
    """
    try:
        with replacing(target) as partial:
            shutil.copyfile(source, partial)
    except OSError as error:
        raise UserError(f"cannot copy {source} to {target}: {error.strerror}") from None


def sha256(path: StrPath) -> str:
    """Hexadecimal SHA-256 of a file."""
    # `hashlib.file_digest` does the same, but does not exist in Python 3.10.
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


@contextlib.contextmanager
def locked(folder: StrPath, name: str = ".lock") -> Iterator[bool]:
    """Context manager that keeps other processes out of a folder, which it creates if necessary.

    The operating system releases the lock when the process ends, even if it is killed.

    Args:
        folder: to lock.
        name: of the lock file in the folder.

    Yields:
        Whether the file system supports locks.

    Raises:
        UserError: if another process holds the lock, naming that process.
    """
    import fcntl  # not on Windows, where the rest of this module works

    folder = pathlib.Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / name, "a+", encoding="utf-8")  # noqa: SIM115
    except OSError as error:
        raise UserError(f"cannot write to the folder {folder}: {error.strerror}") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            other = file.read().strip() or "unknown"
            raise UserError(
                f"another process works in {folder}: {other}; wait until it ends, stop it, or "
                "choose another folder"
            ) from None
        except OSError as error:  # some network file systems do not support locks
            logging.warning("%s cannot be locked: %s", folder, error.strerror)
            yield False
            return
        with contextlib.suppress(OSError):  # the lock holds even if a full disk keeps no name
            file.truncate(0)
            command = shlex.join(sys.argv)[:300]
            file.write(f"process {os.getpid()} on {socket.gethostname()}, {command}\n")
            file.flush()
        yield True


def remove_leftovers(folder: StrPath) -> None:
    """Deletes the temporary files that a killed process has left in a folder.

    Only call it while holding the lock of the folder; otherwise a file might still be in use.
    """
    for file in pathlib.Path(folder).glob("*.tmp*"):
        if re.search(r"\.[0-9a-f]{12}\.tmp(\.weights\.h5)?$", file.name):
            file.unlink(missing_ok=True)
