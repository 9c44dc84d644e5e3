"""The parsers of `ddpm-hf`: a function for each subcommand, which adds its options; the docstring is its help.

Nothing heavy is imported here, so that help and mistakes come at once: torch, diffusers and what builds on them are
imported by what a subcommand does, after its options were parsed. The functions of the same names are in `commands`,
in the same order, or have a module of their own: `train`, `distill`, `draw`, `demo`.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from .. import __version__
from ..codec import MAX_BATCH
from ..evaluation import METRICS
from ..evaluation.paper_tables import TABLES
from ..runs import RESULTS
from . import draw_arguments
from .shared_options import (
    Parser,
    add_checkpoint,
    add_classes,
    add_device,
    add_guidance,
    add_parser,
    add_skip_bad_images,
    add_weights,
    add_work_arguments,
    folder,
    parse_seeds,
    parse_size,
    place,
)


class Sampler(NamedTuple):
    """A class of diffusers, None for the checkpoint's own, and what a call of the pipeline is told beside it."""

    scheduler: str | None
    options: Mapping[str, Any] = {}


SCHEDULERS = {
    "ddpm": Sampler(None),
    "ddim": Sampler("DDIMScheduler"),
    "ddim_clipped": Sampler("DDIMScheduler", {"use_clipped_model_output": True}),
    "deis": Sampler("DEISMultistepScheduler"),
    "dpmsolver++": Sampler("DPMSolverMultistepScheduler"),
    "euler": Sampler("EulerDiscreteScheduler"),
    "euler_ancestral": Sampler("EulerAncestralDiscreteScheduler"),
    "heun": Sampler("HeunDiscreteScheduler"),
    "lms": Sampler("LMSDiscreteScheduler"),
    "pndm": Sampler("PNDMScheduler"),
    "unipc": Sampler("UniPCMultistepScheduler"),
}
BATCHES = (1, 2, 63, 64, 140)  # of `export`: networks with a special case tend to have it at 1 or at 64
DTYPES = ("float32", "bfloat16", "float16", "auto")
DEFAULT_CHECKPOINTS = tuple(Path("model_cards") / name for name in ("ddpm-fashion", "ddpm-digits"))  # of `demo`


