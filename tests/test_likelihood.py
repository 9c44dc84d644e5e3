"""The bound: its terms against the paper's code and laws; of a model; a subset of them; rate and distortion."""

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DModel
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from ddpm_hf import DDPMPaperScheduler, GaussianDiffusion
from ddpm_hf.convert import from_stock
from ddpm_hf.likelihood import (
    BoundTerms,
    _drawn_timesteps,
    bits_per_dim,
    discretized_log_likelihood_nats,
    gaussian_kl_nats,
    prior_bpd,
    rate_distortion,
    vb_terms_bpd,
)
from ddpm_hf.randomness import keyed_generator
from ddpm_hf.scheduler import paper_scheduler

PAPER = GaussianDiffusion(np.linspace(1e-4, 0.02, 1000))
PREDICTION_TYPES = {"eps": "epsilon", "xstart": "sample", "xprev": "previous_sample"}
VARIANCE_TYPES = {"fixedsmall": "fixed_small", "fixedlarge": "fixed_large", "learned": "learned"}
DTYPES = [torch.float32, torch.float64]


def levels(num_levels: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.linspace(-1, 1, num_levels, dtype=torch.float64).to(dtype)


def images(num: int, *, num_levels: int = 256, shape: tuple[int, ...] = (3, 8, 8)) -> Tensor:
    """Random images of so many levels, float32 [num, *shape] in [−1, 1]."""
    drawn = torch.randint(num_levels, (num, *shape), generator=torch.Generator().manual_seed(num_levels))
    return (drawn / (num_levels - 1) * 2 - 1).float()


# ---- the paper's code: recorded numbers ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("variance", VARIANCE_TYPES)
@pytest.mark.parametrize("parameterization", PREDICTION_TYPES)
def test_terms_equal_the_papers(golden, parameterization, variance, clip, dtype):
    """KL to 1e-6 + 1e-5 of the value, the rounding of the recording; its decoder has a tanh in place of the erf."""
    model_output = golden.nchw(f"model_output/{parameterization}")
    if variance == "learned":
        model_output = torch.cat([model_output, golden.nchw("model_log_variance_learned")], dim=1)
    diffusion = GaussianDiffusion(PAPER.betas, PREDICTION_TYPES[parameterization], VARIANCE_TYPES[variance])
    terms = vb_terms_bpd(
        diffusion,
        model_output.to(dtype),
        golden.nchw("in/x0").to(dtype),
        golden.nchw("in/x_t").to(dtype),
        torch.from_numpy(golden["in/t"]),
        clip_denoised=clip,
    )
    assert terms.dtype == dtype
    recorded = torch.from_numpy(golden[f"p/{parameterization}/{variance}/clip{clip:d}/vb_bpd"]).double()
    assert golden["in/t"].tolist().index(0) == 0 and (golden["in/t"][1:] > 0).all()
    torch.testing.assert_close(terms[1:].double(), recorded[1:], rtol=1e-5, atol=1e-6)
    if parameterization == "xstart" and variance != "learned":
        assert terms[0] > recorded[0]  # which stands on its floor of 1e-12 in every bin
    else:
        assert abs(terms[0].item() - recorded[0].item()) < 1e-2


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_prior_equals_the_papers(golden, dtype):
    """To 2e-4: the recording's own float32 is 1e-4 from the exact value."""
    ours = prior_bpd(PAPER, golden.nchw("in/x0").to(dtype))
    torch.testing.assert_close(ours.double(), torch.from_numpy(golden["prior_bpd"]).double(), rtol=2e-4, atol=0)


# ---- Gaussian divergence and the terms -----------------------------------------------------------------------------


def test_gaussian_kl_equals_torchs():
    generator = torch.Generator().manual_seed(0)
    mean1, log_variance1, mean2, log_variance2 = (
        3 * torch.randn(1000, generator=generator, dtype=torch.float64) for _ in range(4)
    )
    ours = gaussian_kl_nats(mean1, log_variance1, mean2, log_variance2)
    p, q = (Normal(m, (0.5 * v).exp()) for m, v in ((mean1, log_variance1), (mean2, log_variance2)))
    torch.testing.assert_close(ours, kl_divergence(p, q), rtol=1e-11, atol=1e-11)
    by_float = gaussian_kl_nats(mean1, -1.5, mean2, 0.25)
    assert torch.equal(by_float, gaussian_kl_nats(mean1, torch.tensor(-1.5).double(), mean2, torch.full((1,), 0.25)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_gaussian_kl_is_zero_for_equals_and_positive_near_them(dtype):
    """For variances in the ratio e^r it is r²/4 − …, also where r² is far below the rounding of e^r."""
    log_variance = torch.linspace(-12, 2, 1001, dtype=dtype)
    assert torch.equal(gaussian_kl_nats(log_variance, log_variance, log_variance, log_variance), 0 * log_variance)
    zero = torch.zeros_like(log_variance)
    for ratio in (1e-3, -1e-3, 1e-2, -1e-2):
        kl = gaussian_kl_nats(zero, 0.0, zero, ratio)
        rounding = torch.finfo(dtype).eps / abs(ratio)
        assert kl[0].item() == pytest.approx(0.5 * (ratio + math.expm1(-ratio)), rel=4 * rounding)
    for exponent in range(-9, 1):
        for ratio in (10**exponent, -(10**exponent)):
            assert (gaussian_kl_nats(zero, log_variance, zero, log_variance + ratio) >= 0).all()


def test_the_prior_is_the_divergence_of_x_T_from_noise():
    """½ (ᾱ_T E[x²] − ᾱ_T − ln(1 − ᾱ_T)) nats; 7–9e-6 bits/dim for the usual images."""
    x_start = images(4).double()
    alpha = PAPER.alphas_cumprod[-1]
    expected = 0.5 * (alpha * x_start.square().mean(dim=(1, 2, 3)) - alpha - math.log1p(-alpha)) / math.log(2)
    torch.testing.assert_close(prior_bpd(PAPER, x_start), expected, rtol=1e-10, atol=0)
    assert prior_bpd(PAPER, torch.full((1, 4), math.sqrt(0.275))).item() == pytest.approx(8e-6, rel=0.1)


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large"])
def test_a_perfect_network_pays_for_the_variance_alone(variance_type):
    """KL 0 with the posterior's own variance, ½ (β̃/β − 1 − ln(β̃/β)) with β: at every t, to float64's rounding."""
    t = torch.arange(1, 1000)
    x_start, noise = (torch.randn(999, 6, generator=torch.Generator().manual_seed(s)).double() for s in (0, 1))
    x_start = x_start.clamp(-1, 1)
    diffusion = GaussianDiffusion(PAPER.betas, "epsilon", variance_type)
    terms = vb_terms_bpd(diffusion, noise, x_start, PAPER.q_sample(x_start, t, noise), t)
    ratio = torch.from_numpy(PAPER.posterior_variance / PAPER.betas)[1:]
    nats = 0 * ratio if variance_type == "fixed_small" else 0.5 * (ratio - 1 - ratio.log())
    torch.testing.assert_close(terms, nats / math.log(2), rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("num_levels", [17, 256, None])
def test_the_first_term_is_the_decoder_of_that_many_levels(num_levels):
    x_start = images(2, num_levels=num_levels or 256).double()
    x_t = x_start + 0.01 * torch.randn(x_start.shape, generator=torch.Generator().manual_seed(0)).double()
    t = torch.tensor([0, 0])
    diffusion = GaussianDiffusion(PAPER.betas, "sample", "fixed_large")
    terms = vb_terms_bpd(diffusion, x_t, x_start, x_t, t, clip_denoised=False, num_levels=num_levels)
    log_variance = diffusion.model_log_variance[0]  # type: ignore[index]
    nats = discretized_log_likelihood_nats(x_start, x_t, log_variance, num_levels=num_levels)
    torch.testing.assert_close(terms, -nats.mean(dim=(1, 2, 3)) / math.log(2), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("device_of_t", ["meta", "cpu"])
def test_times_may_be_on_another_device_than_the_samples(device_of_t):
    """As in all of GaussianDiffusion, and as bits_per_dim asks; `meta` stands for an accelerator."""
    x, t = torch.zeros(4, 3, 2, 2, device="meta"), torch.tensor([0, 1, 500, 999], device=device_of_t)
    terms = vb_terms_bpd(PAPER, x, x, x, t)
    assert terms.shape == (4,) and terms.device.type == "meta"


# ---- the bound of a model ------------------------------------------------------------------------------------------


class Elementwise(nn.Module):
    """ε = 0.3 x + 0.01 t in float32, and a log-variance where asked for one; no kernel depends on the batch."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, *, learned: bool = False):
        super().__init__()
        self.learned = learned
        self.calls: list[SimpleNamespace] = []

    def forward(self, sample: Tensor, timestep: Tensor) -> SimpleNamespace:
        self.calls.append(SimpleNamespace(sample=sample, timestep=timestep, training=self.training))
        output = 0.3 * sample + 0.01 * timestep.view(-1, *(1,) * (sample.ndim - 1)).to(sample.dtype)
        return SimpleNamespace(sample=torch.cat([output, -4 + 0.1 * sample], dim=1) if self.learned else output)


def direct_bound(unet, scheduler, chain: GaussianDiffusion, x_start: Tensor, *, seed: int, **options) -> BoundTerms:
    """bits_per_dim by its definition: one sample and one t at a time, noise keyed (seed, training time, index)."""
    x_start = x_start.double()
    terms, mse = (torch.zeros(len(x_start), chain.num_timesteps, dtype=torch.float64) for _ in range(2))
    clip = options.get("clip_denoised", True)
    for b, x in enumerate(x_start[:, None]):
        for t, time in enumerate(chain.timesteps.tolist()):
            drawn = keyed_generator(seed, "bound", time, b).standard_normal(tuple(x.shape[1:]))
            at = torch.tensor([t])
            x_t = chain.q_sample(x, at, torch.from_numpy(drawn)[None])
            with torch.no_grad():
                output = unet(x_t.float(), torch.tensor([time])).sample.double()
            terms[b, t] = vb_terms_bpd(chain, output, x, x_t, at, **options)[0]
            predicted = chain.p_mean_variance(output, x_t, at, clip_denoised=clip).x_start
            mse[b, t] = (predicted - x).square().mean()
    prior = prior_bpd(chain, x_start)
    return BoundTerms(prior + terms.sum(dim=1), prior, terms, mse)


@pytest.mark.parametrize("clip_denoised", [True, False])
@pytest.mark.parametrize(
    ("num_inference_steps", "variance_type"),
    [(None, "fixed_small"), (None, "fixed_large"), (None, "learned"), (4, "fixed_small"), (4, "fixed_large")],
)
def test_the_bound_is_the_sum_of_its_terms(tiny_scheduler, num_inference_steps, variance_type, clip_denoised):
    """Also of a respaced chain made by hand. To 1e-12: after the network's float32, all is float64."""
    scheduler, x_start = tiny_scheduler(variance_type=variance_type), images(5, num_levels=17, shape=(1, 4, 4))
    unet = Elementwise(learned=variance_type == "learned")
    options: Any = {"seed": 3, "num_levels": 17, "clip_denoised": clip_denoised}
    ours = bits_per_dim(unet, scheduler, x_start, num_inference_steps=num_inference_steps, **options)
    times = range(10) if num_inference_steps is None else [0, 2, 4, 6]
    chain = GaussianDiffusion(np.linspace(0.01, 0.6, 10), "epsilon", variance_type).respaced(times)
    expected = direct_bound(unet, scheduler, chain, x_start, **options)
    for field, value in ours._asdict().items():
        assert value.dtype == torch.float64 and value.device.type == "cpu"
        torch.testing.assert_close(value, getattr(expected, field), rtol=1e-12, atol=1e-12, msg=field)
    torch.testing.assert_close(ours.total_b, ours.prior_b + ours.terms_bt.sum(dim=1), rtol=1e-15, atol=0)
    assert ours.terms_bt.shape == ours.x_start_mse_bt.shape == (5, len(times))
    assert not torch.equal(ours.terms_bt, bits_per_dim(unet, scheduler, x_start, **{**options, "seed": 4}).terms_bt)


@pytest.mark.parametrize("num_inference_steps", [None, 4])
@pytest.mark.parametrize("clip_denoised", [True, False])
def test_rounding_changes_the_early_terms_alone(tiny_scheduler, clip_denoised, num_inference_steps):
    """Below `round_below` terms are those with x̂_0 rounded everywhere, from there on those without rounding."""
    scheduler = tiny_scheduler(variance_type="fixed_large")
    x_start = images(5, num_levels=17)
    options: Any = {"seed": 3, "num_levels": 17, "num_inference_steps": num_inference_steps, "batch_size": 7}

    def nearest(x: Tensor) -> Tensor:
        grid = levels(17)
        return grid[(x[..., None] - grid).abs().argmin(dim=-1)]

    def found(clip: Any, below: int) -> BoundTerms:
        return bits_per_dim(Elementwise(), scheduler, x_start, clip_denoised=clip, round_below=below, **options)

    plain, everywhere = found(clip_denoised, 0), found(nearest, 0)
    some, all_of_it = found(clip_denoised, 5), found(clip_denoised, 10)
    early = torch.from_numpy(scheduler.chain(num_inference_steps).timesteps < 5)
    assert early.any() and not early.all()
    assert torch.equal(some.terms_bt[:, ~early], plain.terms_bt[:, ~early])
    assert torch.allclose(some.terms_bt[:, early], everywhere.terms_bt[:, early], rtol=1e-9, atol=0)
    assert torch.allclose(all_of_it.terms_bt, everywhere.terms_bt, rtol=1e-9, atol=0)
    assert not torch.allclose(some.terms_bt[:, early], plain.terms_bt[:, early], rtol=1e-3)


def test_rounding_makes_a_bound_of_coarse_levels_lower(tiny_scheduler):
    """A network that is off by less than half a level is right once it is rounded: only the widths still cost."""
    scheduler, x_start = tiny_scheduler(variance_type="fixed_small"), images(3, num_levels=5)

    class NearlyRight(nn.Module):
        def forward(self, x: Tensor, t: Tensor) -> Any:
            true = x_start[torch.arange(len(x)) % len(x_start)].double()
            return SimpleNamespace(sample=scheduler.diffusion.predict_eps(true + 0.2, x.double(), t))

    options: Any = {"seed": 0, "num_levels": 5, "batch_size": 3, "clip_denoised": False}
    plain, rounded = (bits_per_dim(NearlyRight(), scheduler, x_start, round_below=n, **options) for n in (0, 10))
    assert (plain.terms_bt > 1e-4).all() and (rounded.terms_bt[:, 1:].abs() < 1e-9).all()


def test_an_images_bound_depends_on_neither_its_batch_nor_its_company(tiny_unet, tiny_scheduler):
    """Bit for bit where the network is elementwise; a UNet's kernels differ by 1e-6 between batch sizes."""
    scheduler, x_start = tiny_scheduler(), images(7)
    for unet, tolerance, subset in ((Elementwise(), 0.0, None), (Elementwise(), 0.0, 3), (tiny_unet(), 1e-4, None)):
        options: Any = {"seed": 0, "num_timesteps_subset": subset}
        whole = bits_per_dim(unet, scheduler, x_start, **options)
        for batch_size, part in ((1, slice(2, 4)), (16, slice(0, 7)), (7, slice(3, 7))):
            terms = bits_per_dim(
                unet, scheduler, x_start[part], batch_size=batch_size, first_index=part.start, **options
            )
            for field, value in terms._asdict().items():
                torch.testing.assert_close(value, getattr(whole, field)[part], rtol=tolerance, atol=tolerance)


def test_the_network_is_asked_for_at_most_a_batch_in_its_own_precision(tiny_scheduler):
    unet = Elementwise()
    unet.dtype = torch.bfloat16
    bits_per_dim(unet, tiny_scheduler(), images(3), seed=0, batch_size=4)
    assert [len(call.sample) for call in unet.calls] == [4] * 7 + [2]
    assert {call.sample.dtype for call in unet.calls} == {torch.bfloat16}
    assert torch.cat([call.timestep for call in unet.calls]).tolist() == np.repeat(np.arange(10), 3).tolist()


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "previous_sample", "v_prediction"])
def test_learned_variances_of_a_unet(tiny_unet, tiny_scheduler, prediction_type):
    scheduler = tiny_scheduler(variance_type="learned", prediction_type=prediction_type)
    unet, x_start = tiny_unet(out_channels=6), images(2)
    ours = bits_per_dim(unet, scheduler, x_start, seed=0)
    expected = direct_bound(unet, scheduler, scheduler.diffusion, x_start, seed=0)
    torch.testing.assert_close(ours.terms_bt, expected.terms_bt, rtol=1e-4, atol=1e-5)  # kernels of other batch sizes


def test_points(tiny_mlp, tiny_scheduler):
    """Outside [−1, 1] too, where the decoder is a density."""
    x_start = 2 * torch.randn(6, 2, generator=torch.Generator().manual_seed(0))
    scheduler, unet = tiny_scheduler(), tiny_mlp()
    options: Any = {"seed": 0, "num_levels": None, "clip_denoised": False}
    ours = bits_per_dim(unet, scheduler, x_start, **options)
    expected = direct_bound(unet, scheduler, scheduler.diffusion, x_start, **options)
    torch.testing.assert_close(ours.terms_bt, expected.terms_bt, rtol=1e-4, atol=1e-5)


def test_stock_networks_and_schedulers_have_the_bound_of_ours():
    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    torch.manual_seed(0)
    one_head = {"attention_head_dim": None, "norm_eps": 1e-6, "downsample_padding": 0, "flip_sin_to_cos": False}
    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        freq_shift=1,
        **blocks,
        **one_head,
    ).eval()
    process = {"num_train_timesteps": 10, "beta_start": 0.01, "beta_end": 0.6}
    stock = bits_per_dim(unet, DDPMScheduler(variance_type="fixed_large", **process), images(2), seed=0)
    ours = bits_per_dim(
        from_stock(unet), DDPMPaperScheduler(variance_type="fixed_large", **process), images(2), seed=0
    )
    torch.testing.assert_close(stock.terms_bt, ours.terms_bt, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(stock.prior_b, ours.prior_b, rtol=1e-12, atol=0)
    ddim = bits_per_dim(unet, DDIMScheduler(**process), images(2), seed=0)  # no variance of its own: fixed_small
    small = bits_per_dim(unet, DDPMScheduler(variance_type="fixed_small", **process), images(2), seed=0)
    assert torch.equal(ddim.terms_bt, small.terms_bt)


def test_stocks_learned_variance_is_refused():
    """To stock it is a variance, to us a logarithm; a configuration in memory does not say whose it is."""
    with pytest.raises(ValueError, match="learned"):
        paper_scheduler(DDPMScheduler(variance_type="learned"))


def test_the_network_is_in_eval_mode_and_then_as_it_was(tiny_scheduler):
    unet = Elementwise()
    for mode in (True, False):
        bits_per_dim(unet.train(mode), tiny_scheduler(), images(1), seed=0)
        assert unet.training is mode
    assert not any(call.training for call in unet.calls)
    unet.train()

    def fail(module, inputs):
        raise RuntimeError("out of memory")

    unet.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        bits_per_dim(unet, tiny_scheduler(), images(1), seed=0)
    assert unet.training


# ---- a subset of the terms -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("subset", [1, 3, 4, 7, 10])
def test_a_subset_has_one_weighted_term_of_each_range(tiny_scheduler, subset):
    """An entry is 0 or the whole bound's times its range's length; each sample draws for itself.

    From two terms on the first range is L_0 alone, which may outweigh all others.
    """
    x_start, unet = images(12), Elementwise()
    whole = bits_per_dim(unet, tiny_scheduler(), x_start, seed=5)
    some = bits_per_dim(unet, tiny_scheduler(), x_start, seed=5, num_timesteps_subset=subset, batch_size=5)
    edges = {1: [0, 10], 3: [0, 1, 3, 10], 4: [0, 1, 2, 4, 10], 7: [0, 1, 2, 3, 4, 5, 6, 10], 10: range(11)}[subset]
    for low, high in zip(edges[:-1], edges[1:], strict=True):
        drawn = some.terms_bt[:, low:high] != 0
        assert (drawn.sum(dim=1) == 1).all()
        for field in ("terms_bt", "x_start_mse_bt"):
            expected = torch.where(drawn, (high - low) * getattr(whole, field)[:, low:high], 0)
            torch.testing.assert_close(getattr(some, field)[:, low:high], expected, rtol=1e-14, atol=0)
        assert high - low == 1 or drawn.any(dim=0).sum() > 1
    assert torch.equal(some.prior_b, whole.prior_b)
    if subset == 10:
        assert torch.equal(some.total_b, whole.total_b)


@pytest.mark.parametrize("subset", [1, 3])
def test_a_subset_is_an_unbiased_estimate(tiny_scheduler, subset):
    """Of the total and of the mean error, over 2000 samples: within 5 standard errors, the noise being the same."""
    x_start, unet = images(2000, shape=(1, 2, 2)), Elementwise()
    options: Any = {"seed": 6, "batch_size": 4096}
    whole = bits_per_dim(unet, tiny_scheduler(), x_start, **options)
    some = bits_per_dim(unet, tiny_scheduler(), x_start, num_timesteps_subset=subset, **options)
    for difference in (
        some.total_b - whole.total_b,
        some.x_start_mse_bt.mean(dim=1) - whole.x_start_mse_bt.mean(dim=1),
        *(some.terms_bt - whole.terms_bt).T,
    ):
        assert abs(difference.mean()) <= 5 * difference.std() / math.sqrt(2000)
    assert (difference.std() > 0) and ((some.terms_bt[:, 0] == whole.terms_bt[:, 0]).all() or subset == 1)


@pytest.mark.parametrize("total", [1, 2, 10, 37, 1000])
def test_the_ranges_of_a_subset_cover_every_timestep_once(total):
    """So that a term's weight times its probability is 1, whatever the subset."""
    for subset in {min(max(size, 1), total) for size in (1, 2, 3, total // 3, total // 2 + 1, total - 1, total)}:
        times, lengths = _drawn_timesteps(total, subset, 0, range(50))
        starts = np.append(0, np.cumsum(lengths))
        assert starts[-1] == total and lengths.min() >= 1
        assert (np.diff(lengths) >= -1).all() and (subset == 1 or lengths[0] == 1)  # they grow, up to rounding
        assert times.shape == (50, subset)
        assert (times >= starts[:-1]).all() and (times < starts[1:]).all()


# ---- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_timesteps_subset": 0}, "num_timesteps_subset=0 must be an integer, 1 or more, 10 at most"),
        ({"num_timesteps_subset": 11}, "num_timesteps_subset=11 must be an integer, 1 or more, 10 at most"),
        (
            {"num_timesteps_subset": 3, "num_inference_steps": 2},
            "num_timesteps_subset=3 must be an integer, 1 or more, 2 at most",
        ),
        ({"num_inference_steps": 11}, r"num_inference_steps=11 must be an integer in \[1, 10\]"),
        ({"num_timesteps_subset": 2.5}, "num_timesteps_subset=2.5"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"batch_size": -1}, "batch_size=-1"),  # evaluates nothing and returns the prior
        ({"first_index": -1}, "first_index=-1"),
        ({"num_levels": 1}, "num_levels=1"),
        ({"num_levels": -5}, "num_levels=-5"),
        ({"round_below": -1}, "round_below=-1 must be an integer, 0 or more, 10 at most"),
        ({"round_below": 11}, "round_below=11"),
        ({"round_below": 1, "num_levels": None}, "round_below=1 rounds x̂_0 to levels, and points have none"),
    ],
    ids=str,
)
def test_impossible_options_are_refused(tiny_scheduler, options, message):
    with pytest.raises(ValueError, match=message):
        bits_per_dim(Elementwise(), tiny_scheduler(), images(2), seed=0, **options)


@pytest.mark.parametrize("x", [1.01, -1.5, float("nan"), float("inf")])
def test_samples_outside_their_range_are_refused(tiny_scheduler, x):
    x_start = images(2)
    x_start[1, 2, 3, 4] = x
    with pytest.raises(ValueError, match=r"x_start runs from .* to .*; it must be in \[−1, 1\]"):
        bits_per_dim(Elementwise(), tiny_scheduler(), x_start, seed=0)
    with pytest.raises(ValueError, match="x_start runs from 0.0 to 255.0"):
        bits_per_dim(Elementwise(), tiny_scheduler(), torch.tensor([[0.0, 255.0]]), seed=0)


def test_epsilon_where_nothing_is_left_of_x_start_is_refused():
    """As the scheduler's step does."""
    with pytest.raises(ValueError, match="ᾱ is 0"):
        bits_per_dim(Elementwise(), DDPMPaperScheduler(10, beta_schedule="jsd"), images(1), seed=0)


# ---- rate and distortion -------------------------------------------------------------------------------------------


def test_rate_and_distortion_follow_their_definition():
    """After n steps: L_T and the terms above t = T − n are paid, and x̂_0(x_t, t) is shown."""
    generator = torch.Generator().manual_seed(0)
    terms_bt, mse_bt = (torch.rand(4, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    prior_b = torch.rand(4, generator=generator, dtype=torch.float64)
    curve = rate_distortion(BoundTerms(prior_b + terms_bt.sum(dim=1), prior_b, terms_bt, mse_bt))
    assert curve.num_reverse_steps.tolist() == [1, 2, 3, 4, 5, 6]
    for n, rate, rmse in zip(*curve, strict=True):
        t = 6 - n
        paid = prior_b.mean() + sum(terms_bt[:, above].mean() for above in range(t + 1, 6))
        assert rate == pytest.approx(float(paid), rel=1e-12)
        assert rmse == pytest.approx(127.5 * math.sqrt(mse_bt[:, t].mean()), rel=1e-12)
    assert curve.rate_bpd[0] == pytest.approx(prior_b.mean().item())
    assert (np.diff(curve.rate_bpd) > 0).all()


def test_the_whole_rate_and_the_decoder_make_the_bound(tiny_scheduler):
    """Also for a single step, whose rate is the prior alone."""
    for num_inference_steps in (1, 10):
        terms = bits_per_dim(
            Elementwise(), tiny_scheduler(), images(3), seed=0, num_inference_steps=num_inference_steps
        )
        curve = rate_distortion(terms)
        assert len(curve.rate_bpd) == len(curve.rmse) == num_inference_steps
        assert curve.rate_bpd[-1] + terms.terms_bt[:, 0].mean() == pytest.approx(terms.total_b.mean().item())
