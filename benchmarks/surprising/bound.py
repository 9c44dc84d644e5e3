"""What surprises about the bound: its widths, its last steps, rounding, and what the loss says of it."""

import copy
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ddpm_hf import GaussianDiffusion
from ddpm_hf.data import to_model_range
from ddpm_hf.likelihood import bits_per_dim, discretized_log_likelihood_nats, gaussian_kl_nats, prior_bpd
from ddpm_hf.objectives import simple_loss
from ddpm_hf.short_chains import shortened

from .lab import FIRST, NUM_IMAGES, SECOND, Answers, Lab, bootstrapped, bound, bound_terms, estimate, x_start_mse

CHAIN_LENGTHS = (2, 4, 10, 25, 50, 100, 250, 500, 1000)
LAST_STEPS = 10
PAPER_RMSE, PAPER_DISTORTION = 0.95, 1.97  # published for CIFAR-10 (Section 4.3): of x̂_0 on [0, 255], L_0 in bits/dim


def width_mismatch_bpd(diffusion: GaussianDiffusion) -> float:
    """Σ KL(N(μ, β̃_t) ‖ N(μ, σ_t²)) over t ≥ 1, in bits/dim: what the widths cost a network whose means are perfect."""
    zero = torch.zeros(diffusion.num_timesteps - 1, dtype=torch.float64)
    true, own = (
        torch.tensor(table[1:]) for table in (diffusion.posterior_log_variance_clipped, diffusion.model_log_variance)
    )
    return gaussian_kl_nats(zero, true, zero, own).sum().item() / math.log(2)


def chains(lab: Lab) -> dict[str, Any]:
    """Of each network: bounds of chains by their number of steps, and what the last ten steps cost and save."""
    found: dict[str, Any] = {
        "num_images": {name: NUM_IMAGES[name]["test"] for name in (FIRST, SECOND)},
        "width_fixed_large": width_mismatch_bpd(lab.diffusion(variance_type="fixed_large")),
    }
    for name in (FIRST, SECOND):
        answers, own = lab.answers(name, "test"), {}
        mse = x_start_mse(lab.answers(name, "train"), lab.diffusion())
        for kind in ("fixed_large", "fixed_small"):
            own[kind] = estimate(bound(answers, lab.diffusion(variance_type=kind)))
        for num_levels in (17, 256):
            own[f"chosen_{num_levels}"] = {
                str(steps): estimate(bound(answers, chosen_chain(lab, mse, steps, num_levels), num_levels=num_levels))
                for steps in CHAIN_LENGTHS
            }
        own |= last_steps(answers, shortened(lab.scheduler(), mse).diffusion)
        found[name] = own
    return found


def chosen_chain(lab: Lab, mse: np.ndarray, steps: int, num_levels: int) -> GaussianDiffusion:
    return shortened(lab.scheduler(), mse, num_steps=steps, num_levels=num_levels).chain()


def last_steps(answers: Answers, fitted: GaussianDiffusion) -> dict[str, Any]:
    """What the steps from t = 10 down to 0 cost with fitted widths, and the part of L_0 that they save."""
    whole = bound_terms(answers, fitted)
    short = fitted.respaced(range(LAST_STEPS, fitted.num_timesteps))
    decoder = bound_terms(answers, short.respaced([0]))[:, 0]  # of the chain that ends at t = 10
    cost, saved = whole[:, 1 : LAST_STEPS + 1].sum(dim=1), decoder - whole[:, 0]
    return {"last_steps_cost": estimate(cost), "last_steps_save": estimate(saved)}


# ---- rounding x̂_0 --------------------------------------------------------------------------------------------------


def to_levels(x_start: Tensor) -> Tensor:
    """x̂_0 at the nearest of the digits' 17 levels."""
    return (x_start.clamp(-1, 1) * 8).round() / 8


def rounding(lab: Lab) -> dict[str, Any]:
    """The bound with x̂_0 rounded for t ≤ a limit that was chosen on training images; and L_0 at 256 levels."""
    diffusion = lab.diffusion(variance_type="fixed_large")
    own_log_variance = float(diffusion.posterior_log_variance_clipped[0])
    found: dict[str, Any] = {
        "floor_256": decoder_bpd(0.0, own_log_variance, 256),
        "floor_17": decoder_bpd(0.0, own_log_variance, 17),
        "sigma": math.exp(0.5 * own_log_variance) * 127.5,
        "paper_rmse": PAPER_RMSE,
        "paper_distortion": PAPER_DISTORTION,
        "of_rmse": decoder_bpd(PAPER_RMSE / 127.5, own_log_variance, 256),
        "of_rmse_best": best_decoder_bpd(PAPER_RMSE / 127.5, 256),
    }
    for name in (FIRST, SECOND):
        both = {}
        for split in ("train", "test"):
            answers = lab.answers(name, split)
            both[split] = [bound_terms(answers, diffusion, clip=clip) for clip in (True, to_levels)]
        plain, rounded = (terms.mean(dim=0).cumsum(dim=0) for terms in both["train"])
        limit = int((rounded - plain).argmin())  # round for t ≤ limit
        plain_nt, rounded_nt = both["test"]
        saved = (plain_nt - rounded_nt)[:, : limit + 1].sum(dim=1)
        answers = lab.answers(name, "test")
        total = prior_bpd(diffusion, answers.x_start) + plain_nt.sum(dim=1)
        everywhere = (plain_nt - rounded_nt).sum(dim=1)
        mse = x_start_mse(lab.answers(name, "train"), lab.diffusion())
        fitted = shortened(lab.scheduler(), mse).diffusion
        found[name] = {
            "limit": limit,
            "plain": estimate(total),
            "rounded": estimate(total - saved),
            "saved": estimate(saved),
            "saved_everywhere": estimate(everywhere),
            "decoder_256": estimate(bound_terms(answers, diffusion.respaced([0]), num_levels=256)[:, 0]),
            "decoder_256_fitted": estimate(bound_terms(answers, fitted.respaced([0]), num_levels=256)[:, 0]),
        }
    return found


