#!/usr/bin/env bash
# diffusers: EDMEulerScheduler is "compatible" with DDPMScheduler, and asks a DDPM network for timesteps from 1.1 to
# -1.6.
#
# Expected: scheduler.compatibles names the schedulers that can take over a pipeline: built from its configuration
#   they run the same process, defined by its betas, and ask the network for timesteps from 0 to 999, as it was
#   trained.
# Seen: one of the list, EDMEulerScheduler, has no betas. from_config drops them without a word and takes EDM's own
#   noise levels, 80 to 0.002, for data of standard deviation 0.5; its timesteps are log(sigma) / 4, all of them below
#   2. A DDPM network is told that pure noise is a nearly clean image. There is no error.
# Matters: "try all compatible schedulers" is the usual loop in comparisons and in user interfaces, and this one is
#   then listed as a sampler that does not work.
# Instead: keep those that have betas after from_config, hasattr(scheduler, "betas"); the configuration lists
#   beta_start for this one too.
# Versions: diffusers 0.42.1, torch 2.13.0; scipy 1.17.1 and torchsde 0.2.6, which two of the schedulers need.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

environment diffusers==0.42.1 torch==2.13.0 numpy==2.4.6 scipy==1.17.1 torchsde==0.2.6

observe <<'PYTHON'
from diffusers import DDPMScheduler

ddpm = DDPMScheduler(beta_start=0.0001, beta_end=0.02)
for scheduler_class in sorted(ddpm.compatibles, key=lambda scheduler: scheduler.__name__):
    scheduler = scheduler_class.from_config(ddpm.config)
    scheduler.set_timesteps(20)
    first, last = float(scheduler.timesteps[0]), float(scheduler.timesteps[-1])
    print(f"{scheduler_class.__name__}: has betas {hasattr(scheduler, 'betas')}, timesteps {first:.1f} to {last:.1f}")
PYTHON

expect <<'SEEN'
DDIMScheduler: has betas True, timesteps 950.0 to 0.0
DDPMScheduler: has betas True, timesteps 950.0 to 0.0
DEISMultistepScheduler: has betas True, timesteps 999.0 to 50.0
DPMSolverMultistepScheduler: has betas True, timesteps 999.0 to 50.0
DPMSolverSDEScheduler: has betas True, timesteps 999.0 to 0.0
DPMSolverSinglestepScheduler: has betas True, timesteps 999.0 to 50.0
EDMEulerScheduler: has betas False, timesteps 1.1 to -1.6
EulerAncestralDiscreteScheduler: has betas True, timesteps 999.0 to 0.0
EulerDiscreteScheduler: has betas True, timesteps 999.0 to 0.0
HeunDiscreteScheduler: has betas True, timesteps 999.0 to 0.0
KDPM2AncestralDiscreteScheduler: has betas True, timesteps 999.0 to 0.0
KDPM2DiscreteScheduler: has betas True, timesteps 999.0 to 0.0
LMSDiscreteScheduler: has betas True, timesteps 999.0 to 0.0
PNDMScheduler: has betas True, timesteps 950.0 to 0.0
UniPCMultistepScheduler: has betas True, timesteps 999.0 to 50.0
SEEN
