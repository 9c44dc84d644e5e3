"""The reverse process step by step: the pipeline's own numbers, from any timestep, and no trace left behind."""

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, UniPCMultistepScheduler
from diffusers.utils.torch_utils import randn_tensor

from ddpm_hf import DDPMPaperPipeline, DDPMPaperScheduler
from ddpm_hf.pipeline_ddpm_paper import seeded_generators
from ddpm_hf.sampling import reverse_process

SEEDS = [3, 1, 4]


def quiet(unet, scheduler) -> DDPMPaperPipeline:
    pipe = DDPMPaperPipeline(unet, scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def pipe(tiny_unet, tiny_scheduler) -> DDPMPaperPipeline:
    return quiet(tiny_unet(), tiny_scheduler())


def start(pipe, seeds=SEEDS):
    """x_T as the pipeline draws it, and the generators that have drawn it."""
    generators = seeded_generators(seeds)
    return randn_tensor((len(seeds), *pipe.sample_shape), generator=generators), generators


# ---- the numbers ---------------------------------------------------------------------------------------------------

CASES = {
    "paper's": ({}, {}, {}, None),
    "respaced": ({}, {}, {}, 4),
    "trailing": ({}, {"timestep_spacing": "trailing", "variance_type": "fixed_large"}, {}, 3),
    "learned variance": ({"out_channels": 6}, {"variance_type": "learned"}, {}, None),
    "bfloat16": ({}, {}, {"dtype": torch.bfloat16}, None),
}


@pytest.mark.parametrize(("unet", "scheduler", "to", "steps"), CASES.values(), ids=CASES)
def test_from_noise_it_is_the_pipeline_bit_for_bit(tiny_unet, tiny_scheduler, unet, scheduler, to, steps):
    pipe = quiet(tiny_unet(**unet).to(**to), tiny_scheduler(**scheduler))
    seen = []

    def see(pipe, i, t, tensors):
        seen.append((t, tensors["latents"]))

    expected = pipe(seeds=SEEDS, num_inference_steps=steps, output_type="latent", callback_on_step_end=see).images
    x_t, generators = start(pipe)
    found = list(reverse_process(pipe, x_t, generators=generators, num_inference_steps=steps))
    assert [step.t for step in found] == [t for t, _ in seen] and len(found) == (steps or 10)
    assert all(torch.equal(step.x, x) for step, (_, x) in zip(found, seen, strict=True))
    assert torch.equal(found[-1].x, expected)
    assert torch.equal(found[-1].x_start, expected)  # at the end x̂_0 is x_0
    assert all(step.x_start.abs().max() <= 1 for step in found)


def test_it_can_be_left_and_taken_up_at_any_timestep(pipe):
    x_t, generators = start(pipe)
    whole = list(reverse_process(pipe, x_t, generators=generators))
    x_t, generators = start(pipe)
    for step in reverse_process(pipe, x_t, generators=generators):
        if step.t == 6:
            x_t = step.x
            break
    rest = list(reverse_process(pipe, x_t, generators=generators, from_timestep=5))
    assert [step.t for step in rest] == [5, 4, 3, 2, 1, 0]
    assert torch.equal(rest[-1].x, whole[-1].x)


def test_each_sample_has_the_noise_of_its_own_generator(pipe):
    x_t, _ = start(pipe, [0, 0, 1])
    shared = x_t[:1].expand(3, -1, -1, -1)
    first = next(reverse_process(pipe, shared, generators=seeded_generators([7, 7, 8])))
    assert torch.equal(first.x[0], first.x[1]) and not torch.equal(first.x[0], first.x[2])
    # x̂_0 was there before the noise; samples of a batch differ by the rounding of vectorised kernels at most
    torch.testing.assert_close(first.x_start[0], first.x_start[2], atol=1e-5, rtol=0)


@pytest.mark.parametrize("stock", [DDPMScheduler, DDIMScheduler])
def test_another_scheduler_is_taken_as_the_ddpm_it_was_built_from(pipe, stock):
    x_t, generators = start(pipe)
    *_, expected = reverse_process(pipe, x_t, generators=generators)
    pipe.scheduler = stock.from_config(pipe.scheduler.config)
    x_t, generators = start(pipe)
    *_, found = reverse_process(pipe, x_t, generators=generators)
    assert torch.equal(found.x, expected.x)


# ---- no trace ------------------------------------------------------------------------------------------------------


def test_two_chains_of_one_pipeline_run_side_by_side(pipe):
    def chain(steps):
        x_t, generators = start(pipe)
        return reverse_process(pipe, x_t, generators=generators, num_inference_steps=steps)

    pipe.scheduler.set_timesteps(2)
    apart = [list(chain(steps))[1] for steps in (5, 10)]
    five, ten = chain(5), chain(10)
    next(five), next(ten)
    for step, expected in zip((next(five), next(ten)), apart, strict=True):
        assert step.t == expected.t and torch.equal(step.x, expected.x)
    assert pipe.scheduler.timesteps.tolist() == [5, 0]


def test_the_network_is_in_eval_mode_only_while_it_is_asked(tiny_unet, tiny_scheduler):
    pipe = quiet(tiny_unet(dropout=0.5), tiny_scheduler())
    *_, expected = reverse_process(pipe, start(pipe)[0], generators=seeded_generators(SEEDS))
    pipe.unet.train()
    steps = reverse_process(pipe, start(pipe)[0], generators=seeded_generators(SEEDS))
    for step in steps:
        assert pipe.unet.training and torch.is_grad_enabled() and not step.x.requires_grad
    assert torch.equal(step.x, expected.x)


# ---- refusals: at once, not when the first step is asked for -------------------------------------------------------


@pytest.mark.parametrize(("timestep", "nearest"), [(10, 6), (4, 3), (-1, 0)])
def test_timesteps_outside_the_chain_are_refused(pipe, timestep, nearest):
    x_t, generators = start(pipe)
    with pytest.raises(ValueError, match=f"from_timestep={timestep} .* 3 timesteps; the nearest of them is {nearest}"):
        reverse_process(pipe, x_t, generators=generators, from_timestep=timestep, num_inference_steps=3)


@pytest.mark.parametrize("count", [0, 1, 2, 4])
def test_another_number_of_generators_is_refused(pipe, count):
    with pytest.raises(ValueError, match=f"generators: got {count} for 3 samples"):
        reverse_process(pipe, start(pipe)[0], generators=seeded_generators(range(count)))


@pytest.mark.parametrize("kind", [DDPMPaperScheduler, DDIMScheduler, UniPCMultistepScheduler])
@pytest.mark.parametrize("steps", [0, 11, 2.5, True])
def test_a_chain_of_impossible_length_is_refused(tiny_unet, tiny_scheduler, kind, steps):
    """Of stock's schedulers as of ours: theirs divide by zero, or take more steps than there are."""
    pipe = quiet(tiny_unet(), kind.from_config(tiny_scheduler().config))
    for call in (lambda: pipe.own_scheduler(steps), lambda: pipe(seeds=[0], num_inference_steps=steps)):
        with pytest.raises(ValueError, match=rf"num_inference_steps={steps!r} must be an integer in \[1, 10\]"):
            call()


# ---- steps that are changed ----------------------------------------------------------------------------------------


def test_the_chain_goes_on_from_what_is_assigned(pipe):
    x_t, generators = start(pipe)
    asked = []
    for step in reverse_process(pipe, x_t, generators=generators):
        asked.append(step.x_t)
        step.x = torch.full_like(step.x, 0.25 * step.t)
    assert all(bool((x == 0.25 * (9 - i)).all()) for i, x in enumerate(asked[1:]))


def test_a_step_may_go_back_in_t(pipe):
    """Resampling (RePaint): x_{t−1} is noised again, and the same steps are taken anew, with new noise."""
    x_t, generators = start(pipe)
    diffusion, times, again = pipe.scheduler.diffusion, [], True
    for step in reverse_process(pipe, x_t, generators=generators, num_inference_steps=5):
        times.append((step.t, step.next_t))
        if step.t == 4 and again:
            step.x, step.next_t, again = diffusion.q_sample(step.x_start, 8, torch.zeros_like(step.x)), 8, False
    assert times == [(8, 6), (6, 4), (4, 2), (8, 6), (6, 4), (4, 2), (2, 0), (0, None)]
    *_, other = reverse_process(pipe, x_t, generators=start(pipe)[1], num_inference_steps=5)
    assert not torch.equal(step.x, other.x)


def test_a_step_may_end_the_chain_or_name_a_timestep_that_is_none(pipe):
    x_t, generators = start(pipe)
    steps = reverse_process(pipe, x_t, generators=generators)
    next(steps).next_t = None
    assert list(steps) == []
    steps = reverse_process(pipe, x_t, generators=start(pipe)[1], num_inference_steps=5)
    next(steps).next_t = 7
    with pytest.raises(ValueError, match="timestep 7 is not one of this chain's 5; the nearest of them is 8"):
        next(steps)


def test_a_solver_with_a_history_cannot_go_back(tiny_unet, tiny_scheduler):
    pipe = quiet(tiny_unet(), UniPCMultistepScheduler.from_config(tiny_scheduler().config))
    scheduler = pipe.own_scheduler(5)
    steps = pipe.reverse_process(start(pipe)[0], scheduler=scheduler)
    next(steps).next_t = scheduler.timesteps[0]
    with pytest.raises(ValueError, match="UniPCMultistepScheduler cannot go on from another timestep than the next"):
        next(steps)


def test_a_step_is_differentiable(pipe):
    """∂x̂_0/∂x_t by automatic differentiation is what a small change of x_t makes of it: guidance needs it."""
    pipe.unet.double()
    scheduler = pipe.own_scheduler()
    x_t = start(pipe)[0].double().requires_grad_()
    direction = torch.randn(x_t.shape, generator=torch.Generator().manual_seed(0)).double()

    def mean(x):
        """A weighted mean of x_{t−1} at t = 5, with the same z."""
        step = pipe.reverse_step(x, 5, scheduler=scheduler, generator=torch.Generator().manual_seed(1))
        return (direction * step.x).sum()

    (gradient,) = torch.autograd.grad(mean(x_t), x_t)
    with torch.no_grad():
        change = (mean(x_t + 1e-3 * direction) - mean(x_t - 1e-3 * direction)) / 2e-3
    # the pipeline rounds the network's output to float32: 1e-7 of it, over a change of 1e-3
    assert float((gradient * direction).sum()) == pytest.approx(float(change), rel=1e-3)
