"""A diffusion process with discrete steps: its tables, the forward process q, and what a model's output says of the
reverse process p. Knows a model only as a callable, and nothing of what its condition means.

Sources: Ho et al. 2020 (DDPM), Nichol and Dhariwal 2021 (learned variance), Dhariwal and Nichol 2021 (steering)."""

import enum
from collections.abc import Callable
from typing import Any

import numpy as np
import torch as th

from .guidance import GuidedModel, Model
from .samplers import Denoised
from .schedules import Schedule

# Of a prediction of x_0 to another, shaped alike.
DenoisedFn = Callable[[th.Tensor], th.Tensor]
# See DiffusionProcess.denoise.
CondFn = Callable[..., th.Tensor]


class ModelMeanType(enum.Enum):
    """What the model predicts."""

    PREVIOUS_X = enum.auto()  # the mean of x_{t-1}
    START_X = enum.auto()  # x_0
    EPSILON = enum.auto()  # the noise
    VELOCITY = enum.auto()  # v = alpha eps - sigma x_0 (Salimans and Ho 2022)


class ModelVarType(enum.Enum):
    """Where the variance of the reverse process comes from."""

    LEARNED = enum.auto()  # the model's second half is its logarithm
    FIXED_SMALL = enum.auto()  # the posterior's
    FIXED_LARGE = enum.auto()  # beta
    LEARNED_RANGE = enum.auto()  # the second half interpolates between the logarithms of these two


