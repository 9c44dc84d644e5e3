"""ddpm_hf: the DDPM paper (Ho, Jain, Abbeel 2020) as Hugging Face classes, exact to the paper's own code.

Names are imported when they are first asked for (PEP 562), here and in every package below: `import ddpm_hf` does not
import torch. The stubs beside the `__init__` files, `__init__.pyi`, say what is public and where it is defined.
"""

import lazy_loader

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
