"""The subcommand `ddpm-hf demo`: a page to look at checkpoints with, served here or written as a Space."""

import argparse
from pathlib import Path
from typing import Any

from ..demo import load, write_space
from .arguments import SCHEDULERS, check_new_folder, default_device, parse_device, parse_seeds

DEFAULT_CHECKPOINT = Path("model_cards") / "ddpm-digits"


# ---- the command ---------------------------------------------------------------------------------------------------


def demo(args: argparse.Namespace) -> None:
    """Show checkpoints of images in a page: sampling, interpolation, noise and back, bits/dim."""
    try:
        from ..demo import Page, launch
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
