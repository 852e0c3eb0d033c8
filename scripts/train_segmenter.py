"""
Train a segmenter of nuclei on a MoNuSeg-layout folder.

    python scripts/train_segmenter.py DATA --results_path DIR [--max_steps 4000 | --minutes M] [--seed 0]

DATA/MoNuSegTrainingData/{images,inst_masks} holds whole slides or patches, real or mixed by scripts/assemble_set.py:
what DATA/manifest.csv calls synthetic is trained on, but never validated on, and left out where it was made from a
held-out slide. With ignore_masks/ beside them, nothing is learned where such a mask is not 0, but in nuclei; with
class_masks/, and classes.json, the model learns to tell the classes of nuclei apart. Of the slides a seeded share is
held out; training stops when they no longer improve, and the best weights are kept. Writes DIR/segmenter.pt,
config.json and result.json; until then checkpoint.pt, from which the same command resumes. By steps, and on a CPU,
equal seeds give equal weights; by minutes they cannot.
"""

import argparse
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


from guided_diffusion import cell_classes, cli, magnification, progress
from guided_diffusion.cell_classes import CellClass
from guided_diffusion.devices import UNSCALED, find_device
from guided_diffusion.files import check_place, claimed, read_json, write_json
from guided_diffusion.histology.segmenter import data as segmenter_data
from guided_diffusion.histology.segmenter.data import Pair
from guided_diffusion.histology.segmenter.decoding import FILE
from guided_diffusion.histology.segmenter.net import ADAPT, STRIDE
from guided_diffusion.histology.segmenter.training import CHECKPOINT, Settings, Training
from guided_diffusion.histology.slides.annotations import TEST_SPLIT
from guided_diffusion.options import WORKERS, check_ranges, str2bool
from guided_diffusion.slides import slides_of

CONFIG, RESULT = "config.json", "result.json"


def main(argv: list[str] | None = None) -> None:
    args = create_argparser().parse_args(argv)
    settings = settings_of(args)
    device = find_device(args.device)
    pairs = segmenter_data.training_pairs(args.data)
    classes = segmenter_data.classes_of(pairs)
    known_mpp = settings.mpp or magnification.of_data(args.data)
    settings = replace(settings, mpp=known_mpp or magnification.REFERENCE_MPP)
    test_images = args.data / TEST_SPLIT / "images"
    if test_images.is_dir():
        tests = list(segmenter_data.files_in(test_images, deep=True).values())
        test_slides = slides_of(args.data, tests, lambda: [pair.image for pair in pairs])
        segmenter_data.check_no_overlap(pairs, test_slides, test_images)
    train, held, left_out = segmenter_data.hold_out(pairs, args.val_share, args.seed)
    config = config_of(args, settings, train, held, left_out, classes)
    check_out(args.out, config)
    if (args.out / RESULT).exists():
        (args.out / CHECKPOINT).unlink(missing_ok=True)  # where the run was killed at its very end
        print(f"{args.out}: finished before")
        return

    bar = progress.bar([*train, *held], "reading", leave=False)
    examples = [segmenter_data.read_pair(pair, classes) for pair in bar]
    if not any((example.inst_map > 0).any() for example in examples[: len(train)]):
        raise ValueError(f"DATA {args.data} shows no nucleus in any instance mask to train on: give annotated images")
    validation = segmenter_data.validation_part(examples[len(train) :])
    slides = config["slides_trained_on"]
    training = Training(settings, examples[: len(train)], validation, args.out, device, slides, classes)

    if classes:
        print(f"nuclei of {len(classes)} classes: {', '.join(one.name for one in classes)}")
    if not known_mpp:
        print(magnification.assumption(f"DATA {args.data}"))
    if not held:
        print("no slide is held out (--val_share 0, or fewer than three): no early stop, the last weights are kept")
    if left_out:
        print(f"{len(left_out)} synthetic images made from held-out slides are left out")
    with claimed(args.out, "--results_path"):
        write_json(args.out / CONFIG, config)
        result = training.run(args.num_workers, report)
        write_json(args.out / RESULT, result)
        (args.out / CHECKPOINT).unlink(missing_ok=True)
    tail = "" if result["validation"] is None else f", best at step {result['best_step']}: {line(result['validation'])}"
    print(f"{args.out / FILE}: {result['steps']} steps in {result['seconds']:.0f} s{tail}")


