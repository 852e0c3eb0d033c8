"""Training scripts as users of guided-diffusion and its forks have them, written against its modules and keywords."""

import argparse
import csv

import pytest
import torch as th

from guided_diffusion import dist_util, logger
from guided_diffusion.fp16_util import MixedPrecisionTrainer
from guided_diffusion.resample import LossSecondMomentResampler, create_named_schedule_sampler
from guided_diffusion.script_util import (
    add_dict_to_argparser,
    args_to_dict,
    create_model_and_diffusion,
    model_and_diffusion_defaults,
)
from guided_diffusion.train_util import TrainLoop

TINY = (
    "--image_size 16 --num_channels 32 --channel_mult 1,1 --num_res_blocks 1 --attention_resolutions 8 "
    "--num_classes 6 --learn_sigma True --use_col_map True --diffusion_steps 50 --batch_size 4 --lr_anneal_steps 3"
).split()


def parse(argv):
    defaults = dict(
        schedule_sampler="uniform",
        lr=1e-4,
        weight_decay=0.0,
        lr_anneal_steps=0,
        batch_size=1,
        microbatch=-1,
        ema_rate="0.9999",
        drop_rate=0.0,
        log_interval=1,
        save_interval=10000,
        resume_checkpoint="",
        fp16_scale_growth=1e-3,
    )
    defaults.update(model_and_diffusion_defaults())
    parser = argparse.ArgumentParser()
    add_dict_to_argparser(parser, defaults)
    return parser.parse_args([*TINY, *argv])


def batches(batch_size, image_size, assembled=False):
    """A loader of the user's own: images, and their conditions' parts or the conditions themselves."""
    generator = th.Generator().manual_seed(0)
    shape = (batch_size, 1, image_size, image_size)
    while True:
        instance = th.randint(0, 3, shape, generator=generator)
        cond = {
            "label": th.rand(shape, generator=generator).repeat(1, 2, 1, 1) * (instance > 0),
            "instance": instance,
            "col_map": 2 * th.rand(shape, generator=generator).repeat(1, 3, 1, 1) - 1,
            "path": ["x.png"] * batch_size,
        }
        yield cond["col_map"].flip(0), {"y": th.zeros(shape).repeat(1, 6, 1, 1)} if assembled else cond


def train(args, assembled=False):
    dist_util.setup_dist()
    logger.configure()
    model, diffusion = create_model_and_diffusion(**args_to_dict(args, model_and_diffusion_defaults().keys()))
    model.to(dist_util.dev())
    schedule_sampler = create_named_schedule_sampler(args.schedule_sampler, diffusion)
    TrainLoop(
        model=model,
        diffusion=diffusion,
        num_classes=args.num_classes,
        data=batches(args.batch_size, args.image_size, assembled),
        batch_size=args.batch_size,
        microbatch=args.microbatch,
        lr=args.lr,
        ema_rate=args.ema_rate,
        drop_rate=args.drop_rate,
        log_interval=args.log_interval,
        save_interval=args.save_interval,
        resume_checkpoint=args.resume_checkpoint,
        use_fp16=args.use_fp16,
        fp16_scale_growth=args.fp16_scale_growth,
        schedule_sampler=schedule_sampler,
        weight_decay=args.weight_decay,
        lr_anneal_steps=args.lr_anneal_steps,
    ).run_loop()


@pytest.mark.parametrize("assembled", [False, True])
def test_train_loop(logdir, monkeypatch, assembled):
    train(parse("--drop_rate 0.5 --microbatch 2 --use_fp16 True --ema_rate 0.9,0.99".split()), assembled)
    names = {path.name for path in logdir.glob("*.pt")}
    assert names == {f"{kind}000003.pt" for kind in ("model", "ema_0.9_", "ema_0.99_", "opt", "state")}
    with open(logdir / "progress.csv") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["lr"]) for row in rows] == pytest.approx([1e-4, 2e-4 / 3, 1e-4 / 3])
    assert all(float(row[key]) > 0 for row in rows for key in ("loss", "grad_norm", "param_norm"))

    monkeypatch.setenv("OPENAI_LOGDIR", str(logdir.parent / "on"))
    model = str(logdir / "model000003.pt")
    train(parse(["--resume_checkpoint", model, "--schedule_sampler", "loss-second-moment", "--lr_anneal_steps", "4"]))
    assert (logdir.parent / "on" / "model000004.pt").exists()
    assert f"going on from {model}: weights, opt000003.pt, state" in (logdir.parent / "on" / "log.txt").read_text()


def test_a_loop_of_the_users_own():
    args = parse([])
    model, diffusion = create_model_and_diffusion(**args_to_dict(args, model_and_diffusion_defaults().keys()))
    sampler = LossSecondMomentResampler(diffusion)
    mp_trainer = MixedPrecisionTrainer(model=model, use_fp16=args.use_fp16, fp16_scale_growth=args.fp16_scale_growth)
    opt = th.optim.AdamW(mp_trainer.master_params, lr=1e-3, weight_decay=0.1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    data = batches(args.batch_size, args.image_size, assembled=True)
    for _ in range(2):
        batch, cond = next(data)
        t, weights = sampler.sample(len(batch), dist_util.dev())
        mp_trainer.zero_grad()
        losses = diffusion.training_losses(model, batch, t, model_kwargs=cond)
        sampler.update_with_local_losses(t, losses["loss"].detach())
        mp_trainer.backward((losses["loss"] * weights).mean())
        assert mp_trainer.optimize(opt)
    state = mp_trainer.master_params_to_state_dict(mp_trainer.master_params)
    assert list(state) == list(before) and any(not th.equal(state[name], before[name]) for name in state)
    model.load_state_dict(state)
