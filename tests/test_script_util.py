"""From flags to objects: parsing, defaults and what each flag becomes."""

import argparse
import inspect

import pytest
import torch as th

from guided_diffusion import cli
from guided_diffusion.conditioning import ConditionSpec
from guided_diffusion.gaussian_diffusion import LossType, ModelMeanType, ModelVarType, get_named_beta_schedule
from guided_diffusion.script_util import (
    NUM_CLASSES,
    add_dict_to_argparser,
    args_to_dict,
    condition_spec,
    create_gaussian_diffusion,
    create_model,
    create_model_and_diffusion,
    data_defaults,
    diffusion_defaults,
    model_and_diffusion_defaults,
    str2bool,
)

SMALL = dict(image_size=16, num_channels=32, num_res_blocks=1, channel_mult="1,1", attention_resolutions="8")


def parser_of(**defaults):
    parser = cli.FlagParser()
    add_dict_to_argparser(parser, defaults)
    return parser


# ---- command lines ----


@pytest.mark.parametrize("text", ["yes", "true", "t", "y", "1", "True", "TRUE", "Y"])
def test_true(text):
    assert str2bool(text) is True


@pytest.mark.parametrize("text", ["no", "false", "f", "n", "0", "False", "FALSE", "N"])
def test_false(text):
    assert str2bool(text) is False


def test_str2bool_of_booleans_and_nonsense():
    assert str2bool(True) is True
    assert str2bool(False) is False
    for text in ("maybe", "", "2", "truee", "None"):
        with pytest.raises(argparse.ArgumentTypeError, match="neither True nor False"):
            str2bool(text)


def test_flags_are_typed_as_their_defaults():
    parser = parser_of(steps=3, rate=0.5, name="a", flag=False, on=True, anything=None)
    defaults = vars(parser.parse_args([]))
    assert defaults == dict(steps=3, rate=0.5, name="a", flag=False, on=True, anything=None)
    given = parser.parse_args("--steps 7 --rate 1 --name 12 --flag True --on no --anything 5".split())
    assert vars(given) == dict(steps=7, rate=1.0, name="12", flag=True, on=False, anything="5")
    assert [type(value) for value in vars(given).values()] == [int, float, str, bool, bool, str]


@pytest.mark.parametrize(
    "line, message",
    [
        ("--flag maybe", "--flag: 'maybe' is neither True nor False"),
        ("--flag", "--flag: expected one argument"),
        ("--steps 1.5", "--steps: invalid int value: '1.5'"),
        ("--rate fast", "--rate: invalid float value: 'fast'"),
        ("--stepz 3", "--stepz"),
        ("stray", "stray"),
    ],
)
def test_mistyped_flags_are_value_errors(line, message, capsys):
    with pytest.raises(ValueError, match=message):
        parser_of(steps=3, rate=0.5, flag=False).parse_args(line.split())
    assert capsys.readouterr() == ("", "")  # reporting is the program's business


def test_args_to_dict():
    args = argparse.Namespace(a=1, b="x", c=None)
    assert args_to_dict(args, ["c", "a"]) == {"c": None, "a": 1}
    assert args_to_dict(args, {"b": "a default"}) == {"b": "x"}
    with pytest.raises(AttributeError):
        args_to_dict(args, ["d"])


def test_defaults_survive_the_command_line():
    defaults = {**data_defaults(), **ConditionSpec.flags(), **model_and_diffusion_defaults()}
    parser = parser_of(**defaults)
    assert vars(parser.parse_args([])) == defaults
    line = [word for name, value in defaults.items() for word in (f"--{name}", str(value))]
    assert vars(parser.parse_args(line)) == defaults


def test_defaults_are_fresh_and_cover_the_factories():
    model_and_diffusion_defaults()["image_size"] = 1
    assert model_and_diffusion_defaults()["image_size"] == 64
    flags = set(model_and_diffusion_defaults())
    assert diffusion_defaults().items() <= model_and_diffusion_defaults().items()
    of_model = set(inspect.signature(create_model).parameters)
    of_diffusion = set(inspect.signature(create_gaussian_diffusion).parameters)
    assert flags - {"diffusion_steps"} == (of_model | of_diffusion) - {"steps", "sigma_small"}


# ---- the condition ----


