"""
Toy H&E: seeded drawings of tissue with known nuclei, in the layout the MoNuSeg archives are published in; or, with
nuclei of known classes, in our own layout of raw slides.

Owns the drawing. A slide is drawn in optical density (Beer-Lambert): a plane of hematoxylin (nuclei) and one of eosin
(all else), mixed with the colours of a stain and turned into light. Knows nothing of how annotations are read: what
it promises is that the outlines, filled by OpenCV's polygon rules, are the nuclei of the picture.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
from PIL import Image
from scipy.ndimage import distance_transform_edt, gaussian_filter
from scipy.spatial import cKDTree

from ...cell_classes import FOLDER as CLASS_FOLDER
from ...cell_classes import named, painted, write_classes
from ...slides import write_table

TRAIN_FOLDER = "MoNuSeg 2018 Training Data"
TEST_FOLDER = "MoNuSegTestData"
CLASSES = named(["epithelial", "spindle", "lymphocyte"])
_MPP = 0.252  # micrometres a pixel

# (a dense nucleus, plain cytoplasm) as RGB: what differs between laboratories and appearance transfer carries over.
STAINS = (
    ((70, 54, 128), (230, 166, 196)),  # textbook
    ((88, 44, 86), (222, 124, 130)),  # heavy eosin
    ((54, 34, 98), (176, 134, 184)),  # heavy hematoxylin
    ((62, 76, 138), (192, 192, 220)),  # blue, little eosin
    ((92, 62, 98), (230, 182, 166)),  # old section, turned to salmon
    ((92, 32, 116), (218, 134, 190)),  # magenta
    ((114, 98, 166), (241, 208, 220)),  # pale
    ((44, 34, 74), (208, 172, 204)),  # near-black nuclei
)
_MIN_SIZE = 64
_MIN_VISIBLE = 40  # px of a nucleus that must lie inside the picture
_MAX_OVERLAP = 0.06  # share of a nucleus that may lie over earlier ones, so that neighbours touch


@dataclass(frozen=True)
class ToySlide:
    """
    :param image: an [S x S x 3] uint8 RGB image.
    :param inst_map: an [S x S] int32 map of the nuclei drawn, id = position in `outlines` + 1.
    :param outlines: per nucleus a [V x 2] float64 array of (x, y) in px, with two decimals.
    :param of_nucleus: id -> class, an id of CLASSES.
    """

    image: np.ndarray
    inst_map: np.ndarray
    outlines: list[np.ndarray]
    of_nucleus: dict[int, int]


@dataclass(frozen=True)
class _Kind:
    """A sort of nucleus: geometric mean radius in px, length over width, and its chromatin in units of hematoxylin."""

    radius: tuple[float, float]
    aspect: tuple[float, float]
    density: tuple[float, float]
    rim: float
    clumps: float
    nucleoli: int


_EPITHELIAL = _Kind(radius=(8.5, 12.0), aspect=(1.0, 1.5), density=(0.46, 0.82), rim=0.26, clumps=0.21, nucleoli=2)
_SPINDLE = _Kind(radius=(7.0, 9.0), aspect=(2.2, 3.4), density=(0.72, 1.0), rim=0.12, clumps=0.16, nucleoli=0)
_LYMPHOCYTE = _Kind(radius=(7.0, 8.2), aspect=(1.0, 1.15), density=(0.95, 1.15), rim=0.1, clumps=0.16, nucleoli=0)
_KINDS = (_EPITHELIAL, _SPINDLE, _LYMPHOCYTE)
# The same three, each of a size and a density that no other has: what a small model can learn to paint.
_KINDS_APART = (
    replace(_EPITHELIAL, radius=(9.5, 12.0), density=(0.4, 0.56)),
    replace(_SPINDLE, radius=(7.6, 9.0), density=(0.74, 0.88)),
    replace(_LYMPHOCYTE, radius=(5.4, 6.4), density=(1.1, 1.3)),
)


@dataclass(frozen=True)
class _Tissue:
    """
    Smooth [S x S] fields: the direction of fibres in radians, how much a place is a nest of epithelium (0 to 1)
    and how much it is an empty space (0 to 1).
    """

    angle: np.ndarray
    nest: np.ndarray
    lumen: np.ndarray


@dataclass(frozen=True)
class _Nucleus:
    kind: _Kind
    centre: np.ndarray
    outline: np.ndarray
    window: tuple[slice, slice]


def draw_slide(seed: int | list[int], size: int = 256, stain: int = 0, apart: bool = False) -> ToySlide:
    """
    Draw one slide.

    :param seed: whatever `numpy.random.default_rng` takes; equal seeds give equal bytes.
    :param size: side in px, at 40x: nuclei are about 7 to 12 px in radius.
    :param stain: which of STAINS, counted round (-1 is the last).
    :param apart: let the classes differ more, in size and in how dark they stain.
    """
    if size < _MIN_SIZE:
        raise ValueError(f"size is {size}; a toy slide has at least {_MIN_SIZE} px a side")
    rng = np.random.default_rng(seed)
    tissue = _draw_tissue(rng, size)
    kinds = _KINDS_APART if apart else _KINDS
    nuclei, inst_map = _place_nuclei(rng, tissue, kinds)
    hematoxylin = _draw_chromatin(rng, tissue, nuclei, inst_map)
    eosin = _draw_eosin(rng, tissue, nuclei, inst_map)
    image = _develop(rng, hematoxylin, eosin, STAINS[stain % len(STAINS)])
    of_nucleus = {number: 1 + kinds.index(nucleus.kind) for number, nucleus in enumerate(nuclei, start=1)}
    return ToySlide(image, inst_map, [nucleus.outline for nucleus in nuclei], of_nucleus)


def aperio_xml(outlines: list[np.ndarray]) -> str:
    """The outlines as ImageScope would export them: one Region each, in order."""
    regions = []
    for number, outline in enumerate(outlines, start=1):
        vertices = "".join(f'\t\t\t\t\t<Vertex X="{x:.2f}" Y="{y:.2f}"/>\n' for x, y in outline)
        regions.append(
            f'\t\t\t<Region Id="{number}" Type="0" NegativeROA="0">\n'
            f"\t\t\t\t<Vertices>\n{vertices}\t\t\t\t</Vertices>\n\t\t\t</Region>\n"
        )
    return (
        f'<Annotations MicronsPerPixel="{_MPP:f}">\n\t<Annotation Id="1" Name="" Type="4">\n'
        f"\t\t<Regions>\n{''.join(regions)}\t\t</Regions>\n\t</Annotation>\n</Annotations>\n"
    )


def write_toy_monuseg(
    out: Path, train: int = 6, test: int = 2, size: int = 256, seed: int = 0, classes: bool = False
) -> list[Path]:
    """
    Draw a data set in the raw layout: OUT/MoNuSeg 2018 Training Data/{Tissue Images,Annotations}, OUT/MoNuSegTestData.

    Slide k of a split depends on (seed, split, k, size, classes) alone. Training takes the stains from the first on,
    testing from the last one back.

    :param classes: draw nuclei of CLASSES, that differ in size and stain, and tell which is which: in
        OUT/{train,test}/{images,inst_masks,class_masks}, OUT/classes.json and slides.csv.
    :return: the images, training first.
    :raises ValueError: an invalid count or size, or files in OUT that this call would not write.
    """
    for flag, value, least in (("train", train, 1), ("test", test, 0), ("size", size, _MIN_SIZE), ("seed", seed, 0)):
        if value < least:
            raise ValueError(f"--{flag} is {value}; give at least {least}")
    root = Path(out)
    plan = []  # the files of a slide, its seed, its stain
    for split, count in enumerate((train, test)):
        for k in range(count):
            files = _files_of(root, split, f"TCGA-TOY-{'AB'[split]}{k:03d}-01Z-00-DX1", classes)
            plan.append((files, [seed, split, k], -1 - k if split else k))
    _check_folders(root, {path for files, *_ in plan for path in files})
    for files, slide_seed, stain in plan:
        slide = draw_slide(slide_seed, size, stain, apart=classes)
        for path in files:
            path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(slide.image).save(files[0])
        if classes:
            Image.fromarray(slide.inst_map).save(files[1])
            Image.fromarray(painted(slide.inst_map, slide.of_nucleus)).save(files[2])
        else:
            files[1].write_text(aperio_xml(slide.outlines), encoding="utf-8", newline="\n")
    images = [files[0] for files, *_ in plan]
    if classes:
        write_classes(root, CLASSES)
        rows = [(path.relative_to(root).as_posix(), path.stem, f"{_MPP:g}") for path in images]
        write_table(root, rows, ["mpp"])
    return images


def _files_of(root: Path, split: int, name: str, classes: bool) -> list[Path]:
    """:return: a slide's image and what says where its nuclei are; split: 0 training, 1 test."""
    if classes:
        places = ("images", ".png"), ("inst_masks", ".tif"), (CLASS_FOLDER, ".png")
        return [root / ("train", "test")[split] / folder / f"{name}{suffix}" for folder, suffix in places]
    folders = ("Tissue Images", "Annotations") if split == 0 else ("", "")
    parent = root / (TRAIN_FOLDER, TEST_FOLDER)[split]
    return [parent / folder / f"{name}{suffix}" for folder, suffix in zip(folders, (".tif", ".xml"))]


