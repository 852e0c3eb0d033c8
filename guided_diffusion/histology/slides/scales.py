"""
The magnification of slides: what their annotations or the user say, and what it is where neither does.

Knows nothing of pixels nor of patches.
"""

import fnmatch
from collections import Counter
from collections.abc import Mapping, Sequence

from ...magnification import REFERENCE_MPP, nominal
from . import aperio
from .annotations import Slide

Scales = dict[str, float | None]  # slide -> micrometres a pixel, None where nothing says


def read_scales(slides: Sequence[Slide], by_hand: str = "") -> Scales:
    """
    :param by_hand: --slide_mpp, NAME=MPP with commas between, which goes before what a slide's annotation or slides.csv
        says; NAME may be a pattern.
    :return: what is known of each slide, by its stem.
    :raises ValueError: where by_hand does not parse, or names no slide.
    """
    found: Scales = {slide.stem: _said(slide) for slide in slides}
    for part in filter(None, by_hand.split(",")):
        name, _, text = part.partition("=")
        stems = fnmatch.filter(found, name)
        if not stems:
            raise ValueError(f"--slide_mpp {part}: no slide is named {name}; give NAME=MPP, e.g. TCGA-HE-*=0.5")
        try:
            value = float(text)
        except ValueError:
            value = 0.0
        if not 0 < value <= 100:
            raise ValueError(f"--slide_mpp {part}: {text!r} is no number of micrometres a pixel; give e.g. {name}=0.5")
        found |= dict.fromkeys(stems, value)
    return found


def _said(slide: Slide) -> float | None:
    return slide.mpp or (aperio.read_mpp(slide.annotation) if slide.outlined else None)


def nominal_scales(scales: Scales) -> dict[str, float]:
    """:return: slide -> micrometres a pixel as lengths go by: 0.25 of all that is 40x, or that nothing is known of."""
    return {stem: nominal(value or REFERENCE_MPP) for stem, value in scales.items()}


def zooms(values: Mapping[str, float], target: float | None) -> dict[str, float]:
    """:return: slide -> times its size, where all are brought to `target` um a pixel; 1 where they are not."""
    return {stem: value / (target or value) for stem, value in values.items()}


def common(values: Mapping[str, float]) -> float:
    """:return: the micrometres a pixel that most slides have."""
    counts = Counter(values.values())
    return min(counts, key=lambda value: (-counts[value], value))


def in_words(scales: Scales, target: float | None) -> list[str]:
    """
    :param target: --mpp, what all slides are brought to, if they are.
    :return: what a user should know of: slides whose magnification is assumed, and several of them left as they are.
    """
    lines, values = [], nominal_scales(scales)
    unknown = sum(value is None for value in scales.values())
    if unknown:
        lines.append(
            f"{unknown} of {len(scales)} slides do not say their micrometres a pixel: {REFERENCE_MPP} (40x) is "
            "assumed; --slide_mpp NAME=0.5 says otherwise"
        )
    kinds = sorted(set(values.values()))
    if target is None and len(kinds) > 1:
        lines.append(
            f"slides have {', '.join(f'{kind:g}' for kind in kinds)} um a pixel: areas go by {common(values):g}, "
            f"as most have; --mpp {kinds[-1]:g} would bring all to one"
        )
    return lines
