"""Held-out samples: which they are, that nothing draws them, and that what is measured on them is the bound."""

import copy
import logging
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers.training_utils import EMAModel
from PIL import Image

from ddpm_hf import DDPMPaperMLP
from ddpm_hf.data import Samples, load_samples, to_model_range
from ddpm_hf.likelihood import bits_per_dim
from ddpm_hf.randomness import keyed_generator, normal
from ddpm_hf.runs import (
    KeyedBatches,
    Part,
    TrainingOptions,
    TrainingState,
    content_keys,
    evaluate,
    hold_out,
    numbers_of,
)
from ddpm_hf.runs.held_out import NUM_GROUPS, SEED, network_samples, overlap_found, simple_losses

GREY = {"in_channels": 1, "block_out_channels": (8,), "attention_resolutions": ()}


def samples_of(array: np.ndarray, name: str = "mine") -> Samples:
    return Samples(name, array, None if array.ndim == 2 else 256, "fingerprint")


def images(count: int, *, seed: int = 0, shape: tuple[int, ...] = (1, 8, 8)) -> Samples:
    return samples_of(np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8))


def points(count: int) -> Samples:
    return samples_of(np.random.default_rng(0).standard_normal((count, 2)).astype(np.float32))


@pytest.fixture
def accelerator():
    yield Accelerator(cpu=True)
    AcceleratorState._reset_state(True)


def held_out_of(samples: Samples, accelerator: Any, **options: Any) -> Any:
    return hold_out(TrainingOptions(dataset_name="digits", **options), accelerator, samples)


# ---- which samples -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("samples", [images(3000), points(3000)], ids=["images", "points"])
def test_keys_are_of_the_content_and_of_no_place(samples, tmp_path):
    keys = content_keys(samples)
    order = np.random.default_rng(1).permutation(3000)
    assert keys.dtype == np.uint64 and len(set(keys.tolist())) == 3000
    assert np.array_equal(content_keys(samples_of(samples.array[order])), keys[order])
    assert np.array_equal(content_keys(samples, [7, 2999, 7]), keys[[7, 2999, 7]])
    np.save(tmp_path / "array.npy", samples.array)
    assert np.array_equal(content_keys(samples_of(np.load(tmp_path / "array.npy", mmap_mode="r"))), keys)


def test_a_key_changes_with_a_single_level():
    changed = images(50)
    changed.array[:, 0, 7, 7] ^= 1
    assert not (content_keys(changed) == content_keys(images(50))).any()


@pytest.mark.parametrize("every", [2, 3, 10])
def test_about_one_in_k_is_held_out_and_the_others_trained_on(accelerator, every):
    held_out = held_out_of(images(3000), accelerator, held_out_every=every, eval_every=5, eval_samples=3000)
    kept = held_out.parts["held_out"].indices
    assert sorted([*kept, *held_out.rows]) == list(range(3000))
    assert abs(len(kept) - 3000 / every) < 5 * np.sqrt(3000 / every)  # five standard deviations of the count
    assert np.array_equal(held_out.parts["train"].indices, held_out.rows)


def test_neither_seed_nor_order_nor_new_samples_move_a_sample(accelerator):
    """Two runs hold out the same, also after the data have grown, and equal samples are on one side."""
    first, more = images(300), images(200, seed=1)
    grown = samples_of(np.concatenate([more.array, first.array, first.array[:50]]))
    one = held_out_of(first, accelerator, held_out_every=5, eval_every=1, eval_samples=10_000)
    for seed in (0, 7):
        other = held_out_of(grown, accelerator, held_out_every=5, seed=seed, eval_every=1, eval_samples=10_000)
        kept = set(other.parts["held_out"].indices.tolist())
        expected = set(one.parts["held_out"].indices.tolist())
        assert {i - 200 for i in kept if 200 <= i < 500} == expected
        assert {i - 500 for i in kept if i >= 500} == {i for i in expected if i < 50}


def test_what_is_held_out_appears_in_no_batch(accelerator):
    samples = images(200)
    held_out = held_out_of(samples, accelerator, held_out_every=4)
    made = KeyedBatches(
        samples, seed=0, global_batch_size=16, num_timesteps=10, random_flip=True, allowed=held_out.rows
    )
    num_rows = len(held_out.rows)
    drawn = np.concatenate([made.rows(step, range(16)).indices for step in range(num_rows)])
    for epoch in drawn.reshape(16, num_rows):  # num_rows batches of 16 are 16 epochs
        assert np.array_equal(np.sort(epoch), held_out.rows)
    batch = made.rows(3, range(16))
    upright = made.samples.batch(batch.indices)
    same = (batch.x_start == upright) | (batch.x_start == upright.flip(-1))
    assert same.flatten(1).all() and made.epoch(num_rows) == 16


