"""Batches as a pure function of the step: every sample once per epoch, and the same rows whoever computes them."""

import threading
from collections.abc import Callable

import numpy as np
import pytest
import torch

from ddpm_hf.data import Samples
from ddpm_hf.runs import Batch, KeyedBatches, prefetched, share_of

# (samples, global batch): a batch that divides an epoch, one that does not, and one of almost a whole epoch.
SIZES = [(24, 8), (23, 8), (11, 10), (8, 8)]


def images(count: int) -> Samples:
    """`count` grey images of 2×3 pixels; the top left pixel of image i is i, and no image is its own mirror image."""
    array = np.zeros((count, 1, 2, 3), dtype=np.uint8)
    array[:, 0, 0, 0] = np.arange(count)
    array[:, 0, 1, 2] = 255
    return Samples("numbered", array, 256, "fingerprint")


@pytest.fixture
def batches() -> Callable[..., KeyedBatches]:
    def make(num_samples: int = 23, global_batch_size: int = 8, **options) -> KeyedBatches:
        defaults = {"seed": 0, "num_timesteps": 1000, "random_flip": False}
        return KeyedBatches(images(num_samples), global_batch_size=global_batch_size, **{**defaults, **options})

    return make


def assert_same(one: Batch, other: Batch) -> None:
    for a, b in zip(one[:3], other[:3], strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)
    assert np.array_equal(one.indices, other.indices) and np.array_equal(one.quantiles, other.quantiles)


def joined(parts: list[Batch]) -> Batch:
    x_start, t, noise, indices, quantiles, _ = zip(*parts, strict=True)
    tensors = (torch.cat(x) for x in (x_start, t, noise))
    return Batch(*tensors, np.concatenate(indices), np.concatenate(quantiles))


# ---- order ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_samples", "size"), SIZES)
def test_every_epoch_visits_each_sample_once(batches, num_samples, size):
    made = batches(num_samples, size)
    num_epochs = 5
    num_steps = num_epochs * num_samples // size + 1
    epochs = np.concatenate([made.indices(step) for step in range(num_steps)])[: num_epochs * num_samples]
    for epoch in epochs.reshape(num_epochs, num_samples):
        assert sorted(epoch) == list(range(num_samples))


@pytest.mark.parametrize(("num_samples", "size"), SIZES)
def test_every_batch_is_full_also_across_the_end_of_an_epoch(batches, num_samples, size):
    made = batches(num_samples, size)
    for step in range(3 * num_samples):
        batch = made.rows(step, range(size))
        assert batch.x_start.shape == (size, 1, 2, 3) and batch.x_start.dtype == torch.uint8
        assert batch.t.shape == batch.indices.shape == (size,) and batch.t.dtype == torch.int64
        assert batch.noise.shape == batch.x_start.shape and batch.noise.dtype == torch.float32


def test_epochs_and_seeds_differ_in_order(batches):
    orders = [batches(64, 64, seed=seed).indices(step).tolist() for seed in (0, 1) for step in (0, 1, 2)]
    assert len(set(map(tuple, orders))) == len(orders)


def test_batch_holds_the_samples_it_names(batches):
    made = batches(200, 50)
    for step in range(5):
        batch = made.rows(step, range(50))
        assert np.array_equal(batch.x_start[:, 0, 0, 0].numpy(), batch.indices)


def test_epoch_counts_the_batches_before_a_step(batches):
    made = batches(24, 8)
    assert [made.epoch(step) for step in (0, 3, 4)] == [0, 1, pytest.approx(4 / 3)]


# ---- independence of who computes what, and when -------------------------------------------------------------------


@pytest.mark.parametrize("cuts", [[4], [1, 2, 3, 4, 5, 6, 7], [2, 6], [1]])
@pytest.mark.parametrize("random_flip", [False, True])
def test_parts_are_rows_of_the_whole(batches, cuts, random_flip):
    made = batches(random_flip=random_flip)
    for step in range(6):  # step 2 crosses the end of an epoch of 23
        whole = made.rows(step, range(8))
        borders = [0, *cuts, 8]
        parts = [made.rows(step, range(*pair)) for pair in zip(borders, borders[1:], strict=False)]
        assert_same(joined(parts), whole)


def test_batches_do_not_depend_on_the_calls_before(batches):
    in_order = batches(random_flip=True)
    expected = {step: in_order.rows(step, range(8)) for step in range(30)}
    shuffled = batches(random_flip=True)
    for step in np.random.default_rng(0).permutation(30).tolist():
        torch.randn(3)
        np.random.random(3)  # noqa: NPY002, the global generator is what must not matter
        assert_same(shuffled.rows(step, range(8)), expected[step])
    for step in expected:
        assert_same(batches(random_flip=True).rows(step, range(8)), expected[step])  # started at this very step


@pytest.mark.parametrize("purpose", ["t", "noise", "quantiles"])
def test_draws_differ_between_steps_seeds_and_rows(batches, purpose):
    whole = [batches(seed=seed).rows(step, range(8)) for seed in (0, 1) for step in (0, 1)]
    draws = [torch.as_tensor(getattr(batch, purpose)) for batch in whole]
    rows = {tuple(draw.flatten().tolist()) for draw in draws}
    assert len(rows) == 4
    assert len(torch.unique(draws[0].flatten(1) if purpose == "noise" else draws[0], dim=0)) == 8


def test_a_sample_gets_new_noise_in_every_epoch(batches):
    made = batches(8, 8)
    first, second = (made.rows(step, range(8)) for step in (0, 1))
    by_sample = [batch.noise[np.argsort(batch.indices)] for batch in (first, second)]
    assert not (by_sample[0] == by_sample[1]).any()


