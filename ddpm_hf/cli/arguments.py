"""What the subcommands of `ddpm-hf` have in common: how seeds, devices and places are given, and what is refused."""

import argparse
from pathlib import Path

import torch

SCHEDULERS = {
    "ddpm": None,  # the checkpoint's own
    "ddim": "DDIMScheduler",
    "deis": "DEISMultistepScheduler",
    "dpmsolver++": "DPMSolverMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_ancestral": "EulerAncestralDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "lms": "LMSDiscreteScheduler",
    "pndm": "PNDMScheduler",
    "unipc": "UniPCMultistepScheduler",
}
MAX_SEEDS = 1_000_000
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def parse_seeds(text: str) -> list[int]:
    """'0-15,20' → [0, 1, …, 15, 20], ends included. Raises argparse's error for anything else."""
    seeds: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()) or (dash and int(last) < int(first)):
            raise argparse.ArgumentTypeError(f"{part!r} is neither a seed nor a range such as 0-15")
        if int(last or first) >= 2**32 or int(last or first) - int(first) >= MAX_SEEDS:
            raise argparse.ArgumentTypeError(f"{part!r}: seeds lie in [0, 2**32), at most {MAX_SEEDS:,} in a range")
        seeds += range(int(first), int(last or first) + 1)
    return seeds


def parse_device(text: str) -> str:
    """A device that torch knows and this machine has. Raises argparse's error for anything else."""
    try:
        torch.zeros(1, device=text).tolist()  # `meta` holds no numbers
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} cannot be used here: {str(error).splitlines()[0]}") from None
    return text


def default_device() -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def add_skip_bad_images(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--skip_bad_images",
        type=int,
        default=0,
        metavar="N",
        help="how many images may be left out because they cannot be read; default: 0",
    )


def check_in_range(option: str, value: int | None, least: int, most: int | None = None) -> None:
    """ValueError unless an option, where it was given, lies in [least, most]."""
    if value is not None and (value < least or (most is not None and value > most)):
        allowed = f"be at least {least}" if most is None else f"lie in [{least}, {most}]"
        raise ValueError(f"{option} {value} must {allowed}")


def check_output(output: Path, *, is_file: bool) -> None:
    """ValueError where a file or a folder cannot be made at `output`, which should be told before hours of work."""
    blocking = next((path for path in (output, *output.parents) if path.exists()), None)
    if is_file and blocking == output and output.is_dir():
        raise ValueError(f"--output {output} is a folder; give the name of a file")
    if blocking is not None and blocking.is_file() and not (is_file and blocking == output):
        raise ValueError(f"{output} cannot be made: {blocking} is a file; give another name")


def check_new_file(output: Path) -> None:
    """ValueError unless a file can be made at `output`, and none is there that would be lost."""
    if output.is_file():
        raise ValueError(f"{output} exists; give another name, or remove it")
    check_output(output, is_file=True)


def check_new_folder(output: Path) -> None:
    """ValueError unless `output` is empty, or not there and can be made."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} exists; give a new or an empty folder")
    check_output(output, is_file=False)
