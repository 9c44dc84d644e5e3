"""Algorithm 1's losses, per sample and for every parameterization."""

from torch import Tensor

from .scheduler.scheduling_ddpm_paper import GaussianDiffusion


def simple_loss(
    diffusion: GaussianDiffusion,
    model_output: Tensor,
    x_start: Tensor,
    x_t: Tensor,
    t: Tensor,
    *,
    prediction_type: str,
    variance_type: str,
    noise: Tensor | None = None,
) -> Tensor:
    """L_simple (Eq. 14): the mean squared error of what the network predicts, per sample: [B].

    Targets: ε for `epsilon`, x_0 for `sample`, μ̃_t(x_t, x_0) (Eq. 7) for `previous_sample`, v for `v_prediction`.
    All tensors are [B, ...] float32, `t` [B] 0-based; for `epsilon` and `v_prediction` pass the `noise` that made x_t:
    recovered from x_t it is only good to 1e-5 at t = 0. Raises ValueError for a learned variance, about which L_simple
    says nothing (the paper's code refuses it too).
    """
    if variance_type == "learned":
        raise ValueError("L_simple does not train a learned variance; use fixed_small or fixed_large")
    if noise is None:
        noise = diffusion.predict_eps(x_start, x_t, t)
    if prediction_type == "epsilon":
        target = noise
    elif prediction_type == "sample":
        target = x_start
    elif prediction_type == "previous_sample":
        target = diffusion.q_posterior_mean_variance(x_start, x_t, t).mean
    elif prediction_type == "v_prediction":
        target = diffusion.velocity(x_start, t, noise)
    else:
        raise ValueError(f"prediction_type={prediction_type!r} is unknown")
    if model_output.shape != target.shape:
        raise ValueError(f"model_output has shape {tuple(model_output.shape)}, its target {tuple(target.shape)}")
    return (model_output - target).square().flatten(1).mean(dim=1)
