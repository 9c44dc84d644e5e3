#!/usr/bin/env bash
# torchmetrics: normalize=True cuts 63 of 256 grey levels down by one, and only InceptionScore applies it to own
# features.
#
# Expected: normalize=True says that images are floats in [0, 1]. A level k / 255 is then handed to the network as
#   k, also after the way through a sampler's [-1, 1], and FID, KID and InceptionScore hand the same images to the
#   same extractor.
# Seen: the conversion is (images * 255).byte(), which cuts off. k / 255 survives, but (k / 127.5 - 1) / 2 + 0.5,
#   which is what a diffusion pipeline returns, is often a float just below k / 255: 63 levels arrive as k - 1. And
#   with an extractor of one's own FID and KID leave the conversion out, so that it sees floats in [0, 1], where
#   InceptionScore gives it bytes.
# Matters: real images are read as bytes and samples come from [-1, 1], so that only one side is darkened, by up to
#   one level. And one extractor module, shared by the three metrics, is fed two kinds of input.
# Instead: images.mul(255).round().clamp(0, 255).byte() and normalize=False, everywhere.
# Versions: torchmetrics 1.9.0, torch 2.13.0.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

environment torchmetrics==1.9.0 torch==2.13.0 numpy==2.4.6

observe <<'PYTHON'
import torch
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore
from torchmetrics.image.kid import KernelInceptionDistance


class Recorder(torch.nn.Module):
    """An extractor that keeps what it is given."""

    num_features = 8

    def forward(self, images):
        self.images = images
        return images.float().flatten(1)[:, :8]


levels = torch.arange(256).reshape(1, 1, 16, 16)
IMAGES = {"k / 255": levels / 255, "(k / 127.5 - 1) / 2 + 0.5": (levels / 127.5 - 1) / 2 + 0.5}
for metric in (FrechetInceptionDistance, KernelInceptionDistance, InceptionScore):
    for name, images in IMAGES.items():
        recorder = Recorder()
        update = metric(recorder, normalize=True).update
        update(images) if metric is InceptionScore else update(images, real=False)
        seen = recorder.images
        scale = 1 if seen.dtype == torch.uint8 else 255
        changed = int((seen * scale - levels).abs().gt(0.01).sum())
        print(f"{metric.__name__}, {name}: extractor sees {seen.dtype}, {changed} levels changed")
for name, images in IMAGES.items():
    rounded = images.mul(255).round().clamp(0, 255).byte()
    print(f"rounded, {name}: {int((rounded != levels).sum())} levels changed")
PYTHON

expect <<'SEEN'
FrechetInceptionDistance, k / 255: extractor sees torch.float32, 0 levels changed
FrechetInceptionDistance, (k / 127.5 - 1) / 2 + 0.5: extractor sees torch.float32, 0 levels changed
KernelInceptionDistance, k / 255: extractor sees torch.float32, 0 levels changed
KernelInceptionDistance, (k / 127.5 - 1) / 2 + 0.5: extractor sees torch.float32, 0 levels changed
InceptionScore, k / 255: extractor sees torch.uint8, 0 levels changed
InceptionScore, (k / 127.5 - 1) / 2 + 0.5: extractor sees torch.uint8, 63 levels changed
rounded, k / 255: 0 levels changed
rounded, (k / 127.5 - 1) / 2 + 0.5: 0 levels changed
SEEN
