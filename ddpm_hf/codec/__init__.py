"""The variational bound as a file: a lossless image codec. Experimental; needs the extra `codec`.

It is for proof and for teaching, not for daily use: it is slow, and for few or small images other formats are shorter
(docs/codec.md). `bits_back` says how it codes, `files` what a file consists of.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
