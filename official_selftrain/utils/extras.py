"""Packages that not everybody installs: the extras of setup.py."""

import importlib

from official_selftrain.utils.errors import UserError


def import_extra(module, extra, purpose):
    """A module of an extra.

    Args:
        module: its name, such as "tensorflow_datasets".
        extra: of `official_selftrain` that brings it, such as "tfds".
        purpose: what needs it; begins the message.

    Raises:
        UserError: if it is absent, or installed but broken.
    """
    try:
        return importlib.import_module(module)
    except Exception as error:  # a broken package raises anything
        remedy = f"{purpose} needs the extra: pip install 'official_selftrain[{extra}]'"
        absent = isinstance(error, ModuleNotFoundError) and error.name == module.split(".")[0]
        reason = " ".join(str(error).split())[:200]
        broken = "" if absent else f" ({module} cannot be imported: {reason})"
        raise UserError(remedy + broken) from None