def test_without_the_options_nothing_is_held_out_or_read(accelerator, monkeypatch):
    monkeypatch.setattr("ddpm_hf.runs.held_out.content_keys", lambda *_: pytest.fail("read"))
    assert held_out_of(images(10), accelerator) is None


def test_evaluated_are_as_many_of_both_and_the_same_every_time(accelerator):
    options: dict[str, Any] = {"held_out_every": 4, "eval_every": 3}
    one, other = (held_out_of(images(300), accelerator, eval_samples=20, seed=s, **options) for s in (0, 1))
    for name in ("held_out", "train"):
        assert len(one.parts[name].indices) == 20
        assert np.array_equal(one.parts[name].indices, other.parts[name].indices)
    assert np.isin(one.parts["train"].indices, one.rows).all() and one.identity == other.identity
    assert not np.isin(one.parts["held_out"].indices, one.rows).any()
    assert held_out_of(images(300), accelerator, eval_samples=21, **options).identity != one.identity


def test_a_split_is_held_out_beside_all_of_the_training_data(accelerator):
    samples = load_samples("digits")
    held_out = held_out_of(samples, accelerator, eval_split="test", eval_every=1)
    assert held_out.rows is None and len(held_out.parts["held_out"].samples) == 360
    assert held_out.parts["train"].samples is samples and len(held_out.parts["train"].indices) == 256


def test_images_in_both_sets_are_counted_and_named(accelerator, caplog):
    samples = load_samples("digits")
    both = np.concatenate([load_samples("digits", split="test").array[:9], samples.array[[5, 0]]])
    line = overlap_found(replace(samples, array=both, names=[f"{i}.png" for i in range(11)]), samples)
    assert line is not None and line.startswith("2 of the 11 held-out samples are also trained on") and "9.png" in line
    assert overlap_found(load_samples("digits", split="test"), samples) is None
    caplog.set_level(logging.WARNING)
    held_out_of(samples_of(both), accelerator, held_out_every=2, eval_every=1)
    assert "also trained on" not in caplog.text  # equal ones are on one side


def test_a_folder_that_shares_images_is_named_in_one_line(tmp_path, accelerator, caplog):
    pixels = images(6).array
    for name, chosen in (("train", range(5)), ("test", (2, 5))):
        (tmp_path / name).mkdir()
        for i in chosen:
            Image.fromarray(pixels[i, 0]).save(tmp_path / name / f"{i}.png")
    options = TrainingOptions(
        dataset_name=None,
        train_data_dir=str(tmp_path / "train"),
        eval_data_dir=str(tmp_path / "test"),
        eval_every=1,
    )
    samples = load_samples(train_data_dir=tmp_path / "train", cache_dir=tmp_path / "cache")
    caplog.set_level(logging.WARNING)
    assert len(hold_out(options, accelerator, samples).parts["held_out"].indices) == 2  # type: ignore[union-attr]
    (line,) = [record.getMessage() for record in caplog.records if "also trained on" in record.getMessage()]
    assert line.startswith("1 of the 2 held-out samples") and "\n" not in line


def test_a_side_without_samples_is_refused(accelerator):
    alike = samples_of(np.zeros((40, 1, 8, 8), dtype=np.uint8))  # one content: all of them on one side
    with pytest.raises(ValueError, match=r"--held_out_every=2 holds out (0|40) of the 40 samples of mine"):
        held_out_of(alike, accelerator, held_out_every=2)


@pytest.mark.parametrize("samples", [images(9, shape=(3, 8, 8)), images(9), points(9)])
def test_held_out_samples_of_another_kind_are_refused(accelerator, samples):
    with pytest.raises(ValueError, match=r"the held-out samples of digits are \(1, 8, 8\) with 17 levels, .* alike"):
        held_out_of(samples, accelerator, eval_split="test", eval_every=1)


# ---- what is measured ----------------------------------------------------------------------------------------------


