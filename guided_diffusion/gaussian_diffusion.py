"""The diffusion process as the reference's users call it: losses, likelihoods, single steps and whole chains. The
chains themselves are samplers'."""

import enum
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch as th

from .diffusion_process import CondFn, DenoisedFn, DiffusionProcess, ModelMeanType, ModelVarType
from .guidance import Model
from .losses import discretized_gaussian_log_likelihood, normal_kl
from .nn import mean_flat
from .progress import bar
from .samplers import Steps, ancestral_step, ddim_step, sample_ddim, sample_ddpm
from .schedules import NOISE_SCHEDULES, betas_for_alpha_bar, get_named_beta_schedule

__all__ = [  # the reference has schedules and enumerations here, too
    "NOISE_SCHEDULES",
    "GaussianDiffusion",
    "LossType",
    "ModelMeanType",
    "ModelVarType",
    "betas_for_alpha_bar",
    "get_named_beta_schedule",
]


class LossType(enum.Enum):
    """What is minimised."""

    MSE = enum.auto()  # of the prediction; plus the variational bound where the variance is learned
    RESCALED_MSE = enum.auto()  # the same with the bound's term estimating the sum over all steps
    KL = enum.auto()  # the variational bound
    RESCALED_KL = enum.auto()  # the same, estimating the sum over all steps

    def is_vb(self) -> bool:
        """Whether the loss is the variational bound itself."""
        return self in (LossType.KL, LossType.RESCALED_KL)