def create_argparser() -> argparse.ArgumentParser:
    parser = cli.FlagParser(description=__doc__)
    usual = Settings()
    parser.add_argument("data", metavar="DATA", type=Path, help="folder that holds MoNuSegTrainingData")
    parser.add_argument(
        "--results_path", "--out", dest="out", metavar="DIR", type=Path, required=True, help="folder to write to"
    )
    parser.add_argument(
        "--max_steps", "--steps", type=int, help=f"of the optimiser; {usual.steps} where --minutes is not given either"
    )
    parser.add_argument("--minutes", type=float, help="of training, all sessions together")
    parser.add_argument("--batch_size", type=int, default=usual.batch_size, help="crops a step")
    parser.add_argument("--crop", type=int, default=usual.crop, help="side of the crops in px")
    parser.add_argument("--lr", type=float, default=usual.lr, help="largest learning rate")
    parser.add_argument("--precision", default=usual.precision, help="fp32, or bf16, for GPUs and newer CPUs")
    parser.add_argument("--val_share", type=float, default=0.15, help="of the slides, held out")
    parser.add_argument("--seed", type=int, default=usual.seed, help="of all that is random")
    parser.add_argument(
        "--val_interval", "--eval_interval", type=int, default=usual.eval_interval, help="steps between validations"
    )
    parser.add_argument(
        "--patience",
        type=int,
        default=usual.patience,
        help="validations without a better one after which to stop; 0: never",
    )
    parser.add_argument("--num_workers", type=int, default=0, help="processes that make crops")
    parser.add_argument("--colour_augment", type=str2bool, default=True, help="jitter the stains")
    parser.add_argument(
        "--synthetic_first",
        type=float,
        default=usual.synthetic_first,
        help="share of the steps, the first ones, that take synthetic images alone, and the rest real ones; 0: mixed",
    )
    parser.add_argument(
        "--real_last",
        type=float,
        default=usual.real_last,
        help="share of the steps, the last ones, that take real images alone, and those before either kind",
    )
    parser.add_argument("--pretrained", type=str2bool, default=True, help="begin with ImageNet weights")
    parser.add_argument(
        "--mpp", type=float, default=0.0, help="micrometres a pixel; 0: as DATA/prepare.json says, else 0.25 (40x)"
    )
    parser.add_argument("--adapt", type=float, default=usual.adapt, help="of validation, as in segment.py")
    parser.add_argument("--device", default="auto", help="auto (a GPU if there is one), cpu, cuda, cuda:1, ...")
    return parser


def settings_of(args: argparse.Namespace) -> Settings:
    """:raises ValueError: where a flag is out of range."""
    check_ranges(vars(args), max_steps="[1, inf)", batch_size="[2, 65536]", crop=f"[{STRIDE}, 65536]")
    check_ranges(vars(args), seed="[0, inf)", val_interval="[1, inf)", patience="[0, inf)", num_workers=WORKERS)
    check_ranges(vars(args), minutes="(0, inf)", lr="(0, 1]", val_share="[0, 1)", adapt="[0, 1]")
    if args.mpp:
        magnification.check(args.mpp, "--mpp")
    if args.crop % STRIDE:
        raise ValueError(f"--crop {args.crop} must be a multiple of {STRIDE}")
    for name in ("synthetic_first", "real_last"):
        share = getattr(args, name)
        if not 0 <= share < 1 or (share and args.minutes is not None):
            raise ValueError(f"--{name} {share} must be in [0, 1), and goes without --minutes")
    if args.synthetic_first and args.real_last:
        raise ValueError(
            f"--synthetic_first {args.synthetic_first} with --real_last {args.real_last}: both say when real images "
            "come alone; give one of them"
        )
    if args.precision not in UNSCALED:
        raise ValueError(f"unknown --precision {args.precision}: choose one of {', '.join(UNSCALED)}")
    spelled = {"steps": "max_steps", "eval_interval": "val_interval"}
    given = {field.name: getattr(args, spelled.get(field.name, field.name)) for field in fields(Settings)}
    if args.max_steps is None and args.minutes is None:
        given["steps"] = Settings.steps
    return Settings(**given)


def config_of(
    args: argparse.Namespace,
    settings: Settings,
    train: list[Pair],
    held: list[Pair],
    left_out: list[Pair],
    classes: list[CellClass],
) -> dict[str, Any]:
    """All that decides the weights; a run is resumed only with the same."""
    return {
        **asdict(settings),
        "data": str(args.data.resolve()),
        "val_share": args.val_share,
        "slides_trained_on": sorted({slide for pair in train for slide in pair.slides if slide}),
        "slides_held_out": sorted({slide for pair in held for slide in pair.slides}),
        "images_trained_on": len(train),
        "synthetic_trained_on": sum(pair.synthetic for pair in train),
        "synthetic_left_out": len(left_out),
        "checksum": segmenter_data.checksum([*train, *held]),
        **({"classes": cell_classes.as_rows(classes)} if classes else {}),
    }


def check_out(out: Path, config: dict[str, Any]) -> None:
    """:raises ValueError: where the folder is none, lies in the data, or belongs to another run."""
    check_place(out)
    if out.resolve() == Path(config["data"]):
        raise ValueError(f"--results_path {out} is DATA itself: give another folder")
    path = out / CONFIG
    if not path.exists():
        for name in (FILE, RESULT, CHECKPOINT):
            if (out / name).exists():
                raise ValueError(f"--results_path {out} holds {name} of an unknown run: give another folder")
        return
    try:
        # Earlier versions knew 40x alone, always adapted, and always mixed.
        usual = {"mpp": magnification.REFERENCE_MPP, "adapt": ADAPT, "synthetic_first": 0.0, "real_last": 0.0}
        before = {**usual, **read_json(path)}
    except (ValueError, TypeError):
        raise ValueError(f"{path} does not parse: give another --results_path") from None
    for name, value in config.items():
        if before.get(name) != value:
            raise ValueError(
                f"--results_path {out} was begun with {name} {short(before.get(name))}, this run has {short(value)}: "
                "give another folder"
            )


def short(value: Any) -> str:
    return f"{str(value)[:80]} ..." if len(str(value)) > 80 else str(value)


def report(row: dict[str, float]) -> None:
    progress.write(f"step {row['step']}: {line({k: v for k, v in row.items() if k not in ('step', 'score')})}")


def line(figures: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.3f}" for name, value in figures.items())


if __name__ == "__main__":
    cli.run(main)
