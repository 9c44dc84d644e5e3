"""The subcommand `ddpm-hf demo`: a page to look at checkpoints with, served here or written as a Space."""

import argparse
from typing import Any

from ..demo import load, write_space
from .arguments import DEFAULT_CHECKPOINTS, SCHEDULERS, parse_seeds
from .checks import check_new_folder
from .shared_options import weights_options


def default_checkpoints() -> list[str]:
    """Those that come with the repository. Raises ValueError elsewhere."""
    for folder in DEFAULT_CHECKPOINTS:
        if not folder.is_dir():
            raise ValueError(
                f"there is no {folder} here; name a training run, a pipeline's folder or a repository on the Hub: "
                "ddpm-hf demo CHECKPOINT"
            )
    return [str(folder) for folder in DEFAULT_CHECKPOINTS]


def demo(args: argparse.Namespace) -> None:
    """The page, served until Ctrl-C, or written as a Space."""
    try:
        from ..demo import Page, launch
    except ModuleNotFoundError as error:
        raise ValueError(f"{error.name} is not installed: pip install 'ddpm_hf[demo]'") from None
    checkpoints = args.checkpoints or default_checkpoints()
    if args.space is not None:
        check_new_folder(args.space)
        write_space(args.space, checkpoints)
        print(f"{args.space} is a Space of {' and '.join(checkpoints)}; python {args.space / 'app.py'} runs it")
        return
    if not 1 <= args.port < 2**16:
        raise ValueError(f"--port {args.port} must lie in [1, 65535]")
    if not args.max_seconds > 0:
        raise ValueError(f"--max_seconds {args.max_seconds:g} must be above 0")
    models = load(checkpoints, args.device, **weights_options(args))
    options: Any = {"schedulers": SCHEDULERS, "max_seconds": args.max_seconds}
    page = Page(models, parse_seeds=parse_seeds, **options).build()
    url = launch(page, host=args.host, port=args.port)
    print(f"{', '.join(models)} on {url} until Ctrl-C", flush=True)
    page.block_thread()