def _check_folders(root: Path, ours: set[Path]) -> None:
    """:raises ValueError: where there are files of other slides, in either layout."""
    layouts = {
        path.parent for split in (0, 1) for classes in (False, True) for path in _files_of(root, split, "", classes)
    }
    for folder in sorted(layouts):
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            if path not in ours:
                raise ValueError(f"{path} is there and not one of these toy slides; choose another OUT or delete it")


def _noise(rng: np.random.Generator, size: int, sigma: float) -> np.ndarray:
    """Gaussian noise smoothed over `sigma` px, with zero mean and unit variance."""
    field = gaussian_filter(rng.standard_normal((size, size)), sigma, mode="reflect")
    return (field - field.mean()) / field.std()


def _draw_tissue(rng: np.random.Generator, size: int) -> _Tissue:
    angle = rng.uniform(0, np.pi) + 0.4 * _noise(rng, size, 40)
    nest = 1 / (1 + np.exp(-6 * (_noise(rng, size, 30) + rng.uniform(-0.4, 0.8))))
    lumen = 1 / (1 + np.exp(-9 * (_noise(rng, size, 16) + 0.06 * _noise(rng, size, 3) - rng.uniform(1.3, 1.9))))
    return _Tissue(angle, nest, lumen)


def _place_nuclei(
    rng: np.random.Generator, tissue: _Tissue, kinds: tuple[_Kind, _Kind, _Kind]
) -> tuple[list[_Nucleus], np.ndarray]:
    """Throw nuclei at random places or against one another; keep those that hardly overlap what is there."""
    size = len(tissue.nest)
    epithelial, spindle, lymphocyte = kinds
    nuclei: list[_Nucleus] = []
    inst_map = np.zeros((size, size), dtype=np.int32)
    throws = int(rng.uniform(0.7, 1.3) * size * size / 420)
    while throws > 0 or not nuclei:
        throws -= 1
        if nuclei and rng.random() < 0.35:
            bearing = rng.uniform(0, 2 * np.pi)
            neighbour = nuclei[rng.integers(len(nuclei))].centre
            centre = neighbour + rng.uniform(15, 24) * np.array([np.cos(bearing), np.sin(bearing)])
        else:
            centre = rng.uniform(-4, size + 4, 2)
        column, row = np.clip(centre.astype(int), 0, size - 1)
        in_nest = rng.random() < tissue.nest[row, column]
        roll, keep = rng.random(2)
        kind = lymphocyte if roll < 0.12 else epithelial if in_nest else spindle
        outline = _outline(rng, kind, centre, tissue.angle[row, column] if kind is spindle else rng.uniform(0, np.pi))
        if tissue.lumen[row, column] > 0.15 or keep > (1.0 if in_nest else 0.45):
            continue
        window, mask = _fill(outline, size)
        area, covered = mask.sum(), (inst_map[window][mask] > 0).sum()
        if area >= _MIN_VISIBLE and covered <= _MAX_OVERLAP * area:
            nuclei.append(_Nucleus(kind, centre, outline, window))
            inst_map[window][mask] = len(nuclei)
    return nuclei, inst_map


