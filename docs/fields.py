"""Writes the tables of settings in the pages of this folder: `python docs/fields.py`.

A table stands between `<!-- fields of NAME -->` and `<!-- end of fields -->`, NAME being a class of
`official_selftrain.config`. It is made of the descriptions in `config/`.
"""

import pathlib
import re

from official_selftrain import config

TABLE = re.compile(r"(<!-- fields of (\w+) -->\n).*?(<!-- end of fields -->)", re.DOTALL)


def table(name: str) -> str:
    """The fields of a class of `config`, with meaning and default, as a Markdown table."""
    rows = ["| field | meaning | default |", "| --- | --- | --- |"]
    for key, field in getattr(config, name).model_fields.items():
        default = "" if field.default in (None, (), "") else f"`{str(field.default).lower()}`"
        default = "required" if field.is_required() else default
        rows.append(f"| `{key}` | {field.description} | {default} |")
    return "\n".join(rows) + "\n"


def filled(page: str) -> str:
    """The text of a page with its tables as they should be."""
    return TABLE.sub(lambda match: match[1] + table(match[2]) + match[3], page)


if __name__ == "__main__":
    for file in pathlib.Path(__file__).parent.glob("*.md"):
        text = file.read_text(encoding="utf-8")
        if filled(text) != text:
            file.write_text(filled(text), encoding="utf-8")
            print(f"updated {file}")
