"""
The experiment's protocols as data: cells, each a track, a share and a seed; and variants, what segmenters train on.

Owns how a configuration writes them, and what a variant takes. Knows no files, and not how anything is run.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

# Track -> what the diffusion model sees beside the slides that are held out, which nothing sees.
TRACKS = {
    "slides": "the share's slides",
    "masks": "the share's slides, and images of the others without masks",
    "patches": "all training patches with masks; the share is of one cluster's patches",
}
# Whose layouts of nuclei a model's samples show -> the kinds of samples.
STRUCTURES = {"real": ("samples",), "recombine": ("made",), "both": ("samples", "made"), "unseen": ("layouts",)}
# What a variant adds to the real patches -> how its title calls that.
SOURCES = {
    "model": "synthetic",
    "pseudo": "pseudo-labelled",
    "transfer": "with other slides' colours",
    "unseen": "real of other slides",
}
FILTERS = ("patchcore", "useful")
_LAYOUTS = {"recombine": ", made layouts", "both": ", real and made layouts", "unseen": ", layouts of other slides"}
_NAME = re.compile(r"[a-z][a-z0-9_]*")


@dataclass(frozen=True)
class Variant:
    """
    What one segmenter of a cell is trained on.

    :param source: what is added to the real patches, of SOURCES; "" for nothing.
    :param structures: of a model's samples, of STRUCTURES.
    :param ratio: added patches for each real one; None for all there are.
    :param filter: of FILTERS, which chooses among a model's samples; "" for none.
    :param judge: the variant whose segmenter gives pseudo-labels, or is asked by the filter `useful`.
    :param bounds: LOW,HIGH of its agreement there.
    :param size: the variant that has as many added patches, in place of a ratio.
    :param first: share of the steps, the first ones, that take added patches alone, and then real ones; 0: mixed.
    :param last: share of the steps, the last ones, that take real patches alone, where those before take either.
    :param jitter: jitter the stains in training.
    """

    name: str
    source: str = ""
    structures: str = "real"
    ratio: float | None = 1.0
    filter: str = ""
    judge: str = ""
    bounds: str = "0.2,0.7"
    size: str = ""
    first: float = 0.0
    last: float = 0.0
    jitter: bool = False

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of patches that are added; each is a folder of a cell, and a stage."""
        if self.source == "pseudo":
            return (f"pseudo-{self.judge}",)
        return STRUCTURES[self.structures] if self.source == "model" else (self.source,) if self.source else ()

    @property
    def choice(self) -> str:
        """A name for what the filter keeps, the same for all variants that take it; "" without a filter."""
        asked = (self.judge, self.bounds.replace(",", "-")) if self.filter == "useful" else ()
        return "-".join((self.filter, self.structures, *asked)) if self.filter else ""

    @property
    def needs_others(self) -> bool:
        """Whether there must be training slides beside the share's."""
        return self.source not in ("", "model") or self.structures == "unseen"

    @property
    def title(self) -> str:
        """What it is, in a table."""
        words = "real"
        if self.source:
            amount = f"as many as {self.size} of" if self.size else "all" if self.ratio is None else f"{self.ratio:g}"
            words += f" + {amount} {SOURCES[self.source]}{_LAYOUTS.get(self.structures, '')}"
        words += {"": "", "patchcore": ", filtered", "useful": f", useful to {self.judge}"}[self.filter]
        words += (", these first" if self.first else "") + (", real ones last" if self.last else "")
        return words + (", jitter" if self.jitter else "")


@dataclass(frozen=True)
class Cell:
    """A diffusion model and the segmenters that are compared: track, per cent of the data, seed, variants' names."""

    track: str
    share: float
    seed: int
    variants: tuple[str, ...]

    @property
    def name(self) -> str:
        """Of its folder and its stages."""
        return f"{self.track}-f{self.share:g}-s{self.seed}"


