"""Sample labelled patches from trained models: python image_sample.py --model_path M --data_dir DATA ..."""

import argparse
import contextlib
import dataclasses
import json
from collections.abc import Callable

from guided_diffusion import checkpoint, cli, dist_util, logger, magnification, signals, trained_flags
from guided_diffusion.conditioning import ConditionSpec
from guided_diffusion.fp16_util import compute_dtype
from guided_diffusion.histology.features.embeddings import load_features
from guided_diffusion.image_datasets import NucleiDataset, load_dataset
from guided_diffusion.model_options import DiffusionOptions, ModelOptions
from guided_diffusion.options import add_flags, defaults
from guided_diffusion.results_path import check_results_path, check_same_run, claimed
from guided_diffusion.run_options import DataOptions, RunOptions
from guided_diffusion.sample_options import SampleOptions
from guided_diffusion.sampling_plan import SamplingPlan, process_for
from guided_diffusion.script_util import (
    args_to_dict,
    check_data_flags,
    condition_spec,
    create_model_and_diffusion,
    data_defaults,
    model_and_diffusion_defaults,
)
from guided_diffusion.sweep import Sweep, find_checkpoints, parse_interval, parse_scales
from guided_diffusion.unet import UNetModel

# What decides how a run is carried out, and not what it writes.
HOW = "batch_size num_workers device results_path num_samples spade_cache compile overwrite dry_run use_checkpoint"

FLAGS = {
    "data": DataOptions,
    "condition": ConditionSpec,
    "model": ModelOptions,
    "diffusion": DiffusionOptions,
    "running": RunOptions,
    "sampling": SampleOptions,
}


def create_argparser() -> argparse.ArgumentParser:
    """:return: a parser of every flag, with its default."""
    parser = cli.FlagParser(description=__doc__)
    add_flags(parser, FLAGS)
    return parser


def resolve(
    argv: list[str] | None, parser: argparse.ArgumentParser | None = None
) -> tuple[argparse.Namespace, list[str]]:
    """
    Read the command line over the checkpoint's own configuration, if that lies beside it. Collective.

    :param parser: of a program that samples and has other defaults; else this one's.
    :return: flag -> value: given by hand, else the checkpoint's, else the default; and the files that --model_path
        names, as rank 0 finds them.
    :raises ValueError: where there are none, or their configuration is corrupt.
    """
    parser = parser or create_argparser()
    args = parser.parse_args(argv)
    if args.dry_run and not args.model_path:
        return args, []
    paths = dist_util.from_rank_0(lambda: find_checkpoints(args.model_path))
    config = dist_util.from_rank_0(lambda: trained_flags.load_config(paths[0])) or {"mpp": magnification.REFERENCE_MPP}
    fields = (*trained_flags.MODEL_FIELDS, "preserve_nuclei_col", "mpp")  # the last two are what colours and areas mean
    known = {name: config[name] for name in fields if name in config and name in vars(args)}
    for name, value in known.items():
        if type(value) is not type(parser.get_default(name)):
            raise ValueError(f"config.json beside {args.model_path} has --{name} {value!r}: restore it or remove it")
    parser.set_defaults(**known, null_condition=trained_flags.trained_null_condition(config))
    return parser.parse_args(argv), paths


def check(args: argparse.Namespace) -> None:
    """:raises ValueError: where a flag's value is out of range, or contradicts another's."""
    check_data_flags(vars(args))
    SampleOptions.read(vars(args))
    if args.null_condition == "keep_colour" and not args.use_col_map:
        raise ValueError("--null_condition keep_colour without --use_col_map True: there is no colour map to keep")
    if args.features and (args.match_struct or not args.match_app):
        raise ValueError(f"--features {args.features} needs --match_app True and no --match_struct, or is not read")
    if args.num_steps and args.timestep_respacing:
        raise ValueError(f"--num_steps {args.num_steps} with --timestep_respacing {args.timestep_respacing}: give one")


def check_files(args: argparse.Namespace, model: UNetModel, weights: list[str], run: dict) -> None:
    """Collective. :raises ValueError: where results cannot go to --results_path, or weights are of another model."""

    def check() -> None:
        check_results_path(args.results_path, args.data_dir, args.appearance_dir, args.structure_dir)
        if not args.overwrite:
            check_same_run(args.results_path, run, defaults(FLAGS))
        for path in weights:
            trained_flags.check_config(path, vars(args))

    dist_util.from_rank_0(check)
    for path in weights:
        checkpoint.check_weights(model, path)


