"""
Draw a small toy data set of H&E-like slides with known nuclei, in the layout the MoNuSeg archives are published in.

    python scripts/make_toy_monuseg.py OUT [--train 6] [--test 2] [--size 256] [--seed 0] [--classes True]

scripts/prepare_monuseg.py reads it like the real thing, so everything can be tried with no download. With --classes
True nuclei are of three classes that differ in size and stain, and class_masks and classes.json say which is which.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from guided_diffusion import cli
from guided_diffusion.histology.slides import toy
from guided_diffusion.options import str2bool


def create_argparser() -> argparse.ArgumentParser:
    parser = cli.FlagParser(description=__doc__)
    parser.add_argument("out", metavar="OUT", type=Path, help="folder for the toy archives")
    parser.add_argument("--train", type=int, default=6, help="training slides")
    parser.add_argument("--test", type=int, default=2, help="test slides")
    parser.add_argument("--size", type=int, default=256, help="side of a slide in px")
    parser.add_argument("--seed", type=int, default=0, help="equal seeds draw equal files")
    parser.add_argument("--classes", type=str2bool, default=False, help="draw nuclei of three classes, and say which")
    return parser


def main(argv: list[str] | None = None) -> None:
    args = create_argparser().parse_args(argv)
    toy.write_toy_monuseg(args.out, args.train, args.test, args.size, args.seed, args.classes)
    print(f"{args.out}: drew {args.train} training and {args.test} test slides of {args.size} x {args.size} px")


if __name__ == "__main__":
    cli.run(main)
