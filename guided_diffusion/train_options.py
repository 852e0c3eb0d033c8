"""The flags of training. Knows nothing of what they are used for."""

from dataclasses import dataclass, replace

from .options import flag
from .resample import SCHEDULE_SAMPLERS
from .run_options import RunOptions

VAL_SPLITS = ("slides", "test", "none")


@dataclass(frozen=True)
class TrainOptions(RunOptions):
    """
    How to train. What is marked changeable may differ from config.json when a run goes on; the rest makes another run.

    :raises ValueError: where a value is out of range, does not parse, or contradicts another.
    """

    total_batch_size: int = flag(
        0,
        "samples a step on all processes together, a multiple of their number, so that a run is the same on any; 0: "
        "--batch_size on each",
        within="[0, 65536]",
        changeable=True,
        ours=True,
    )
    lr: float = flag(1e-4, "learning rate", within="(0, 1]", changeable=True)
    weight_decay: float = flag(0.0, "of AdamW", within="[0, 1000]", changeable=True)
    lr_anneal_steps: int = flag(
        0,
        "steps over which the learning rate falls to 0, and training ends; 0: neither",
        within="[0, inf)",
        changeable=True,
    )
    microbatch: str = flag(
        "-1",
        "samples of a forward pass, a divisor of --batch_size; -1: all of it, auto: as many as fit in memory",
        changeable=True,
    )
    ema_rate: str = flag("0.9999", "comma-separated rates of the averages of weights, each in (0, 1)", changeable=True)
    schedule_sampler: str = flag("uniform", "how timesteps are drawn", choices=SCHEDULE_SAMPLERS, changeable=True)
    drop_rate: float = flag(0.0, "share of samples whose condition is dropped", within="[0, 1]", changeable=True)
    drop_hvb_only: bool = flag(False, "a dropped condition keeps its colour map")
    grad_clip: float = flag(
        0.0, "scale gradients down to this norm; 0 leaves them", within="[0, inf)", changeable=True, ours=True
    )
    fp16_scale_growth: float = flag(
        1e-3, "log2 by which the loss scale grows at each step in fp16", within="[0, 1]", changeable=True
    )
    max_steps: int = flag(
        0,
        "the step to end after, counted from the very first; 0 goes on",
        within="[0, inf)",
        changeable=True,
        ours=True,
    )
    log_interval: int = flag(10, "steps between two rows of the log", within="[1, inf)", changeable=True)
    save_interval: int = flag(10_000, "steps between two checkpoints", within="[1, inf)", changeable=True)
    keep_checkpoints: str = flag(
        "all", "how many of the newest to keep; the best one is kept apart", changeable=True, ours=True
    )
    resume_checkpoint: str = flag(
        "",
        "go on from this model with the state beside it, whatever OPENAI_LOGDIR holds; without a step in its name, as "
        "in model.pt: begin with its weights",
        changeable=True,
    )
    init_checkpoint: str = flag(
        "", "begin with these weights, at step 0 with a fresh optimiser: for fine-tuning", ours=True
    )
    unlabelled_dir: str = flag(
        "",
        "folders of images without masks to learn from as well, with commas between them; see --mark_unknown",
        ours=True,
    )
    unlabelled_share: float = flag(
        0.5, "share of each step's samples that come from --unlabelled_dir", within="(0, 1)", ours=True
    )
    balance_classes: bool = flag(
        False,
        "patches whose nuclei are of rare classes come more often (docs/training.md); needs class_masks and "
        "--class_cond True",
        ours=True,
    )
    is_train: bool = flag(True, "train on the training set; False: on the test set")
    val_split: str = flag(
        "slides",
        "what to validate on: a share of the slides, held out; the test set; nothing",
        choices=VAL_SPLITS,
        ours=True,
    )
    val_share: float = flag(
        0.1,
        "share of the slides that is held out, by --seed; at least one slide, and none of fewer than three",
        within="(0, 1)",
        ours=True,
    )
    val_interval: int = flag(1000, "steps between two validations", within="[1, inf)", changeable=True, ours=True)
    data_licence: str = flag(
        "unknown",
        "under which licence the data are, in words; card.md beside the checkpoints says it, and that of a set made by "
        "them",
        changeable=True,
        ours=True,
    )
    preview_samples: int = flag(
        4,
        "held-out and training conditions, each, that are sampled at each checkpoint",
        within="[0, 1000]",
        changeable=True,
        ours=True,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        size = self.microbatch_size
        name = "total_batch_size" if self.total_batch_size else "batch_size"
        batch = getattr(self, name)
        if size is not None and (size < 1 or batch % size):
            raise ValueError(
                f"--microbatch {self.microbatch} does not divide --{name} {batch}: give a divisor, -1 for "
                "the whole batch, or auto"
            )
        _ = self.kept_checkpoints  # which raises
        if not self.ema_rates:
            raise ValueError("--ema_rate is empty: give one rate or more, such as 0.9999")
        if not self.unlabelled_dir and self.unlabelled_share != self.flags()["unlabelled_share"]:
            raise ValueError(f"--unlabelled_share {self.unlabelled_share} without --unlabelled_dir: give the images")
        if self.resume_checkpoint and self.init_checkpoint:
            raise ValueError("--resume_checkpoint and --init_checkpoint both say where to begin: give one of them")

    def shared_by(self, ranks: int) -> "TrainOptions":
        """:return: the options of each of some processes, with total_batch_size as a batch_size."""
        if not self.total_batch_size:
            return self
        if self.total_batch_size % ranks:
            raise ValueError(
                f"--total_batch_size {self.total_batch_size} is no multiple of {ranks} processes: give "
                f"{-(-self.total_batch_size // ranks) * ranks}, or start another number of them"
            )
        return replace(self, batch_size=self.total_batch_size // ranks, total_batch_size=0)

    @property
    def ema_rates(self) -> list[float]:
        """The rates as numbers, each in (0, 1)."""
        try:
            rates = [float(rate) for rate in str(self.ema_rate).split(",") if rate]
        except ValueError:
            raise ValueError(f"--ema_rate {self.ema_rate} does not parse: give rates such as 0.999,0.9999") from None
        for rate in rates:
            if not 0 < rate < 1:
                raise ValueError(f"--ema_rate {rate} must lie between 0 and 1")
        return rates

    @property
    def microbatch_size(self) -> int | None:
        """Samples of a forward pass; None is to be found out."""
        if self.microbatch == "auto":
            return None
        try:
            size = int(self.microbatch)
        except ValueError:
            raise ValueError(f"--microbatch {self.microbatch} is neither a number nor auto") from None
        return (self.total_batch_size or self.batch_size) if size == -1 else size

    @property
    def kept_checkpoints(self) -> int | None:
        """How many checkpoints stay; None is all."""
        if self.keep_checkpoints == "all":
            return None
        if not str(self.keep_checkpoints).isdecimal() or int(self.keep_checkpoints) < 1:
            raise ValueError(f"--keep_checkpoints {self.keep_checkpoints}: give at least 1, or all")
        return int(self.keep_checkpoints)

    @property
    def last_step(self) -> int | None:
        """The step after which the run ends, or None."""
        return min((steps for steps in (self.max_steps, self.lr_anneal_steps) if steps), default=None)
