"""`ddpm-hf`, and `python -m ddpm_hf.cli` for launchers that start modules."""

import importlib
import sys
from collections.abc import Sequence

from .arguments import build_parser

OF_EXTRAS = (
    "datasets",
    "matplotlib",
    "sklearn",
    "scipy",
)  # what `train` brings; other extras are named where they lack
OWN_MODULES = ("train", "distill", "draw", "demo")  # other subcommands are functions of `commands`


def main(argv: Sequence[str] | None = None) -> None:
    """Run a subcommand; a mistake, or a missing package, ends with exit code 1 and one line on stderr."""
    args = build_parser().parse_args(argv)
    name = args.command if args.command in OWN_MODULES else "commands"
    run = getattr(importlib.import_module(f"{__package__}.{name}"), args.command)  # imports torch, but for scripts
    if args.command in ("train", "distill"):
        return run(args)  # which ends by itself
    from .checks import check_in_range
    from .devices import usable_device

    if "device" in args:
        try:
            args.device = usable_device(args.device)
        except ValueError as error:
            args.parser.error(f"argument --device: {error}")
    try:
        check_in_range("--batch_size", getattr(args, "batch_size", None), 1)
        run(args)
    except (ValueError, OSError) as error:
        sys.exit(f"ddpm-hf: {error}")
    except ModuleNotFoundError as error:
        of_extra = (error.name or "").partition(".")[0] in OF_EXTRAS
        remedy = ": pip install 'ddpm_hf[train]'" if of_extra else ", which code from outside of this package imports"
        sys.exit(f"ddpm-hf: {error.name} is not installed{remedy}")


if __name__ == "__main__":
    main()