def state_of(network: Any) -> TrainingState:
    """Averaged weights that are not the raw ones."""
    ema = EMAModel(network.parameters(), decay=0.5)
    with torch.no_grad():
        for shadow in ema.shadow_params:
            shadow.mul_(0.9)
    return TrainingState(network.train(), ema, torch.optim.Adam(network.parameters()))


@pytest.fixture
def parts() -> dict[str, Part]:
    """Numbers that no piece of four divides."""
    return {"held_out": Part(images(12), np.arange(1, 12, 2)), "train": Part(images(12), np.arange(0, 9, 2))}


@pytest.mark.slow
@pytest.mark.parametrize("variance", ["fixed_small", "learned"])
@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction", "previous_sample"])
def test_all_terms_are_the_bound_itself(accelerator, tiny_unet, tiny_scheduler, parts, prediction, variance):
    outputs = 2 if variance == "learned" else 1
    state = state_of(tiny_unet(**GREY, out_channels=outputs, dropout=0.5))
    scheduler = tiny_scheduler(prediction_type=prediction, variance_type=variance)
    values = evaluate(accelerator, state, scheduler, parts, batch_size=4, num_terms=10)
    with state.ema_weights():
        for name, part in parts.items():
            x_start = to_model_range(part.samples.batch(part.indices), 256)
            exact = bits_per_dim(state.unet, scheduler, x_start, seed=SEED)
            # by another batch, so by other kernels of float32
            torch.testing.assert_close(values[name][1], exact.total_b, rtol=1e-5, atol=0)


def test_few_terms_are_the_estimate_of_the_bound(accelerator, tiny_unet, tiny_scheduler, parts):
    """Whose expectation is the bound (tests/test_likelihood.py)."""
    state, scheduler = state_of(tiny_unet(**GREY, out_channels=1)), tiny_scheduler()
    values = evaluate(accelerator, state, scheduler, parts, batch_size=4, num_terms=4)
    x_start = to_model_range(parts["train"].samples.batch(parts["train"].indices), 256)
    with state.ema_weights():
        estimate = bits_per_dim(state.unet, scheduler, x_start, seed=SEED, num_timesteps_subset=4).total_b
    torch.testing.assert_close(values["train"][1], estimate, rtol=1e-5, atol=0)


@pytest.mark.parametrize("num_timesteps", [5, 10, 30])
def test_the_samples_that_the_network_sees_are_counted(accelerator, tiny_unet, tiny_scheduler, parts, num_timesteps):
    state, seen = state_of(tiny_unet(**GREY, out_channels=1)), []
    state.unet.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    evaluate(accelerator, state, tiny_scheduler(num_train_timesteps=num_timesteps), parts, batch_size=4)
    assert sum(seen) == network_samples(parts, num_timesteps)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "previous_sample"])