def _outline(rng: np.random.Generator, kind: _Kind, centre: np.ndarray, angle: float) -> np.ndarray:
    """A closed outline: an ellipse with a few soft bumps."""
    radius, aspect = rng.uniform(*kind.radius), rng.uniform(*kind.aspect)
    t = np.linspace(0, 2 * np.pi, 40, endpoint=False)
    bumps = sum(
        rng.normal(0, 0.075 / order) * np.cos(order * t + phase)
        for order, phase in zip((2, 3, 4, 5), rng.uniform(0, 2 * np.pi, 4))
    )
    x, y = radius * np.sqrt(aspect) * np.cos(t), radius / np.sqrt(aspect) * np.sin(t)
    tilt = angle + rng.normal(0, 0.15)
    turned = np.stack([x * np.cos(tilt) - y * np.sin(tilt), x * np.sin(tilt) + y * np.cos(tilt)], axis=1)
    return np.round(centre + (1 + bumps)[:, None] * turned, 2)


def _fill(outline: np.ndarray, size: int) -> tuple[tuple[slice, slice], np.ndarray]:
    """The window of the picture an outline lies in, and which pixels of it the outline fills."""
    points = np.trunc(outline).astype(np.int32)
    (left, top), (right, bottom) = np.clip([points.min(axis=0), points.max(axis=0) + 1], 0, size)
    mask = np.zeros((bottom - top, right - left), dtype=np.uint8)
    if mask.size:
        cv2.fillPoly(mask, [points - np.array([left, top], dtype=np.int32)], 1)
    return (slice(top, bottom), slice(left, right)), mask > 0


