"""Networks and pipelines from elsewhere: the paper's TensorFlow checkpoints and PyTorch ports → ours, stock ⇄ ours."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
