"""One step of training/train.py is Algorithm 1, whatever the objective, the parts of a batch and the precision."""

import itertools
import math

import numpy as np
import pytest
import torch
from tiny_runs import IMPORTANCE, SCRIPT, build, stream_of
from torch import Tensor

from ddpm_hf.objectives import vlb_loss
from ddpm_hf.runs import share_of
from training import train as train_py

# ---- Algorithm 1 ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [1, 2])
def test_the_first_update_is_algorithm_1_written_out(tmp_path, parts):
    """The same gradient step computed by hand from the batch: noise, network, L_simple, clipping, Adam."""
    twin = build(tmp_path).state.unet
    run = build(tmp_path, gradient_accumulation_steps=parts, max_grad_norm=0.05)
    run.state.num_updates = 2  # the warm-up is over
    batch = run.batches.rows(0, range(16))
    x_start = batch.x_start / 8.0 - 1  # the digits have 17 levels
    alpha_bar = torch.cumprod(1 - torch.linspace(1e-4, 0.5, 20, dtype=torch.float64), 0)[batch.t].view(-1, 1, 1, 1)
    x_t = (alpha_bar.sqrt() * x_start + (1 - alpha_bar).sqrt() * batch.noise).float()
    loss = (twin(x_t, batch.t).sample - batch.noise).square().mean()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.05)
    torch.optim.Adam(twin.parameters(), lr=2e-3).step()

    found_loss, found_norm = train_py.training_step(run, stream_of(run))
    assert float(found_loss) == pytest.approx(loss.item(), rel=1e-5)
    assert float(found_norm) == pytest.approx(float(norm), rel=1e-4) and float(norm) > 0.05
    for found, expected in zip(run.state.unet.parameters(), twin.parameters(), strict=True):
        # Adam's first update is lr · g / (|g| + ε): the rounding of tiny gradients shows, in units of lr
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-4)


def test_gradients_are_clipped_before_the_update(tmp_path):
    run = build(tmp_path, max_grad_norm=0.5)
    losses = run.updates.losses
    run.updates.losses = lambda *batch: 1000 * losses(*batch)
    norms = []

    def record(optimizer, args, kwargs) -> None:
        gradients = [p.grad for p in run.state.unet.parameters()]
        norms.append(float(torch.cat([g.flatten() for g in gradients]).norm()))

    run.state.optimizer.optimizer.register_step_pre_hook(record)
    stream = stream_of(run)
    reported = [float(train_py.training_step(run, stream)[1]) for _ in range(3)]
    assert min(reported) > 0.5  # what is logged is the norm before clipping
    assert norms == pytest.approx([0.5] * 3, rel=1e-4)


def nan_loss_of_the_third(losses: Tensor) -> Tensor:
    return torch.where(torch.arange(len(losses)) == 2, math.nan, losses)


def nan_gradient(losses: Tensor) -> Tensor:
    return (0 * losses).sqrt()  # 0, but its derivative is 0 · ∞


@pytest.mark.parametrize(("spoil", "what"), [(nan_loss_of_the_third, "loss"), (nan_gradient, "gradient")])
@pytest.mark.parametrize("parts", [1, 2])
def test_a_step_that_is_not_finite_stops_before_it_touches_the_weights(tmp_path, spoil, what, parts):
    run = build(tmp_path, gradient_accumulation_steps=parts)
    stream = stream_of(run)
    for _ in range(2):
        train_py.training_step(run, stream)
    before = [p.detach().clone() for p in run.state.unet.parameters()]
    shadow = [x.clone() for x in run.state.ema.shadow_params]
    losses = run.updates.losses
    run.updates.losses = lambda *batch: spoil(losses(*batch))
    batches = [run.batches.rows(2, share_of(16, parts, part, 0, 1)) for part in range(parts)]
    with pytest.raises(FloatingPointError) as error:
        train_py.training_step(run, stream)
    message = str(error.value)
    assert f"the {what} is not finite at step 2, learning rate 0.002" in message
    if what == "loss":
        t, samples = [int(b.t[2]) for b in batches], [int(b.indices[2]) for b in batches]
        assert f"t={t}" in message and f"samples {samples}" in message
    assert all(torch.equal(p, b) for p, b in zip(run.state.unet.parameters(), before, strict=True))
    assert all(torch.equal(x, b) for x, b in zip(run.state.ema.shadow_params, shadow, strict=True))
    assert (run.state.step, run.state.num_updates) == (2, 2)


