"""What a word of a command line names in Python: `module:name`."""

import importlib
import os
import re
import sys
from typing import Any


def is_module_and_name(text: object) -> bool:
    """Whether a text has the form `package.module:name`."""
    return isinstance(text, str) and re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*", text) is not None


def object_named(text: str, whose: str) -> Any:
    """The class or function that `package.module:name` names, from PYTHONPATH or else the working folder.

    Raises ValueError, which begins with `whose`, for another form, a module that cannot be imported or lacks the name,
    and what cannot be called.
    """
    if not is_module_and_name(text):
        raise ValueError(f"{whose} {text!r} must have the form package.module:name")
    module_name, _, name = text.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # last, so that nothing here stands in for what is installed
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ValueError(f"{whose} {text!r}: {error}; its folder must be on PYTHONPATH, or the working one") from error
    found = getattr(module, name, None)
    if not callable(found):
        raise ValueError(f"{whose} {text!r}: {module_name} has no callable {name!r}")
    return found
