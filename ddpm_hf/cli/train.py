"""The subcommand `ddpm-hf train`: training/train.py, in this process."""

import argparse
import runpy
import sys
from pathlib import Path

PACKAGE = Path(__file__).parents[1]
# A wheel carries the scripts inside the package; in a clone they lie beside the package.
PLACES = (PACKAGE / "training", PACKAGE.parent / "training")


def train(args: argparse.Namespace) -> None:
    """Algorithm 1, with the words of the command line as the script's options."""
    run_script("train.py", args.words)


def run_script(name: str, words: list[str]) -> None:
    """Run a script as Python itself would, so that messages, exit codes and signals are the script's own."""
    script = next((place / name for place in PLACES if (place / name).is_file()), None)
    if script is None:
        sys.exit(f"ddpm-hf: training/{name} is not installed: pip install 'ddpm_hf[train]'")
    sys.argv = [str(script), *words]
    runpy.run_path(str(script), run_name="__main__")
