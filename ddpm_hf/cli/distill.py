"""The subcommand `ddpm-hf distill`: training/distill.py, in this process."""

import argparse

from .train import run_script


def distill(args: argparse.Namespace) -> None:
    """Progressive distillation, with the words of the command line as the script's options."""
    run_script("distill.py", args.words)
