"""The variational bound as a file: a lossless image codec. Experimental; needs the extra `codec`."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
