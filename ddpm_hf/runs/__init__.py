"""A training run and its folder: options, batches, state, checkpoints, log, records, report."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
