#!/usr/bin/env bash
# PyTorch: after the same seed, randn_like of a channels_last tensor is other noise than that of a contiguous one.
#
# Expected: memory format is how a tensor lies in memory, not what it holds (PyTorch's channels_last tutorial:
#   operators keep their semantics). With one seed and one shape one expects one noise; torch.randn(shape) and
#   randn_like(x) do agree for a contiguous x.
# Seen: random functions fill a dense tensor in the order of its memory. rand_like gives the same numbers at other
#   pixels. randn_like gives other numbers altogether: contiguous tensors are filled by a vectorized method, 16 at a
#   time, others by drawing one normal after the other. dropout drops other elements. This is so on the CPU; a CUDA
#   device has its own rules.
# Matters: adding images.to(memory_format=torch.channels_last) to a training script changes every draw of noise and
#   of dropout, so that two runs that were to be equal are not, and a loss measured "on the same noise" is not.
# Instead: draw by shape, torch.randn(x.shape, generator=...), and then .to(memory_format=...).
# Versions: torch 2.13.0, CPU.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

environment torch==2.13.0 numpy==2.4.6

observe <<'PYTHON'
import torch


def drawn(function, *inputs):
    torch.manual_seed(0)
    return function(*inputs)


plain = torch.ones(2, 3, 8, 8)
channels_last = plain.contiguous(memory_format=torch.channels_last)
print("the two inputs are equal:", torch.equal(plain, channels_last))
by_shape = drawn(torch.randn, 2, 3, 8, 8)
print("randn(shape) is randn_like of the contiguous one:", torch.equal(by_shape, drawn(torch.randn_like, plain)))
functions = {"rand_like": torch.rand_like, "randn_like": torch.randn_like, "dropout": torch.nn.Dropout(0.5)}
for name, function in functions.items():
    one, other = drawn(function, plain), drawn(function, channels_last)
    in_memory = torch.equal(one.flatten(), other.permute(0, 2, 3, 1).flatten())
    print(f"{name}: equal {torch.equal(one, other)}, equal when read in the order of memory {in_memory}")
PYTHON

expect <<'SEEN'
the two inputs are equal: True
randn(shape) is randn_like of the contiguous one: True
rand_like: equal False, equal when read in the order of memory True
randn_like: equal False, equal when read in the order of memory False
dropout: equal False, equal when read in the order of memory True
SEEN
