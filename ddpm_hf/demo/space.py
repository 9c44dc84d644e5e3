"""The demo page as a Space: a folder that one pushes to the Hub."""

import importlib.metadata
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import yaml

from ..runs import options_beside, public_options
from .models import load, newest_grid

APP = '''"""The demo page of ddpm_hf as a Space; written by `ddpm-hf demo --space`."""

import os
from pathlib import Path

from ddpm_hf.cli import main

CHECKPOINTS = {names}

if __name__ == "__main__":
    folder = Path(__file__).resolve().parent / "checkpoints"
    host = os.environ.get("GRADIO_SERVER_NAME", "0.0.0.0")
    port = os.environ.get("GRADIO_SERVER_PORT", "7860")
    main(["demo", *(str(folder / name) for name in CHECKPOINTS), "--host", host, "--port", port])
'''
SPACE_CARD = """---
title: DDPM demo
sdk: gradio
sdk_version: {sdk_version}
app_file: app.py
pinned: false
tags:
- ddpm
- diffusion
- arxiv:2006.11239
---

# DDPM demo

What a DDPM ([Ho, Jain, Abbeel 2020](https://arxiv.org/abs/2006.11239)) does to noise and to images, shown with these
checkpoints: {names}. Written by `ddpm-hf demo --space`; `ddpm_hf/` is a copy of the package.
"""


def write_space(folder: Path, checkpoints: Sequence[str]) -> None:
    """Write a Space into `folder`, new or empty: the app, the checkpoints with their code, a copy of this package, and
    the list of what it needs.

    Raises ValueError for checkpoints that the page cannot show, and where the package is not installed: its metadata
    list what it needs.
    """
    try:
        requirements = importlib.metadata.requires("ddpm_hf") or []
    except importlib.metadata.PackageNotFoundError:
        raise ValueError("what ddpm_hf needs is known only where it is installed; install it with pip") from None
    models = load(checkpoints, "cpu", fast=False)
    names = [re.sub(r"[^\w.-]+", "-", name) for name in models]
    if len(set(names)) < len(names):
        raise ValueError(f"two checkpoints would lie in one folder: {', '.join(names)}; rename one")
    package = Path(__file__).resolve().parents[1]
    shutil.copytree(package, folder / "ddpm_hf", ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)
    for checkpoint, name, model in zip(checkpoints, names, models.values(), strict=True):
        saved = folder / "checkpoints" / name
        model.pipe.save_pretrained(saved)
        if options := options_beside(checkpoint):
            text = yaml.safe_dump(public_options(options), sort_keys=False, allow_unicode=True)
            (saved / "options.yaml").write_text(text, encoding="utf-8")
        if grid := newest_grid(checkpoint):
            (saved / "samples").mkdir()
            shutil.copy(grid[1], saved / "samples")
    needed = [line for line in requirements if "extra ==" not in line]
    needed += [line.partition(";")[0].strip() for line in requirements if line.startswith("matplotlib")][:1]
    (folder / "requirements.txt").write_text("\n".join(needed) + "\n", encoding="utf-8")
    (folder / "app.py").write_text(APP.format(names=names), encoding="utf-8")
    card = SPACE_CARD.format(sdk_version=importlib.metadata.version("gradio"), names=", ".join(names))
    (folder / "README.md").write_text(card, encoding="utf-8")
