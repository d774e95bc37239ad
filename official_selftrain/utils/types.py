"""Types of arguments that several libraries share; shapes and units are in the docstrings."""

import os
from typing import Any, TypeAlias

Tensor: TypeAlias = Any  # of the backend, symbolic or NumPy; no type covers these
StrPath: TypeAlias = str | os.PathLike[str]
