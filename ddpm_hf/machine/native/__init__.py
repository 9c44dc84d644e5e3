"""Kernels of our own for a CPU, in C++, where the machine has a compiler: 3×3 convolutions, GroupNorm with SiLU."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
