"""What this CPU can do, which decides what may be compared on it."""

from functools import cache

import torch

INSTRUCTIONS = {  # the name in a result → PyTorch's question, which has no promise to stay
    "amx": "_is_amx_tile_supported",
    "avx512_bf16": "_is_avx512_bf16_supported",
    "avx512": "_is_avx512_supported",
    "avx2": "_is_avx2_supported",
}
NO_AMX, NO_GPU = "this CPU has no AMX", "there is no GPU here"


@cache
def instructions() -> dict[str, bool]:
    """Which of the instruction sets that our kernels and oneDNN choose by are there."""
    return {name: bool(getattr(torch.cpu, question, bool)()) for name, question in INSTRUCTIONS.items()}


def has_amx() -> bool:
    return instructions()["amx"]


def without_amx() -> str | None:
    """Why a row that needs AMX cannot be measured; None where it can."""
    return None if has_amx() else NO_AMX