def test_condition_spec_takes_its_flags_from_many():
    flags = {**model_and_diffusion_defaults(), **ConditionSpec.flags(), "lr": 1.0}
    assert condition_spec(flags).channel_names == ("mask", "edge")
    spec = condition_spec({**flags, "use_hv_map": True, "use_col_map": True, "num_classes": 6})
    assert spec.channel_names == ("hv_x", "hv_y", "colour_r", "colour_g", "colour_b", "edge")


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(num_classes=3), r"--num_classes 3, .*2 channels \(mask, edge\).*--num_classes 2"),
        (dict(use_hv_map=True), r"--num_classes 2, .*3 channels \(hv_x, hv_y, edge\)"),
        (dict(use_col_map=True, in_channels=1), r"3 channels \(mask, colour, edge\)"),
        (dict(no_instance=True), r"1 channels \(mask\)"),
        (dict(in_channels=2), "--in_channels 2"),
        (dict(class_cond=True, num_classes=0), "--num_classes 0"),
    ],
)
def test_condition_spec_names_the_mistake(changes, message):
    with pytest.raises(ValueError, match=message):
        condition_spec({**ConditionSpec.flags(), **changes})


# ---- the model ----


@pytest.mark.parametrize(
    "changes, channels",
    [
        (dict(num_classes=6), 6),
        (dict(class_cond=True, num_classes=5), 5 + 1),
        (dict(class_cond=True, num_classes=5, use_hv_map=True), 2 + 5 + 1),
        (dict(class_cond=True, num_classes=5, no_instance=True), 5),
        (dict(class_cond=True, num_classes=5, use_col_map=True), 5 + 1 + 3),
        (dict(class_cond=True, num_classes=5, use_col_map=True, in_channels=1), 5 + 1 + 1),
        (dict(class_cond=True, num_classes=5, use_col_map=True, no_instance=True), 5 + 3),
    ],
)
def test_condition_channels(changes, channels):
    with th.device("meta"):
        model = create_model(**SMALL, **changes)
    assert model.num_classes == channels
    convolutions = [p for name, p in model.named_parameters() if name.endswith("mlp_shared.0.weight")]
    assert len(convolutions) > 4
    assert {p.shape[1] for p in convolutions} == {channels}
    if changes.get("class_cond"):
        assert condition_spec({**ConditionSpec.flags(), **changes}).channels == channels


def test_create_model_and_diffusion_takes_all_flags():
    flags = {**model_and_diffusion_defaults(), **SMALL}
    with th.device("meta"):
        model, diffusion = create_model_and_diffusion(**flags)
        sigma, spaced = create_model_and_diffusion(
            **{**flags, "learn_sigma": True, "diffusion_steps": 40, "timestep_respacing": "10"}
        )
    assert model.out[2].weight.shape[0] == 3
    assert sigma.out[2].weight.shape[0] == 6  # learn_sigma reaches both
    assert diffusion.model_var_type == ModelVarType.FIXED_LARGE
    assert spaced.model_var_type == ModelVarType.LEARNED_RANGE
    assert (diffusion.num_timesteps, spaced.num_timesteps, spaced.original_num_steps) == (1000, 10, 40)
    with pytest.raises(TypeError):
        create_model_and_diffusion(**flags, no_such_flag=1)


def test_a_script_that_knows_only_the_reference_s_flags_builds():
    theirs = dict(SMALL, class_cond=False, learn_sigma=True, diffusion_steps=50, timestep_respacing="ddim5")
    with th.device("meta"):
        model, diffusion = create_model_and_diffusion(**theirs)
    assert model.num_classes == NUM_CLASSES == model_and_diffusion_defaults()["num_classes"]
    assert (model.out[2].weight.shape[0], diffusion.num_timesteps) == (6, 5)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(image_size=0), "--image_size 0 must lie in"),
        (dict(num_res_blocks=0), "--num_res_blocks 0"),
        (dict(dropout=1.0), "--dropout 1.0"),
        (dict(diffusion_steps=0), "--diffusion_steps 0"),
        (dict(noise_schedule="sigmoid"), "unknown --noise_schedule sigmoid: choose one of linear, cosine"),
        (dict(predict_v=True, predict_xstart=True), "--predict_v True with --predict_xstart True.*one of them"),
        (dict(loss_weights="min_snr", use_kl=True), "--loss_weights min_snr with --use_kl True"),
        (dict(min_snr_gamma=3.0), "--min_snr_gamma 3.0 without --loss_weights min_snr"),
    ],
)
def test_flags_of_model_and_diffusion_are_checked(changes, message):
    with pytest.raises(ValueError, match=message):
        create_model_and_diffusion(**{**model_and_diffusion_defaults(), **SMALL, **changes})


