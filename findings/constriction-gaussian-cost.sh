#!/usr/bin/env bash
# constriction's QuantizedGaussian takes a NaN mean and a very wide support without a word; the file pays for both.
#
# Expected: a mean of NaN is an error. And the documentation says that the Gaussian is clipped to the
#   support and renormalized, so that a support far wider than the Gaussian changes nothing: 0 costs 1.38 bits for a
#   Gaussian of mean 0 and std 1, whatever lies further out.
# Seen: with a NaN or infinite mean all symbols are coded, and decoded, at about 18 bits each. And each level of the support
#   gets one of 2^24 units of probability first, which the Gaussian then lacks: +-1,000,000 costs 0.18 bits per symbol,
#   +-4,000,000 0.94, +-8,000,000 4.4. Nothing is wrong in the files, but for their size.
# Matters: a codec built on a diffusion model gets its means from a network and its latents on a fine grid. A NaN of the
#   network, or one grid for all steps "wide enough for everything", shows in nothing but the rate.
# Instead: assert np.isfinite(means).all(), and code in a window of some standard deviations around the mean, with an escape.
# Versions: constriction 0.5.0, numpy 2.4.6.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

environment constriction==0.5.0 numpy==2.4.6

observe <<'PYTHON'
import constriction
import numpy as np


def coded(symbols, width, mean, std):
    """Bits per symbol in a support of -width..width, and whether they are decoded right."""
    model = constriction.stream.model.QuantizedGaussian(-width, width)
    parameters = np.full(len(symbols), mean), np.full(len(symbols), std)
    coder = constriction.stream.stack.AnsCoder()
    coder.encode_reverse(symbols, model, *parameters)
    bits = coder.num_bits() / len(symbols)
    right = (coder.decode(model, *parameters) == symbols).all()
    return f"{bits:.1f} bits per symbol, decoded right: {right}"


few = np.tile(np.array([-10, 0, 3, 10], np.int32), 1000)
for mean, std in ((0.0, 3.0), (float("nan"), 3.0), (float("inf"), 3.0)):
    print(f"mean {mean}, std {std}: {coded(few, 10, mean, std)}")
for width in (10, 10_000, 1_000_000, 4_000_000, 8_000_000):
    print(f"zeros, mean 0, std 1, support +-{width:,}: {coded(np.zeros(20_000, np.int32), width, 0.0, 1.0)}")
PYTHON

expect <<'SEEN'
mean 0.0, std 3.0: 6.8 bits per symbol, decoded right: True
mean nan, std 3.0: 18.0 bits per symbol, decoded right: True
mean inf, std 3.0: 18.0 bits per symbol, decoded right: True
zeros, mean 0, std 1, support +-10: 1.4 bits per symbol, decoded right: True
zeros, mean 0, std 1, support +-10,000: 1.4 bits per symbol, decoded right: True
zeros, mean 0, std 1, support +-1,000,000: 1.6 bits per symbol, decoded right: True
zeros, mean 0, std 1, support +-4,000,000: 2.3 bits per symbol, decoded right: True
zeros, mean 0, std 1, support +-8,000,000: 5.8 bits per symbol, decoded right: True
SEEN
