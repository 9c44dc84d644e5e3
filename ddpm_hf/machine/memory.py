"""Physical memory that the process holds and no longer needs."""

import contextlib
import ctypes


def return_freed_memory() -> None:
    """Give freed memory back to the system, which glibc keeps between blocks in use; elsewhere nothing is done."""
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
