"""
Cards: what a model or a synthetic set is, where it comes from and what it is not for, in Markdown beside it.

Owns their words. Knows facts that it is given, and no files but the card's name; of files it says names, not places.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

NAME = "card.md"
UNKNOWN = "unknown"  # a licence that nobody has said
# Of a model's flags those that say what it is and how it was trained, in this order.
TOLD = (
    *("image_size", "mpp", "num_channels", "channel_mult", "num_res_blocks", "attention_resolutions"),
    *("num_head_channels", "resblock_updown", "use_scale_shift_norm", "spade_channels", "dropout"),
    *("class_cond", "num_classes", "use_hv_map", "use_col_map", "no_instance", "mark_unknown"),
    *("diffusion_steps", "noise_schedule", "learn_sigma", "predict_v", "predict_xstart", "loss_weights", "lr"),
    *("lr_anneal_steps", "weight_decay", "batch_size", "total_batch_size", "precision", "use_fp16", "ema_rate"),
    *("drop_rate", "drop_hvb_only", "grad_clip", "augment", "stain_jitter", "subsample", "unlabelled_share", "seed"),
)
METHOD = """The method is Wang et al., Semantic Image Synthesis via Diffusion Models, 2022, https://arxiv.org/abs/2207.00050.
Cite the data, too, as their authors ask. For MoNuSeg these are Kumar et al., A Dataset and a Technique for Generalized
Nuclear Segmentation for Computational Pathology, IEEE Transactions on Medical Imaging 36, 2017."""
CAUTION = """- For research on programs that find nuclei. **Not for diagnosis**, nor for any decision about a patient.
- Images made by a model look like the slides that it was trained on. Other stains, scanners, tissues and diseases are
  not in them, and what these slides have too much of comes again.
- They may show parts of training patches: look for copies (`scripts/evaluate.py`) before you give a set away. The
  licence of the data may bind what was made of them.
- JPEG: most scanners compress slides by it. Patches cut from such slides, and images made after them, carry its traces,
  blocks of 8 px and blurred colours, whatever format they are stored in. Programs may learn these as tissue."""


def one_line(text: str) -> str:
    """:return: a text that a user gave, in one line, such that no Markdown or HTML in it acts."""
    plain = "".join(sign if sign.isprintable() else " " for sign in text)
    return re.sub(r"([\\`*\[\]<>|#])", r"\\\1", " ".join(plain.split()))


def model_card(config: Mapping[str, Any], data: Mapping[str, int], step: int, best: Mapping[str, float]) -> str:
    """
    :param config: the flags that the model is trained with.
    :param data: "patches", "slides": what it learns from, with masks; "unlabelled": images without; "held_out_patches",
        "held_out_slides": what it is validated on.
    :param step: of the checkpoint that the card lies beside.
    :param best: "step" and "val_loss" of the lowest validation loss so far; {} where there is none.
    :return: the card's text.
    """
    begun = config.get("init_checkpoint") or config.get("resume_checkpoint") or ""
    held_out = f"{data['held_out_patches']} patches of {data['held_out_slides']} slides that it does not learn from"
    facts = {
        "data": f"{_name(config.get('data_dir') or '')}, licence: {one_line(config.get('data_licence') or UNKNOWN)}",
        "trained on": f"{data['patches']} patches of {data['slides']} slides"
        + (f", and {data['unlabelled']} images without masks" if data["unlabelled"] else ""),
        "validated on": held_out if data["held_out_patches"] else "nothing",
        "begun with": _name(begun) if begun else "random weights",
        "steps": str(step),
        "lowest validation loss": f"{best['val_loss']:.4g}, at step {int(best['step'])}"
        if best
        else "not measured yet",
    }
    told = [name for name in TOLD if name != "unlabelled_share" or data["unlabelled"]]
    flags = " ".join(f"--{name} {config[name]}" for name in told if config.get(name) not in (None, ""))
    return f"""# Model card

A diffusion model that makes images of haematoxylin-and-eosin tissue: from a mask that says where nuclei are, and the
colours of a real image. `image_train.py` has written this card with the checkpoint of step {step}; sample from its
running averages, `ema_*.pt`, with `image_sample.py`.

{_table(facts)}

The loss says how far training is, not how good images are: `scripts/evaluate.py` measures that.

```
{flags}
```

## Use, and what to beware of

{CAUTION}

## Reference

{METHOD}
"""


def data_sheet(facts: Mapping[str, str], licences: Sequence[str]) -> str:
    """
    :param facts: what -> how much, in words, of a set of real and synthetic patches.
    :param licences: of the data that the models of its synthetic patches were trained on, as they are known.
    :return: the text of the card beside the set.
    """
    told = {**facts, "licence of the models' data": "; ".join(licences) or UNKNOWN}
    return f"""# Data sheet

A training set of real and synthetic patches of haematoxylin-and-eosin tissue, with masks of their nuclei, made by
`scripts/assemble_set.py`. `manifest.csv` says of every patch whether it is synthetic, and where it came from.

{_table({what: one_line(value) for what, value in told.items()})}

Synthetic patches are in the training split alone. A patch that is made after a test slide must not be trained on where
that slide is tested on.

## Use, and what to beware of

{CAUTION}

## Reference

{METHOD}
"""


def _name(path: str) -> str:
    return one_line(PurePath(path).name) or UNKNOWN


def _table(facts: Mapping[str, str]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {what} | {value} |" for what, value in facts.items())])
