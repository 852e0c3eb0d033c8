"""The flags of sampling. Knows nothing of what they are used for."""

from dataclasses import dataclass

from .options import flag
from .run_options import RunOptions
from .samplers import SAMPLERS
from .structures import LEAST

SPADE_CACHE = ("auto", "on", "off")
NULL_CONDITIONS = ("zeros", "keep_colour")


@dataclass(frozen=True)
class SampleOptions(RunOptions):
    """
    What to sample, and how.

    :raises ValueError: where a value is out of range or contradicts another.
    """

    model_path: str = flag("", "checkpoint to sample from; several with commas between them, or a pattern")
    results_path: str = flag("", "folder to write to")
    num_samples: int = flag(10_000, "how many; 0: one for each structure", within="[0, inf)")
    s: str = flag("1.0", "guidance scales, comma-separated; up to 1 is no guidance")
    first: bool = flag(False, "take structures by name, not spread evenly over slides and patches", ours=True)
    same_noise: bool = flag(
        False, "all checkpoints and scales share conditions and noise, to be compared in a picture", ours=True
    )
    use_train: bool = flag(
        False, "take structures from the training set; False: from the test set", aliases=("--is_train",)
    )
    use_ddim: bool = flag(False, "the same as --sampler ddim")
    sampler: str = flag("", "empty: ddpm, or ddim with --use_ddim True", choices=("", *SAMPLERS), ours=True)
    num_steps: int = flag(
        0, "steps of the sampler; 0: all, or what --timestep_respacing says", within="[0, inf)", ours=True
    )
    clip_denoised: bool = flag(True, "clip each step's estimate of the image to its range")
    guidance_interval: str = flag(
        "", "LO,HI: guidance acts at noise levels (sigma / alpha) between these alone", ours=True
    )
    guide_path: str = flag("", "an earlier checkpoint to push away from, in place of the null condition", ours=True)
    field: bool = flag(
        False,
        "sample each structure whole, at its own size, from --image_size up, by overlapping windows of --image_size",
        ours=True,
    )
    window_overlap: float = flag(
        0.5, "of --field: the least share of a window that the next one covers", within="[0, 1)", ours=True
    )
    null_condition: str = flag(
        "",
        "what the null condition's colour map is; empty: as the model was trained (--drop_hvb_only, --unlabelled_dir)",
        choices=("", *NULL_CONDITIONS),
        ours=True,
    )
    match_other_slide: bool = flag(False, "the appearance comes from another slide than the structure", ours=True)
    appearance_dir: str = flag("", "a folder of images without masks to take the appearances from", ours=True)
    structure_dir: str = flag(
        "",
        "a folder of instance masks without images to take the structures from; the appearances are then those of "
        "--appearance_dir or --data_dir, any or by --match_struct",
        ours=True,
    )
    min_nucleus: float = flag(
        LEAST,
        "of --structure_dir: parts of nuclei below so many px at 40x, but for those that the border cuts, are an error",
        within="[0, inf)",
        ours=True,
    )
    features: str = flag(
        "", "with --match_app True: a file of extract_features.py, by whose vectors images are alike", ours=True
    )
    spade_cache: str = flag(
        "auto",
        "keep what the decoder makes of a condition (123.5 MiB an image or window in fp16 at 128 px); auto: if memory "
        "allows",
        choices=SPADE_CACHE,
        ours=True,
    )
    overwrite: bool = flag(False, "delete what an earlier run wrote in --results_path", ours=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.use_ddim and self.sampler not in ("", "ddim"):
            raise ValueError(f"--use_ddim True with --sampler {self.sampler}: give one of them")
        if not self.structure_dir and self.min_nucleus != self.flags()["min_nucleus"]:
            raise ValueError(f"--min_nucleus {self.min_nucleus} without --structure_dir: nothing reads it")
        if not self.field and self.window_overlap != self.flags()["window_overlap"]:
            raise ValueError(f"--window_overlap {self.window_overlap} without --field True: nothing reads it")