def test_learning_rate_and_ema_wait_for_a_skipped_update_and_twenty_in_a_row_stop_the_run(tmp_path, monkeypatch):
    """What float16's loss scaling does on a GPU, played here."""
    run = build(tmp_path, warmup_steps=4)
    skipped = [True] * 19 + [False] + [True] * 20
    monkeypatch.setattr(
        type(run.accelerator), "optimizer_step_was_skipped", property(lambda self: skipped[run.state.step - 1])
    )
    run.state.grad_scaler = object()
    stream = stream_of(run)
    for _ in range(19):
        train_py.training_step(run, stream)
    assert (run.state.step, run.state.num_updates, run.state.ema.optimization_step) == (19, 0, 0)
    train_py.training_step(run, stream)
    assert (run.state.num_updates, run.state.overflows_in_a_row, run.state.ema.optimization_step) == (1, 0, 1)
    assert run.state.optimizer.param_groups[0]["lr"] == 0  # of that update, the first
    for _ in range(19):
        train_py.training_step(run, stream)
    assert run.state.optimizer.param_groups[0]["lr"] == pytest.approx(2e-3 / 4)
    with pytest.raises(FloatingPointError, match="20 times in a row"):
        train_py.training_step(run, stream)


def test_dropout_is_keyed_by_the_step(tmp_path):
    """Whatever drew from torch's generator before, a step drops the same, and the next step something else."""
    losses = []
    for seed in (1, 2):
        run = build(tmp_path, dropout=0.5)
        for block in run.state.unet.mid_block.resnets:
            torch.nn.init.ones_(block.conv2.weight)  # the paper's near 0 would hide the dropout
        torch.nn.init.ones_(run.state.unet.conv_out.weight)
        torch.manual_seed(seed)
        batch = run.batches.rows(0, range(16))  # twice: the first update, at learning rate 0, leaves the weights alone
        losses.append([float(train_py.training_step(run, iter([batch]))[0]) for _ in range(2)])
    assert losses[0] == losses[1] and losses[0][0] != losses[0][1]


def test_ema_first_copies_and_then_decays_as_told(tmp_path):
    run = build(tmp_path, ema_decay=0.9)
    run.state.num_updates = 2  # the warm-up is over
    stream, expected = stream_of(run), None
    for _ in range(3):
        train_py.training_step(run, stream)
        weights = [p.detach().clone() for p in run.state.unet.parameters()]
        expected = [0.9 * e + 0.1 * w for e, w in zip(expected, weights, strict=True)] if expected else weights
        for shadow, e in zip(run.state.ema.shadow_params, expected, strict=True):
            torch.testing.assert_close(shadow, e, rtol=0, atol=1e-6)


# ---- objectives -----------------------------------------------------------------------------------------------------


PREDICTIONS = ["epsilon", "sample", "previous_sample", "v_prediction"]


ALLOWED = [
    *(("simple", prediction, variance) for prediction in PREDICTIONS for variance in ("fixed_small", "fixed_large")),
    *(("vlb", prediction, v) for prediction in PREDICTIONS for v in ("fixed_small", "fixed_large", "learned")),
]


@pytest.mark.parametrize(("objective", "prediction", "variance"), ALLOWED)
def test_every_combination_that_makes_sense_trains(tmp_path, objective, prediction, variance):
    run = build(tmp_path, objective=objective, prediction_type=prediction, variance_type=variance, warmup_steps=0)
    stream = stream_of(run)
    for _ in range(2):
        loss, norm = train_py.training_step(run, stream)
        assert 0 < float(loss) < math.inf and 0 < float(norm) < math.inf
    assert all(torch.isfinite(p).all() for p in run.state.unet.parameters())
    config = run.scheduler.config
    assert (config["prediction_type"], config["variance_type"]) == (prediction, variance)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned"])
@pytest.mark.parametrize(
    ("data", "num_levels"),
    [({}, 17), ({"config": SCRIPT.parent / "configs" / "points.yaml", "hidden_size": 16}, None)],
    ids=["digits", "points"],
)
def test_the_loss_of_the_bound_is_its_term_with_the_levels_of_the_data(tmp_path, data, num_levels, variance):
    """Of a batch with t = 0 in it, where the levels count; unclipped, unweighted, a mean in bits/dim."""
    run = build(tmp_path, objective="vlb", prediction_type="sample", variance_type=variance, **data)
    unet, diffusion = run.state.unet, run.scheduler.diffusion
    step = next(step for step in itertools.count() if (run.batches.rows(step, range(16)).t == 0).any())
    batch = run.batches.rows(step, range(16))
    x_start = batch.x_start / 8.0 - 1 if num_levels else batch.x_start
    x_t = diffusion.q_sample(x_start, batch.t, batch.noise)
    with torch.no_grad():
        output = unet(x_t, batch.t).sample
    expected, otherwise = (
        vlb_loss(diffusion, output, x_start, x_t, batch.t, num_levels=levels).mean().item()
        for levels in (num_levels, 256)
    )
    loss, _ = train_py.training_step(run, iter([batch]))
    assert float(loss) == pytest.approx(expected, rel=1e-5) and abs(expected - otherwise) > 0.1


