#!/usr/bin/env bash
# diffusers: use_beta_sigmas jumps from a noise level of 2.2 to 0.01 in its last step, and loses most of the spread.
#
# Expected: "Beta Sampling is All You Need", which the documentation names, takes the timesteps from a Beta(0.6,
#   0.6) distribution, which is dense at both ends: many steps where the image gets its form, many where it gets its
#   details.
# Seen: the distribution is applied to the noise levels (sigma) themselves, between 157 and 0.01. Dense at the lower
#   end then means one level of 20 below 1, where the default schedule has five. For data N(0.3, 0.2^2), with the
#   exact network, 20 steps of Euler give a standard deviation of 0.03 in place of 0.2 (default 0.14, Karras 0.17, and
#   0.17 with the timesteps themselves from the same distribution).
# Matters: all samples look alike and smooth, as if the network had collapsed, in the schedule that was chosen for
#   quality.
# Instead: scheduler.set_timesteps(timesteps=...) with the quantiles of the distribution times 999, as below.
# Versions: diffusers 0.42.1, torch 2.13.0, scipy 1.17.1.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

environment diffusers==0.42.1 torch==2.13.0 numpy==2.4.6 scipy==1.17.1

observe <<'PYTHON'
import numpy as np
import torch
from diffusers import EulerDiscreteScheduler
from scipy.stats import beta

MEAN, STD = 0.3, 0.2


def sampled_std(scheduler):
    """Euler's steps are affine in x, so that two chains, begun at 0 and 1, tell the standard deviation exactly."""
    x = torch.tensor([0.0, 1.0], dtype=torch.float64) * float(scheduler.sigmas[0])
    for t, sigma in zip(scheduler.timesteps, scheduler.sigmas.double(), strict=False):
        scheduler.scale_model_input(x, t)
        noise = (x - MEAN) * sigma / (sigma**2 + STD**2)  # what a perfect network returns for data N(MEAN, STD^2)
        x = scheduler.step(noise, t, x).prev_sample
    return (x[1] - x[0]).abs().item()


OPTIONS = {"default": {}, "Karras": {"use_karras_sigmas": True}, "beta": {"use_beta_sigmas": True}, "timesteps": {}}
for name, options in OPTIONS.items():
    scheduler = EulerDiscreteScheduler(beta_start=1e-4, beta_end=0.02, **options)
    if name == "timesteps":
        quantiles = beta.ppf(1 - np.linspace(0, 1, 20), 0.6, 0.6)
        scheduler.set_timesteps(timesteps=np.round(999 * quantiles).tolist())
    else:
        scheduler.set_timesteps(20)
    last = [f"{sigma:.2f}" for sigma in scheduler.sigmas[-6:].tolist()]
    low = int(((scheduler.sigmas < 1) & (scheduler.sigmas > 0)).sum())
    print(f"{name}: levels between 1 and 0: {low}, the last {last}")
    print(f"  standard deviation of the samples {sampled_std(scheduler):.2f}, of the data {STD}")
PYTHON

expect <<'SEEN'
default: levels between 1 and 0: 5, the last ['0.77', '0.55', '0.36', '0.18', '0.01', '0.00']
  standard deviation of the samples 0.14, of the data 0.2
Karras: levels between 1 and 0: 6, the last ['0.30', '0.15', '0.07', '0.03', '0.01', '0.00']
  standard deviation of the samples 0.17, of the data 0.2
beta: levels between 1 and 0: 1, the last ['21.02', '13.20', '6.79', '2.16', '0.01', '0.00']
  standard deviation of the samples 0.03, of the data 0.2
timesteps: levels between 1 and 0: 7, the last ['0.46', '0.29', '0.15', '0.06', '0.01', '0.00']
  standard deviation of the samples 0.17, of the data 0.2
SEEN
