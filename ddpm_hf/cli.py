"""The command `ddpm-hf`: one function per subcommand."""

import argparse
import importlib.metadata
import platform
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from .figures import image_grid, point_density
from .pipeline_ddpm_paper import DDPMPaperPipeline

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
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def parse_seeds(text: str) -> list[int]:
    """'0-15,20' → [0, 1, …, 15, 20], ends included. Raises argparse's error for anything else."""
    seeds: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()) or (dash and int(last) < int(first)):
            raise argparse.ArgumentTypeError(f"{part!r} is neither a seed nor a range such as 0-15")
        seeds += range(int(first), int(last or first) + 1)
    return seeds


def default_device() -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def sample(args: argparse.Namespace) -> None:
    """Draw one sample per seed from a checkpoint and write a grid, a folder of pictures, or points."""
    output = Path(args.output)
    suffix = output.suffix.lower()
    pipe = DDPMPaperPipeline.from_pretrained(args.checkpoint, torch_dtype=DTYPES[args.dtype])
    if SCHEDULERS[args.scheduler]:
        import diffusers

        pipe.scheduler = getattr(diffusers, SCHEDULERS[args.scheduler]).from_config(pipe.scheduler.config)
    pipe.to(args.device)
    is_points = len(pipe.sample_shape) == 1
    if suffix not in ("", ".png", ".npy") or (is_points and suffix == ""):
        raise ValueError(f"--output {output}: give a .png, a .npy, or for images a folder")
    parts = [
        pipe(seeds=args.seeds[i : i + args.batch_size], num_inference_steps=args.steps, output_type="np").images
        for i in range(0, len(args.seeds), args.batch_size)
    ]
    samples = np.concatenate(parts)
    (output.parent if suffix else output).mkdir(parents=True, exist_ok=True)
    if suffix == ".npy":
        np.save(output, samples)
    elif is_points:
        point_density(samples).save(output)
    elif suffix == ".png":
        image_grid(pipe.numpy_to_pil(samples)).save(output)
    else:
        for seed, image in zip(args.seeds, pipe.numpy_to_pil(samples), strict=True):
            image.save(output / f"seed-{seed}.png")
    print(f"{len(samples)} samples in {output}")


def env(args: argparse.Namespace) -> None:
    """Print versions and devices, for a bug report."""
    packages = (
        "ddpm_hf",
        "torch",
        "diffusers",
        "accelerate",
        "transformers",
        "datasets",
        "huggingface_hub",
        "numpy",
        "pillow",
    )
    print(f"python {platform.python_version()} on {platform.platform()}")
    for name in packages:
        try:
            print(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            print(f"{name} is not installed")
    device = default_device()
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor()
    print(f"device {device} {name}, {torch.get_num_threads()} threads")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="ddpm-hf", description="The DDPM paper as Hugging Face classes.")
    commands = parser.add_subparsers(dest="command", required=True)

    command = commands.add_parser("sample", help=sample.__doc__, description=sample.__doc__)
    command.set_defaults(function=sample)
    command.add_argument("checkpoint", help="a folder, or a repository on the Hub")
    command.add_argument("--seeds", type=parse_seeds, default=[0], metavar="0-15,20", help="one sample each")
    command.add_argument("--steps", type=int, help="reverse steps; default: all the network was trained with")
    command.add_argument("--scheduler", choices=SCHEDULERS, default="ddpm", help="default: the checkpoint's own")
    command.add_argument("--batch_size", type=int, default=64, help="samples at once; does not change them")
    command.add_argument("--dtype", choices=DTYPES, default="float32", help="precision of the network")
    command.add_argument("--device", default=default_device())
    command.add_argument(
        "-o", "--output", default="samples.png", help="grid.png, a folder for one picture per seed, or samples.npy"
    )

    command = commands.add_parser("env", help=env.__doc__, description=env.__doc__)
    command.set_defaults(function=env)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run a subcommand; a mistake in its arguments or files ends with exit code 1 and one line on stderr."""
    args = build_parser().parse_args(argv)
    if getattr(args, "batch_size", 1) < 1:
        sys.exit(f"ddpm-hf: --batch_size {args.batch_size} must be at least 1")
    try:
        args.function(args)
    except (ValueError, OSError) as error:
        sys.exit(f"ddpm-hf: {error}")


if __name__ == "__main__":
    main()