# ---- importance sampling --------------------------------------------------------------------------------------------


def test_a_step_by_importance_is_the_gradient_of_the_weighted_losses(tmp_path):
    """Written out: t at the batch's quantiles of p_t ∝ √E[L_t²], each loss weighted by 1 / (T p_t), then the mean."""
    options = {**IMPORTANCE, "num_train_timesteps": 20, "max_grad_norm": 1000}
    twin, run = build(tmp_path, **options).state.unet, build(tmp_path, **options)
    size = np.linspace(0.1, 3, 20)  # of the losses so far: alternating, so that their mean is 0 and only L² counts
    run.state.loss_history.losses[:] = size[:, None] * np.resize([1, -1], 10)
    run.state.loss_history.counts[:] = 10
    batch = run.batches.rows(0, range(16))
    probabilities = 0.999 * size / size.sum() + 0.001 / 20
    t = torch.from_numpy((np.cumsum(probabilities)[None] <= batch.quantiles[:, None]).sum(axis=1))
    assert not torch.equal(t, batch.t) and len(set(t.tolist())) > 5
    x_start = batch.x_start / 8.0 - 1
    diffusion = run.scheduler.diffusion
    x_t = diffusion.q_sample(x_start, t, batch.noise)
    losses = vlb_loss(diffusion, twin(x_t, t).sample, x_start, x_t, t, num_levels=17)
    weighted = (losses / torch.from_numpy(20 * probabilities).float()[t]).mean()
    weighted.backward()
    norm = torch.cat([p.grad.flatten() for p in twin.parameters()]).norm()
    torch.optim.Adam(twin.parameters(), lr=2e-3).step()

    found, found_norm = train_py.training_step(run, iter([batch]))
    assert float(found) == pytest.approx(weighted.item(), rel=1e-5) and abs(weighted - losses.mean()) > 0.01
    assert float(found_norm) == pytest.approx(float(norm), rel=1e-4)
    for one, other in zip(run.state.unet.parameters(), twin.parameters(), strict=True):
        # Adam's first update is lr · g / (|g| + ε): the rounding of tiny gradients shows, in units of lr
        torch.testing.assert_close(one, other, rtol=0, atol=2e-4)
    history = run.state.loss_history  # took in the unweighted losses
    assert history.counts.tolist() == (10 + np.bincount(t, minlength=20)).tolist()
    for place in set(t.tolist()):
        ours = losses[t == place].detach().numpy()[-10:]
        np.testing.assert_allclose(history.losses[place, : len(ours)], ours, rtol=1e-5)


def test_until_every_t_was_seen_often_importance_is_uniform(tmp_path):
    run = build(tmp_path, **IMPORTANCE)
    stream, uniform = stream_of(run), []
    for _ in range(6):
        uniform.append(len(set(run.state.loss_history.probabilities())) == 1)
        train_py.training_step(run, stream)
    assert uniform == [True] * uniform.index(False) + [False] * (6 - uniform.index(False)) and uniform[1]
    assert run.state.loss_history.counts.sum() == 6 * 16


def test_the_history_does_not_depend_on_the_parts_of_a_batch(tmp_path):
    """The same t and the same losses, to rounding, in the same order."""
    runs = []
    for parts in (1, 2, 8):
        run = build(tmp_path, gradient_accumulation_steps=parts, **IMPORTANCE)
        stream = stream_of(run)
        losses = [float(train_py.training_step(run, stream)[0]) for _ in range(8)]
        runs.append((run.state.loss_history, losses))
    (history, losses), *others = runs
    assert len(set(history.probabilities())) == 3
    for other, other_losses in others:
        assert other.counts.tolist() == history.counts.tolist()
        np.testing.assert_allclose(other.losses, history.losses, rtol=1e-3)  # eight updates of rounding
        assert other_losses == pytest.approx(losses, rel=1e-3)