# ---- distributions -------------------------------------------------------------------------------------------------


def test_timesteps_are_uniform(batches):
    made = batches(1024, 1024, num_timesteps=10)
    t = torch.cat([made.rows(step, range(1024)).t for step in range(20)])
    counts = torch.bincount(t, minlength=10)
    assert len(counts) == 10
    expected = len(t) / 10
    # χ² with 9 degrees of freedom exceeds 33.7 once in 10,000 seeds
    assert ((counts - expected) ** 2 / expected).sum() < 33.7


def test_quantiles_are_uniform_and_independent_of_t(batches):
    """100 cells of (quantile, t) are equally likely; χ² with 99 degrees exceeds 148.2 for one in 1,000 seeds."""
    made = batches(1000, 1000, num_timesteps=10)
    whole = [made.rows(step, range(1000)) for step in range(20)]
    quantiles, t = np.concatenate([b.quantiles for b in whole]), np.concatenate([b.t.numpy() for b in whole])
    assert quantiles.dtype == np.float64 and quantiles.min() >= 0 and quantiles.max() < 1
    counts = np.bincount((10 * quantiles).astype(int) * 10 + t, minlength=100)
    assert ((counts - 200) ** 2 / 200).sum() < 148.2


def test_a_batch_on_another_device_is_the_same_batch(batches):
    batch = batches().rows(2, range(2, 6))
    assert_same(batch.to(torch.device("cpu")), batch)
    there = batch.to(torch.device("meta"))
    assert {x.device.type for x in there[:3]} == {"meta"}
    assert there.indices is batch.indices and there.quantiles is batch.quantiles


def test_noise_is_standard_normal(batches):
    made = batches(1024, 1024)
    noise = torch.cat([made.rows(step, range(1024)).noise for step in range(20)]).flatten().double()
    standard_error = len(noise) ** -0.5  # 0.0029
    assert abs(noise.mean()) < 4 * standard_error
    assert abs(noise.var() - 1) < 4 * 2**0.5 * standard_error
    assert abs((noise.abs() < 1).double().mean() - 0.6827) < 4 * 0.466 * standard_error


def test_half_of_the_images_are_mirrored_the_same_ones_every_time(batches):
    plain, flipping = batches(500, 500), batches(500, 500, random_flip=True)
    mirrored = []
    for step in range(4):
        before, after = plain.rows(step, range(500)).x_start, flipping.rows(step, range(500)).x_start
        is_mirrored = (after == before.flip(-1)).flatten(1).all(1)
        is_same = (after == before).flatten(1).all(1)
        assert (is_mirrored ^ is_same).all()
        mirrored.append(is_mirrored)
    share = torch.cat(mirrored).double().mean()
    assert abs(share - 0.5) < 4 * 0.5 / 2000**0.5
    assert not torch.equal(mirrored[0], mirrored[1])


# ---- shares --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("micro_steps", [1, 2, 5])
def test_shares_are_equal_and_cover_the_batch_once(world_size, micro_steps):
    shares = [share_of(120, micro_steps, m, r, world_size) for m in range(micro_steps) for r in range(world_size)]
    assert {len(share) for share in shares} == {120 // (world_size * micro_steps)}
    assert sorted(row for share in shares for row in share) == list(range(120))


def test_batch_that_cannot_be_cut_evenly_is_refused():
    with pytest.raises(ValueError, match=r"global_batch_size=128 .* 3 processes .*=2; choose a multiple of 6"):
        share_of(128, 2, 0, 0, 3)


def test_fewer_samples_than_a_batch_are_refused(batches):
    with pytest.raises(ValueError, match="numbered has 7 samples, fewer than global_batch_size=8; lower"):
        batches(7, 8)


# ---- prefetching ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first_step", [0, 5])
def test_prefetched_yields_what_is_wanted_in_order(batches, first_step):
    made = batches(random_flip=True)
    wanted = [(step, rows) for step in range(first_step, first_step + 6) for rows in (range(4), range(4, 8))]
    found = list(prefetched(made, iter(wanted), pin_memory=False))
    assert len(found) == len(wanted)
    for batch, (step, rows) in zip(found, wanted, strict=True):
        assert_same(batch, made.rows(step, rows))


def test_prefetched_of_nothing_is_empty(batches):
    assert list(prefetched(batches(), [], pin_memory=False)) == []


class Recorded:
    """Stands in for KeyedBatches: notes the steps asked for, and the threads that asked; step 3 fails."""

    def __init__(self):
        self.steps: list[int] = []
        self.threads: set[str] = set()
        self.prepared = threading.Semaphore(0)

    def rows(self, step: int, rows: range) -> int:
        self.steps.append(step)
        self.threads.add(threading.current_thread().name)
        self.prepared.release()
        if step == 3:
            raise OSError("the disk of step 3 is gone")
        return step


def test_prefetched_prepares_one_batch_ahead_in_a_thread():
    source = Recorded()
    stream = prefetched(source, ((step, range(1)) for step in range(3)), pin_memory=False)
    assert next(stream) == 0
    for _ in range(2):
        assert source.prepared.acquire(timeout=30)  # of steps 0 and 1, although only 0 was taken
    assert source.steps == [0, 1]
    assert list(stream) == [1, 2]
    assert source.threads and threading.current_thread().name not in source.threads


def test_prefetched_raises_the_error_of_a_batch_in_its_place():
    stream = prefetched(Recorded(), ((step, range(1)) for step in range(6)), pin_memory=False)
    assert [next(stream) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(OSError, match="step 3"):
        next(stream)