def test_positional_order_of_create_model():
    positional = [p.name for p in inspect.signature(create_model).parameters.values() if p.kind is not p.KEYWORD_ONLY]
    assert (
        positional
        == (
            "image_size num_channels num_res_blocks channel_mult learn_sigma class_cond use_checkpoint "
            "attention_resolutions num_heads num_head_channels num_heads_upsample use_scale_shift_norm dropout "
            "resblock_updown use_fp16 use_new_attention_order"
        ).split()
    )


# ---- the process ----


def test_weights_that_nothing_reads_are_refused():
    with pytest.raises(ValueError, match="loss_weights min_snr with use_kl"):
        create_gaussian_diffusion(use_kl=True, loss_weights="min_snr")


@pytest.mark.parametrize("use_kl", [False, True])
@pytest.mark.parametrize("rescale_learned_sigmas", [False, True])
def test_loss_type(use_kl, rescale_learned_sigmas):
    diffusion = create_gaussian_diffusion(use_kl=use_kl, rescale_learned_sigmas=rescale_learned_sigmas)
    plain = LossType.RESCALED_MSE if rescale_learned_sigmas else LossType.MSE
    assert diffusion.loss_type == (LossType.RESCALED_KL if use_kl else plain)


def test_mean_type():
    assert create_gaussian_diffusion().model_mean_type == ModelMeanType.EPSILON
    assert create_gaussian_diffusion(predict_xstart=True).model_mean_type == ModelMeanType.START_X
    assert create_gaussian_diffusion(predict_v=True).model_mean_type == ModelMeanType.VELOCITY
    with pytest.raises(ValueError, match="a model predicts one of them"):
        create_gaussian_diffusion(predict_v=True, predict_xstart=True)


def test_loss_weights():
    assert create_gaussian_diffusion().min_snr_gamma is None
    assert create_gaussian_diffusion(loss_weights="min_snr").min_snr_gamma == 5
    flags = dict(loss_weights="min_snr", min_snr_gamma=2.0)
    _, diffusion = create_model_and_diffusion(**SMALL, **flags, diffusion_steps=40, noise_schedule="cosine")
    assert diffusion.mse_weights[0] < 0.1 and diffusion.mse_weights[-1] == 1


@pytest.mark.parametrize(
    "learn_sigma, sigma_small, var_type",
    [
        (False, False, ModelVarType.FIXED_LARGE),
        (False, True, ModelVarType.FIXED_SMALL),
        (True, False, ModelVarType.LEARNED_RANGE),
        (True, True, ModelVarType.LEARNED_RANGE),
    ],
)
def test_var_type(learn_sigma, sigma_small, var_type):
    diffusion = create_gaussian_diffusion(learn_sigma=learn_sigma, sigma_small=sigma_small)
    assert diffusion.model_var_type == var_type


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_schedule_steps_and_respacing(schedule):
    betas = get_named_beta_schedule(schedule, 60)
    diffusion = create_gaussian_diffusion(steps=60, noise_schedule=schedule)
    assert diffusion.num_timesteps == 60
    assert diffusion.betas == pytest.approx(betas, rel=1e-9)
    for respacing, kept in (("ddim4", [0, 15, 30, 45]), ("2,2", [0, 29, 30, 59]), ([3], [0, 30, 59])):
        spaced = create_gaussian_diffusion(steps=60, noise_schedule=schedule, timestep_respacing=respacing)
        assert spaced.timestep_map == kept


def test_rescale_timesteps():
    t = th.tensor([0, 25])
    assert create_gaussian_diffusion(steps=50).model_timesteps(t).tolist() == [0, 25]
    scaled = create_gaussian_diffusion(steps=50, rescale_timesteps=True).model_timesteps(t)
    assert scaled.is_floating_point()
    assert scaled.tolist() == [0, 500]


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(steps=0), "--diffusion_steps 0"),
        (dict(steps=-3), "--diffusion_steps -3"),
        (dict(steps=10), "--diffusion_steps 10"),
        (dict(noise_schedule="sigmoid"), "--noise_schedule sigmoid"),
        (dict(timestep_respacing="ddim"), "--timestep_respacing ddim"),
        (dict(steps=30, timestep_respacing="31"), "--timestep_respacing 31"),
    ],
)
def test_mistakes_name_the_flag(changes, message):
    with pytest.raises(ValueError, match=message):
        create_gaussian_diffusion(**changes)
