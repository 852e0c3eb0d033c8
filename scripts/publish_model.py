"""
Make a checkpoint ready to hand on: half its size, and with no paths in it.

    python scripts/publish_model.py CHECKPOINT OUT [--figures FILE]

CHECKPOINT is one of image_train.py, best an ema_*.pt, with config.json and card.md beside it. The folder OUT is made
anew. It gets the weights in 16-bit floats, which image_sample.py and --init_checkpoint take as they take any others;
config.json, in which of folders and files only the names are left; the card, with the Markdown of FILE at its end, such
as figures of the model's samples; and SHA256SUMS, which `sha256sum --check` reads.
"""

import argparse
import hashlib
import sys
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch as th

from guided_diffusion import checkpoint, cli
from guided_diffusion.cards import NAME as CARD
from guided_diffusion.files import check_place, read_bytes, replace_folder, write_json, write_text
from guided_diffusion.trained_flags import CONFIG_NAME, load_config

SUMS = "SHA256SUMS"
PATHS = ("data_dir", "unlabelled_dir", "init_checkpoint", "resume_checkpoint")  # flags of config.json


def main(argv: list[str] | None = None) -> None:
    args = create_argparser().parse_args(argv)
    config = load_config(str(args.checkpoint))
    card = args.checkpoint.parent / CARD
    if config is None or not card.is_file():
        raise FileNotFoundError(f"CHECKPOINT {args.checkpoint}: beside it there must be {CONFIG_NAME} and {CARD}")
    check_place(args.out, "OUT")
    if args.out.exists() and not (args.out / SUMS).is_file():
        raise ValueError(f"OUT {args.out} is there, and no folder of this program: choose another or remove it")
    weights = halved(checkpoint.load(str(args.checkpoint)), str(args.checkpoint))
    text = card.read_text(encoding="utf-8")
    if args.figures:
        text += "\n" + appended(args.figures)

    def fill(folder: Path) -> None:
        checkpoint.save(weights, str(folder), args.checkpoint.name)
        write_json(folder / CONFIG_NAME, without_paths(config))
        write_text(folder / CARD, text)
        names = (args.checkpoint.name, CONFIG_NAME, CARD)
        sums = [f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}\n" for name in names]
        write_text(folder / SUMS, "".join(sums))

    replace_folder(args.out, fill, "OUT")
    print(f"{args.out}: {args.checkpoint.name}, {(args.out / args.checkpoint.name).stat().st_size / 1e6:.1f} MB")


def create_argparser() -> argparse.ArgumentParser:
    parser = cli.FlagParser(description=__doc__)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=Path, help="weights of image_train.py")
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to make")
    parser.add_argument("--figures", type=Path, help="Markdown for the card's end")
    return parser


def appended(path: Path) -> str:
    """:return: what a text file holds. :raises ValueError: where it is none."""
    try:
        return read_bytes(path).decode()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--figures {path} is no text file ({error}): give Markdown") from None


def halved(state: Mapping[str, Any], path: str) -> dict[str, th.Tensor]:
    """
    :return: a model's weights in 16-bit floats.
    :raises ValueError: where they are no model's, or a weight is too large.
    """
    if not all(isinstance(value, th.Tensor) and value.is_floating_point() for value in state.values()):
        raise ValueError(f"{path} holds no model's weights: give an ema_*.pt or model*.pt")
    small = {name: value.half() for name, value in state.items()}
    for name, value in small.items():
        if not value.isfinite().all():
            raise ValueError(f"{path}: {name} holds values that 16 bits cannot")
    return small


def without_paths(config: Mapping[str, Any]) -> dict[str, Any]:
    """:return: flags whose folders and files are bare names."""
    names = {key: ",".join(PurePath(path).name for path in config.get(key, "").split(",")) for key in PATHS}
    return {**config, **names}


if __name__ == "__main__":
    cli.run(main)
