#!/usr/bin/env bash
# diffusers: of DDPMScheduler's six variance types fixed_large_log and learned give NaN.
#
# Expected: the documentation lists fixed_small, fixed_small_log, fixed_large, fixed_large_log, learned and
#   learned_range as choices. "log" says that the logarithm is kept, as in the paper's code; the noise that is added
#   is the same. A learned variance is the network's as a logarithm (Nichol and Dhariwal 2021), exp(v).
# Seen: with fixed_large_log the step takes the square root of log(beta), which is negative: every sample is NaN,
#   after one step. With learned it takes the square root of the network's output: NaN for any logarithm of a variance
#   below 1, which all of them are. fixed_small_log and learned_range are right. The constructor and the first step
#   raise nothing.
# Matters: fixed_large_log is what one writes for the paper's CIFAR-10 model, whose code calls it fixedlarge and
#   keeps the logarithm. A NaN then points at the weights or at the precision.
# Instead: fixed_large, which is the same variance; learned_range in place of learned.
# Versions: diffusers 0.42.1, torch 2.13.0.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

environment diffusers==0.42.1 torch==2.13.0 numpy==2.4.6

observe <<'PYTHON'
import torch
from diffusers import DDPMScheduler

TYPES = ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned", "learned_range")
for name in TYPES:
    scheduler = DDPMScheduler(variance_type=name, clip_sample=False)
    image = torch.zeros(1, 1, 256, 256)
    output = image
    if name.startswith("learned"):
        # The network's second half asks for the greatest variance: log(beta) itself, or 1 in the range from -1 to 1.
        variance = torch.full_like(image, 1.0 if name == "learned_range" else scheduler.betas[500].log().item())
        output = torch.cat([image, variance], dim=1)
    previous = scheduler.step(output, 500, image, generator=torch.Generator().manual_seed(0)).prev_sample
    print(f"{name}: noise of {previous.std():.2f}, expected {scheduler.betas[500].sqrt():.2f}")
PYTHON

expect <<'SEEN'
fixed_small: noise of 0.10, expected 0.10
fixed_small_log: noise of 0.10, expected 0.10
fixed_large: noise of 0.10, expected 0.10
fixed_large_log: noise of nan, expected 0.10
learned: noise of nan, expected 0.10
learned_range: noise of 0.10, expected 0.10
SEEN
