"""Train a semantic diffusion model: python, mpiexec -n N python or torchrun image_train.py --data_dir DATA ..."""

import argparse
import contextlib
import functools
import json
from pathlib import Path
from typing import Any

import torch as th

from guided_diffusion import cards, checkpoint, cli, dist_util, logger, magnification, trained_flags
from guided_diffusion.checkpointer import Checkpointer
from guided_diffusion.conditioning import ConditionSpec
from guided_diffusion.data_stream import stream
from guided_diffusion.devices import prepare_training
from guided_diffusion.files import write_json
from guided_diffusion.fp16_util import compute_dtype
from guided_diffusion.image_datasets import NucleiDataset, count_patches, load_dataset
from guided_diffusion.model_options import DiffusionOptions, ModelOptions
from guided_diffusion.options import add_flags, changeable, defaults
from guided_diffusion.resample import create_named_schedule_sampler
from guided_diffusion.results_path import check_outside
from guided_diffusion.run_options import DataOptions, RunOptions
from guided_diffusion.script_util import (
    args_to_dict,
    check_data_flags,
    condition_spec,
    create_model_and_diffusion,
    data_defaults,
    model_and_diffusion_defaults,
)
from guided_diffusion.train_options import TrainOptions
from guided_diffusion.train_util import TrainLoop
from guided_diffusion.validation import Validation

FLAGS = {
    "data": DataOptions,
    "condition": ConditionSpec,
    "model": ModelOptions,
    "diffusion": DiffusionOptions,
    "running": RunOptions,
    "training": TrainOptions,
}


def create_argparser() -> argparse.ArgumentParser:
    """:return: a parser of every flag, with its default."""
    parser = cli.FlagParser(description=__doc__)
    add_flags(parser, FLAGS)
    return parser


def check(args: argparse.Namespace) -> None:
    """:raises ValueError: where a flag is out of range or contradicts another, or the run's folder lies in its data."""
    check_data_flags(vars(args))
    for name in ("shuffle_masks", "match_struct", "match_app"):
        if getattr(args, name):
            raise ValueError(f"--{name} True pairs images with the masks of others, which is for image_sample.py only")
    if args.unlabelled_dir and not args.mark_unknown:
        raise ValueError(
            "--unlabelled_dir with --mark_unknown False: an unknown structure would look like none; leave that out"
        )
    if folder := logger.environment_dir():
        check_outside(folder, "OPENAI_LOGDIR", args.data_dir, unlabelled_dir=args.unlabelled_dir)


def check_last_step(options: TrainOptions, resume_checkpoint: str) -> None:
    """:raises ValueError: where the run would have to go back."""
    step = checkpoint.resume_step(resume_checkpoint)
    if options.last_step is not None and options.last_step < step:
        raise ValueError(f"--max_steps {options.last_step} is below the resumed step {step}: give more")


def check_begun_with(args: argparse.Namespace) -> None:
    """:raises ValueError: where a checkpoint to begin with is of another model; but the mark can be taught to one."""
    if args.resume_checkpoint:
        trained_flags.check_config(args.resume_checkpoint, vars(args))
    if args.init_checkpoint:
        taught = {"mark_unknown"} if args.mark_unknown else set()
        trained_flags.check_config(args.init_checkpoint, args_to_dict(args, vars(args).keys() - taught))


def load_parts(args: argparse.Namespace, spec: ConditionSpec) -> tuple[NucleiDataset, NucleiDataset | None]:
    """:return: what to train on, and what to validate on by --val_split, None where there is nothing. Collective."""
    load = functools.partial(load_dataset, spec=spec, image_size=args.image_size, ids=False)
    options = args_to_dict(args, data_defaults().keys() - {"num_workers"})
    plain = {**options, "augment": False, "stain_jitter": 0.0}
    held = dict(is_train=args.is_train, val_share=args.val_share)
    options |= args_to_dict(args, ["unlabelled_dir", "balance_classes"])
    if args.val_split != "slides":
        seen = load(is_train=args.is_train, **options)
        return seen, load(is_train=False, **plain) if args.val_split == "test" else None
    seen = load(part="train", **held, **options)
    held_out = load(part="held_out", **held, **plain)
    if not len(held_out):
        logger.warn("fewer than three slides: none is held out, so there is no validation, best checkpoint or preview")
    return seen, held_out if len(held_out) else None


