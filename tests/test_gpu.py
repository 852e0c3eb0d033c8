"""What training and sampling ask of a GPU, by one that computes nothing: how many launches."""

import pytest
import torch as th
from fake_gpu import GPU, Launches, fake_gpu

import image_train
from guided_diffusion.script_util import (
    args_to_dict,
    condition_spec,
    create_model_and_diffusion,
    model_and_diffusion_defaults,
)
from guided_diffusion.train_options import TrainOptions
from guided_diffusion.train_util import TrainLoop

README = (
    "--image_size 128 --attention_resolutions 32,16,8 --diffusion_steps 1000 --learn_sigma True "
    "--noise_schedule cosine --num_channels 128 --num_head_channels 32 --num_res_blocks 2 --resblock_updown True "
    "--use_scale_shift_norm True --num_classes 6 --use_hv_map True --use_col_map True "
    "--drop_rate 0.2 --use_checkpoint True"
).split()

LAUNCHES = 2984  # of a training step


def make_loop(flags, dtype, **options):
    """:return: a training loop on the fake GPU."""
    args = image_train.create_argparser().parse_args(flags)
    with GPU:
        model, diffusion = create_model_and_diffusion(**args_to_dict(args, model_and_diffusion_defaults()))
    model.convert_to(dtype)
    options = TrainOptions(drop_rate=args.drop_rate, **options)
    return TrainLoop(model=model, diffusion=diffusion, spec=condition_spec(vars(args)), data=iter(()), options=options)


def batch(count, size):
    """What the loader gives, in the CPU's memory."""
    label, edge = th.zeros(count, 2, size, size), th.zeros(count, 1, size, size, dtype=th.bool)
    images = th.zeros(2, count, 3, size, size, dtype=th.uint8)
    return images[0], dict(label=label, edge=edge, col_map=images[1], index=th.arange(count))


@pytest.mark.slow
def test_launches_of_a_step():
    """At the README's flags, with activations computed again; without what only the first step makes or uploads."""
    with fake_gpu():
        loop = make_loop(README, th.float16, batch_size=8)
        for p in loop.model.parameters():
            p.grad = th.empty_like(p)
        loop.opt.step()
        x, t = th.empty(1, 3, 128, 128, device=GPU), th.zeros(1, dtype=th.long, device=GPU)
        loop.diffusion.training_losses(lambda x, t: th.cat([x, x], dim=1), x, t)
        with Launches() as launches:
            loop.run_step(*batch(8, 128))
    assert launches.counts.total() == LAUNCHES <= 3000, launches.counts.most_common()
