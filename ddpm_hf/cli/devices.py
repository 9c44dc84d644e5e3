"""The device that a subcommand runs on."""

import torch


def default_device() -> str:
    """A GPU, where there is one."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def usable_device(text: str | None) -> str:
    """`text`, a device that torch knows and this machine has; the default for None. Raises ValueError."""
    if text is None:
        return default_device()
    try:
        torch.zeros(1, device=text).tolist()  # `meta` holds no numbers
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"{text!r} cannot be used here: {str(error).splitlines()[0]}") from None
    return text
