#!/usr/bin/env bash
# PyTorch's GroupNorm on a CPU loses its digits in channels_last: an offset of 1000 makes its output ten times larger.
#
# Expected: GroupNorm takes the mean away and divides by the standard deviation (torch.nn.GroupNorm), so a constant
#   added to the input changes nothing, and the memory format, which is a matter of speed, changes the last digits
#   only.
# Seen: for contiguous tensors that holds. For channels_last ones in float32 the variance is the mean of the squares
#   minus the square of the mean, or behaves like it: at an offset of 100 standard deviations the output is wrong by
#   more than 0.01, and at 1000 the two nearly cancel and the output grows by orders of magnitude. BatchNorm is right
#   in both formats.
# Matters: U-Nets of diffusion models are GroupNorm throughout, and channels_last is the advice for speed. Data that
#   was not scaled to [-1, 1] (depth in mm, 16-bit levels, temperatures in kelvin) reaches such ratios.
# Instead: scale the data; or model.to(memory_format=torch.contiguous_format); or compute
#   group_norm(x.contiguous()).
# Versions: torch 2.13.0, CPU; the same with the kernels for AVX-512, AVX2 and neither (ATEN_CPU_CAPABILITY).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

environment torch==2.13.0 numpy==2.4.6

observe <<'PYTHON'
import torch
from torch.nn.functional import batch_norm, group_norm

FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
BOUNDS = ((1, "above 1"), (0.01, "above 0.01"), (0, "below 0.01"))


def batch_statistics(x):
    return batch_norm(x, None, None, training=True)


noise = torch.randn(1, 128, 32, 32, generator=torch.Generator().manual_seed(0))
for offset in (0, 100, 1000):
    for name, norm in (("group_norm", lambda x: group_norm(x, 32)), ("batch_norm", batch_statistics)):
        truth = norm((noise + offset).double())
        for memory, memory_format in FORMATS.items():
            output = norm((noise + offset).contiguous(memory_format=memory_format))
            error = (output - truth).abs().max()
            size = next(words for bound, words in BOUNDS if error > bound)
            spread = "1" if abs(output.std() - 1) < 0.01 else "above 10" if output.std() > 10 else "other"
            print(f"offset {offset}, {name}, {memory}: greatest error {size}, standard deviation {spread}")
PYTHON

expect <<'SEEN'
offset 0, group_norm, contiguous: greatest error below 0.01, standard deviation 1
offset 0, group_norm, channels_last: greatest error below 0.01, standard deviation 1
offset 0, batch_norm, contiguous: greatest error below 0.01, standard deviation 1
offset 0, batch_norm, channels_last: greatest error below 0.01, standard deviation 1
offset 100, group_norm, contiguous: greatest error below 0.01, standard deviation 1
offset 100, group_norm, channels_last: greatest error above 0.01, standard deviation 1
offset 100, batch_norm, contiguous: greatest error below 0.01, standard deviation 1
offset 100, batch_norm, channels_last: greatest error below 0.01, standard deviation 1
offset 1000, group_norm, contiguous: greatest error below 0.01, standard deviation 1
offset 1000, group_norm, channels_last: greatest error above 1, standard deviation above 10
offset 1000, batch_norm, contiguous: greatest error below 0.01, standard deviation 1
offset 1000, batch_norm, channels_last: greatest error below 0.01, standard deviation 1
SEEN
