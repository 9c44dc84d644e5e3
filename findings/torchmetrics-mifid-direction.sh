#!/usr/bin/env bash
# torchmetrics: MIFID looks from each real image for the nearest generated one, so that copies of a few real images
# are not seen; a copy of all of them scores 0, its best.
#
# Expected: the memorization-informed FID (Bai et al. 2021) divides FID by the mean distance, 1 − |cosine|, from each
#   generated image to the nearest one of the training set: a generator that copies has a large score.
# Seen: compute() hands the features over as (real, generated) to a function that takes the least over the second, so
#   that the mean is over real images. Of 50 real images, drawn ten times each, every one is a copy, and yet the divisor
#   is larger than that of 500 new draws: it says that they are further from the real ones. And where FID is below
#   1e-8, as of an exact copy of the whole set, the result is 0, the best there is.
# Matters: small sets are where a generator copies, and it does not copy all of them. MIFID then grows only as FID does.
# Instead: the distances from generated to real images, beside those of held-out real ones, and FID apart from them.
# Versions: torchmetrics 1.9.0, torch 2.13.0.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

environment torchmetrics==1.9.0 torch==2.13.0 numpy==2.4.6

observe <<'PYTHON'
import torch
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.mifid import MemorizationInformedFrechetInceptionDistance


class Flat(torch.nn.Module):
    """Pixels as features."""

    num_features = 16

    def forward(self, images):
        return images.flatten(1)


def draws(count):
    return torch.rand(count, 1, 4, 4, generator=generator, dtype=torch.float64)


def scored(kind, generated):
    metric = kind(Flat()).set_dtype(torch.float64)
    metric.update(real, real=True)
    metric.update(generated, real=False)
    return float(metric.compute())


def nearest(images, others):
    """Mean of 1 − |cosine| from each image to the nearest of the others."""
    rows = [each.flatten(1) / each.flatten(1).norm(dim=1, keepdim=True) for each in (images, others)]
    return float((1 - (rows[0] @ rows[1].T).abs()).amin(dim=1).mean().clamp(min=0))


generator = torch.Generator().manual_seed(0)
real = draws(500)
for name, generated in {
    "500 new draws": draws(500),
    "50 real ones, ten times each": real[:50].repeat(10, 1, 1, 1),
    "all real ones": real,
}.items():
    fid = scored(FrechetInceptionDistance, generated)
    mifid = scored(MemorizationInformedFrechetInceptionDistance, generated)
    print(f"{name}: FID {fid:.3f}, MIFID {mifid:.2f}, a divisor of {fid / mifid if mifid else 0:.3f}")
    to_real, from_real = nearest(generated, real), nearest(real, generated)
    print(f"  distance generated to real {to_real:.3f}, real to generated {from_real:.3f}")
PYTHON

expect <<'SEEN'
500 new draws: FID 0.025, MIFID 0.36, a divisor of 0.069
  distance generated to real 0.070, real to generated 0.069
50 real ones, ten times each: FID 0.155, MIFID 1.64, a divisor of 0.095
  distance generated to real 0.000, real to generated 0.095
all real ones: FID 0.000, MIFID 0.00, a divisor of 0.000
  distance generated to real 0.000, real to generated 0.000
SEEN
