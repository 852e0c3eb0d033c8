"""Gaussian diffusion: schedules, the forward process q, the learned reverse process p, losses, ancestral and DDIM
steps. Knows a model only as a callable, and nothing of what its condition means.

Sources: Ho et al. 2020 (DDPM), Nichol and Dhariwal 2021 (learned variance), Song et al. 2021 (DDIM)."""

import enum
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch as th
from tqdm.auto import tqdm

from .guidance import GuidedModel
from .losses import discretized_gaussian_log_likelihood, normal_kl
from .nn import mean_flat

Model = Callable[..., th.Tensor]
NoiseFn = Callable[[th.Tensor], th.Tensor]

NOISE_SCHEDULES = ("linear", "cosine")


def get_named_beta_schedule(schedule_name: str, num_diffusion_timesteps: int) -> np.ndarray:
    """
    Make a schedule by its flag's value.

    :param schedule_name: "linear" (Ho et al. 2020, stretched to the number of steps) or "cosine" (Nichol and
        Dhariwal 2021, equation 17).
    :param num_diffusion_timesteps: the number of steps.
    :return: a [num_diffusion_timesteps] float64 array of betas.
    """
    if schedule_name == "linear":
        stretch = 1000 / num_diffusion_timesteps
        if stretch * 0.02 >= 1:
            raise ValueError(
                f"--diffusion_steps {num_diffusion_timesteps} is too few for a linear schedule: give at least 21, or "
                "--noise_schedule cosine"
            )
        return np.linspace(stretch * 1e-4, stretch * 0.02, num_diffusion_timesteps, dtype=np.float64)
    if schedule_name == "cosine":
        return betas_for_alpha_bar(num_diffusion_timesteps, lambda u: math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2)
    raise ValueError(f"unknown --noise_schedule {schedule_name}: choose one of {', '.join(NOISE_SCHEDULES)}")


def betas_for_alpha_bar(
    num_diffusion_timesteps: int, alpha_bar: Callable[[float], float], max_beta: float = 0.999
) -> np.ndarray:
    """
    Discretise a continuous schedule.

    :param alpha_bar: the cumulative product of (1 - beta) as a function of time in [0, 1].
    :param max_beta: a cap, which keeps the last steps from being singular.
    """
    n = num_diffusion_timesteps
    levels = np.array([alpha_bar(i / n) for i in range(n + 1)])
    return np.minimum(1 - levels[1:] / levels[:-1], max_beta)


class ModelMeanType(enum.Enum):
    """What the model predicts."""

    PREVIOUS_X = enum.auto()  # the mean of x_{t-1}
    START_X = enum.auto()  # x_0
    EPSILON = enum.auto()  # the noise


class ModelVarType(enum.Enum):
    """Where the variance of the reverse process comes from."""

    LEARNED = enum.auto()  # the model's second half is its logarithm
    FIXED_SMALL = enum.auto()  # the posterior's
    FIXED_LARGE = enum.auto()  # beta
    LEARNED_RANGE = enum.auto()  # the second half interpolates between the logarithms of these two


class LossType(enum.Enum):
    """What is minimised."""

    MSE = enum.auto()  # of the prediction; plus the variational bound where the variance is learned
    RESCALED_MSE = enum.auto()  # the same with the bound's term estimating the sum over all steps
    KL = enum.auto()  # the variational bound
    RESCALED_KL = enum.auto()  # the same, estimating the sum over all steps

    def is_vb(self) -> bool:
        """Whether the loss is the variational bound itself."""
        return self in (LossType.KL, LossType.RESCALED_KL)


