"""Optional packages: the extras of setup.py."""

import importlib
from types import ModuleType

from official_selftrain.utils.errors import UserError, one_line


def import_extra(module: str, extra: str, purpose: str) -> ModuleType:
    """Imports a module of an optional package.

    Args:
        module: name of the module, such as "tensorflow_datasets".
        extra: the extra of `official_selftrain` that installs it, such as "tfds".
        purpose: what needs the module; the error message begins with it.

    Raises:
        UserError: if the module is not installed, or is installed but broken.
    """
    try:
        return importlib.import_module(module)
    except Exception as error:  # a broken package may raise anything
        remedy = f"{purpose} needs the extra: pip install 'official_selftrain[{extra}]'"
        absent = isinstance(error, ModuleNotFoundError) and error.name == module.split(".")[0]
        reason = one_line(error)
        broken = "" if absent else f" ({module} cannot be imported: {reason})"
        raise UserError(remedy + broken) from None
