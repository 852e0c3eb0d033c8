"""What a flag is: a field of a dataclass, which holds its name, type, default, range and help once. Parsers, defaults,
checks and the table in the docs are made from such fields here. Knows no flag by name."""

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Self


def flag(
    default: Any,
    help: str,
    *,
    within: str = "",
    choices: Sequence[str] = (),
    aliases: Sequence[str] = (),
    changeable: bool = False,
    ours: bool = False,
) -> Any:
    """
    Declare a flag: `lr: float = flag(1e-4, "learning rate", within="(0, 1]")`.

    :param default: its value where it is not given.
    :param help: what it means, for --help and the docs.
    :param within: the interval that a number must lie in, such as "[0, 1)" or "[0, 2**63)"; "" leaves it free.
    :param choices: the values of a text that are allowed; none leaves it free.
    :param aliases: deprecated spellings, with their dashes.
    :param changeable: a run that goes on may have another value than it began with.
    :param ours: the reference has no such flag.
    """
    metadata = dict(
        help=help, within=within, choices=tuple(choices), aliases=tuple(aliases), changeable=changeable, ours=ours
    )
    return dataclasses.field(default=default, metadata=metadata)


# Ranges that several flags share. What takes memory has an end, for beyond it a program does not fail, but hangs.
SIZE = "[1, 65536]"  # of a batch, or of a layer
WORKERS = "[0, 1024]"
SOME_WORKERS = "[1, 1024]"
COUNT = "[1, 1000000]"  # of what is listed before it is made


class Options:
    """
    The base of dataclasses whose fields are flags; making one checks ranges and choices.

    :raises ValueError: naming flag, value and remedy.
    """

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            check_value(field, getattr(self, field.name))

    @classmethod
    def flags(cls) -> dict[str, Any]:
        """:return: flag -> default."""
        return {field.name: field.default for field in dataclasses.fields(cls)}

    @classmethod
    def read(cls, flags: Mapping[str, Any]) -> Self:
        """:return: the options among flags -> values; others than its own are ignored."""
        return cls(**{name: flags[name] for name in cls.flags()})


def check_value(field: dataclasses.Field, value: Any) -> None:
    """:raises ValueError: where a flag's value is not among its choices, or not in its range."""
    choices, within = field.metadata["choices"], field.metadata["within"]
    if choices and value not in choices:
        raise ValueError(f"unknown --{field.name} {value}: choose one of {', '.join(filter(None, choices))}")
    if within and not contains(within, value):
        raise ValueError(f"--{field.name} {value} must {in_words(within)}")


def check_ranges(flags: Mapping[str, Any], **within: str) -> None:
    """
    :param flags: flag -> value; None is in any range.
    :param within: flag -> the interval that its value must lie in.
    :raises ValueError: naming the first that does not.
    """
    for name, interval in within.items():
        if flags[name] is not None and not contains(interval, flags[name]):
            raise ValueError(f"--{name} {flags[name]} must {in_words(interval)}")


def _bounds(within: str) -> tuple[float, float]:
    low, high = (_number(bound) for bound in within[1:-1].split(","))
    return low, high


def _number(text: str) -> float:
    base, _, power = text.partition("**")
    return float(base) ** float(power or 1)


def contains(within: str, value: float) -> bool:
    """:return: whether a number lies in an interval such as "[0, 1)"."""
    low, high = _bounds(within)
    return (low <= value if within[0] == "[" else low < value) and (
        value <= high if within[-1] == "]" else value < high
    )


def in_words(within: str) -> str:
    """:return: of an interval, what a number must do: "be at least 0", "lie in [0, 1)"."""
    low, _, high = within[1:-1].partition(", ")
    if high == "inf":
        return f"be at least {low}" if within[0] == "[" else f"be above {low}"
    return f"lie in {within}"


def add_flags(parser: argparse.ArgumentParser, groups: Mapping[str, type[Options]]) -> None:
    """
    Add the flags of options to a parser, each with its help.

    :param groups: title of a group in --help -> its options; a flag that an earlier group has is left out.
    """
    seen = set()
    for title, options in groups.items():
        group = parser.add_argument_group(title)
        for field in dataclasses.fields(options):
            if field.name not in seen:
                _add_flag(group, field)
        seen |= options.flags().keys()


def defaults(groups: Mapping[str, type[Options]]) -> dict[str, Any]:
    """:return: flag -> default, of all groups."""
    return {name: default for options in groups.values() for name, default in options.flags().items()}


def changeable(groups: Mapping[str, type[Options]]) -> set[str]:
    """:return: the flags among options that may change when a run goes on."""
    fields = (field for options in groups.values() for field in dataclasses.fields(options))
    return {field.name for field in fields if field.metadata["changeable"]}


def _add_flag(group: Any, field: dataclasses.Field) -> None:
    choices, within = field.metadata["choices"], field.metadata["within"]
    metavar = {bool: "{True,False}", int: "N", float: "X"}.get(field.type, "TEXT")
    group.add_argument(
        f"--{field.name}",
        *field.metadata["aliases"],
        default=field.default,
        type=value_type(field.default),
        metavar=f"{{{','.join(filter(None, choices))}}}" if choices else metavar,
        help=field.metadata["help"] + (f", {within}" if within and not within.endswith("inf)") else ""),
    )


def value_type(default: Any) -> type | Any:
    """:return: what makes a flag's value of text, by its default; None makes a string."""
    return str if default is None else str2bool if isinstance(default, bool) else type(default)


def str2bool(text: str | bool) -> bool:
    """
    Read a boolean flag's value.

    :param text: yes, true, t, y, 1 or no, false, f, n, 0, in any case.
    """
    if isinstance(text, bool):
        return text
    if text.lower() in ("yes", "true", "t", "y", "1"):
        return True
    if text.lower() in ("no", "false", "f", "n", "0"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")