def resolve(argv: list[str] | None) -> tuple[argparse.Namespace, str]:
    """
    :return: the flags, with the magnification of the data and how an unknown structure is marked, where that follows
        from others; and what to say where the former is assumed.
    """
    parser = create_argparser()
    args = parser.parse_args(argv)
    begun_with, folder = args.resume_checkpoint or args.init_checkpoint, logger.environment_dir()
    # Where the checkpoint has gone since, the run in the folder, which began with it, says so.
    places = [begun_with, f"{folder}/" if folder else ""] if begun_with else []
    configs = filter(None, map(trained_flags.load_config, filter(None, places)))
    if args.unlabelled_dir or next(configs, {}).get("mark_unknown"):
        parser.set_defaults(mark_unknown=True)
        args = parser.parse_args(argv)
    check(args)
    known = args.mpp or magnification.of_data(args.data_dir)
    args.mpp = known or magnification.REFERENCE_MPP
    return args, magnification.assumption(args.data_dir) if args.use_hv_map and not known else ""


def main(argv: list[str] | None = None) -> None:
    """Flags -> objects -> run. :param argv: the command line without the program's name; sys.argv's if None."""
    args, assumption = resolve(argv)
    spec = condition_spec(vars(args))
    options = TrainOptions.read(vars(args))
    th.manual_seed(args.seed)  # the initial weights; all later draws have generators of their own
    model, diffusion = create_model_and_diffusion(**args_to_dict(args, model_and_diffusion_defaults()))
    schedule_sampler = create_named_schedule_sampler(args.schedule_sampler, diffusion)
    check_last_step(options, args.resume_checkpoint)
    config = {**vars(args), "condition_channels": spec.channel_names}
    if args.dry_run:
        print(json.dumps(config, indent=2))
        return

    dist_util.setup_dist(args.device)
    prepare_training(dist_util.dev())
    if dist_util.rank():
        logger.set_level(logger.ERROR)
    options = options.shared_by(dist_util.world_size())
    dtype = compute_dtype(args.use_fp16, dist_util.dev(), args.precision)
    check_begun_with(args)
    model.place(dist_util.dev(), args.compile, training=True)
    model.convert_to(dtype)
    with Checkpointer(logger.environment_dir(), options.kept_checkpoints) as checkpointer:
        seen, held_out = load_parts(args, spec)
        if assumption:
            logger.log(assumption)
        files, images = seen.identity()
        facts = {"data": files, "unlabelled": images, "held_out": held_out.identity()[0] if held_out else ""}
        older = {**defaults(FLAGS), "mpp": args.mpp}  # a magnification was always taken from the data
        resumed = checkpointer.find(args.resume_checkpoint, vars(args), changeable(FLAGS), facts, older)
        check_last_step(options, resumed)
        validate = functools.partial(
            Validation, spec=spec, diffusion=diffusion, batch_size=options.batch_size, seed=args.seed
        )
        start = checkpoint.samples_seen(resumed, options.batch_size * dist_util.world_size())
        order = args_to_dict(args, ["num_workers", "seed", "unlabelled_share"])
        data = stream(seen, options.batch_size, start=start, **order)
        with contextlib.closing(data):  # an error must not leave workers behind, which the process's end waits for
            loop = TrainLoop(
                model=model,
                diffusion=diffusion,
                spec=spec,
                data=data,
                options=options,
                schedule_sampler=schedule_sampler,
                validation=validate(held_out) if held_out else None,
                train_preview=validate(seen.unchanged()),
                resume_checkpoint=resumed,
                init_checkpoint="" if resumed else args.init_checkpoint,
                checkpointer=checkpointer,
            )
            run(loop, config, seen, held_out)
    logger.close()
    dist_util.shutdown()


def run(loop: TrainLoop, config: dict[str, Any], seen: NucleiDataset, held_out: NucleiDataset | None) -> None:
    """Train, and say in the folder of the run with which flags, and where it stands at the end."""
    rank = dist_util.rank()
    dist_util.agree(lambda: None if rank else logger.configure())
    folder = dist_util.all_gather(logger.get_dir())[0]
    dist_util.agree(lambda: logger.configure(folder, rank=rank) if rank else None)
    loop.checkpointer.begin(folder, config, functools.partial(cards.model_card, config, count_patches(seen, held_out)))
    logger.log(f"condition: {', '.join(config['condition_channels'])}; checkpoints and logs go to {folder}")
    images = {"images": len(seen)}
    if seen.unlabelled:
        images["unlabelled_images"] = seen.unlabelled
        left_out = f"; {seen.copies} more are labelled ones, and left out" if seen.copies else ""
        logger.log(f"{len(seen)} labelled images, {seen.unlabelled} without masks{left_out}")
    loop.run_loop()
    if rank == 0:
        write_json(Path(folder, checkpoint.RESULT_NAME), {**images, **loop.result()})


if __name__ == "__main__":
    cli.run(main, dist_util.launched_rank, dist_util.leave)