def _draw_chromatin(
    rng: np.random.Generator, tissue: _Tissue, nuclei: list[_Nucleus], inst_map: np.ndarray
) -> np.ndarray:
    """The hematoxylin plane, 1 = a dense nucleus: dark rims, clumps, nucleoli, and a haze over the nests."""
    size = len(inst_map)
    plane = 0.05 + 0.1 * tissue.nest * (1 + 0.35 * _noise(rng, size, 1.5))
    grain = 0.6 * _noise(rng, size, 0.9) + 0.9 * _noise(rng, size, 2.0)
    rows, columns = np.mgrid[:size, :size]
    for number, nucleus in enumerate(nuclei, start=1):
        kind, density = nucleus.kind, rng.uniform(*nucleus.kind.density)
        inside = inst_map[nucleus.window] == number
        depth = distance_transform_edt(np.pad(inside, 1))[1:-1, 1:-1]
        values = density * (1 + kind.clumps * grain[nucleus.window]) + kind.rim * np.exp(-(((depth - 1.2) / 1.1) ** 2))
        for _ in range(rng.integers(0, kind.nucleoli + 1)):
            x, y = nucleus.centre + rng.uniform(-4, 4, 2)
            values += 0.4 * np.exp(
                -((columns[nucleus.window] - x) ** 2 + (rows[nucleus.window] - y) ** 2) / (2 * 1.3**2)
            )
        plane[nucleus.window][inside] = values[inside]
    return np.clip(plane * (1 - tissue.lumen * (inst_map == 0)), 0, None)


def _draw_eosin(rng: np.random.Generator, tissue: _Tissue, nuclei: list[_Nucleus], inst_map: np.ndarray) -> np.ndarray:
    """The eosin plane, 1 = plain cytoplasm: fibres in the stroma, cells with faint borders in the nests."""
    size = len(inst_map)
    wavy = tissue.angle + 0.3 * _noise(rng, size, 7)
    coarse, fine = _fibres(rng, wavy, 2.4, 18), _fibres(rng, wavy, 0.8, 9)
    stroma = 0.85 + 0.17 * coarse + 0.13 * fine + 0.08 * _noise(rng, size, 1.0)
    stroma *= 1 - 0.8 / (1 + np.exp(-6 * (_noise(rng, size, 6) - 0.7 * coarse - 1.5)))  # clefts between bundles
    cells = 0.9 + 0.1 * _noise(rng, size, 1.2) + 0.12 * _noise(rng, size, 5)
    if len(nuclei) > 1:
        rows, columns = np.mgrid[:size, :size]
        near = cKDTree([nucleus.centre for nucleus in nuclei]).query(np.stack([columns, rows], axis=-1), k=2)[0]
        cells += 0.3 * np.exp(-(((near[..., 1] - near[..., 0]) / 1.8) ** 2)) * (near[..., 0] < 26)
    plane = tissue.nest * cells + (1 - tissue.nest) * stroma
    halo = gaussian_filter((inst_map > 0).astype(float), 2.0)
    plane *= 1 - 0.35 * halo
    plane *= 1 + 0.1 * _noise(rng, size, 40)
    plane = np.where(inst_map > 0, 0.4 * plane, plane * (1 - 0.97 * tissue.lumen))
    return np.clip(plane, 0, None)


def _fibres(rng: np.random.Generator, angle: np.ndarray, sigma: float, reach: int) -> np.ndarray:
    """Noise smeared `reach` px both ways along the direction field (line integral convolution), unit variance."""
    size = len(angle)
    noise = _noise(rng, size, sigma).astype(np.float32)
    along_x, along_y = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
    start_y, start_x = np.mgrid[:size, :size].astype(np.float32)
    total = np.zeros_like(noise)
    for sign in (1, -1):
        x, y = start_x, start_y
        for _ in range(reach):
            total += cv2.remap(noise, x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT)
            step_x = cv2.remap(along_x, x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT)
            step_y = cv2.remap(along_y, x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT)
            x, y = x + sign * step_x, y + sign * step_y
    return ((total - total.mean()) / total.std()).astype(np.float64)


def _develop(rng: np.random.Generator, hematoxylin: np.ndarray, eosin: np.ndarray, stain: tuple) -> np.ndarray:
    """Stain, light and lens: densities times colours, exp(-density) of a white lamp, slight blur, camera noise."""
    nucleus, cytoplasm = (-np.log(np.clip(colour + rng.normal(0, 4, 3), 8, 250) / 255) for colour in stain)
    density = hematoxylin[..., None] * nucleus + eosin[..., None] * cytoplasm
    light = 247 * np.exp(-density)
    light = gaussian_filter(light, (0.72, 0.72, 0)) + rng.normal(0, 1.6, light.shape)
    return np.clip(np.round(light), 0, 255).astype(np.uint8)
