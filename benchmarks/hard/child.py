"""Loads inputs by the package that PYTHONPATH names, and keeps what came of each. Started by hard_inputs.py."""

import json
import logging
import os
import sys
import warnings
from pathlib import Path

import datasets
import numpy as np
from PIL import Image

from ddpm_hf.data import load_samples


class Lines(logging.Handler):
    """Keeps the messages of the package's logger."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def load(task: dict, pixels: Path) -> dict:
    """What one load said, and the pixels it gave or the error it raised."""
    handler = Lines()
    logging.getLogger("ddpm_hf").addHandler(handler)
    os.chdir(task["folder"])
    result: dict = {"error": None, "message": ""}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        try:
            names = {"datasets": datasets, "np": np, "Image": Image, "Path": Path}
            first = [eval(task["dataset"], names)] if task["dataset"] else []
            caught.clear()  # of making the input
            np.save(pixels, load_samples(*first, **task["call"]).array, allow_pickle=False)
        except BaseException as error:
            result = {
                "error": type(error).__name__,
                "message": str(error),
                "is_refusal": isinstance(error, ValueError),
            }
    logging.getLogger("ddpm_hf").removeHandler(handler)
    return {
        **result,
        "said": handler.lines + [str(each.message) for each in caught if issubclass(each.category, UserWarning)],
    }


def main() -> None:
    datasets.disable_progress_bars()
    tasks, results = Path(sys.argv[1]), Path(sys.argv[2])
    for number, task in enumerate(json.loads(tasks.read_text())):
        if not task["skip"]:
            (results / f"{number}.json").write_text(json.dumps(load(task, results / f"{number}.npy")))


if __name__ == "__main__":
    main()
