#!/usr/bin/env bash
# diffusers: Heun.from_config(ddpm.config) has other betas than Heun from the same configuration saved and read again.
#
# Expected: schedulers are exchanged by Other.from_config(pipe.scheduler.config), as the documentation has it: the
#   same process of noise, other steps. Whether the pipeline was built in the script or loaded from a folder makes no
#   difference.
# Seen: a value that was left at its default is not passed on. A DDPMScheduler() has beta_start 0.0001 by default,
#   Heun 0.00085, and Heun's default wins: four schedulers of the list of compatible ones get the betas of Stable
#   Diffusion, whose noisiest level has a sigma of 25 in place of 157. After save_pretrained and from_pretrained all
#   values are in the file, none counts as a default, and the betas are right. timestep_spacing, clip_sample and
#   variance_type change hands in the same way for others. Nothing is logged of it.
# Matters: a network trained with DDPMScheduler() is sampled at the end of the training script by another process
#   than after loading the checkpoint. One and the same network gives good samples in one of the two places only.
# Instead: state every value that matters, Heun.from_config(config, beta_start=config.beta_start, ...), or pass
#   dict(scheduler.config) without its key _use_default_values.
# Versions: diffusers 0.42.1, torch 2.13.0; scipy 1.17.1 and torchsde 0.2.6, which two of the schedulers need.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

environment diffusers==0.42.1 torch==2.13.0 numpy==2.4.6 scipy==1.17.1 torchsde==0.2.6

observe <<'PYTHON'
import diffusers
from diffusers import DDPMScheduler

DDPMScheduler().save_pretrained("folder")
loaded = DDPMScheduler.from_pretrained("folder").config
built = DDPMScheduler().config
explicit = {key: value for key, value in built.items() if key != "_use_default_values"}
print("all arguments equal:", all(loaded[key] == value for key, value in built.items() if not key.startswith("_")))

names = sorted(scheduler.__name__ for scheduler in DDPMScheduler().compatibles)
KEYS = ("beta_start", "beta_end", "timestep_spacing", "clip_sample")
for name in names:
    scheduler = getattr(diffusers, name)
    in_memory, from_folder, stated = (scheduler.from_config(config).config for config in (built, loaded, explicit))
    known = [key for key in KEYS if key in in_memory]
    differ = {key: (in_memory[key], from_folder[key]) for key in known if in_memory[key] != from_folder[key]}
    assert all(stated[key] == from_folder[key] for key in known)
    print(f"{name}: (in memory, from a folder) {differ}" if differ else f"{name}: the same")
for source, config in (("in memory", built), ("from a folder", loaded)):
    heun = diffusers.HeunDiscreteScheduler.from_config(config)
    print(f"Heun {source}: greatest sigma {heun.sigmas.max():.1f}")
PYTHON

expect <<'SEEN'
all arguments equal: True
DDIMScheduler: the same
DDPMScheduler: the same
DEISMultistepScheduler: (in memory, from a folder) {'timestep_spacing': ('linspace', 'leading')}
DPMSolverMultistepScheduler: (in memory, from a folder) {'timestep_spacing': ('linspace', 'leading')}
DPMSolverSDEScheduler: (in memory, from a folder) {'beta_start': (0.00085, 0.0001), 'beta_end': (0.012, 0.02), 'timestep_spacing': ('linspace', 'leading')}
DPMSolverSinglestepScheduler: the same
EDMEulerScheduler: the same
EulerAncestralDiscreteScheduler: (in memory, from a folder) {'timestep_spacing': ('linspace', 'leading')}
EulerDiscreteScheduler: (in memory, from a folder) {'timestep_spacing': ('linspace', 'leading')}
HeunDiscreteScheduler: (in memory, from a folder) {'beta_start': (0.00085, 0.0001), 'beta_end': (0.012, 0.02), 'timestep_spacing': ('linspace', 'leading'), 'clip_sample': (False, True)}
KDPM2AncestralDiscreteScheduler: (in memory, from a folder) {'beta_start': (0.00085, 0.0001), 'beta_end': (0.012, 0.02), 'timestep_spacing': ('linspace', 'leading')}
KDPM2DiscreteScheduler: (in memory, from a folder) {'beta_start': (0.00085, 0.0001), 'beta_end': (0.012, 0.02), 'timestep_spacing': ('linspace', 'leading')}
LMSDiscreteScheduler: (in memory, from a folder) {'timestep_spacing': ('linspace', 'leading')}
PNDMScheduler: the same
UniPCMultistepScheduler: (in memory, from a folder) {'timestep_spacing': ('linspace', 'leading')}
Heun in memory: greatest sigma 25.1
Heun from a folder: greatest sigma 157.4
SEEN