class DiffusionProcess:
    """
    A diffusion process with discrete steps 0 ... num_timesteps - 1; images are [N x C x H x W] in [-1, 1].

    Models are callables (x_t, timesteps, **model_kwargs) -> [N x C or 2C x H x W]. In sampling, model_kwargs holds
    "y", the condition, and optionally "s", the guidance scale, and "null", the null condition, see GuidedModel; the
    U-Net takes modulations for both, which saves half of the time.

    :param betas: the schedule, each in (0, 1], 1-D.
    :param rescale_timesteps: show the model times scaled to 0 ... 1000, as floats.
    """

    def __init__(
        self,
        *,
        betas: np.ndarray,
        model_mean_type: ModelMeanType,
        model_var_type: ModelVarType,
        rescale_timesteps: bool = False,
    ) -> None:
        betas = np.asarray(betas, dtype=np.float64)
        if betas.ndim != 1 or not ((betas > 0) & (betas <= 1)).all():
            raise ValueError("betas must be one-dimensional and lie in (0, 1]")
        self.model_mean_type = model_mean_type
        self.model_var_type = model_var_type
        self.rescale_timesteps = rescale_timesteps
        self.num_timesteps = len(betas)
        self._device_tables: dict[tuple[str, th.device], th.Tensor] = {}  # so that a loop uploads each once

        alphas = 1 - betas
        self.betas = betas
        self.alphas_cumprod = np.cumprod(alphas)
        # The process the model was trained on, and which of its steps these are: all, but in a SpacedDiffusion.
        self.base_alphas_cumprod = self.alphas_cumprod
        self.original_num_steps = len(betas)
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
    def learns_variance(self) -> bool:
        """Whether the second half of the model's output is about the variance."""
        return self.model_var_type in (ModelVarType.LEARNED, ModelVarType.LEARNED_RANGE)

    def model_timesteps(self, t: th.Tensor) -> th.Tensor:
        """:return: the [N] times of the base process for [N] steps of this one, scaled to 0 ... 1000 if asked for."""
        times = self._table("timestep_map", t.device)[t]
        return times.float() * (1000 / self.original_num_steps) if self.rescale_timesteps else times

    def p_mean_variance(
        self,
        model: Model,
        x: th.Tensor,
        t: th.Tensor,
        clip_denoised: bool = True,
        denoised_fn: DenoisedFn | None = None,
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
        return self._reverse(output, x, t, clip_denoised, denoised_fn)

    def _reverse(
        self, output: th.Tensor, x: th.Tensor, t: th.Tensor, clip_denoised: bool, denoised_fn: DenoisedFn | None = None
    ) -> dict[str, th.Tensor]:
        """What p_mean_variance gives, from the model's output."""
        prediction, variance, log_variance = self._variance(output, x, t)
        pred_xstart = self._predict_xstart(x, t, prediction)
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
            prediction, values = output.split(x.shape[1], dim=1)
            if self.model_var_type == ModelVarType.LEARNED_RANGE:
                low = self._at("posterior_log_variance_clipped", t, x)
                high = self._at("log_betas", t, x)
                share = (values + 1) / 2  # the model's -1 ... 1 spans the range
                values = share * high + (1 - share) * low
            return prediction, values.exp(), values
        return output, self._at(variance, t, x), self._at(log_variance, t, x)

    def _predict_xstart(self, x_t: th.Tensor, t: th.Tensor, prediction: th.Tensor) -> th.Tensor:
        if self.model_mean_type == ModelMeanType.EPSILON:
            return self._predict_xstart_from_eps(x_t, t, prediction)
        if self.model_mean_type == ModelMeanType.VELOCITY:
            return self._predict_xstart_from_v(x_t, t, prediction)
        if self.model_mean_type == ModelMeanType.PREVIOUS_X:
            return self._predict_xstart_from_xprev(x_t, t, prediction)
        return prediction

    def _predict_xstart_from_eps(self, x_t: th.Tensor, t: th.Tensor, eps: th.Tensor) -> th.Tensor:
        return (
            self._at("sqrt_recip_alphas_cumprod", t, x_t) * x_t - self._at("sqrt_recipm1_alphas_cumprod", t, x_t) * eps
        )

    def _predict_xstart_from_v(self, x_t: th.Tensor, t: th.Tensor, v: th.Tensor) -> th.Tensor:
        return self._at("sqrt_alphas_cumprod", t, x_t) * x_t - self._at("sqrt_one_minus_alphas_cumprod", t, x_t) * v

    def _predict_xstart_from_xprev(self, x_t: th.Tensor, t: th.Tensor, xprev: th.Tensor) -> th.Tensor:
        coef1, coef2 = self._at("posterior_mean_coef1", t, x_t), self._at("posterior_mean_coef2", t, x_t)
        return (xprev - coef2 * x_t) / coef1

    def _predict_eps_from_xstart(self, x_t: th.Tensor, t: th.Tensor, pred_xstart: th.Tensor) -> th.Tensor:
        return (self._at("sqrt_recip_alphas_cumprod", t, x_t) * x_t - pred_xstart) / self._at(
            "sqrt_recipm1_alphas_cumprod", t, x_t
        )

    # ---- what samplers ask ----

    @property
    def schedule(self) -> Schedule:
        """The noise levels of this process's steps, from noise to image."""
        return Schedule.of(self.alphas_cumprod)

    def denoise(
        self,
        model: Model,
        x: th.Tensor,
        t: int | th.Tensor,
        clip_denoised: bool = True,
        denoised_fn: DenoisedFn | None = None,
        cond_fn: CondFn | None = None,
        model_kwargs: dict[str, Any] | None = None,
        steer_x_start: bool = False,
    ) -> Denoised:
        """
        Ask the model what a sampler needs to know.

        :param t: a step, or an [N] int tensor of steps; other parameters as p_mean_variance's.
        :param cond_fn: a callable (x_t, timesteps, **model_kwargs) -> the gradient at x_t of the log-probability to
            steer by, shaped as x_t (Dhariwal and Nichol 2021). It moves the mean of x_{t-1}, as their algorithm 1 does.
        :param steer_x_start: let it move the prediction of x_0 instead, as their algorithm 2, for DDIM, does.
        """
        t = t if th.is_tensor(t) else th.full((len(x),), t, device=x.device)
        out = self.p_mean_variance(model, x, t, clip_denoised, denoised_fn, model_kwargs)
        mean, x_start = out["mean"], out["pred_xstart"]
        if cond_fn is not None:
            gradient = cond_fn(x, self.model_timesteps(t), **(model_kwargs or {})).float()
            if steer_x_start:  # by sigma^2 / alpha, which is to move eps by sigma
                sigma, ratio = (
                    self._at("sqrt_one_minus_alphas_cumprod", t, x),
                    self._at("sqrt_recipm1_alphas_cumprod", t, x),
                )
                x_start = x_start + ratio * sigma * gradient
            else:
                mean = mean + out["variance"] * gradient
        return Denoised(x_start, mean, out["log_variance"])

    # ---- tables ----

    def _table(self, name: str, device: th.device) -> th.Tensor:
        """:return: an attribute of this process as a tensor; float64 becomes fp32."""
        if (name, device) not in self._device_tables:
            table = th.as_tensor(getattr(self, name))
            table = table.float() if table.is_floating_point() else table
            self._device_tables[name, device] = table.to(device, non_blocking=True)  # without a wait for its work
        return self._device_tables[name, device]

    def _at(self, table: str, t: th.Tensor, like: th.Tensor) -> th.Tensor:
        """:return: a table's values at [N] steps, [N x 1 x ...] with as many dimensions as `like`."""
        return self._table(table, t.device)[t].view(-1, *[1] * (like.dim() - 1))

    def _point(self, t: th.Tensor, like: th.Tensor, neighbour: str = "") -> tuple[th.Tensor, th.Tensor]:
        """:return: alpha and sigma at [N] steps, or at their neighbours "_prev" or "_next", as _at gives them."""
        level = self._at(f"alphas_cumprod{neighbour}", t, like)
        return level.sqrt(), (1 - level).sqrt()