def build_parser() -> Parser:
    """The parser of `ddpm-hf`, with a parser for each of `COMMANDS`."""
    parser = Parser(prog="ddpm-hf", description="The DDPM paper as Hugging Face classes.")
    parser.add_argument("--version", action="version", version=f"ddpm_hf {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    for add_arguments in COMMANDS:
        # no word of a script is an option here, `--help` and `-o` neither: the script reads them
        passed_on = {"add_help": False, "prefix_chars": "\0"} if add_arguments in (train, distill) else {}
        add_parser(commands, add_arguments, **passed_on)
    return parser


# ---- one function per subcommand -----------------------------------------------------------------------------------


def train(command: Parser) -> None:
    """Train a model: training/train.py, with all that follows as its options; `ddpm-hf train --help` lists them."""
    command.add_argument("words", nargs=argparse.REMAINDER)


def distill(command: Parser) -> None:
    """Distil a model into few steps: training/distill.py, with its options; `ddpm-hf distill --help` lists them."""
    command.add_argument("words", nargs=argparse.REMAINDER)


def sample(command: Parser) -> None:
    """Draw one sample per seed from a checkpoint and write a grid, a folder of pictures, or points."""
    add_checkpoint(command, "a folder, or a repository on the Hub")
    command.add_argument(
        "--seeds", type=parse_seeds, default=[0], metavar="0-15,20", help="one sample each; default: 0"
    )
    add_classes(command, "of a checkpoint with classes, what to draw, in turn over the seeds")
    add_guidance(command)
    command.add_argument("--steps", type=int, help="reverse steps; default: the model's, else all it was trained with")
    command.add_argument("--scheduler", choices=SCHEDULERS, default="ddpm", help="default: ddpm, the checkpoint's own")
    command.add_argument(
        "--batch_size", type=int, default=64, help="samples at once; does not change them; default: 64"
    )
    command.add_argument(
        "--size", type=parse_size, metavar="48x64", help="height x width of images; default: what it was trained on"
    )
    command.add_argument(
        "--dtype",
        choices=DTYPES,
        default="float32",
        help="precision of the network; auto: bfloat16 where it is faster, else float32",
    )
    add_device(command)
    command.add_argument(
        "--onnx", type=place, metavar="FILE", help="draw by this file of `ddpm-hf export`, in onnxruntime"
    )
    command.add_argument(
        "--fast",
        action=argparse.BooleanOptionalAction,
        help="the same samples, to rounding, sooner; default: where the network is a UNet of this package, in float32 "
        "or bfloat16",
    )
    command.add_argument(
        "-o",
        "--output",
        type=place,
        default="samples.png",
        help="grid.png, a folder for one picture per seed, or samples.npy; default: %(default)s",
    )


def convert(command: Parser) -> None:
    """Make a checkpoint of stock diffusers, of the paper's code or its ports one of ours; or one of ours stock's."""
    command.add_argument(
        "source",
        type=place,
        help="a folder or Hub repository of ours or stock's, a TensorFlow checkpoint (model.ckpt-790000), or a file "
        "of a PyTorch port of the paper's code (diffusion_cifar10_model.ckpt), of which only tensors are read",
    )
    command.add_argument("output", type=place, help="a new folder")
    command.add_argument(
        "--to", choices=("paper", "stock"), default="paper", help="ours, or DDPMPipeline; default: ours"
    )
    add_weights(command)
    ports = command.add_argument_group("checkpoints of the paper's code and its ports only")
    ports.add_argument("--raw", action="store_true", help="the raw weights, not their moving average")
    ports.add_argument(
        "--sample_size",
        type=int,
        help="side of the images; default: so that attention is at 16. Also for one of stock's that states none",
    )
    ports.add_argument(
        "--variance_type",
        choices=("fixed_small", "fixed_large", "learned"),
        help="default: the paper's, fixed_large up to 32x32 and fixed_small above; learned if channels are doubled",
    )


def export(command: Parser) -> None:
    """Write a checkpoint's network as an ONNX file for any batch, and say how far onnxruntime's outputs are."""
    command.description = f"{command.description} Needs the extra `export`."
    add_checkpoint(command)
    command.add_argument("output", type=place, help="a new file, model.onnx")
    command.add_argument(
        "--batches",
        type=int,
        nargs="+",
        default=list(BATCHES),
        metavar="B",
        help="sizes in which it is compared, fewer for large networks; default: 1 2 63 64 140",
    )


def draw(command: Parser) -> None:
    """Draw a figure of the paper from a checkpoint."""
    kinds = command.add_subparsers(dest="kind", required=True, metavar="KIND")
    for kind in draw_arguments.KINDS:
        add_parser(kinds, kind)


def evaluate(command: Parser) -> None:
    """Measure a checkpoint: bits/dim of real images, or their classes; FID, IS, KID and FD-DINOv2 of samples."""
    command.description = (
        f"{command.description} On several processes: accelerate launch -m ddpm_hf.cli evaluate ... A run "
        "that was stopped goes on where it was. FID, IS, KID and FD-DINOv2 need the extra `eval`. ± is a standard "
        "error (of IS, the deviation over ten splits). To compare two results, give both the same data, extractor and "
        "--num_samples; they differ where their difference is three times its standard error."
    )
    add_checkpoint(command)
    command.add_argument(
        "--metrics",
        nargs="+",
        choices=METRICS,
        default=["bpd"],
        help="flow: bits/dim by the probability flow (extra `flow`); classify: the share of images whose class has "
        "the lowest bound; default: bpd",
    )
    command.add_argument(
        "--dataset",
        type=place,
        help="digits, swiss_roll, moons, a data set's name on the Hub, a folder, or module:function",
    )
    command.add_argument(
        "--split", help="default: test for bpd, flow and classify, train for the others, as the paper's FID"
    )
    command.add_argument(
        "--label_column",
        help="for a checkpoint with classes: where the data's labels are. bits/dim is then that given the class, and "
        "samples have the classes of the data, from the first",
    )
    add_guidance(command)
    command.add_argument("--num_samples", type=int, default=50_000, help="drawn for FID, IS, KID and FD-DINOv2")
    command.add_argument("--num_images", type=int, help="for bpd, flow and classify, from the first; default: all")
    command.add_argument(
        "--num_timesteps_subset",
        type=int,
        help="terms of the bound per image, an unbiased estimate; default: all for bpd, 50 for classify",
    )
    command.add_argument("--steps", dest="num_inference_steps", type=int, help="reverse steps; default: the model's")
    command.add_argument("--seed", type=int, default=0, help="of the bound's noise; samples have the seeds from here")
    command.add_argument("--batch_size", type=int, default=64, help="samples at once; part of the protocol")
    command.add_argument("--tolerance", type=float, default=1e-4, help="of the flow's solver; default: %(default)s")
    command.add_argument(
        "--num_probes",
        type=int,
        help="of the flow's divergence; 0: exact, a backward pass per dimension; default: exact in up to 16 "
        "dimensions, and 2 probes above",
    )
    command.add_argument(
        "--num_dequantizations", type=int, default=1, help="draws of noise within bins per image, for flow; default: 1"
    )
    command.add_argument("--weights", choices=("ema", "raw"), help="of a training checkpoint; default: ema")
    command.add_argument(
        "--extractor", default="inception", help="of FID, IS and KID: inception, or a factory as module:function"
    )
    add_skip_bad_images(command)
    command.add_argument("-o", "--output", type=place, help=f"default: {RESULTS} in the checkpoint's folder, or here")
    add_work_arguments(command)


def shorten(command: Parser) -> None:
    """Fit a checkpoint's variances to its network, and choose timesteps, so that few reverse steps do."""
    add_checkpoint(command)
    command.add_argument("output", type=place, help="a new folder")
    command.add_argument("--steps", type=int, help="reverse steps; default: all, with fitted variances")
    command.add_argument(
        "--dataset", type=place, required=True, help="what the network was trained on, as for evaluate"
    )
    command.add_argument(
        "--label_column",
        help="for a checkpoint with classes: where the data's labels are, which the network is then given",
    )
    command.add_argument("--num_images", type=int, default=128, help="to measure the network's error on; default: 128")
    command.add_argument("--seed", type=int, default=0, help="of the noise")
    add_skip_bad_images(command)
    add_work_arguments(command)


def reproduce(command: Parser) -> None:
    """Print a table of the paper: each published row, the command that trains it, and what a checkpoint measured."""
    command.add_argument("table", choices=TABLES)
    command.add_argument("--checkpoint", type=place, help=f"a folder in which `evaluate` left its {RESULTS}")


def publish(command: Parser) -> None:
    """Upload a training run, or any saved pipeline, to the Hub with a model card."""
    command.description = (
        f"{command.description} Log in first with `hf auth login`, or set HF_TOKEN. A README.md in RUN is "
        "uploaded in place of the generated card. Exit code 4: the Hub could not be reached or refused."
    )
    command.add_argument("run", type=place, help="a run's folder, finished or not, or a pipeline's")
    command.add_argument("repo_id", metavar="user/name", help="made where it does not exist")
    command.add_argument("--private", action="store_true", help="make it private")
    command.add_argument("--revision", help="a branch, made where it does not exist; default: main")
    command.add_argument("--license", help="an identifier such as apache-2.0, for the card; default: none is stated")


def compress(command: Parser) -> None:
    """Make one file of images, from which the same checkpoint gets them back exactly. Experimental."""
    add_checkpoint(command, "a folder, or a repository on the Hub")
    command.add_argument(
        "images", type=place, help="a folder of images, an image, or a data set's name; of the model's size"
    )
    command.add_argument("-o", "--output", type=place, help="the file, a new one; not needed with --dry_run")
    command.add_argument(
        "--steps", type=int, help="reverse steps, fitted to the images; default: a shortened checkpoint's own, else 25"
    )
    command.add_argument("--fit_images", type=int, default=64, help="to fit them to, at most; default: 64")
    command.add_argument("--split", default="test", help="of a data set; default: test")
    add_skip_bad_images(command)
    command.add_argument(
        "--max_batch", type=int, default=MAX_BATCH, help="images coded together, at most; default: %(default)s"
    )
    command.add_argument("--dry_run", action="store_true", help="only print how many bits/dim to expect")
    add_device(command)


def decompress(command: Parser) -> None:
    """Get the images of a compressed file back, with the checkpoint that compressed them. Experimental."""
    add_checkpoint(command, "the one that compressed")
    command.add_argument("file", type=place)
    command.add_argument(
        "-o", "--output", type=place, required=True, help="a new folder, of a PNG per image, or a new levels.npy"
    )
    command.add_argument(
        "--micro_batch", type=int, help="images that the network sees at once; default: all of a batch"
    )
    add_device(command)


def demo(command: Parser) -> None:
    """Show checkpoints of images in a page: sampling, interpolation, noise and back, bits/dim."""
    command.description = (
        f"{command.description} Only this machine can open it, unless --host is given. Needs the extra `demo`."
    )
    command.add_argument(
        "checkpoints",
        type=place,
        nargs="*",
        metavar="CHECKPOINT",
        help="training runs, pipelines' folders, or repositories on the Hub, to choose from in the page; default: "
        f"{' and '.join(map(str, DEFAULT_CHECKPOINTS))} of the source",
    )
    add_weights(command)
    command.add_argument(
        "--host", default="127.0.0.1", help="0.0.0.0: for all who reach this machine; default: %(default)s"
    )
    command.add_argument("--port", type=int, default=7860, help="default: %(default)s")
    add_device(command)
    command.add_argument(
        "--max_seconds", type=float, default=300.0, help="after which a visitor's work is stopped; default: 300"
    )
    command.add_argument(
        "--space", type=folder, metavar="FOLDER", help="write the page as a Space into this new folder instead"
    )


def env(command: Parser) -> None:
    """Print versions and devices, for a bug report."""


COMMANDS = (
    *(train, distill, sample, convert, export, draw, evaluate, shorten, reproduce),
    *(publish, compress, decompress, demo, env),
)
