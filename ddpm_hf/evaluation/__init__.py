"""What a checkpoint is worth: bits/dim, FID and its kin, with the whole protocol; the paper's tables."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
