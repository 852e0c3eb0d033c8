"""
Measure the filter of filter_ood.py on samples whose worth is known: real patches that it has not seen, as they are and
with planted failures.

    python scripts/benchmarks/measure_filter.py DATA [--sizes 3,6,15,30] [--choices 5]

DATA is a data folder of prepare_monuseg.py. Of every slide a quarter of the patches are the samples, the others the
real ones. For each number of slides, and each random choice of so many, a line: the AUROC of perfect samples and the
share of them that --tau 0.95 keeps, with structure and appearance of one slide (own) and of two (pair), then the AUROC
of each planted failure. The last line of a size is the mean.
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch as th
from PIL import Image, ImageFilter
from tqdm import tqdm

from guided_diffusion import cli
from guided_diffusion.bridge import load_backbone
from guided_diffusion.histology.features.backbones import Backbone
from guided_diffusion.histology.filtering import comparison, patchcore
from guided_diffusion.image_files import read_image
from guided_diffusion.images import list_items
from guided_diffusion.options import check_ranges

TAU = 0.95
TILE = 16  # px
LEAST = 3  # slides, for each is compared with others

Plant = Callable[[np.ndarray, np.random.Generator], np.ndarray]


def blur(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(2.5)))


def density(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Half as much stain again."""
    return stained(image, (1.5, 1.5, 1.5))


def hue(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return stained(image, (1.6, 0.8, 0.6))


def stained(image: np.ndarray, factors: Sequence[float]) -> np.ndarray:
    """The optical density of each channel, multiplied."""
    return np.clip(256 * ((image + 1.0) / 256) ** factors - 1, 0, 255).astype(np.uint8)


def noise(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return np.clip(image + rng.normal(0, 25, image.shape), 0, 255).astype(np.uint8)


def checkerboard(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    rows, columns = np.mgrid[: image.shape[0], : image.shape[1]] // 4
    return np.clip(image + 25 * (2 * ((rows + columns) % 2) - 1)[..., None], 0, 255).astype(np.uint8)


def mirrored(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Half of the tiles, each left to right."""
    tiles = tiled(image)
    chosen = rng.random(len(tiles)) < 0.5
    tiles[chosen] = tiles[chosen][:, :, ::-1]
    return joined(tiles, image.shape)


def shuffled(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return joined(rng.permutation(tiled(image)), image.shape)


def tiled(image: np.ndarray) -> np.ndarray:
    """:return: [N x TILE x TILE x 3], a copy; sides must be multiples of TILE."""
    rows, columns = (side // TILE for side in image.shape[:2])
    return image.reshape(rows, TILE, columns, TILE, 3).swapaxes(1, 2).reshape(-1, TILE, TILE, 3).copy()


def joined(tiles: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    rows, columns = (side // TILE for side in shape[:2])
    return tiles.reshape(rows, columns, TILE, TILE, 3).swapaxes(1, 2).reshape(shape)


PLANTS: dict[str, Plant] = {
    plant.__name__: plant for plant in (blur, density, hue, noise, checkerboard, mirrored, shuffled)
}


def main(argv: list[str] | None = None) -> None:
    parser = cli.FlagParser(description=__doc__)
    parser.add_argument("data", metavar="DATA", type=Path, help="data folder")
    parser.add_argument("--sizes", default="3,6,15,30", help="numbers of slides")
    parser.add_argument("--choices", type=int, default=5, help="random choices of so many slides")
    parser.add_argument("--backbone", default="efficientnet_lite0", help="as in filter_ood.py")
    args = parser.parse_args(argv)
    check_ranges(vars(args), choices="[1, inf)")
    items = list_items(str(args.data), "monuseg")
    files, slides = [item.image for item in items], np.array([item.slide for item in items])
    sampled = np.arange(len(files)) % 4 == 1
    sizes = parse_sizes(args.sizes, len(set(slides.tolist())))
    backbone = load_backbone(args.backbone, th.device("cpu"))
    real = features(backbone, files, None)
    planted = {"perfect": real[sampled]}
    for name, plant in PLANTS.items():
        planted[name] = features(backbone, [file for file, own in zip(files, sampled) if own], plant)
    print("slides  own: AUROC  kept  pair: AUROC  kept", *PLANTS, sep="  ")
    for size in sizes:
        rows = []
        for choice in range(args.choices):
            rng = np.random.default_rng((size, choice))
            chosen = rng.choice(np.unique(slides), size, replace=False)
            rows.append(measure(real[~sampled], slides[~sampled], planted, slides[sampled], chosen, rng))
            print_row(f"{size:6d}", rows[-1])
        print_row("  mean", np.mean(rows, axis=0))


def parse_sizes(text: str, most: int) -> list[int]:
    """:return: the numbers of slides in --sizes; :raises ValueError: where one is none, or more than there are."""
    for part in text.split(","):
        if not part.isdecimal() or not LEAST <= int(part) <= most:
            raise ValueError(f"--sizes {text}: {part!r} is no number of slides from {LEAST} to the {most} of DATA")
    return list(map(int, text.split(",")))


def features(backbone: Backbone, files: Sequence[str], plant: Plant | None) -> th.Tensor:
    """:return: [N x P x D] local features of images, or of what planting a failure makes of them."""
    rng = np.random.default_rng(0)
    parts = []
    for start in tqdm(range(0, len(files), 32), plant.__name__ if plant else "real", leave=False, disable=None):
        images = [read_image(file) for file in files[start : start + 32]]
        images = [plant(image, rng) for image in images] if plant else images
        parts.append(patchcore.local_features(backbone.maps(np.stack(images)))[0])
    return th.cat(parts)


def measure(
    real: th.Tensor,
    real_slides: np.ndarray,
    planted: dict[str, th.Tensor],
    sample_slides: np.ndarray,
    chosen: np.ndarray,
    rng: np.random.Generator,
) -> list[float]:
    """:return: AUROC and share kept of perfect samples of one slide, and of two; AUROC of each planted failure."""
    own = np.isin(real_slides, chosen)
    known, numbers = np.unique(real_slides[own], return_inverse=True)
    real = real[th.from_numpy(own)]
    folds = comparison.deal_folds(known.tolist(), comparison.SHARE, int(rng.integers(1 << 31)))
    memory = patchcore.Memory.fit(real, folds[numbers])
    samples = np.isin(sample_slides, chosen)
    names = sample_slides[samples]
    partners = [rng.choice(known[known != name]) for name in names]
    found = []
    for name, structures in [("perfect", names), ("perfect", partners), *((name, names) for name in PLANTS)]:
        origins = comparison.Origins.of(list(zip(structures, names)), known.tolist(), folds)
        order = np.argsort(origins.group, kind="stable")
        scores = np.empty(len(names))
        scores[order] = comparison.score(memory, origins, order, planted[name][th.from_numpy(samples)][order])
        compared = comparison.compare(memory, scores, origins, real, numbers, folds)
        found.append(compared.auroc())
        if name == "perfect":
            found.append(float((scores <= compared.quantile(TAU)).mean()))
    return found


def print_row(name: str, row: Sequence[float]) -> None:
    print(name, *(f"{value:.3f}" for value in row), sep="  ", flush=True)


if __name__ == "__main__":
    cli.run(main)