def parse_variants(rows: Iterable[str]) -> dict[str, Variant]:
    """
    :param rows: each "NAME: WORD ...", the words `jitter` and source=, structures=, ratio=, filter=, judge=, bounds=,
        size=, first= and last= with their values. What is not said is as Variant has it; with structures, ratio,
        filter or size, the source is a model; pseudo-labels are those of the first variant of real patches with jitter.
    :return: name -> variant, in order.
    :raises ValueError: naming the row that is none.
    """
    found: dict[str, Variant] = {}
    for row in rows:
        name, colon, words = row.partition(":")
        if not colon or not _NAME.fullmatch(name) or name in found:
            raise ValueError(f"VARIANTS: {row!r} is no NAME: WORD ..., or the second of that name: mend it")
        try:
            found[name] = _variant(name, words.split(), _baseline(found.values()))
        except ValueError as error:
            raise ValueError(f"VARIANTS: {name}: {error}") from None
    for variant in found.values():
        _check_others(variant, found)
    return found


def _variant(name: str, words: Sequence[str], baseline: str) -> Variant:
    values: dict[str, str] = {}
    for word in words:
        key, _, value = word.partition("=")
        if key not in Variant.__dataclass_fields__ or key == "name" or bool(value) == (key == "jitter"):
            raise ValueError(f"{word!r} is no word of a variant: see docs/experiment.md")
        values[key] = value
    source = values.get("source") or ("model" if values.keys() - {"jitter"} else "")
    for key, choices in (("source", ("", *SOURCES)), ("structures", STRUCTURES), ("filter", ("", *FILTERS))):
        if (source if key == "source" else values.get(key, "real" if key == "structures" else "")) not in choices:
            raise ValueError(f"{key}={values[key]}: choose one of {', '.join(filter(None, choices))}")
    if source != "model" and values.keys() & {"structures", "filter"}:
        raise ValueError(f"source={source} has no structures and no filter: those are of a model's samples")
    ratio = _number("ratio", values.get("ratio", "1"), math.inf) if values.get("ratio") != "all" else None
    if ratio is None and source not in ("pseudo", "unseen"):
        raise ValueError(f"ratio=all is for source=pseudo and source=unseen: give {source} a number")
    if "size" in values and "ratio" in values:
        raise ValueError("size and ratio both say how many: give one of them")
    judge = values.get("judge", baseline if source == "pseudo" else "")
    if bool(judge) != (source == "pseudo" or values.get("filter") == "useful"):
        raise ValueError("filter=useful and source=pseudo take a judge, and nothing else does")
    if "bounds" in values and values.get("filter") != "useful":
        raise ValueError("bounds are of filter=useful alone")
    low, _, high = values.get("bounds", "0,1").partition(",")
    if not re.fullmatch(r"[\d.]+,[\d.]+", f"{low},{high}") or not 0 <= float(low) < float(high) <= 1:
        raise ValueError(f"bounds={values['bounds']} are no LOW,HIGH between 0 and 1")
    first, last = (_number(key, values.get(key, "0"), 1) for key in ("first", "last"))
    if first and last:
        raise ValueError("first and last both say when real patches come alone: give one of them")
    given = {key: values[key] for key in ("structures", "filter", "bounds", "size") if key in values}
    return Variant(name, source, ratio=ratio, judge=judge, first=first, last=last, jitter="jitter" in values, **given)


def _number(key: str, text: str, below: float) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 <= number < below or (key not in ("first", "last") and not number):
        raise ValueError(f"{key}={text} is not a number that it takes")
    return number


def _baseline(variants: Iterable[Variant]) -> str:
    """The first variant of real patches with jitter; "" where there is none."""
    return next((variant.name for variant in variants if variant.jitter and not variant.source), "")


def _check_others(variant: Variant, variants: Mapping[str, Variant]) -> None:
    """:raises ValueError: where a variant names another that is missing, or waits for more itself."""
    for key, name in (("judge", variant.judge), ("size", variant.size)):
        other = variants.get(name)
        if name and (
            other is None or other.size or (key == "judge" and other.judge) or not (other.source or key != "size")
        ):
            raise ValueError(f"VARIANTS: {variant.name}: {key}={name} is no variant that can be that: choose another")