def load_conditions(args: argparse.Namespace, spec: ConditionSpec) -> NucleiDataset:
    """:return: the data set that gives structures and appearances. Collective."""
    return load_dataset(
        spec=spec,
        is_train=args.use_train,
        image_size=args.image_size,
        features=load_features(args.features).of if args.features else None,
        **args_to_dict(args, ["match_other_slide", "appearance_dir", "structure_dir", "min_nucleus", "field"]),
        **args_to_dict(args, data_defaults().keys() - {"num_workers"}),
    )


def ready(model: UNetModel, args: argparse.Namespace) -> UNetModel:
    """:return: the model, on this rank's device and in the precision to sample in."""
    device = dist_util.dev()
    model.place(device, args.compile)
    model.eval().convert_to(compute_dtype(args.use_fp16, device, args.precision), weights=True)
    return model


def load_guide(args: argparse.Namespace) -> UNetModel | None:
    """:return: the weaker model of autoguidance, if one was asked for."""
    if not args.guide_path:
        return None
    guide, _ = create_model_and_diffusion(**args_to_dict(args, model_and_diffusion_defaults()))
    checkpoint.load_weights(ready(guide, args), args.guide_path)
    return guide


def sample(sweep: Sweep, load_model: Callable[[str], UNetModel], run: dict, args: argparse.Namespace) -> None:
    """Sample, as the only run in the results folder. Collective."""
    with contextlib.ExitStack() as stack:
        place = claimed(args.results_path, run, defaults(FLAGS), args.overwrite)
        dist_util.from_rank_0(lambda: stack.enter_context(place))
        try:
            sweep.run(load_model)
        except signals.Stopped as stop:
            logger.log("what has been sampled stays: the same command goes on")
            stop.code = cli.NOT_FINISHED
            raise


def main(argv: list[str] | None = None) -> None:
    """Flags -> objects -> run. :param argv: the command line without the program's name; sys.argv's if None."""
    dist_util.setup_dist(create_argparser().parse_args(argv).device)
    if dist_util.rank():
        logger.set_level(logger.ERROR)
    args, checkpoints = resolve(argv)
    check(args)
    spec = condition_spec(vars(args))
    model, diffusion = create_model_and_diffusion(**args_to_dict(args, model_and_diffusion_defaults()))
    args.sampler = args.sampler or ("ddim" if args.use_ddim else "ddpm")
    plan = SamplingPlan(
        args.sampler,
        process_for(args.sampler, diffusion, args.num_steps),
        interval=parse_interval(args.guidance_interval),
        channels=args.in_channels,
        **args_to_dict(args, ["seed", "clip_denoised"]),
    )
    scales = parse_scales(args.s)
    if args.dry_run:
        if dist_util.rank() == 0:
            cost = plan.cost_of_fields(args.image_size, args.window_overlap) if args.field else {}
            print(json.dumps({**vars(args), "condition_channels": spec.channel_names, **cost}, indent=2))
        return dist_util.shutdown()

    run = {name: value for name, value in vars(args).items() if name not in HOW.split()}
    check_files(args, model, [*checkpoints, *filter(None, [args.guide_path])], run)
    dataset = load_conditions(args, spec)
    ready(model, args)
    plan = dataclasses.replace(plan, guide=load_guide(args))

    def load_model(path: str) -> UNetModel:
        checkpoint.load_weights(model, path, alone=True)
        return model

    sweep = Sweep(
        dataset,
        spec,
        plan,
        checkpoints,
        scales,
        results_path=args.results_path,
        count=args.num_samples or len(dataset),
        keep_colour=args.null_condition == "keep_colour",
        **args_to_dict(args, ["batch_size", "num_workers", "spade_cache", "first", "same_noise"]),
        **args_to_dict(args, ["field", "window_overlap"]),
    )
    if len(plan) == diffusion.original_num_steps > 25:
        logger.log(f"--sampler dpmpp_2m_sde --num_steps 25 is {len(plan) / 25:.0f} times faster than {len(plan)} steps")
    sample(sweep, load_model, run, args)
    dist_util.shutdown()


if __name__ == "__main__":
    cli.run(main, dist_util.launched_rank, dist_util.leave)