def decoder_bpd(deviation: float, log_variance: float, num_levels: int) -> float:
    """E[L_0] at a level between the ends where x̂_0 is off by N(0, deviation²), in bits/dim."""
    z = torch.linspace(-8, 8, 2001, dtype=torch.float64)
    density = torch.exp(-0.5 * z.square()) / math.sqrt(2 * math.pi)
    nats = -discretized_log_likelihood_nats(torch.zeros_like(z), deviation * z, log_variance, num_levels=num_levels)
    return torch.trapezoid(density * nats, z).item() / math.log(2)


def best_decoder_bpd(deviation: float, num_levels: int) -> float:
    """The least of that over all widths of the decoder."""
    widths = np.geomspace(0.3, 3, 400) * deviation
    return min(decoder_bpd(deviation, 2 * math.log(width), num_levels) for width in widths)


# ---- the loss by t -------------------------------------------------------------------------------------------------


def loss_by_t(lab: Lab) -> dict[str, Any]:
    """How much of the variance of L_simple over (image, t, ε) is t's, its share below t = 50, and gradients by t."""
    found: dict[str, Any] = {}
    for name in (FIRST, SECOND):
        answers = lab.answers(name, "test")
        loss = np.stack([losses_at(answers, lab.diffusion(), t) for t in range(len(answers.outputs))])  # [T, N]

        def explained(rows: np.ndarray, loss: np.ndarray = loss) -> float:
            return float(loss[:, rows].mean(axis=1).var() / loss[:, rows].var())

        def early(rows: np.ndarray, loss: np.ndarray = loss) -> float:
            return float(loss[:50, rows].sum() / loss[:, rows].sum())

        own = {"explained_by_t": bootstrapped(explained, loss.shape[1])}
        own["share_below_50"] = bootstrapped(early, loss.shape[1])
        for size, count in ((1, 150), (128, 10)):
            low, high = (gradient_norms(lab, name, range(*ends), size, count) for ends in ((0, 10), (900, 1000)))
            own[f"gradient_ratio_{size}"] = ratio_of_rms(low["norms"], high["norms"])
            own["loss_ratio"] = float(np.mean(low["losses"]) / np.mean(high["losses"]))  # of the last, the most images
        found[name] = own
    return found


def losses_at(answers: Answers, diffusion: GaussianDiffusion, t: int) -> np.ndarray:
    noise, at = answers.noise(t), torch.full((len(answers.x_start),), t)
    x_t = diffusion.q_sample(answers.x_start, t, noise)
    return simple_loss(diffusion, answers.outputs[t].double(), answers.x_start, x_t, at, noise).numpy()


def gradient_norms(lab: Lab, name: str, times: range, size: int, count: int) -> dict[str, list[float]]:
    """Norms of the gradient of the mean loss of `size` images at uniform t of `times`, and these losses."""
    unet: Any = lab.pipes[name].unet
    generator, diffusion, images = torch.Generator().manual_seed(0), lab.diffusion(), lab.images("train").float()
    found: dict[str, list[float]] = {"norms": [], "losses": []}
    for first in range(0, size * count, size):
        x_start = images[first : first + size]
        t = times[0] + torch.randint(len(times), (len(x_start),), generator=generator)
        noise = torch.randn(x_start.shape, generator=generator)
        x_t = diffusion.q_sample(x_start, t, noise)
        loss = simple_loss(diffusion, unet(x_t, t).sample, x_start, x_t, t, noise).mean()
        gradients = torch.autograd.grad(loss, list(unet.parameters()))
        found["norms"].append(math.sqrt(sum(float(g.double().square().sum()) for g in gradients)))
        found["losses"].append(loss.item())
    return found


def ratio_of_rms(first: list[float], second: list[float]) -> dict[str, float]:
    a, b = (np.square(values) for values in (first, second))
    return bootstrapped(lambda rows: math.sqrt(a[rows].mean() / b[rows].mean()), len(a))


# ---- bfloat16 ------------------------------------------------------------------------------------------------------

SUBSET = 40  # terms of each image, the same for every precision


def half_precision(lab: Lab) -> dict[str, Any]:
    """What the bound loses where the network computes in bfloat16, in three ways, on the same x_t."""
    samples, scheduler = lab.splits["test"], lab.scheduler()
    x_start = to_model_range(samples.batch(range(len(samples))), samples.num_levels)
    found: dict[str, Any] = {}
    for name in (FIRST, SECOND):
        plain: Any = lab.pipes[name].unet
        ways: dict[str, Callable[[], Any]] = {
            "float32": lambda plain=plain: plain,
            "autocast": lambda plain=plain: Autocast(plain),
            "weights": lambda plain=plain: copy.deepcopy(plain).to(torch.bfloat16),
        }
        bounds = {}
        for way, make in ways.items():
            bounds[way] = bits_per_dim(
                make(), scheduler, x_start, seed=0, num_levels=samples.num_levels, num_timesteps_subset=SUBSET
            ).total_b
        found[name] = {way: estimate(own - bounds["float32"]) for way, own in bounds.items() if way != "float32"}
        found[name]["float32"] = estimate(bounds["float32"])
    return found


class Autocast(nn.Module):
    """A network that computes under autocast in bfloat16."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, unet: nn.Module):
        super().__init__()
        self.unet = unet

    def forward(self, x: Tensor, t: Tensor) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return SimpleNamespace(sample=self.unet(x, t).sample.float())
