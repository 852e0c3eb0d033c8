"""The tables of docs/flags.md, made from the flags themselves: python -m tests.flag_table writes them."""

import dataclasses
import re
from pathlib import Path

import image_sample
import image_train

PAGE = Path(__file__).resolve().parents[1] / "docs" / "flags.md"
PROGRAMS = {"t": image_train.FLAGS, "s": image_sample.FLAGS}
HEAD = "| flag | default | values | | meaning |\n|---|---|---|---|---|\n"


def tables() -> str:
    """:return: a heading and a table for each group of flags, in the order of --help."""
    groups = {title: options for flags in PROGRAMS.values() for title, options in flags.items()}
    seen, parts = set(), []
    for title, options in groups.items():
        fields = [field for field in dataclasses.fields(options) if field.name not in seen]
        seen |= options.flags().keys()
        parts.append(f"## {title.capitalize()}\n\n{HEAD}" + "\n".join(row(field) for field in fields) + "\n")
    return "\n".join(parts)


def row(field: dataclasses.Field) -> str:
    """:return: a flag's row: name, + if the reference has no such flag; default, values, where, meaning."""
    known = [letter for letter, flags in PROGRAMS.items() if any(field.name in o.flags() for o in flags.values())]
    mark = " +" if field.metadata["ours"] else ""
    values = ", ".join(filter(None, field.metadata["choices"])) or field.metadata["within"]
    meaning = re.sub(r"(--\w+( True| False)?)", r"`\1`", field.metadata["help"])
    cells = [f"`--{field.name}`{mark}", str(field.default), values, " ".join(known), meaning]
    return "| " + " | ".join(cells).replace("|  |", "| |") + " |"


def page() -> str:
    """:return: the page with its tables made new; what stands before and after them stays."""
    text = PAGE.read_text()
    before, after = text[: text.index("## Data\n")], text[text.index("\nOther programs") :]
    return before + tables() + after


if __name__ == "__main__":
    PAGE.write_text(page())
