"""The flags that training and sampling share: which data, and how a program runs. Knows nothing of what reads them."""

from dataclasses import dataclass

from .devices import PRECISIONS
from .images import LAYOUTS
from .options import SIZE, WORKERS, Options, flag


@dataclass(frozen=True)
class DataOptions(Options):
    """Which images and masks there are, and which image lends its colours to which structure."""

    data_dir: str = flag("", "data folder, which holds the training and the test set")
    dataset_mode: str = flag("monuseg", "how the data folder is laid out", choices=tuple(LAYOUTS))
    augment: bool = flag(
        False, "random crops, flips and quarter turns; HV map, edges and colours are made after them", ours=True
    )
    stain_jitter: float = flag(
        0.0,
        "the amounts of an appearance's stains vary by up to this share, and all densities by a little; needs RGB",
        within="[0, 1)",
        ours=True,
    )
    preserve_nuclei_col: bool = flag(False, "the colour map keeps the colours of nuclei within nuclei")
    subsample: float = flag(1.0, "use only this share of the images", within="(0, 1]")
    shuffle_masks: bool = flag(False, "pair each structure with another image; for sampling")
    match_struct: bool = flag(False, "pair each structure with an image whose nuclei are alike; for sampling")
    match_app: bool = flag(False, "pair each structure with an image that looks like its own; for sampling")


@dataclass(frozen=True)
class RunOptions(Options):
    """How a program runs."""

    batch_size: int = flag(1, "samples at once, on each process", within=SIZE, changeable=True)
    num_workers: int = flag(
        1,
        "processes that read and prepare data; 0 does it in the main one",
        within=WORKERS,
        changeable=True,
        ours=True,
    )
    seed: int = flag(0, "everything random is a function of it", within="[0, 2**63)", ours=True)
    precision: str = flag(
        "", "what to compute in; wins over --use_fp16", choices=("", *PRECISIONS), changeable=True, ours=True
    )
    device: str = flag(
        "auto",
        "where to compute: auto is a GPU where there is one; cuda insists on one; cpu; cuda:1 is one GPU by its number",
        changeable=True,
        ours=True,
    )
    compile: bool = flag(
        False, "compile the model to fused kernels at the start; needs a C++ compiler", changeable=True, ours=True
    )
    dry_run: bool = flag(
        False, "print the resolved flags and the condition's channels, and stop", changeable=True, ours=True
    )
