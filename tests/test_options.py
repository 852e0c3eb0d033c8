"""Flags as fields: what a field says is what parser, check and help say."""

import dataclasses
import math

import pytest

import image_sample
import image_train
from guided_diffusion import cli
from guided_diffusion.options import Options, add_flags, flag


@dataclasses.dataclass(frozen=True)
class Paint(Options):
    colour: str = flag("red", "what to dip the brush into", choices=("red", "", "blue"))
    coats: int = flag(2, "one after another", within="[1, inf)", changeable=True)
    share: float = flag(0.5, "of the wall", within="(0, 1]", ours=True)
    wet: bool = flag(False, "do not wait between coats", aliases=("--damp",))


@dataclasses.dataclass(frozen=True)
class Brush(Paint):
    width: float = flag(1.0, "in cm", within="(0, inf)")


@pytest.mark.parametrize(
    "values, message",
    [
        (dict(colour="green"), "unknown --colour green: choose one of red, blue"),
        (dict(coats=0), "--coats 0 must be at least 1"),
        (dict(share=0.0), r"--share 0.0 must lie in \(0, 1\]"),
        (dict(share=1.01), r"--share 1.01 must lie in \(0, 1\]"),
        (dict(share=math.nan), "--share nan"),
        (dict(width=0.0), "--width 0.0 must be above 0"),
        (dict(width=math.inf), "--width inf must be above 0"),
    ],
)
def test_ranges_and_choices(values, message):
    with pytest.raises(ValueError, match=message):
        Brush(**values)


def test_bounds_belong_as_the_brackets_say():
    seed = flag(0, "of colours", within="[0, 2**63)")
    Seeded = dataclasses.make_dataclass("Seeded", [("seed", int, seed)], bases=(Options,), frozen=True)
    assert Seeded(2**62).seed == 2**62
    with pytest.raises(ValueError, match=r"--seed 9223372036854775808 must lie in \[0, 2\*\*63\)"):
        Seeded(2**63)
    assert Brush(coats=1, share=1.0, colour="").share == 1.0
    with pytest.raises(ValueError, match="--share"):
        Brush(share=math.nextafter(1, 2))


def test_flags_and_read():
    assert Brush.flags() == dict(colour="red", coats=2, share=0.5, wet=False, width=1.0)
    assert Paint.read({**Brush.flags(), "coats": 5, "other": 1}) == Paint(coats=5)
    with pytest.raises(ValueError, match="--coats -1"):
        Paint.read({**Paint.flags(), "coats": -1})


def test_marks_stay_with_the_flag():
    marks = {field.name: field.metadata for field in dataclasses.fields(Brush)}
    assert [name for name in marks if marks[name]["changeable"]] == ["coats"]
    assert [name for name in marks if marks[name]["ours"]] == ["share"]


def test_parser_has_every_flag_once_with_its_help():
    parser = cli.FlagParser(prog="wall")
    add_flags(parser, {"paint": Paint, "brush": Brush})
    assert vars(parser.parse_args([])) == Brush.flags()
    given = parser.parse_args("--colour blue --coats 3 --share 1 --damp yes --width 2".split())
    assert vars(given) == dict(colour="blue", coats=3, share=1.0, wet=True, width=2.0)
    paint, brush = parser.format_help().split("\npaint:\n")[1].split("\nbrush:\n")
    assert "--colour {red,blue}" in paint and "(default red)" in paint
    assert "one after another (default 2)" in " ".join(paint.split())
    assert "of the wall, (0, 1] (default 0.5)" in " ".join(paint.split())
    assert "--damp: deprecated spelling" in " ".join(paint.split()) and "--damp {" not in paint
    assert "--width X" in brush and "--coats" not in brush


def test_usage_names_what_must_be_given():
    parser = cli.FlagParser(prog="wall")
    parser.add_argument("house", metavar="HOUSE")
    parser.add_argument("--owner", required=True)
    parser.add_argument("--seed", default=0)
    assert " ".join(parser.format_usage().split()) == "usage: wall --owner OWNER [flags] HOUSE"


def test_abbreviations_as_argparse_has_them():
    parser = cli.FlagParser()
    add_flags(parser, {"brush": Brush})
    assert parser.parse_args(["--wid", "3"]).width == 3
    with pytest.raises(ValueError, match="ambiguous option: --w could match --wet, --width"):
        parser.parse_args(["--w", "3"])
    with pytest.raises(ValueError, match="--widht"):
        parser.parse_args(["--widht", "3"])


# ---- the flags that there are ----

GROUPS = list(dict.fromkeys([*image_train.FLAGS.values(), *image_sample.FLAGS.values()]))  # each once, in order
FIELDS = [pytest.param(o, field, id=f"{o.__name__}.{field.name}") for o in GROUPS for field in dataclasses.fields(o)]


def outside(field):
    """Values that a flag must not have."""
    if field.metadata["choices"]:
        return ["nonsense"]
    if not field.metadata["within"]:
        return []
    low, _, high = field.metadata["within"][1:-1].partition(", ")
    low = field.type(low)
    below = low if field.metadata["within"][0] == "(" else low - 1
    above = {"inf": [math.inf] if field.type is float else [], "2**63": [2**63]}.get(high)
    return [below, *([field.type(high) + 1] if above is None else above), *[math.nan] * (field.type is float)]


@pytest.mark.parametrize("options, field", FIELDS)
def test_every_flag_is_checked(options, field):
    assert field.type is type(field.default) and field.metadata["help"]
    options.read({**options.flags()})
    for value in outside(field):
        with pytest.raises(ValueError, match=f"--{field.name} {value}".replace("+", "[+]")):
            options.read({**options.flags(), field.name: value})


def test_numbers_without_a_range_are_checked_elsewhere():
    free = {p.values[1].name for p in FIELDS if p.values[1].type in (int, float) and not p.values[1].metadata["within"]}
    assert free == {"num_heads_upsample", "num_head_channels", "in_channels"}
