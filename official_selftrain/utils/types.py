"""Names for types that several libraries share; shapes and units are in the docstrings."""

import os
from typing import Any, TypeAlias

Tensor: TypeAlias = Any  # a tensor of the backend, a symbolic one of Keras, or a NumPy array
StrPath: TypeAlias = str | os.PathLike[str]
