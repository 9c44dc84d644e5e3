#!/usr/bin/env bash
# accelerate: an environment variable overrides Accelerator(gradient_accumulation_steps=2), and divides the gradients.
#
# Expected: an argument that is given counts more than the environment. The documentation says so, the variable
#   counts "if not passed", and mixed_precision does so: Accelerator(mixed_precision="no") stays "no" whatever the
#   environment says.
# Seen: for gradient_accumulation_steps the environment wins. ACCELERATE_GRADIENT_ACCUMULATION_STEPS=4 makes 4 of a
#   given 1 or 2, and backward divides by 4. A loop of its own that counts its micro-batches (it has no accumulate)
#   takes steps with a quarter of the gradient. A variable of 1 turns a given 2 into 1 as well. Nothing is logged.
# Matters: `accelerate launch` sets the variable where DeepSpeed is used, and a shell or a job script that exports
#   it for one training changes all later ones. Adam hides the factor; gradient clipping, the logged norm and SGD do
#   not.
# Instead: look at accelerator.gradient_accumulation_steps after construction, and stop if it is not what was asked
#   for.
# Versions: accelerate 1.15.0, torch 2.13.0.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

environment accelerate==1.15.0 torch==2.13.0 numpy==2.4.6

observe <<'PYTHON'
import os

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState


def gradient(environment, **arguments):
    """What backward leaves of a gradient of 1 in this environment, and what the Accelerator says."""
    for name in ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "ACCELERATE_MIXED_PRECISION"):
        os.environ.pop(name, None)
    os.environ.update(environment)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    accelerator = Accelerator(cpu=True, **arguments)
    weight = torch.nn.Parameter(torch.zeros(()))
    accelerator.backward(weight * 1.0)
    steps, precision = accelerator.gradient_accumulation_steps, accelerator.mixed_precision
    return f"gradient {weight.grad.item()}, steps {steps}, {precision}"


for variable in (None, "4", "1"):
    environment = {} if variable is None else {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": variable}
    for arguments in ({}, {"gradient_accumulation_steps": 1}, {"gradient_accumulation_steps": 2}):
        print(f"variable {variable}, arguments {arguments}: {gradient(environment, **arguments)}")
environment = {"ACCELERATE_MIXED_PRECISION": "bf16"}
for arguments in ({}, {"mixed_precision": "no"}):
    print(f"variable bf16, arguments {arguments}: {gradient(environment, **arguments)}")
PYTHON

expect <<'SEEN'
variable None, arguments {}: gradient 1.0, steps 1, no
variable None, arguments {'gradient_accumulation_steps': 1}: gradient 1.0, steps 1, no
variable None, arguments {'gradient_accumulation_steps': 2}: gradient 0.5, steps 2, no
variable 4, arguments {}: gradient 0.25, steps 4, no
variable 4, arguments {'gradient_accumulation_steps': 1}: gradient 0.25, steps 4, no
variable 4, arguments {'gradient_accumulation_steps': 2}: gradient 0.25, steps 4, no
variable 1, arguments {}: gradient 1.0, steps 1, no
variable 1, arguments {'gradient_accumulation_steps': 1}: gradient 1.0, steps 1, no
variable 1, arguments {'gradient_accumulation_steps': 2}: gradient 1.0, steps 1, no
variable bf16, arguments {}: gradient 1.0, steps 1, bf16
variable bf16, arguments {'mixed_precision': 'no'}: gradient 1.0, steps 1, no
SEEN
