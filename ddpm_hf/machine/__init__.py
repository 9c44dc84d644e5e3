"""What is true of the computer and not of diffusion: processes, signals, files, CUDA graphs."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
