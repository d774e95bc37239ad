"""Extras that are absent or broken are told in one line with the command that mends them."""

import importlib
import json
import sys

import pytest

from official_selftrain.utils.errors import UserError
from official_selftrain.utils.extras import import_extra


@pytest.mark.parametrize(
    ("module", "user"),
    [("sklearn", "sources.digits:_sources"), ("skimage", "sources.digits:_sources"),
     ("keras_cv", "augmentation.geometry:keras_cv_policy")],
)  # fmt: skip
def test_broken_packages_of_data_are_told_as_such(module, user, tmp_path, monkeypatch):
    name, function = user.split(":")
    library = importlib.import_module(f"official_selftrain.data.{name}")
    for known in [key for key in sys.modules if key.split(".")[0] == module]:
        monkeypatch.delitem(sys.modules, known)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / f"{module}.py").write_text("raise ImportError('libgomp.so: no such file')")
    call = getattr(library, function)
    with pytest.raises(UserError, match=r"pip install .* cannot be imported: libgomp.so"):
        getattr(call, "__wrapped__", call)()


COMMAND = r"pip install 'official_selftrain\[report\]'"


def test_an_installed_extra_is_imported():
    assert import_extra("json", "report", "drawing") is json


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (None, "$"),
        ("import gone_with_the_wind", r" \(broken cannot be imported: No module named 'gone_"),
        ("raise ImportError('libcuda.so: no\\nfile')", r" \(broken .*: libcuda.so: no file\)$"),
        ("1 / 0", r" \(broken cannot be imported: division by zero\)$"),
        ("raise OSError", r" \(broken cannot be imported: OSError\)$"),
        ("def", r" \(broken cannot be imported: invalid syntax"),
    ],
)
def test_an_absent_or_broken_extra_is_one_line_with_the_command(
    tmp_path, monkeypatch, module, reason
):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "broken", raising=False)
    if module:
        (tmp_path / "broken.py").write_text(module)
    with pytest.raises(UserError, match=f"^drawing needs the extra: {COMMAND}{reason}"):
        import_extra("broken", "report", "drawing")
