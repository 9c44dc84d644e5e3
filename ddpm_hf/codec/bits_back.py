"""Bits-back coding with a diffusion model: a stack of bits, and the chain that pushes images onto it.

The bound of Eq. 3 is a code length (Section 4.3). Bits-back coding reaches it (Hinton & van Camp 1993; with ANS:
Townsend et al. 2019): to send x_0, pop x_1 … x_T from a stack of bits, by q, and push x_0 … x_T onto it, by p. The
popped bits are not lost: the receiver, who knows x_0 in the end, pushes them back onto a stack of its own. The order
is Bit-Swap's (Kingma et al. 2019), which needs few initial bits: for t = 1 … T, pop x_t by q(x_t | x_{t−1}) and
push x_{t−1} by p(x_{t−1} | x_t); then push x_T by p(x_T). The stack is constriction's ANS coder (Duda 2009).

Both sides must compute the same numbers to the last bit, with other threads and in other batches. So the network runs
in float64, and its output is rounded to multiples of 2⁻⁸, far more than its kernels differ by (1e-13). What follows
are single operations in float64, which are exact everywhere, and constriction's distribution function, which is
compiled into it. An output within 1e-13 of the middle between two multiples could still be rounded either way, about
once in 10¹⁰ numbers; the checksums of `files` detect that.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import torch

from ..likelihood import discretized_log_likelihood_nats
from ..pipeline_loading import DDPMPaperPipeline
from ..scheduler import GaussianDiffusion

OUTPUT_STEP = 2.0**-8  # the network's output is rounded to multiples of this
# How many standard deviations around the mean a latent has a code of its own. No code has a probability below 2⁻²⁴,
# so wide windows cost bits. What p codes may lie anywhere; what q draws does not.
WINDOW, DRAWN_WINDOW = 20, 8
RESERVE = 4  # how many words an ANS coder needs below what it reads


class CodingError(ValueError):
    """The images or the model cannot be coded, or the file cannot be decoded; the message says why."""


# ---- the stack -----------------------------------------------------------------------------------------------------


def _constriction() -> Any:
    try:
        import constriction
    except ImportError:
        raise CodingError("the codec needs constriction: pip install 'ddpm_hf[codec]'") from None
    return constriction.stream  # pyright: ignore[reportAttributeAccessIssue]


class Stack:
    """A stack of bits. A sender's has endless random bits below; those that were never read are not sent."""

    def __init__(self, words: np.ndarray | None = None):
        stream = _constriction()
        self.model, self.make = stream.model, stream.stack.AnsCoder
        self.coder = self.make() if words is None else self.make(words)
        self.is_sender = words is None
        self.num_supplied = 0
        self.lowest = 0  # the fewest words that were ever on the stack, plus all words supplied later

    def _supply(self, num_symbols: int) -> None:
        """Put random words below the others, unless there are enough for `num_symbols` symbols of at most 24 bits."""
        missing = num_symbols + RESERVE - self.coder.num_words()
        if self.is_sender and missing > 0:
            words = _random_words(self.num_supplied + missing)[self.num_supplied :]
            self.coder = self.make(np.concatenate([words[::-1], self.coder.get_compressed()]))
            self.num_supplied += missing
            self.lowest += missing

    def pop(self, low: int, high: int, mean: np.ndarray, std: float) -> np.ndarray:
        """Symbols in [low, high] under N(mean, std²) integrated over bins of width 1, the outer ones open: int64."""
        self._supply(mean.size)
        family = self.model.QuantizedGaussian(low, high)
        symbols = self.coder.decode(family, mean.ravel(), np.full(mean.size, std))
        self.lowest = min(self.lowest, self.coder.num_words())
        return symbols.astype(np.int64).reshape(mean.shape)

    def push(self, symbols: np.ndarray, low: int, high: int, mean: np.ndarray, std: float) -> None:
        """Push symbols; `pop` with the same distribution returns them."""
        family = self.model.QuantizedGaussian(low, high)
        self.coder.encode_reverse(symbols.astype(np.int32).ravel(), family, mean.ravel(), np.full(mean.size, std))

    def draw_latent(self, mean: np.ndarray, std: float) -> np.ndarray:
        """Pop integers under N(mean, std²), each in a window around its mean: a draw that `return_latent` undoes."""
        centre, width = np.rint(mean), math.ceil(DRAWN_WINDOW * std)
        return centre.astype(np.int64) + self.pop(-width, width, mean - centre, std)

    def return_latent(self, values: np.ndarray, mean: np.ndarray, std: float) -> None:
        """Push back the bits from which `draw_latent` drew these values."""
        centre, width = np.rint(mean), math.ceil(DRAWN_WINDOW * std)
        self.push(values - centre.astype(np.int64), -width, width, mean - centre, std)

    def pop_latent(self, mean: np.ndarray, std: float) -> np.ndarray:
        """The integers that `push_latent` pushed with the same distribution."""
        centre, width = np.rint(mean), math.ceil(WINDOW * std)
        offset = self.pop(-width, width, mean - centre, std)
        if (outside := np.abs(offset) == width).any():
            halves = self.coder.decode(self.model.Uniform(2**16), 2 * int(outside.sum())).astype(np.int64)
            offset[outside] += np.sign(offset[outside]) * (halves[::2] * 2**16 + halves[1::2])
        return centre.astype(np.int64) + offset

    def push_latent(self, values: np.ndarray, mean: np.ndarray, std: float) -> None:
        """Push integers under N(mean, std²); those outside a window around their mean take 32 bits more.

        Raises CodingError for values more than 2³² from their mean.
        """
        centre, width = np.rint(mean), math.ceil(WINDOW * std)
        offset = values - centre.astype(np.int64)
        if (outside := np.abs(offset) >= width).any():
            beyond = np.abs(offset[outside]) - width
            if beyond.max() >= 2**32:
                raise CodingError("the network's output is far from anything that could be noise")
            halves = np.stack([beyond // 2**16, beyond % 2**16], axis=1)
            self.coder.encode_reverse(halves.astype(np.int32).ravel(), self.model.Uniform(2**16))
        self.push(np.clip(offset, -width, width), -width, width, mean - centre, std)

    @property
    def num_unread(self) -> int:
        """How many of the supplied words were never read, and need not be sent."""
        return max(0, self.lowest - RESERVE)

    def words(self) -> np.ndarray:
        """The words on the stack, bottom first, without the random words that were never read: uint32."""
        return self.coder.get_compressed()[self.num_unread :]

    def is_back_at_the_start(self) -> bool:
        """Whether nothing but the random words is left."""
        left = self.coder.get_compressed()
        return bool(np.array_equal(left[::-1], _random_words(len(left))))


def _random_words(num: int) -> np.ndarray:
    """The first `num` words of the supply, from the top down; none is 0, because an ANS coder cannot end in a 0."""
    raw = np.random.Philox(key=0).random_raw(num) >> np.uint64(32)
    return np.maximum(raw, 1).astype(np.uint32)


# ---- the model, in numbers that are the same everywhere ------------------------------------------------------------


class CodingChain:
    """q and p of a chain for batches of latents, on grids; step i is the chain's, and step 0 is the last of sampling.

    A latent is an integer k for x = k δ_i. δ_i is the smaller of the standard deviations with which q and p draw it: a
    finer grid gains nothing measurable, and needs more initial bits.

    Raises CodingError for points, and for networks that predict anything but ε, x_0 or v alone.
    """

    def __init__(self, pipe: DDPMPaperPipeline, scheduler: Any, num_levels: int, micro_batch: int | None):
        if not pipe.sample_shape or len(pipe.sample_shape) != 3:
            raise CodingError("the codec is for images, and this is a model of points")
        for key, value in (("prediction_type", "previous_sample"), ("variance_type", "learned")):
            if scheduler.config[key] == value:
                raise CodingError(f"{key}={value!r} cannot be coded: networks must predict ε, x_0 or v, and no more")
        if micro_batch is not None and micro_batch < 1:
            raise CodingError(f"micro_batch={micro_batch} must be at least 1")
        self.chain: GaussianDiffusion = scheduler.chain()
        self.clip_denoised = scheduler.clip_denoised()
        self.shape, self.num_levels, self.micro_batch = tuple(pipe.sample_shape), num_levels, micro_batch
        unet = copy.deepcopy(pipe.unet)
        self.unet = (unet.cpu() if unet.device.type == "mps" else unet).double().eval()  # MPS has no float64
        chain = self.chain
        self.q_scale = np.sqrt(1 - chain.betas).tolist()
        self.q_std = np.sqrt(chain.betas).tolist()
        # via float32, which rounds away the last bit, in which the exp of two machines may differ
        log_variance: Any = chain.model_log_variance
        self.p_std = np.exp(0.5 * log_variance).astype(np.float32).tolist()
        self.grid = [min(pair) for pair in zip(self.q_std, [*self.p_std[1:], 1.0], strict=True)]

    def __len__(self) -> int:
        return self.chain.num_timesteps

    def x_start(self, levels: np.ndarray) -> np.ndarray:
        """x_0 in [−1, 1] of levels, float64."""
        return levels * 2 / (self.num_levels - 1) - 1

    @torch.no_grad()
    def p_mean(self, x: np.ndarray, i: int) -> np.ndarray:
        """The mean of p(x_{i−1} | x_i), float64 [B, C, H, W]."""
        x_t = torch.from_numpy(x)
        device, t = self.unet.device, int(self.chain.timesteps[i])
        parts = [self.unet(part.to(device), t).sample.cpu() for part in x_t.split(self.micro_batch or len(x_t))]
        output = torch.round(torch.cat(parts) / OUTPUT_STEP) * OUTPUT_STEP
        if not bool(output.isfinite().all()):
            raise CodingError(f"the network's output at t = {t} is not finite")
        return self.chain.p_mean_variance(output, x_t, i, clip_denoised=self.clip_denoised).mean.numpy()

    def encode(self, stack: Stack, levels: np.ndarray) -> float:
        """Push a batch of levels [B, C, H, W]; return its bound, in bits, at the latents that were drawn."""
        k_below, below, nats = levels, self.x_start(levels), 0.0
        for i in range(len(self)):
            q_mean = self.q_scale[i] * below
            k = stack.draw_latent(q_mean / self.grid[i], self.q_std[i] / self.grid[i])
            x = k * self.grid[i]
            p_mean, std = self.p_mean(x, i), self.p_std[i]
            if i == 0:
                stack.push(levels, 0, self.num_levels - 1, *self._in_levels(p_mean, std))
                nats += _nats(below, p_mean, std, num_levels=self.num_levels)
            else:
                stack.push_latent(k_below, p_mean / self.grid[i - 1], std / self.grid[i - 1])
                nats += _nats(below, p_mean, std)
            nats -= _nats(x, q_mean, self.q_std[i])
            below, k_below = x, k
        stack.push_latent(k_below, 0 * below, 1 / self.grid[-1])
        return (nats + _nats(below, 0 * below, 1.0)) / math.log(2)

    def decode(self, stack: Stack, size: int) -> np.ndarray:
        """Pop a batch of `size` images: levels, int64 [B, C, H, W]."""
        k = stack.pop_latent(np.zeros((size, *self.shape)), 1 / self.grid[-1])
        for i in reversed(range(len(self))):
            x = k * self.grid[i]
            p_mean, std = self.p_mean(x, i), self.p_std[i]
            if i == 0:
                k_below = levels = stack.pop(0, self.num_levels - 1, *self._in_levels(p_mean, std))
                below = self.x_start(levels)
            else:
                k_below = stack.pop_latent(p_mean / self.grid[i - 1], std / self.grid[i - 1])
                below = k_below * self.grid[i - 1]
            stack.return_latent(k, self.q_scale[i] * below / self.grid[i], self.q_std[i] / self.grid[i])
            k = k_below
        return k

    def _in_levels(self, mean: np.ndarray, std: float) -> tuple[np.ndarray, float]:
        """Mean and σ of the decoder's N(mean, std²) (Eq. 13) on the scale of levels, where bins have width 1."""
        per_unit = (self.num_levels - 1) / 2
        return (mean + 1) * per_unit, std * per_unit


def _nats(x: np.ndarray, mean: np.ndarray, std: float, *, num_levels: int | None = None) -> float:
    """−log N(x; mean, std²), summed; with `num_levels`, of the decoder's bins (Eq. 13)."""
    x_, mean_, log_variance = torch.from_numpy(x), torch.from_numpy(mean), 2 * math.log(std)
    return -float(discretized_log_likelihood_nats(x_, mean_, log_variance, num_levels=num_levels).sum())
