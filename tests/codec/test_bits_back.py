"""The stack of bits, and the chain that codes: symbols come back, no bit is wasted, rounding makes numbers equal."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from scipy.special import ndtr

from ddpm_hf.codec import CodingChain, CodingError, Stack, batch_sizes, bits_back, compress
from ddpm_hf.likelihood import discretized_log_likelihood_nats

# ---- the stack -----------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(0, 2**32), st.floats(0.3, 50), st.sampled_from([1.0, 30.0, 1e3, 1e6, 5e8]))
def test_latents_come_back_however_far_from_their_mean(seed, std, spread):
    rng = np.random.default_rng(seed)
    mean, values = rng.normal(0, 100, (3, 20)), np.rint(rng.normal(0, spread, (3, 20))).astype(np.int64)
    stack = Stack(np.arange(1, 9, dtype=np.uint32))
    stack.push_latent(values, mean, std)
    assert np.array_equal(stack.pop_latent(mean, std), values)
    assert np.array_equal(stack.coder.get_compressed(), np.arange(1, 9))


def test_values_beyond_all_reason_are_refused():
    with pytest.raises(CodingError, match="far from anything"):
        Stack().push_latent(np.array([2**33]), np.array([0.0]), 1.0)


def test_drawing_takes_bits_that_returning_gives_back():
    """A sender draws from the endless supply; what was never read is not sent."""
    stack = Stack()
    mean = np.random.default_rng(0).normal(0, 10, 1000)
    values = stack.draw_latent(mean, 2.0)
    offsets = (values - mean) / 2
    assert abs(offsets.mean()) < 0.1 and abs(offsets.std() - 1) < 0.1  # 3 standard errors of 1,000 draws
    receiver = Stack(stack.words())
    assert len(stack.words()) < 20 and stack.num_unread > 500
    receiver.return_latent(values, mean, 2.0)
    assert receiver.is_back_at_the_start() and not Stack(np.arange(1, 9, dtype=np.uint32)).is_back_at_the_start()


@pytest.mark.parametrize("std", [0.02, 0.5, 3.0])
@pytest.mark.parametrize("mean", [-1.0, -0.4, 0.99])
def test_the_coder_s_intervals_are_those_of_the_paper_s_decoder(mean, std):
    """constriction's outer bins are open, as Eq. 13 has them: checked by the length of a thousand symbols each."""
    for level in (0, 8, 16):
        x = torch.tensor([level / 8 - 1.0], dtype=torch.float64)
        nats = -discretized_log_likelihood_nats(x, torch.full_like(x, mean), 2 * np.log(std), num_levels=17)
        bits = float(nats) / np.log(2)
        stack = Stack(np.arange(1, 9, dtype=np.uint32))
        before = stack.coder.num_valid_bits()
        stack.push(np.full(1000, level), 0, 16, np.full(1000, (mean + 1) * 8), std * 8)
        length = (stack.coder.num_valid_bits() - before) / 1000
        assert length == pytest.approx(min(bits, 24), rel=0.01, abs=0.002)  # 24 bits are the longest code there is


# ---- the chain -----------------------------------------------------------------------------------------------------


def bin_bits(symbols, low, high, mean, std) -> float:
    """−log₂ of the probabilities of bins of width 1, the outer ones open, summed."""
    below = np.where(symbols == low, -np.inf, (symbols - 0.5 - mean) / std)
    above = np.where(symbols == high, np.inf, (symbols + 0.5 - mean) / std)
    flip = below > 0  # into the lower tail, where the distribution function keeps its digits
    low_end, high_end = np.where(flip, -above, below), np.where(flip, -below, above)
    return float(-np.log2(np.maximum(ndtr(high_end) - ndtr(low_end), 2.0**-24)).sum())


@pytest.mark.slow
def test_the_coder_wastes_nothing(digits_pipe, digits, chain, monkeypatch):
    """Within 0.2 % and a word of what the bins' probabilities say, push by push and pop by pop."""
    ideal = []
    pop, push = Stack.pop, Stack.push

    def counted_pop(self, low, high, mean, std):
        symbols = pop(self, low, high, mean, std)
        ideal.append(-bin_bits(symbols, low, high, mean, std))
        return symbols

    def counted_push(self, symbols, low, high, mean, std):
        push(self, symbols, low, high, mean, std)
        ideal.append(bin_bits(symbols, low, high, mean, std))

    monkeypatch.setattr(Stack, "pop", counted_pop)
    monkeypatch.setattr(Stack, "push", counted_push)
    encoded = compress(digits_pipe, digits[:12], num_levels=17, chain=chain)
    steps, batches = len(chain["inference_timesteps"]), len(batch_sizes(12, 64))
    assert len(ideal) == (2 * steps + 1) * batches
    assert encoded.net_bits == pytest.approx(sum(ideal), rel=0.002, abs=32)


@pytest.mark.slow
def test_a_finer_grid_gains_nothing_and_needs_more_to_begin_with(digits_pipe, digits, chain, encoded, monkeypatch):
    """A quarter of the step: no shorter by more than chance, and a bit more at least for each of the first latents."""
    initialise = CodingChain.__init__

    def finer(self, *args):
        initialise(self, *args)
        self.grid = [step / 4 for step in self.grid]

    monkeypatch.setattr(CodingChain, "__init__", finer)
    fine = compress(digits_pipe, digits, num_levels=17, chain=chain)
    assert fine.net_bits > 0.97 * encoded.net_bits
    assert fine.initial_bits > encoded.initial_bits + 64


def test_equal_numbers_take_float64_and_rounding(digits_pipe):
    """In float32 other micro-batches give other numbers, rounded or not; in float64 only the rounded ones agree."""
    x = torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for dtype, error in ((torch.float32, 1e-4), (torch.float64, 1e-12)):
        unet = copy.deepcopy(digits_pipe.unet).to(dtype).eval()
        with torch.no_grad():
            whole = unet(x.to(dtype), 500).sample
            parts = torch.cat([unet(part.to(dtype), 500).sample for part in x.split(1)])
        assert 0 < float((whole - parts).abs().max()) < error
        rounded = [torch.round(output / bits_back.OUTPUT_STEP) for output in (whole, parts)]
        assert torch.equal(*rounded) or dtype == torch.float32


def test_a_float64_network_embeds_t_in_float64():
    """In float32 the angles of t = 999 are off by up to 6e-5, by other amounts where another exp is used."""
    from ddpm_hf.unet.unet_ddpm_paper import TimeEmbedding, sinusoidal_embedding

    t = torch.tensor([999])
    exact = sinusoidal_embedding(t, 128, torch.float64)
    assert 1e-6 < float((sinusoidal_embedding(t, 128).double() - exact).abs().max()) < 1e-4
    embedding = TimeEmbedding(128).double()
    expected = embedding.linear_2(torch.nn.functional.silu(embedding.linear_1(exact)))
    assert torch.equal(embedding(999, torch.zeros(1, dtype=torch.float64)), expected)
