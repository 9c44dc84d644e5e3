"""The subcommand `ddpm-hf demo`: a page to look at checkpoints with, served here or written as a Space."""

import argparse
import importlib.metadata
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from .arguments import SCHEDULERS, check_new_folder, default_device, parse_device, parse_seeds
from .card import public_options, read_options
from .demo_tasks import load

DEFAULT_CHECKPOINT = Path("model_cards") / "ddpm-digits"

# ---- as a Space ----------------------------------------------------------------------------------------------------

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
    """A Space in `folder`, new or empty: the page, the checkpoints with their code, this package, what they need.

    Raises ValueError for checkpoints that the page cannot show, and where the package is not installed, so that what
    it needs is not known.
    """
    try:
        requirements = importlib.metadata.requires("ddpm_hf") or []
    except importlib.metadata.PackageNotFoundError:
        raise ValueError("what ddpm_hf needs is known only where it is installed; install it with pip") from None
    models = load(checkpoints, "cpu", fast=False)
    names = [re.sub(r"[^\w.-]+", "-", name) for name in models]
    if len(set(names)) < len(names):
        raise ValueError(f"two checkpoints would lie in one folder: {', '.join(names)}; rename one")
    package = Path(__file__).resolve().parent
    shutil.copytree(package, folder / "ddpm_hf", ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)
    for checkpoint, name, model in zip(checkpoints, names, models.values(), strict=True):
        saved = folder / "checkpoints" / name
        model.pipe.save_pretrained(saved)
        options = Path(checkpoint) / "options.yaml"
        if options.is_file():
            text = yaml.safe_dump(public_options(read_options(options)), sort_keys=False, allow_unicode=True)
            (saved / "options.yaml").write_text(text, encoding="utf-8")
    needed = [line for line in requirements if "extra ==" not in line]
    needed += [line.partition(";")[0].strip() for line in requirements if line.startswith("matplotlib")][:1]
    (folder / "requirements.txt").write_text("\n".join(needed) + "\n", encoding="utf-8")
    (folder / "app.py").write_text(APP.format(names=names), encoding="utf-8")
    card = SPACE_CARD.format(sdk_version=importlib.metadata.version("gradio"), names=", ".join(names))
    (folder / "README.md").write_text(card, encoding="utf-8")


# ---- the command ---------------------------------------------------------------------------------------------------


def demo(args: argparse.Namespace) -> None:
    """Show checkpoints of images in a page: sampling, interpolation, noise and back, bits/dim."""
    try:
        from .demo_page import Page, launch
    except ModuleNotFoundError as error:
        raise ValueError(f"{error.name} is not installed: pip install 'ddpm_hf[demo]'") from None
    checkpoints = args.checkpoints or [str(DEFAULT_CHECKPOINT)]
    if not args.checkpoints and not DEFAULT_CHECKPOINT.is_dir():
        raise ValueError(
            f"there is no {DEFAULT_CHECKPOINT} here; name a training run, a pipeline's folder or a repository on the "
            "Hub: ddpm-hf demo CHECKPOINT"
        )
    if args.space is not None:
        check_new_folder(args.space)
        write_space(args.space, checkpoints)
        print(f"{args.space} is a Space of {' and '.join(checkpoints)}; python {args.space / 'app.py'} runs it")
        return
    if not 1 <= args.port < 2**16:
        raise ValueError(f"--port {args.port} must lie in [1, 65535]")
    if not args.max_seconds > 0:
        raise ValueError(f"--max_seconds {args.max_seconds:g} must be above 0")
    models = load(checkpoints, args.device)
    page = Page(models, parse_seeds=parse_seeds, schedulers=SCHEDULERS, max_seconds=args.max_seconds).build()
    url = launch(page, host=args.host, port=args.port)
    print(f"{', '.join(models)} on {url} until Ctrl-C", flush=True)
    page.block_thread()


def add_parser(commands: Any) -> None:
    """Add `demo` to an argparse subparsers object."""
    command = commands.add_parser(
        "demo",
        help=demo.__doc__,
        description=f"{demo.__doc__} Only this machine can open it, unless --host is given. Needs the extra `demo`.",
    )
    command.set_defaults(function=demo)
    command.add_argument(
        "checkpoints",
        nargs="*",
        metavar="CHECKPOINT",
        help="training runs, pipelines' folders, or repositories on the Hub, to choose from in the page; default: "
        f"{DEFAULT_CHECKPOINT} of the source",
    )
    command.add_argument(
        "--host", default="127.0.0.1", help="0.0.0.0: for all who reach this machine; default: %(default)s"
    )
    command.add_argument("--port", type=int, default=7860, help="default: %(default)s")
    command.add_argument("--device", type=parse_device, default=default_device())
    command.add_argument(
        "--max_seconds", type=float, default=300.0, help="after which a visitor's work is stopped; default: 300"
    )
    command.add_argument(
        "--space", type=Path, metavar="FOLDER", help="write the page as a Space into this new folder instead"
    )
