#!/usr/bin/env bash
# PyTorch's normal CDF has no lower tail in float32: at -5.5 it is wrong by 57 %, and at -6 it is 0.
#
# Expected: torch.special.ndtr and Normal.cdf in float32 are good to about seven digits; the value at -6, 9.9e-10,
#   is far from the smallest float32. scipy.special.ndtr, after which it is named, returns it for a float32.
# Seen: the result is a multiple of 3e-8, as if it were (1 + erf(x / sqrt 2)) / 2, whose terms cancel below the
#   mean. So the lower tail, where floating point has digits to spare, is no finer than the upper one, which ends at
#   1. The logarithm of the mass between -6.4 and -5.6 is -inf. In float64 the same happens further out: 2 % at -8,
#   and 0 at -9.
# Matters: the last term of the variational bound (DDPM, Eq. 13), PixelCNN-like likelihoods and learned codecs take
#   log(cdf(upper) - cdf(lower)) of a pixel's interval. Far from the mean that is noise or -inf, and the usual clamp
#   at 1e-12 makes a loss without a gradient of it, exactly for the pixels that are predicted worst.
# Instead: mirror the interval so that it lies below the mean, and take torch.erfc(-x / 2**0.5) / 2; or differences
#   of torch.special.log_ndtr, which is right.
# Versions: torch 2.13.0, CPU; scipy 1.17.1 for the truth.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

environment torch==2.13.0 scipy==1.17.1 numpy==2.4.6

observe <<'PYTHON'
import scipy.special
import torch

FUNCTIONS = {
    "ndtr": torch.special.ndtr,
    "Normal.cdf": torch.distributions.Normal(0.0, 1.0).cdf,
    "erfc": lambda x: torch.erfc(-x / 2**0.5) / 2,
    "exp of log_ndtr": lambda x: torch.special.log_ndtr(x).exp(),
    "scipy's ndtr": lambda x: torch.from_numpy(scipy.special.ndtr(x.numpy())),
}
for dtype, points in ((torch.float32, (-3.0, -5.0, -5.5, -6.0)), (torch.float64, (-6.0, -8.0, -9.0))):
    for point in points:
        truth = scipy.special.ndtr(point)
        x = torch.tensor([point], dtype=dtype)
        errors = {name: f"{100 * abs(function(x).item() / truth - 1):.0f} %" for name, function in FUNCTIONS.items()}
        print(f"{dtype}, at {point}, {truth:.1e}: {errors}")

interval = torch.tensor([-6.4, -5.6])
for name, function in FUNCTIONS.items():
    lower, upper = function(interval)
    print(f"log of the mass in [-6.4, -5.6] by {name}: {(upper - lower).log():.2f}")
PYTHON

expect <<'SEEN'
torch.float32, at -3.0, 1.3e-03: {'ndtr': '0 %', 'Normal.cdf': '0 %', 'erfc': '0 %', 'exp of log_ndtr': '0 %', "scipy's ndtr": '0 %'}
torch.float32, at -5.0, 2.9e-07: {'ndtr': '4 %', 'Normal.cdf': '4 %', 'erfc': '0 %', 'exp of log_ndtr': '0 %', "scipy's ndtr": '0 %'}
torch.float32, at -5.5, 1.9e-08: {'ndtr': '57 %', 'Normal.cdf': '57 %', 'erfc': '0 %', 'exp of log_ndtr': '0 %', "scipy's ndtr": '0 %'}
torch.float32, at -6.0, 9.9e-10: {'ndtr': '100 %', 'Normal.cdf': '100 %', 'erfc': '0 %', 'exp of log_ndtr': '0 %', "scipy's ndtr": '0 %'}
torch.float64, at -6.0, 9.9e-10: {'ndtr': '0 %', 'Normal.cdf': '0 %', 'erfc': '0 %', 'exp of log_ndtr': '0 %', "scipy's ndtr": '0 %'}
torch.float64, at -8.0, 6.2e-16: {'ndtr': '2 %', 'Normal.cdf': '2 %', 'erfc': '0 %', 'exp of log_ndtr': '0 %', "scipy's ndtr": '0 %'}
torch.float64, at -9.0, 1.1e-19: {'ndtr': '100 %', 'Normal.cdf': '100 %', 'erfc': '0 %', 'exp of log_ndtr': '0 %', "scipy's ndtr": '0 %'}
log of the mass in [-6.4, -5.6] by ndtr: -inf
log of the mass in [-6.4, -5.6] by Normal.cdf: -inf
log of the mass in [-6.4, -5.6] by erfc: -18.36
log of the mass in [-6.4, -5.6] by exp of log_ndtr: -18.36
log of the mass in [-6.4, -5.6] by scipy's ndtr: -18.36
SEEN