class GaussianDiffusion(DiffusionProcess):
    """
    A diffusion process and what a model of it is trained on.

    :param loss_type: what is minimised; other parameters as DiffusionProcess's.
    :param min_snr_gamma: weigh the squared error by it, see min_snr_weights; None weighs all timesteps alike.
    """

    def __init__(
        self, *, betas: np.ndarray, loss_type: LossType, min_snr_gamma: float | None = None, **options: Any
    ) -> None:
        super().__init__(betas=betas, **options)
        self.loss_type = loss_type
        self.min_snr_gamma = min_snr_gamma
        self.mse_weights = np.ones(len(betas)) if min_snr_gamma is None else self.min_snr_weights(min_snr_gamma)

    # ---- sampling ----

    def p_sample(
        self,
        model: Model,
        x: th.Tensor,
        t: th.Tensor,
        clip_denoised: bool = True,
        denoised_fn: DenoisedFn | None = None,
        cond_fn: CondFn | None = None,
        model_kwargs: dict[str, Any] | None = None,
    ) -> dict[str, th.Tensor]:
        """
        Draw x_{t-1} from the model's p(x_{t-1} | x_t). Parameters as denoise's.

        :return: "sample", shaped as x, and "pred_xstart".
        """
        out = self.denoise(model, x, t, clip_denoised, denoised_fn, cond_fn, model_kwargs)
        kept = (t != 0).to(x.dtype).view(-1, *[1] * (x.dim() - 1))  # the last step of sampling adds no noise
        return {"sample": ancestral_step(out, kept * th.randn_like(x)), "pred_xstart": out.x_start}

    def ddim_sample(
        self,
        model: Model,
        x: th.Tensor,
        t: th.Tensor,
        clip_denoised: bool = True,
        denoised_fn: DenoisedFn | None = None,
        cond_fn: CondFn | None = None,
        model_kwargs: dict[str, Any] | None = None,
        eta: float = 0.0,
    ) -> dict[str, th.Tensor]:
        """
        Take a DDIM step, see samplers.ddim_step. Other parameters and result as p_sample's.

        :param eta: 0 is deterministic, 1 has the ancestral step's variance.
        """
        x_start = self.denoise(
            model, x, t, clip_denoised, denoised_fn, cond_fn, model_kwargs, steer_x_start=True
        ).x_start
        noise = th.randn_like(x) if eta else None
        sample = ddim_step(x, x_start, self._point(t, x), self._point(t, x, "_prev"), eta, noise)
        return {"sample": sample, "pred_xstart": x_start}

    def ddim_reverse_sample(
        self,
        model: Model,
        x: th.Tensor,
        t: th.Tensor,
        clip_denoised: bool = True,
        denoised_fn: DenoisedFn | None = None,
        model_kwargs: dict[str, Any] | None = None,
        eta: float = 0.0,
    ) -> dict[str, th.Tensor]:
        """
        Take the DDIM step the other way, from x_t to x_{t+1}. Parameters as p_sample's.

        :param eta: 0, since only the deterministic step has a way back.
        """
        if eta:
            raise ValueError(f"ddim_reverse_sample with eta {eta}: only the deterministic step, eta 0, has a way back")
        x_start = self.denoise(model, x, t, clip_denoised, denoised_fn, None, model_kwargs).x_start
        sample = ddim_step(x, x_start, self._point(t, x), self._point(t, x, "_next"))
        return {"sample": sample, "pred_xstart": x_start}

    def p_sample_loop(self, model: Model, shape: Sequence[int], *args: Any, **options: Any) -> th.Tensor:
        """Run the whole ancestral chain; parameters as p_sample_loop_progressive's. :return: the last sample."""
        return _last(self.p_sample_loop_progressive(model, shape, *args, **options))

    def p_sample_loop_progressive(
        self,
        model: Model,
        shape: Sequence[int],
        noise: th.Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: DenoisedFn | None = None,
        cond_fn: CondFn | None = None,
        model_kwargs: dict[str, Any] | None = None,
        device: th.device | str | None = None,
        progress: bool = False,
    ) -> Iterator[dict[str, th.Tensor]]:
        """
        Run the ancestral chain, step by step.

        :param shape: the samples' shape, (N, C, H, W).
        :param noise: x_T, shaped as the samples; drawn if None.
        :param device: where to sample; the noise's or the model's own device if None.
        :param progress: show a bar; other parameters as denoise's.
        :return: an iterator over what p_sample returns.
        """
        asked = dict(clip_denoised=clip_denoised, denoised_fn=denoised_fn, cond_fn=cond_fn, model_kwargs=model_kwargs)
        return self._loop(sample_ddpm, model, shape, noise, device, progress, asked)

    def ddim_sample_loop(self, model: Model, shape: Sequence[int], *args: Any, **options: Any) -> th.Tensor:
        """Run the whole DDIM chain; parameters as ddim_sample_loop_progressive's. :return: the last sample."""
        return _last(self.ddim_sample_loop_progressive(model, shape, *args, **options))

    def ddim_sample_loop_progressive(
        self,
        model: Model,
        shape: Sequence[int],
        noise: th.Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: DenoisedFn | None = None,
        cond_fn: CondFn | None = None,
        model_kwargs: dict[str, Any] | None = None,
        device: th.device | str | None = None,
        progress: bool = False,
        eta: float = 0.0,
    ) -> Iterator[dict[str, th.Tensor]]:
        """
        Run the DDIM chain, step by step.

        :param eta: see ddim_sample; other parameters as p_sample_loop_progressive's.
        :return: an iterator over what ddim_sample returns.
        """
        asked = dict(clip_denoised=clip_denoised, denoised_fn=denoised_fn, cond_fn=cond_fn, model_kwargs=model_kwargs)
        sampler = functools.partial(sample_ddim, eta=eta)
        return self._loop(sampler, model, shape, noise, device, progress, {**asked, "steer_x_start": True})

    @th.no_grad()
    def _loop(
        self,
        sampler: Callable[..., Steps],
        model: Model,
        shape: Sequence[int],
        noise: th.Tensor | None,
        device: th.device | str | None,
        progress: bool,
        asked: dict[str, Any],
    ) -> Iterator[dict[str, th.Tensor]]:
        """
        Run one of samplers' chains over all steps of this process.

        :param asked: options of denoise.
        """
        if device is None:
            device = next(model.parameters()).device if noise is None else noise.device
        x = th.randn(tuple(shape), device=device) if noise is None else noise.to(device)
        last = self.num_timesteps - 1
        steps = sampler(lambda x, i: self.denoise(model, x, last - i, **asked), x, self.schedule, th.randn_like)
        for x, x_start in bar(steps, total=last + 1, unit="step", leave=False, disable=not progress):
            yield {"sample": x, "pred_xstart": x_start}

    # ---- losses and likelihoods ----

    def training_losses(
        self,
        model: Model,
        x_start: th.Tensor,
        t: th.Tensor,
        model_kwargs: dict[str, Any] | None = None,
        noise: th.Tensor | None = None,
    ) -> dict[str, th.Tensor]:
        """
        Losses of one batch.

        :param x_start: an [N x C x ...] tensor of images in [-1, 1].
        :param t: an [N] int tensor of steps.
        :param noise: the standard normal noise to use, shaped as x_start; drawn if None.
        :return: "loss", [N]; for an MSE loss also "mse", before it is weighed, and "vb" where the variance is learned.
        """
        noise = th.randn_like(x_start) if noise is None else noise
        x_t = self.q_sample(x_start, t, noise)
        output = model(x_t, self.model_timesteps(t), **(model_kwargs or {}))
        if self.loss_type.is_vb():
            loss = self._bound(x_start, x_t, t, self._reverse(output, x_t, t, clip_denoised=False))
            return {"loss": loss * self.num_timesteps if self.loss_type == LossType.RESCALED_KL else loss}

        prediction = output[:, : x_start.shape[1]] if self.learns_variance else output
        mse = mean_flat((self._target(x_start, x_t, t, noise) - prediction) ** 2)
        loss = mse * self._table("mse_weights", t.device)[t]
        terms = {"mse": mse, "loss": loss}
        if self.learns_variance:
            # The bound trains the variance only; the prediction is left to the MSE, and so are the weights, which say
            # what its errors count.
            frozen = th.cat([prediction.detach(), output[:, x_start.shape[1] :]], dim=1)
            terms["vb"] = self._bound(x_start, x_t, t, self._reverse(frozen, x_t, t, clip_denoised=False))
            if self.loss_type == LossType.RESCALED_MSE:
                # Without this the bound would outweigh the MSE (Nichol and Dhariwal 2021, lambda = 0.001).
                terms["vb"] = terms["vb"] * (self.num_timesteps / 1000)
            terms["loss"] = loss + terms["vb"]
        return terms

    def min_snr_weights(self, gamma: float) -> np.ndarray:
        """
        Weights by which the square of an error of x_0 counts min(SNR, gamma) times, whatever the model predicts (Hang
        et al. 2023, section 3.4); SNR is alpha^2 / sigma^2.

        :return: [num_timesteps] float64; up to gamma where x_0 is predicted, up to 1 for noise and v.
        """
        snr = self.alphas_cumprod / (1 - self.alphas_cumprod)
        # How many times larger the error of the prediction is, squared, x_t being given.
        larger = {
            ModelMeanType.START_X: 1.0,
            ModelMeanType.EPSILON: snr,
            ModelMeanType.VELOCITY: snr + 1,
            ModelMeanType.PREVIOUS_X: self.posterior_mean_coef1**2,
        }
        return np.minimum(snr, gamma) / larger[self.model_mean_type]

    def _target(self, x_start: th.Tensor, x_t: th.Tensor, t: th.Tensor, noise: th.Tensor) -> th.Tensor:
        """What the model is to predict."""
        if self.model_mean_type == ModelMeanType.EPSILON:
            return noise
        if self.model_mean_type == ModelMeanType.START_X:
            return x_start
        if self.model_mean_type == ModelMeanType.VELOCITY:
            alpha, sigma = (self._at(f"sqrt_{name}alphas_cumprod", t, x_t) for name in ("", "one_minus_"))
            return alpha * noise - sigma * x_start
        return self.q_posterior_mean_variance(x_start, x_t, t)[0]

    def _bound(self, x_start: th.Tensor, x_t: th.Tensor, t: th.Tensor, p: dict[str, th.Tensor]) -> th.Tensor:
        """
        Terms of the variational bound (Ho et al. 2020, equation 5): the decoder's likelihood at t = 0, elsewhere the
        divergence of p from the posterior.

        :param p: what p_mean_variance gives for x_t.
        :return: [N], bits per dimension.
        """
        mean, _, log_variance = self.q_posterior_mean_variance(x_start, x_t, t)
        divergence = normal_kl(mean, log_variance, p["mean"], p["log_variance"])
        likelihood = discretized_gaussian_log_likelihood(x_start, means=p["mean"], log_scales=p["log_variance"] / 2)
        first = (t == 0).view(-1, *[1] * (x_start.dim() - 1))
        return mean_flat(th.where(first, -likelihood, divergence)) / math.log(2)

    @th.no_grad()
    def calc_bpd_loop(
        self,
        model: Model,
        x_start: th.Tensor,
        clip_denoised: bool = True,
        model_kwargs: dict[str, Any] | None = None,
    ) -> dict[str, th.Tensor]:
        """
        The whole variational bound, one model evaluation a step.

        :return: "total_bpd" and "prior_bpd", [N]; "vb", "xstart_mse" and "mse", [N x num_timesteps].
        """

        def terms(step: int) -> th.Tensor:
            t = th.full((len(x_start),), step, device=x_start.device)
            noise = th.randn_like(x_start)
            x_t = self.q_sample(x_start, t, noise)
            p = self.p_mean_variance(model, x_t, t, clip_denoised, model_kwargs=model_kwargs)
            eps = self._predict_eps_from_xstart(x_t, t, p["pred_xstart"])
            errors = (mean_flat((ours - true) ** 2) for ours, true in ((p["pred_xstart"], x_start), (eps, noise)))
            return th.stack([self._bound(x_start, x_t, t, p), *errors])

        falling = [terms(step) for step in reversed(range(self.num_timesteps))]
        vb, xstart_mse, mse = th.stack(falling[::-1], dim=2)
        # The term that no model can change: the divergence of q(x_T | x_0) from a standard normal.
        end = th.full((len(x_start),), self.num_timesteps - 1, device=x_start.device)
        mean, _, log_variance = self.q_mean_variance(x_start, end)
        prior = mean_flat(normal_kl(mean, log_variance, *th.zeros(2, device=x_start.device))) / math.log(2)
        return {
            "total_bpd": vb.sum(dim=1) + prior,
            "prior_bpd": prior,
            "vb": vb,
            "xstart_mse": xstart_mse,
            "mse": mse,
        }


def _last(steps: Iterator[dict[str, th.Tensor]]) -> th.Tensor:
    for step in steps:
        sample = step["sample"]
    return sample
