"""Files that appear only when complete, their checksums, and locks on folders."""

import contextlib
import fnmatch
import hashlib
import json
import logging
import os
import pathlib
import re
import shlex
import socket
import stat
import sys
import uuid

from official_selftrain.utils.errors import UserError

LARGEST_TEXT = 4 * 2**30  # bytes of a text file; COCO's largest has 0.7e9


def temporary_name(path):
    """A name beside `path` that no other process, here or on another machine, takes."""
    return f"{path}.{uuid.uuid4().hex[:12]}.tmp"


def replace(temporary, path):
    """Renames a finished file to `path`, on the disk before the name is: a power cut leaves the
    old file or the new one, never an empty one."""
    with open(temporary, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)
    with contextlib.suppress(OSError):  # some file systems cannot sync a folder
        folder = os.open(os.path.dirname(os.path.abspath(path)), os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_text(path, text):
    """Writes a text file that appears only when complete.

    Raises:
        UserError: if it cannot be written, such as on a full disk.
    """
    temporary = pathlib.Path(temporary_name(path))
    try:
        temporary.write_text(text, encoding="utf-8")
        replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {error.strerror}") from None


def read_bytes(path, what="file", limit=LARGEST_TEXT):
    """The bytes of a regular file.

    A device or a pipe, which might never end, and a file of more than `limit` bytes are refused
    before they are read.

    Raises:
        UserError: if it is missing, not readable, not a regular file or too large; `what` says what
            it should have been.
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


def _open_without_waiting(path, flags):
    """Opens a pipe at once, too, where nobody writes into it."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def read_text(path, what="file"):
    """The text of a UTF-8 file, with or without a byte order mark; UTF-16 needs one.

    Raises:
        UserError: if it is missing, not readable or not text; `what` says what it should have been.
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


def read_json(path, what="file"):
    """The content of a JSON file.

    Raises:
        UserError: if it is missing, not readable or not valid JSON.
    """
    text = read_text(path, what)
    try:
        return json.loads(text)
    except RecursionError:
        raise UserError(f"the {what} {path} is nested too deeply to be read") from None
    except ValueError as error:  # numbers of thousands of digits, too
        raise UserError(f"the {what} {path} is not valid JSON: {error}") from None


def read_json_or_none(path):
    """The content of a JSON file that can be made again; None if it is missing or damaged."""
    if not os.path.exists(path):
        return None
    try:
        return read_json(path)
    except UserError as error:
        logging.warning("%s; it is made again", error)
        return None


def matching(pattern):
    """The paths that a path or a glob means.

    A path that exists is that path, whatever brackets or stars are in it. Otherwise its first
    folders that exist are taken as they are, and the rest is a pattern, in which `**` is any number
    of folders, linked ones too.

    Returns:
        Folder from which the pattern counts, and a sorted list of paths below it, which may be
        hidden.

    Raises:
        UserError: if a folder cannot be read.
    """
    path = pathlib.Path(pattern)
    if path.exists():
        return path.parent, [path]
    base = next(folder for folder in path.parents if folder.exists() or folder == folder.parent)
    return base, sorted(set(_expand(base, path.relative_to(base).parts)))


def _expand(folder, parts):
    if not parts:
        return [folder]
    part, rest = parts[0], parts[1:]
    if part == "**":
        return [path for below in _folders(folder) for path in _expand(below, rest or ("*",))]
    near = [path for path in _listed(folder) if fnmatch.fnmatchcase(path.name, part)]
    return [path for inside in near for path in _expand(inside, rest)]


def _folders(folder):
    """A folder and those below it, each once."""
    waiting, entered = [folder], set()
    while waiting:
        here = waiting.pop(0)
        real = os.path.realpath(here)
        if real not in entered:
            entered.add(real)
            yield here
            waiting += sorted(path for path in _listed(here) if path.is_dir())


def _listed(folder):
    if not folder.is_dir():
        return []
    try:
        return list(folder.iterdir())
    except OSError as error:
        raise UserError(f"cannot read the folder {folder}: {error.strerror}") from None


def write_json(path, values):
    """Writes a JSON file that appears only when complete."""
    write_text(path, json.dumps(values, indent=1))


def sha256(path):
    """Hexadecimal SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def locked(folder, name=".lock"):
    """Keeps other processes out of a folder, which is made if missing.

    The lock ends with the process, however that ends. Yields whether the file system knows locks.

    Raises:
        UserError: if another process holds it, naming the process.
    """
    import fcntl

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
        except OSError as error:  # some network file systems know no locks
            logging.warning("%s cannot be locked: %s", folder, error.strerror)
            yield False
            return
        with contextlib.suppress(OSError):  # on a full disk the name of the process is missing
            file.truncate(0)
            command = shlex.join(sys.argv)[:300]
            file.write(f"process {os.getpid()} on {socket.gethostname()}, {command}\n")
            file.flush()
        yield True


def remove_leftovers(folder):
    """Removes the temporary files that a killed process has left in a folder.

    Only for who holds the lock of the folder: no other process then writes into it.
    """
    for file in pathlib.Path(folder).glob("*.tmp*"):
        if re.search(r"\.[0-9a-f]{12}\.tmp(\.weights\.h5)?$", file.name):
            file.unlink(missing_ok=True)