def baselines(variants: Iterable[Variant]) -> list[str]:
    """:return: of real patches alone the variants with jitter, then those without: what the others are to beat."""
    alone = [variant for variant in variants if not variant.source]
    return [variant.name for jitter in (True, False) for variant in alone if variant.jitter == jitter]


def rivals(variants: Iterable[Variant]) -> list[str]:
    """:return: of what a lab could do instead with the same images, the variants."""
    return [variant.name for variant in variants if variant.source in ("pseudo", "transfer")]


def parse_grid(rows: Iterable[str], variants: Mapping[str, Variant]) -> dict[str, Cell]:
    """
    :param rows: each "TRACK SHARE SEEDS VARIANTS": per cent; such as 0-4 or 0,3; names with commas between, or all. Of
        rows of one cell the variants add up.
    :return: name -> cell, in order.
    :raises ValueError: naming the row that is none.
    """
    cells: dict[str, Cell] = {}
    for row in rows:
        words = row.split()
        if len(words) != 4 or words[0] not in TRACKS or not re.fullmatch(r"\d+(-\d+)?(,\d+(-\d+)?)*", words[2]):
            raise ValueError(f"GRID: {row!r} is no TRACK SHARE SEEDS VARIANTS such as 'masks 10 0-4 all': mend it")
        share = _number("share", words[1], 100 + 1e-9)
        names = tuple(variants) if words[3] == "all" else tuple(words[3].split(","))
        for name in names:
            if name not in variants:
                raise ValueError(f"GRID: {row!r}: {name} is not of VARIANTS: choose of {', '.join(variants)}")
            if words[0] != "patches" and share == 100 and variants[name].needs_others:
                raise ValueError(f"GRID: {row!r}: {name} needs training slides beside the share's: leave it out")
        for part in words[2].split(","):
            low, _, high = part.partition("-")
            if int(high or low) < int(low):
                raise ValueError(f"GRID: {row!r}: seeds {part} go down: give the smaller one first")
            for seed in range(int(low), int(high or low) + 1):
                cell = Cell(words[0], share, seed, names)
                before = cells.get(cell.name, cell).variants
                cells[cell.name] = replace(cell, variants=tuple(dict.fromkeys((*before, *names))))
    return cells


def involved(names: Iterable[str], variants: Mapping[str, Variant]) -> list[Variant]:
    """:return: the variants of these names and those that they wait for, in order."""
    wanted = {name: variants[name] for name in names}
    for variant in list(wanted.values()):
        for name in filter(None, (variant.judge, variant.size, variants[variant.size].judge if variant.size else "")):
            wanted[name] = variants[name]
    return [variant for variant in variants.values() if variant.name in wanted]


def amounts(wanted: Sequence[Variant], variants: Mapping[str, Variant], patches: int, others: int) -> dict[str, int]:
    """
    Say how many patches of each kind a cell makes: for the largest ratio; smaller ones take a part of them.

    :param wanted: the cell's variants. :param variants: all.
    :param patches: real ones that a segmenter is trained on; others: training patches of which it sees no mask.
    """
    found: dict[str, int] = {}
    for variant in wanted:
        ratio = variants[variant.size].ratio if variant.size else variant.ratio
        for kind in variant.kinds:
            number = others if ratio is None else math.ceil(ratio * patches / len(variant.kinds))
            if variant.source in ("pseudo", "unseen"):
                number = min(number, others)
            found[kind] = max(found.get(kind, 0), number)
    if any(len(variant.kinds) > 1 for variant in wanted):  # half each needs as many of both
        most = max(found[kind] for kind in STRUCTURES["both"])
        found |= dict.fromkeys(STRUCTURES["both"], most)
    return found
