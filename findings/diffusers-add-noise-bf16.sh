#!/usr/bin/env bash
# diffusers: add_noise adds no noise at all to bfloat16 images at the first ten timesteps.
#
# Expected: scheduler.add_noise(x_0, noise, t) is sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise (DDPM, Eq. 4), rounded
#   to the dtype of the images: at t = 0 of the linear schedule 0.01 of noise, which bfloat16 holds well.
# Seen: the table abar is cast to the images' dtype first, and 1 - abar is taken there. bfloat16 has no number
#   between 0.996 and 1, so abar_0 ... abar_9 are 1, and the noise vanishes; after that its factor goes in steps
#   (0.0625 at t = 10 and 11, in place of 0.047 and 0.050). float16 loses t = 0 and 1. get_velocity does the same.
# Matters: scripts that train in "bf16" with latents or images in weight_dtype do this. The network is asked for
#   unit noise in images that have none: for 1 % of all steps the loss is 1 whatever it learns, and the last steps of
#   sampling are trained worst.
# Instead: add noise in float32, scheduler.add_noise(x.float(), noise.float(), t), and cast the result.
# Versions: diffusers 0.42.1, torch 2.13.0.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

environment diffusers==0.42.1 torch==2.13.0 numpy==2.4.6

observe <<'PYTHON'
import torch
from diffusers import DDPMScheduler

SCHEDULES = {
    "linear, DDPM": {"beta_schedule": "linear"},
    "scaled_linear, Stable Diffusion": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "squaredcos_cap_v2": {"beta_schedule": "squaredcos_cap_v2"},
}
steps = torch.arange(1000)
for name, options in SCHEDULES.items():
    scheduler = DDPMScheduler(**options)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        image, noise = torch.zeros(1000, 1, dtype=dtype), torch.ones(1000, 1, dtype=dtype)
        factor = scheduler.add_noise(image, noise, steps).squeeze()
        first = [round(value, 3) for value in factor[9:12].tolist()]
        print(f"{name}, {dtype}: no noise at t = {steps[factor == 0].tolist()}, at t = 9 to 11 {first}")
PYTHON

expect <<'SEEN'
linear, DDPM, torch.float32: no noise at t = [], at t = 9 to 11 [0.044, 0.047, 0.05]
linear, DDPM, torch.float16: no noise at t = [0, 1], at t = 9 to 11 [0.044, 0.044, 0.049]
linear, DDPM, torch.bfloat16: no noise at t = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9], at t = 9 to 11 [0.0, 0.062, 0.062]
scaled_linear, Stable Diffusion, torch.float32: no noise at t = [], at t = 9 to 11 [0.093, 0.098, 0.102]
scaled_linear, Stable Diffusion, torch.float16: no noise at t = [], at t = 9 to 11 [0.094, 0.099, 0.101]
scaled_linear, Stable Diffusion, torch.bfloat16: no noise at t = [0, 1], at t = 9 to 11 [0.088, 0.088, 0.108]
squaredcos_cap_v2, torch.float32: no noise at t = [], at t = 9 to 11 [0.025, 0.027, 0.029]
squaredcos_cap_v2, torch.float16: no noise at t = [0, 1, 2, 3], at t = 9 to 11 [0.022, 0.022, 0.031]
squaredcos_cap_v2, torch.bfloat16: no noise at t = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20], at t = 9 to 11 [0.0, 0.0, 0.0]
SEEN