class GaussianDiffusion:
    """
    A diffusion process with discrete steps 0 ... num_timesteps - 1; images are [N x C x H x W] in [-1, 1].

    Models are callables (x_t, timesteps, **model_kwargs) -> [N x C or 2C x H x W]. In sampling, model_kwargs holds
    "y", the condition, and optionally "s", the guidance scale.

    :param betas: the schedule, each in (0, 1], 1-D.
    :param rescale_timesteps: show the model times scaled to 0 ... 1000, as floats.
    """

    def __init__(
        self,
        *,
        betas: np.ndarray,
        model_mean_type: ModelMeanType,
        model_var_type: ModelVarType,
        loss_type: LossType,
        rescale_timesteps: bool = False,
    ) -> None:
        betas = np.asarray(betas, dtype=np.float64)
        if betas.ndim != 1 or not ((betas > 0) & (betas <= 1)).all():
            raise ValueError("betas must be one-dimensional and lie in (0, 1]")
        self.model_mean_type = model_mean_type
        self.model_var_type = model_var_type
        self.loss_type = loss_type
        self.rescale_timesteps = rescale_timesteps
        self.num_timesteps = len(betas)
        self._device_tables: dict[tuple[str, th.device], th.Tensor] = {}

        alphas = 1 - betas
        self.betas = betas
        self.alphas_cumprod = np.cumprod(alphas)
        # The process the model was trained on, and which of its steps these are: all, but in a SpacedDiffusion.
        self.base_alphas_cumprod = self.alphas_cumprod
        self.timestep_map = list(range(len(betas)))
        self.alphas_cumprod_prev = np.append(1.0, self.alphas_cumprod[:-1])
        self.alphas_cumprod_next = np.append(self.alphas_cumprod[1:], 0.0)

        # q(x_t | x_0), and x_0 from x_t and eps
        self.sqrt_alphas_cumprod = np.sqrt(self.alphas_cumprod)
        self.sqrt_one_minus_alphas_cumprod = np.sqrt(1 - self.alphas_cumprod)
        self.log_one_minus_alphas_cumprod = np.log(1 - self.alphas_cumprod)
        self.sqrt_recip_alphas_cumprod = np.sqrt(1 / self.alphas_cumprod)
        self.sqrt_recipm1_alphas_cumprod = np.sqrt(1 / self.alphas_cumprod - 1)

        # q(x_{t-1} | x_t, x_0), Ho et al. 2020, equations 6 and 7
        self.posterior_variance = betas * (1 - self.alphas_cumprod_prev) / (1 - self.alphas_cumprod)
        # The first variance is zero; its logarithm is clipped to the second's.
        clipped = np.append(self.posterior_variance[1:2], self.posterior_variance[1:])
        self.posterior_log_variance_clipped = np.log(clipped if len(betas) > 1 else betas)
        self.posterior_mean_coef1 = betas * np.sqrt(self.alphas_cumprod_prev) / (1 - self.alphas_cumprod)
        self.posterior_mean_coef2 = (1 - self.alphas_cumprod_prev) * np.sqrt(alphas) / (1 - self.alphas_cumprod)

        self.log_betas = np.log(betas)
        # beta, but for the first step the posterior's second variance: a better decoder likelihood.
        self.fixed_large_variance = np.append(self.posterior_variance[1:2], betas[1:]) if len(betas) > 1 else betas
        self.log_fixed_large_variance = np.log(self.fixed_large_variance)

    # ---- the forward process ----

    def q_mean_variance(self, x_start: th.Tensor, t: th.Tensor) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        """
        Mean, variance and log-variance of q(x_t | x_0).

        :param x_start: an [N x C x ...] tensor of images.
        :param t: an [N] int tensor of steps; 0 means one step of noise.
        :return: three tensors that broadcast to x_start's shape.
        """
        mean = self._at("sqrt_alphas_cumprod", t, x_start) * x_start
        variance = self._at("sqrt_one_minus_alphas_cumprod", t, x_start) ** 2
        return mean, variance, self._at("log_one_minus_alphas_cumprod", t, x_start)

    def q_sample(self, x_start: th.Tensor, t: th.Tensor, noise: th.Tensor | None = None) -> th.Tensor:
        """
        Draw x_t from q(x_t | x_0).

        :param noise: the standard normal noise to use, shaped as x_start; drawn if None.
        """
        noise = th.randn_like(x_start) if noise is None else noise
        return (
            self._at("sqrt_alphas_cumprod", t, x_start) * x_start
            + self._at("sqrt_one_minus_alphas_cumprod", t, x_start) * noise
        )

    def q_posterior_mean_variance(
        self, x_start: th.Tensor, x_t: th.Tensor, t: th.Tensor
    ) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        """:return: mean, variance and clipped log-variance of q(x_{t-1} | x_t, x_0)."""
        mean = self._at("posterior_mean_coef1", t, x_t) * x_start + self._at("posterior_mean_coef2", t, x_t) * x_t
        variance = self._at("posterior_variance", t, x_t)
        return mean, variance, self._at("posterior_log_variance_clipped", t, x_t)

    # ---- the reverse process ----

    @property
    def time_scale(self) -> float:
        """What the model's timesteps are multiplied by: 1, or what brings them to 0 ... 1000."""
        return 1000 / self.num_timesteps if self.rescale_timesteps else 1

    def model_timesteps(self, t: th.Tensor) -> th.Tensor:
        """:return: the [N] times that the model is shown for [N] steps of this process."""
        return t.float() * self.time_scale if self.rescale_timesteps else t

    def split_output(self, output: th.Tensor, channels: int) -> tuple[th.Tensor, th.Tensor | None]:
        """
        Split a model's output.

        :param channels: the images' channels.
        :return: the prediction, and the variance values where these are learned.
        """
        if self.model_var_type in (ModelVarType.LEARNED, ModelVarType.LEARNED_RANGE):
            return output.split(channels, dim=1)
        return output, None

    def x_start_from(self, prediction: th.Tensor, x_t: th.Tensor, alpha: float, sigma: float) -> th.Tensor:
        """:return: x_0 by a model's prediction at x_t = alpha x_0 + sigma eps."""
        if self.model_mean_type == ModelMeanType.START_X:
            return prediction
        if self.model_mean_type == ModelMeanType.EPSILON:
            return (x_t - sigma * prediction) / alpha
        raise ValueError("a model that predicts x_{t-1} is bound to its own steps: use p_sample_loop")

    def p_mean_variance(
        self,
        model: Model,
        x: th.Tensor,
        t: th.Tensor,
        clip_denoised: bool = True,
        denoised_fn: Callable[[th.Tensor], th.Tensor] | None = None,
        model_kwargs: dict[str, Any] | None = None,
    ) -> dict[str, th.Tensor]:
        """
        Ask the model for p(x_{t-1} | x_t), and for x_0.

        :param x: x_t, an [N x C x ...] tensor.
        :param t: an [N] int tensor of steps.
        :param clip_denoised: clip the prediction of x_0 to [-1, 1].
        :param denoised_fn: applied to the prediction of x_0 before it is clipped.
        :param model_kwargs: passed to the model; "s" and "null", if there, make it a guided one, see GuidedModel.
        :return: "mean", "variance", "log_variance" of x_{t-1} and "pred_xstart", each shaped as x.
        """
        model_kwargs = dict(model_kwargs or {})
        if "s" in model_kwargs:
            model = GuidedModel(model, model_kwargs.pop("s"), model_kwargs.pop("null", None))
        output = model(x, self.model_timesteps(t), **model_kwargs)
        prediction, variance, log_variance = self._variance(output, x, t)

        if self.model_mean_type == ModelMeanType.EPSILON:
            pred_xstart = self._predict_xstart_from_eps(x, t, prediction)
        elif self.model_mean_type == ModelMeanType.START_X:
            pred_xstart = prediction
        else:
            pred_xstart = self._predict_xstart_from_xprev(x, t, prediction)
        if denoised_fn is not None:
            pred_xstart = denoised_fn(pred_xstart)
        if clip_denoised:
            pred_xstart = pred_xstart.clamp(-1, 1)
        if self.model_mean_type == ModelMeanType.PREVIOUS_X:
            mean = prediction
        else:
            mean, _, _ = self.q_posterior_mean_variance(pred_xstart, x, t)
        return {
            "mean": mean,
            "variance": variance.expand_as(x),
            "log_variance": log_variance.expand_as(x),
            "pred_xstart": pred_xstart,
        }

    def _variance(self, output: th.Tensor, x: th.Tensor, t: th.Tensor) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        """Split a model's output into its prediction and the variance and log-variance of the reverse step."""
        if self.model_var_type == ModelVarType.FIXED_LARGE:
            variance, log_variance = "fixed_large_variance", "log_fixed_large_variance"
        elif self.model_var_type == ModelVarType.FIXED_SMALL:
            variance, log_variance = "posterior_variance", "posterior_log_variance_clipped"
        else:
            prediction, values = self.split_output(output, x.shape[1])
            if self.model_var_type == ModelVarType.LEARNED_RANGE:
                low = self._at("posterior_log_variance_clipped", t, x)
                high = self._at("log_betas", t, x)
                share = (values + 1) / 2  # the model's -1 ... 1 spans the range
                values = share * high + (1 - share) * low
            return prediction, values.exp(), values
        return output, self._at(variance, t, x), self._at(log_variance, t, x)

    def _predict_xstart_from_eps(self, x_t: th.Tensor, t: th.Tensor, eps: th.Tensor) -> th.Tensor:
        return (
            self._at("sqrt_recip_alphas_cumprod", t, x_t) * x_t - self._at("sqrt_recipm1_alphas_cumprod", t, x_t) * eps
        )

    def _predict_xstart_from_xprev(self, x_t: th.Tensor, t: th.Tensor, xprev: th.Tensor) -> th.Tensor:
        coef1, coef2 = self._at("posterior_mean_coef1", t, x_t), self._at("posterior_mean_coef2", t, x_t)
        return (xprev - coef2 * x_t) / coef1

    def _predict_eps_from_xstart(self, x_t: th.Tensor, t: th.Tensor, pred_xstart: th.Tensor) -> th.Tensor:
        return (self._at("sqrt_recip_alphas_cumprod", t, x_t) * x_t - pred_xstart) / self._at(
            "sqrt_recipm1_alphas_cumprod", t, x_t
        )

    # ---- sampling ----

    def p_sample(
        self, model: Model, x: th.Tensor, t: th.Tensor, *, noise_fn: NoiseFn = th.randn_like, **options: Any
    ) -> dict[str, th.Tensor]:
        """
        Draw x_{t-1} from the model's p(x_{t-1} | x_t).

        :param noise_fn: gives standard normal noise shaped as its argument.
        :param options: see p_mean_variance; so are the other parameters.
        :return: "sample", shaped as x, and "pred_xstart".
        """
        out = self.p_mean_variance(model, x, t, **options)
        std = (0.5 * out["log_variance"]).exp() * self._not_first(t, x)
        return {"sample": out["mean"] + std * noise_fn(x), "pred_xstart": out["pred_xstart"]}

    def ddim_sample(
        self,
        model: Model,
        x: th.Tensor,
        t: th.Tensor,
        *,
        eta: float = 0.0,
        noise_fn: NoiseFn = th.randn_like,
        **options: Any,
    ) -> dict[str, th.Tensor]:
        """
        Take a DDIM step (Song et al. 2021, equation 12). Other parameters and result as p_sample's.

        :param eta: 0 is deterministic, 1 has the ancestral step's variance.
        """
        pred_xstart = self.p_mean_variance(model, x, t, **options)["pred_xstart"]
        eps = self._predict_eps_from_xstart(x, t, pred_xstart)
        alpha_bar = self._at("alphas_cumprod", t, x)
        alpha_bar_prev = self._at("alphas_cumprod_prev", t, x)
        sigma = eta * ((1 - alpha_bar_prev) / (1 - alpha_bar) * (1 - alpha_bar / alpha_bar_prev)).sqrt()
        sample = pred_xstart * alpha_bar_prev.sqrt() + (1 - alpha_bar_prev - sigma**2).sqrt() * eps
        if eta > 0:
            sample = sample + sigma * self._not_first(t, x) * noise_fn(x)
        return {"sample": sample, "pred_xstart": pred_xstart}

    def ddim_reverse_sample(self, model: Model, x: th.Tensor, t: th.Tensor, **options: Any) -> dict[str, th.Tensor]:
        """Take the deterministic DDIM step the other way, from x_t to x_{t+1}. Parameters as p_sample's."""
        pred_xstart = self.p_mean_variance(model, x, t, **options)["pred_xstart"]
        eps = self._predict_eps_from_xstart(x, t, pred_xstart)
        alpha_bar_next = self._at("alphas_cumprod_next", t, x)
        sample = pred_xstart * alpha_bar_next.sqrt() + (1 - alpha_bar_next).sqrt() * eps
        return {"sample": sample, "pred_xstart": pred_xstart}

    def p_sample_loop(self, model: Model, shape: Sequence[int], **options: Any) -> th.Tensor:
        """Run the whole ancestral chain; parameters as p_sample_loop_progressive's. :return: the last sample."""
        return _last(self.p_sample_loop_progressive(model, shape, **options))["sample"]

    def p_sample_loop_progressive(self, model: Model, shape: Sequence[int], **options: Any) -> Iterator[dict]:
        """
        Run the ancestral chain, step by step.

        :param options: those of _loop and p_sample.
        :return: an iterator over what p_sample returns.
        """
        return self._loop(self.p_sample, model, shape, **options)

    def ddim_sample_loop(self, model: Model, shape: Sequence[int], **options: Any) -> th.Tensor:
        """Run the whole DDIM chain; parameters as ddim_sample_loop_progressive's. :return: the last sample."""
        return _last(self.ddim_sample_loop_progressive(model, shape, **options))["sample"]

    def ddim_sample_loop_progressive(self, model: Model, shape: Sequence[int], **options: Any) -> Iterator[dict]:
        """
        Run the DDIM chain, step by step.

        :param options: those of _loop and ddim_sample.
        :return: an iterator over what ddim_sample returns.
        """
        return self._loop(self.ddim_sample, model, shape, **options)

    @th.no_grad()
    def _loop(
        self,
        step: Callable[..., dict[str, th.Tensor]],
        model: Model,
        shape: Sequence[int],
        *,
        noise: th.Tensor | None = None,
        device: th.device | str | None = None,
        progress: bool = False,
        noise_fn: NoiseFn = th.randn_like,
        **options: Any,
    ) -> Iterator[dict[str, th.Tensor]]:
        """
        Walk from noise to image.

        :param step: p_sample or ddim_sample.
        :param shape: the samples' shape, (N, C, H, W).
        :param noise: x_T, shaped as the samples; drawn by noise_fn if None.
        :param device: where to sample; the noise's or the model's own device if None.
        :param progress: show a bar.
        :param options: passed to the step.
        """
        if device is None:
            device = noise.device if noise is not None else next(model.parameters()).device
        x = noise_fn(th.empty(tuple(shape), device=device)) if noise is None else noise.to(device)
        steps = range(self.num_timesteps - 1, -1, -1)
        for i in tqdm(steps, disable=not progress, unit="step", leave=False):
            t = th.full((len(x),), i, device=device)
            out = step(model, x, t, noise_fn=noise_fn, **options)
            yield out
            x = out["sample"]

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
        :return: "loss", [N]; for an MSE loss also "mse", and "vb" where the variance is learned.
        """
        model_kwargs = model_kwargs or {}
        noise = th.randn_like(x_start) if noise is None else noise
        x_t = self.q_sample(x_start, t, noise)
        if self.loss_type.is_vb():
            loss = self._vb_terms_bpd(model, x_start, x_t, t, clip_denoised=False, model_kwargs=model_kwargs)["output"]
            return {"loss": loss * self.num_timesteps if self.loss_type == LossType.RESCALED_KL else loss}

        output = model(x_t, self.model_timesteps(t), **model_kwargs)
        terms = {}
        prediction, values = self.split_output(output, x_start.shape[1])
        if values is not None:
            # The bound trains the variance only; the prediction is left to the MSE.
            frozen = th.cat([prediction.detach(), values], dim=1)
            vb = self._vb_terms_bpd(lambda *_, **__: frozen, x_start, x_t, t, clip_denoised=False)["output"]
            # Without this the bound would outweigh the MSE (Nichol and Dhariwal 2021, lambda = 0.001).
            terms["vb"] = vb * (self.num_timesteps / 1000) if self.loss_type == LossType.RESCALED_MSE else vb
        if self.model_mean_type == ModelMeanType.EPSILON:
            target = noise
        elif self.model_mean_type == ModelMeanType.START_X:
            target = x_start
        else:
            target, _, _ = self.q_posterior_mean_variance(x_start, x_t, t)
        terms["mse"] = mean_flat((target - prediction) ** 2)
        terms["loss"] = terms["mse"] + terms["vb"] if "vb" in terms else terms["mse"]
        return terms

    def _vb_terms_bpd(
        self, model: Model, x_start: th.Tensor, x_t: th.Tensor, t: th.Tensor, **options: Any
    ) -> dict[str, th.Tensor]:
        """
        One term of the variational bound: the decoder's likelihood at t = 0, else the KL to the posterior.

        :return: "output", [N], bits per dimension; "pred_xstart", shaped as x_start.
        """
        true_mean, _, true_log_variance = self.q_posterior_mean_variance(x_start, x_t, t)
        out = self.p_mean_variance(model, x_t, t, **options)
        kl = normal_kl(true_mean, true_log_variance, out["mean"], out["log_variance"])
        decoder_nll = -discretized_gaussian_log_likelihood(
            x_start, means=out["mean"], log_scales=0.5 * out["log_variance"]
        )
        nats = th.where(t == 0, mean_flat(decoder_nll), mean_flat(kl))
        return {"output": nats / math.log(2), "pred_xstart": out["pred_xstart"]}

    def _prior_bpd(self, x_start: th.Tensor) -> th.Tensor:
        """:return: [N], the bound's term that no model can change: KL of q(x_T | x_0) from a standard normal."""
        t = th.full((x_start.shape[0],), self.num_timesteps - 1, device=x_start.device)
        mean, _, log_variance = self.q_mean_variance(x_start, t)
        zero = th.zeros((), device=x_start.device)
        return mean_flat(normal_kl(mean, log_variance, zero, zero)) / math.log(2)

    @th.no_grad()
    def calc_bpd_loop(
        self, model: Model, x_start: th.Tensor, *, noise_fn: NoiseFn = th.randn_like, **options: Any
    ) -> dict[str, th.Tensor]:
        """
        The whole variational bound, one model evaluation a step.

        :param options: see p_mean_variance.
        :return: "total_bpd" and "prior_bpd", [N]; "vb", "xstart_mse" and "mse", [N x num_timesteps].
        """
        vb, xstart_mse, mse = [], [], []
        for i in reversed(range(self.num_timesteps)):
            t = th.full((x_start.shape[0],), i, device=x_start.device)
            noise = noise_fn(x_start)
            x_t = self.q_sample(x_start, t, noise)
            out = self._vb_terms_bpd(model, x_start, x_t, t, **options)
            eps = self._predict_eps_from_xstart(x_t, t, out["pred_xstart"])
            vb.append(out["output"])
            xstart_mse.append(mean_flat((out["pred_xstart"] - x_start) ** 2))
            mse.append(mean_flat((eps - noise) ** 2))
        prior_bpd = self._prior_bpd(x_start)
        vb = th.stack(vb[::-1], dim=1)
        return {
            "total_bpd": vb.sum(dim=1) + prior_bpd,
            "prior_bpd": prior_bpd,
            "vb": vb,
            "xstart_mse": th.stack(xstart_mse[::-1], dim=1),
            "mse": th.stack(mse[::-1], dim=1),
        }

    # ---- tables ----

    def _at(self, table: str, t: th.Tensor, like: th.Tensor) -> th.Tensor:
        """
        Look a float64 table of this process up as fp32, shaped to broadcast.

        :param table: the attribute's name; its copy on t's device is kept, so that a loop uploads it once.
        :return: an [N x 1 x ...] fp32 tensor with as many dimensions as `like`.
        """
        key = (table, t.device)
        if key not in self._device_tables:
            self._device_tables[key] = th.from_numpy(getattr(self, table)).float().to(t.device)
        return self._device_tables[key][t].view(-1, *[1] * (like.dim() - 1))

    @staticmethod
    def _not_first(t: th.Tensor, like: th.Tensor) -> th.Tensor:
        """[N x 1 x ...], 0 where t is 0, since the last step of sampling adds no noise; else 1."""
        return (t != 0).to(like.dtype).view(-1, *[1] * (like.dim() - 1))


def _last(iterator: Iterator[dict[str, th.Tensor]]) -> dict[str, th.Tensor]:
    for item in iterator:
        last = item
    return last
