"""The subcommand `ddpm-hf train`: training/train.py, in this process."""

import argparse
import runpy
import sys
from pathlib import Path

PACKAGE = Path(__file__).parents[1]
# A wheel carries the script inside the package; in a clone it lies beside the package.
PLACES = (PACKAGE / "training" / "train.py", PACKAGE.parent / "training" / "train.py")


def train(args: argparse.Namespace) -> None:
    """Run the script as Python itself would, so that messages, exit codes and signals are the script's own."""
    script = next((path for path in PLACES if path.is_file()), None)
    if script is None:
        sys.exit("ddpm-hf: training/train.py is not installed: pip install 'ddpm_hf[train]'")
    sys.argv = [str(script), *args.words]
    runpy.run_path(str(script), run_name="__main__")
