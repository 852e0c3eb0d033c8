"""How to train: the numbers that decide it, checked. Knows flags' names, and nothing of what they are used for."""

import math
from dataclasses import dataclass


@dataclass
class TrainOptions:
    """
    How to train.

    :param batch_size: samples a step, on each rank.
    :param microbatch: samples a forward pass, which must divide batch_size; -1 means the whole batch, "auto" the most
        that fits in memory.
    :param lr: learning rate; it falls linearly to 0 over lr_anneal_steps, where that is not 0.
    :param ema_rate: comma-separated rates of the weight averages.
    :param drop_rate: the share of samples whose condition is dropped.
    :param drop_hvb_only: a dropped condition keeps its colour map.
    :param grad_clip: gradients are scaled down to this norm; 0 leaves them.
    :param log_interval: steps between two rows of the log; save_interval: between two checkpoints; val_interval:
        between two validations, where there is something to validate on.
    :param keep_checkpoints: how many checkpoints stay, the newest; "all" deletes none. The best is kept apart.
    :param preview_samples: how many conditions are painted at each save; 0 paints none.
    :param max_steps: the run ends after so many steps, counted from the very first; 0 means never.
    :param seed: of noise, timesteps and drops; step n of a run is a function of (seed, n).
    """

    batch_size: int = 1
    microbatch: str = "-1"
    lr: float = 1e-4
    weight_decay: float = 0.0
    lr_anneal_steps: int = 0
    ema_rate: str = "0.9999"
    drop_rate: float = 0.0
    drop_hvb_only: bool = False
    grad_clip: float = 0.0
    log_interval: int = 10
    save_interval: int = 10_000
    val_interval: int = 1000
    keep_checkpoints: str = "all"
    preview_samples: int = 4
    max_steps: int = 0
    fp16_scale_growth: float = 1e-3
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("batch_size", "log_interval", "save_interval", "val_interval"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)} must be at least 1")
        for name in ("lr_anneal_steps", "max_steps", "preview_samples", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"--{name} {getattr(self, name)} must not be negative")
        if not 0 <= self.drop_rate <= 1:
            raise ValueError(f"--drop_rate {self.drop_rate} must lie in [0, 1]")
        if not 0 < self.lr < math.inf:
            raise ValueError(f"--lr {self.lr} must be a positive number")
        for name in ("weight_decay", "fp16_scale_growth", "grad_clip"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"--{name} {getattr(self, name)} must be a number of at least 0")
        size = self.microbatch_size
        if size is not None and (size < 1 or self.batch_size % size):
            raise ValueError(
                f"--microbatch {self.microbatch} does not divide --batch_size {self.batch_size}: give a divisor, -1 "
                "for the whole batch, or auto"
            )
        _ = self.kept_checkpoints  # which raises
        if not self.ema_rates:
            raise ValueError("--ema_rate is empty: give one rate or more, such as 0.9999")

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
        """Samples a forward pass; None is to be found out."""
        if self.microbatch == "auto":
            return None
        try:
            size = int(self.microbatch)
        except ValueError:
            raise ValueError(f"--microbatch {self.microbatch} is neither a number nor auto") from None
        return self.batch_size if size == -1 else size

    @property
    def kept_checkpoints(self) -> int | None:
        """How many checkpoints stay; None is all."""
        if self.keep_checkpoints == "all":
            return None
        if not self.keep_checkpoints.isdecimal() or int(self.keep_checkpoints) < 1:
            raise ValueError(f"--keep_checkpoints {self.keep_checkpoints}: give at least 1, or all")
        return int(self.keep_checkpoints)

    @property
    def last_step(self) -> int | None:
        """The step after which the run ends, or None."""
        return min((steps for steps in (self.max_steps, self.lr_anneal_steps) if steps), default=None)