def test_l_simple_is_the_error_at_one_t_of_each_quarter(tiny_unet, tiny_scheduler, prediction):
    unet, diffusion = tiny_unet(**GREY, out_channels=1), tiny_scheduler(prediction_type=prediction).diffusion
    x_start = to_model_range(images(3).batch([0, 1, 2]), 256)
    losses = simple_losses(unet, diffusion, x_start, first_index=5)
    seen = []
    for i, x in enumerate(x_start[:, None], start=5):
        expected = 0.0
        for draw, u in enumerate(keyed_generator(SEED, "evaluation t", 0, i).random(4)):
            t = torch.tensor([int((draw + u) / 4 * 10)])
            seen.append(t.item() * 4 // 10)
            noise = normal(SEED, "evaluation noise", draw, [i], (1, 8, 8))
            x_t = diffusion.q_sample(x, t, noise)
            with torch.no_grad():
                error = unet(x_t, t).sample - diffusion.target(x, x_t, t, noise)
            expected += error.square().mean().item() / 4
        assert losses[i - 5].item() == pytest.approx(expected, rel=1e-5)  # float32 kernels of another batch
    assert len(set(seen)) > 2


def test_l_simple_of_a_learned_variance_is_of_its_first_half(tiny_unet, tiny_scheduler):
    diffusion = tiny_scheduler(variance_type="learned").diffusion
    unet = tiny_unet(**GREY, out_channels=2)
    x_start = to_model_range(images(4).batch(range(4)), 256)

    def first_half(x, t, return_dict):
        return (unet(x, t).sample[:, :1],)

    one = simple_losses(unet, diffusion, x_start, first_index=0)
    assert torch.equal(one, simple_losses(first_half, diffusion, x_start, first_index=0))


def test_shares_of_processes_add_up_to_the_whole(accelerator, tiny_unet, tiny_scheduler, parts):
    state, scheduler = state_of(tiny_unet(**GREY, out_channels=1)), tiny_scheduler()
    whole = evaluate(accelerator, state, scheduler, parts, batch_size=4)
    for world_size in (2, 3):
        shares = []
        for rank in range(world_size):
            rank = SimpleNamespace(
                process_index=rank,
                num_processes=world_size,
                device=torch.device("cpu"),
                reduce=lambda tensor, reduction: tensor,
            )
            shares.append(evaluate(rank, state, scheduler, parts, batch_size=4))  # type: ignore[arg-type]
        for name in parts:
            assert torch.equal(torch.stack([share[name] for share in shares]).sum(0), whole[name])
            work = [int((share[name][1] != 0).sum()) for share in shares]
            assert max(work) - min(work) <= 4  # a piece


def test_an_evaluation_leaves_no_trace(accelerator, tiny_unet, tiny_scheduler, parts):
    """Weights, averages, mode, the random state of torch and NumPy; and again it gives the same."""
    state = state_of(tiny_unet(**GREY, out_channels=1, dropout=0.5))
    before = copy.deepcopy((list(state.unet.parameters()), state.ema.shadow_params))
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()  # noqa: NPY002
    first = evaluate(accelerator, state, tiny_scheduler(), parts, batch_size=4)
    after = list(state.unet.parameters()), state.ema.shadow_params
    assert all(torch.equal(a, b) for x, y in zip(before, after, strict=True) for a, b in zip(x, y, strict=True))
    assert all(module.training for module in state.unet.modules()) and state.step == 0
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.array_equal(np.random.get_state()[1], numpy_state[1])  # type: ignore[arg-type] # noqa: NPY002
    torch.manual_seed(5)
    state.step = 9
    again = evaluate(accelerator, state, tiny_scheduler(), parts, batch_size=4)
    assert all(torch.equal(first[name], again[name]) for name in parts)


def test_the_averaged_weights_are_evaluated(accelerator, tiny_unet, tiny_scheduler, parts):
    state = state_of(tiny_unet(**GREY, out_channels=1))
    averaged = evaluate(accelerator, state, tiny_scheduler(), parts, batch_size=4)
    with torch.no_grad():
        for parameter in state.unet.parameters():
            parameter.zero_()
    again = evaluate(accelerator, state, tiny_scheduler(), parts, batch_size=4)
    assert all(torch.equal(averaged[name], again[name]) for name in parts)


def test_of_points_the_bound_is_of_a_density(accelerator, tiny_scheduler):
    torch.manual_seed(0)
    state = state_of(DDPMPaperMLP(2, hidden_size=16, num_layers=2))
    part = Part(points(20), np.arange(20))
    scheduler = tiny_scheduler(clip_sample=False)
    values = evaluate(accelerator, state, scheduler, {"held_out": part}, batch_size=64, num_terms=10)
    with state.ema_weights():
        exact = bits_per_dim(
            state.unet,
            scheduler,
            torch.from_numpy(part.samples.array),
            seed=SEED,
            clip_denoised=False,
            num_levels=None,
        )
    torch.testing.assert_close(values["held_out"][1], exact.total_b, rtol=1e-5, atol=0)


def test_a_line_has_the_means_and_those_of_fixed_groups():
    generator = torch.Generator().manual_seed(0)
    values = {
        "held_out": torch.rand(2, 20, generator=generator).double(),
        "train": torch.rand(2, 5, generator=generator).double(),
    }
    numbers = numbers_of(values, "abcd")
    assert numbers["held_out_l_simple"] == pytest.approx(values["held_out"][0].mean().item())
    assert numbers["held_out_bpd"] == pytest.approx(values["held_out"][1].mean().item())
    assert numbers["train_l_simple"] == pytest.approx(values["train"][0].mean().item())
    assert numbers["train_bpd"] == pytest.approx(values["train"][1].mean().item())
    groups = [values["held_out"][1, [i for i in range(20) if i % NUM_GROUPS == g]].mean().item() for g in range(8)]
    assert numbers["held_out_bpd_groups"] == pytest.approx(groups, abs=1e-6)  # as they are rounded
    assert numbers["evaluated_on"] == "abcd"
    assert len(numbers_of({**values, "held_out": values["train"]}, "")["held_out_bpd_groups"]) == 5
