"""What the parsers of `ddpm-hf` have in common: types of values, and options of several subcommands."""

import argparse
import difflib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

MAX_SEEDS = 1_000_000
MAX_SIDE = 65_536


class Parser(argparse.ArgumentParser):
    """ArgumentParser that helps with misspelt options. The parsers of its subcommands are of the same class."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        namespace, unknown = super().parse_known_args(args, namespace)
        if unknown:
            close = difflib.get_close_matches(unknown[0].partition("=")[0], self._option_string_actions, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            self.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
        return namespace, unknown


def add_parser(commands: Any, add_arguments: Callable[[Parser], None], **kwargs: Any) -> None:
    """Add the subcommand that is called as `add_arguments` is; `args.parser` will be its parser, for later errors."""
    name, text = add_arguments.__name__, add_arguments.__doc__
    command = commands.add_parser(name, help=text, description=text, **kwargs)
    command.set_defaults(parser=command)
    add_arguments(command)


# ---- types of values -----------------------------------------------------------------------------------------------


def place(text: str) -> str:
    """A path, or a name that may be one, its `~` expanded: of `--output=~/x.png` a shell leaves it as it is."""
    return os.path.expanduser(text)


def folder(text: str) -> Path:
    """A path that cannot be anything else."""
    return Path(place(text))


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


def parse_size(text: str) -> tuple[int, int]:
    """'48x64' → (48, 64), height and width; '48' → (48, 48). Raises argparse's error for anything else."""
    sides = text.lower().replace("×", "x").split("x")
    if len(sides) > 2 or not all(side.isdecimal() and 0 < int(side) <= MAX_SIDE for side in sides):
        allowed = f"height x width such as 48x64, of 1 to {MAX_SIDE}"
        raise argparse.ArgumentTypeError(f"{text!r} is no size; give {allowed}")
    return int(sides[0]), int(sides[-1])


# ---- options of several subcommands --------------------------------------------------------------------------------


def add_checkpoint(
    command: Parser, help: str = "a training run, a pipeline's folder, or a repository on the Hub"
) -> None:
    command.add_argument("checkpoint", type=place, help=help)
    add_weights(command)


def add_weights(command: Parser) -> None:
    """Which of a checkpoint's files its weights are read from, and whether its code runs."""
    command.add_argument("--variant", metavar="NAME", help="of the weights: fp16 reads ….fp16.safetensors")
    command.add_argument(
        "--allow_pickle",
        action="store_true",
        help="read weights in .bin files where there are no others; they are pickles, so for sources you trust",
    )
    command.add_argument(
        "--trust_remote_code",
        action="store_true",
        help="run unet/own_….py of a checkpoint whose network is of a class of its own; read it first",
    )


def weights_options(args: argparse.Namespace) -> dict[str, Any]:
    """What `add_weights` added, as `load_pipeline` takes it."""
    return {"variant": args.variant, "read_bin": args.allow_pickle, "trust_remote_code": args.trust_remote_code}


def add_classes(command: Parser, help: str) -> None:
    command.add_argument("--classes", nargs="+", metavar="CLASS", help=f"{help}, by name or number, or all")


def add_guidance(command: Parser) -> None:
    command.add_argument(
        "--guidance",
        dest="guidance_scale",
        type=float,
        default=1.0,
        metavar="S",
        help="guidance scale: 1 is the class alone, more is more typical and less diverse, for up to twice the time",
    )


def add_device(command: Parser) -> None:
    """None where it is not given, for `devices.usable_device`: whether this machine has it, only torch knows."""
    command.add_argument("--device")


def add_skip_bad_images(command: Parser) -> None:
    command.add_argument(
        "--skip_bad_images",
        type=int,
        default=0,
        metavar="N",
        help="how many images may be left out because they cannot be read; default: 0",
    )


def add_work_arguments(command: Parser) -> None:
    command.add_argument(
        "--work_dir",
        type=folder,
        help="for unfinished work and features; default: evaluation in $DDPM_HF_CACHE or ~/.cache/ddpm_hf",
    )
    command.add_argument("--cpu_threads", type=int, help="without a GPU; default: the cores, shared by processes")
