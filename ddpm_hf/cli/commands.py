"""The command `ddpm-hf`: one function per subcommand."""

import argparse
import dataclasses
import difflib
import importlib.metadata
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import __version__
from ..codec import files as codec
from ..convert import pipeline_from_stock, pipeline_from_tf_checkpoint, pipeline_to_stock, tf_checkpoint_prefix
from ..evaluation import METRICS, Evaluator, Protocol, paper_tables as paper_results
from ..hub import load_pipeline, publishing as hub
from ..inference import speed_up
from ..machine import join_processes, leave_processes
from ..pictures import image_grid, point_density
from ..runs import RESULTS, read_results, shown_value, write_results
from ..scheduler import paper_scheduler
from ..short_chains import shortened
from . import demo, draw
from .arguments import (
    DTYPES,
    SCHEDULERS,
    add_skip_bad_images,
    check_in_range,
    check_new_file,
    check_new_folder,
    check_output,
    default_device,
    parse_device,
    parse_seeds,
)


class Parser(argparse.ArgumentParser):
    """ArgumentParser that helps with misspelt options. The parsers of its subcommands are of the same class."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        namespace, unknown = super().parse_known_args(args, namespace)
        if unknown:
            close = difflib.get_close_matches(unknown[0].partition("=")[0], self._option_string_actions, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            self.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
        return namespace, unknown


def sample(args: argparse.Namespace) -> None:
    """Draw one sample per seed from a checkpoint and write a grid, a folder of pictures, or points."""
    output = Path(args.output)
    suffix = output.suffix.lower()
    if not args.output:
        raise ValueError(f"--output {args.output!r}: give a .png, a .npy, or for images a folder")
    check_output(output, is_file=bool(suffix))
    pipe = load_pipeline(args.checkpoint, DTYPES[args.dtype])
    if SCHEDULERS[args.scheduler]:
        import diffusers

        pipe.scheduler = getattr(diffusers, SCHEDULERS[args.scheduler]).from_config(pipe.scheduler.config)
    pipe.to(args.device)
    is_points = len(pipe.sample_shape) == 1
    if suffix not in ("", ".png", ".npy") or (is_points and suffix == ""):
        raise ValueError(f"--output {output}: give a .png, a .npy, or for images a folder")
    if args.fast:
        pipe = speed_up(pipe, DTYPES[args.dtype])
    parts = []
    for i in range(0, len(args.seeds), args.batch_size):
        seeds = args.seeds[i : i + args.batch_size]
        parts += pipe(seeds=seeds, num_inference_steps=args.steps, output_type="np", return_dict=False)
    samples = np.concatenate(parts)
    (output.parent if suffix else output).mkdir(parents=True, exist_ok=True)
    if suffix == ".npy":
        np.save(output, samples, allow_pickle=False)
    elif is_points:
        point_density(samples).save(output)
    elif suffix == ".png":
        image_grid(pipe.numpy_to_pil(samples)).save(output)
    else:
        for seed, image in zip(args.seeds, pipe.numpy_to_pil(samples), strict=True):
            image.save(output / f"seed-{seed}.png")
    print(f"{len(samples)} samples in {output}")


def convert(args: argparse.Namespace) -> None:
    """Make a checkpoint of stock diffusers, or of the paper's TensorFlow code, one of ours; or one of ours stock's."""
    output = Path(args.output)
    check_new_folder(output)
    if tf_checkpoint_prefix(args.source):
        pipe = pipeline_from_tf_checkpoint(
            args.source, ema=not args.raw, sample_size=args.sample_size, variance_type=args.variance_type
        )
    elif args.raw or args.sample_size is not None or args.variance_type:
        raise ValueError(
            "--raw, --sample_size and --variance_type are for TensorFlow checkpoints; there is no "
            f"{args.source}.index and no {Path(args.source) / 'checkpoint'}"
        )
    else:
        pipe = load_pipeline(args.source)
        if args.to == "paper":
            pipe = pipeline_from_stock(pipe)
    if args.to == "stock":
        pipe = pipeline_to_stock(pipe)
    pipe.save_pretrained(output)
    config = {**pipe.unet.config, **pipe.scheduler.config}
    parameters = sum(parameter.numel() for parameter in pipe.unet.parameters())
    print(
        f"{output}: {type(pipe).__name__}, {parameters:,} parameters, sample_size={config['sample_size']}, "
        f"variance_type={config['variance_type']}"
    )


def evaluate(args: argparse.Namespace) -> None:
    """Measure a checkpoint: bits/dim of real images; FID, IS, KID and FD-DINOv2 of samples."""
    protocol = Protocol(**{f.name: getattr(args, f.name) for f in dataclasses.fields(Protocol)})
    accelerator = join_processes(cpu_threads=args.cpu_threads)
    is_folder = Path(args.checkpoint).is_dir()
    output = Path(args.output) if args.output else Path(args.checkpoint if is_folder else ".") / RESULTS
    read_results(output)  # another file there should be found out now, not after hours
    output.parent.mkdir(parents=True, exist_ok=True)
    evaluator = Evaluator(accelerator, args.checkpoint, protocol, work_dir=args.work_dir)
    for result in evaluator.run():
        write_results(output, [result])
        print(f"{result['name']} {shown_value(result)}")
        for name, value in result.get("parts", {}).items():
            print(f"    {name} {value:.6f}")
    if accelerator.is_main_process:
        print(f"with the whole protocol in {output}")
    leave_processes(accelerator)


def shorten(args: argparse.Namespace) -> None:
    """Fit a checkpoint's variances to its network, and choose timesteps, so that few reverse steps do."""
    check_new_folder(Path(args.output))
    accelerator = join_processes(cpu_threads=args.cpu_threads)
    protocol = Protocol(
        dataset=args.dataset,
        split="train",
        num_images=args.num_images,
        seed=args.seed,
        skip_bad_images=args.skip_bad_images,
    )
    evaluator = Evaluator(accelerator, args.checkpoint, protocol, work_dir=args.work_dir)
    scheduler, num_levels = paper_scheduler(evaluator.pipe.scheduler), evaluator.data("bpd").num_levels
    # refuse now what would be refused after the measuring
    if "inference_timesteps" in scheduler.config:
        raise ValueError(f"{args.checkpoint} has been shortened before; start from the one it was made from")
    shortened(scheduler, np.ones(len(scheduler)), num_steps=args.steps, num_levels=num_levels)
    mse = evaluator.bound_terms().x_start_mse_bt.mean(dim=0).numpy()
    if accelerator.is_main_process:
        pipe = evaluator.pipe
        pipe.scheduler = shortened(scheduler, mse, num_steps=args.steps, num_levels=num_levels)
        pipe.to("cpu").save_pretrained(args.output)
        print(f"{args.output}: {pipe.scheduler.chain().num_timesteps} reverse steps, variances of {args.checkpoint}")
    leave_processes(accelerator)


def reproduce(args: argparse.Namespace) -> None:
    """Print a table of the paper: each published row, the command that trains it, and what a checkpoint measured."""
    results = read_results(Path(args.checkpoint) / RESULTS) if args.checkpoint else None
    print(paper_results.report(args.table, checkpoint=args.checkpoint, results=results))


def compress(args: argparse.Namespace) -> None:
    """Make one file of images, from which the same checkpoint gets them back exactly. Experimental."""
    if not args.dry_run:
        if args.output is None:
            raise ValueError("--output is missing: name the file to write, or add --dry_run, which writes none")
        check_new_file(Path(args.output))
    check_in_range("--fit_images", args.fit_images, 1)
    check_in_range("--max_batch", args.max_batch, 1, codec.LARGEST_BATCH)
    check_in_range("--skip_bad_images", args.skip_bad_images, 0)
    pipe = load_pipeline(args.checkpoint).to(args.device)
    num_timesteps = len(paper_scheduler(pipe.scheduler))
    if args.steps is not None and pipe.scheduler.config.get("inference_timesteps"):
        remedy = "leave out --steps, or start from the one it was made from"
        raise ValueError(f"--steps {args.steps}: {args.checkpoint} has been shortened before; {remedy}")
    check_in_range("--steps", args.steps, 1, num_timesteps)
    levels, num_levels, names = codec.read_images(args.images, args.split, args.skip_bad_images)
    codec.check_levels(levels, pipe.sample_shape, num_levels, names[0] if names else args.images)
    chain = None
    if args.steps is not None or pipe.scheduler.config.get("variance_type") != "fitted":
        some = np.linspace(0, len(levels) - 1, min(len(levels), args.fit_images)).astype(int)
        steps = min(25, num_timesteps) if args.steps is None else args.steps
        chain = codec.fit_chain(pipe, levels[some], steps, num_levels=num_levels, progress=True)
    images = codec.counted(len(levels), "image")
    if args.dry_run:
        terms = codec.bound(pipe, levels, num_levels=num_levels, chain=chain, progress=True)
        num_steps = codec.counted(terms.terms_bt.shape[1], "step")
        print(f"{terms.total_b.mean():.3f} bits/dim predicted in {num_steps}, for {images}")
        return
    output = Path(args.output)
    encoded = codec.compress(
        pipe, levels, num_levels=num_levels, chain=chain, names=names, max_batch=args.max_batch, progress=True
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_bytes(encoded.data)
    print(f"{output}: {images}, {len(encoded.data):,} bytes, {encoded.file_bpd:.3f} bits/dim, of which")
    for name in ("net", "initial", "header"):
        print(f"    {name} {getattr(encoded, f'{name}_bits') / encoded.dims:.3f}")
    print(f"the bound at the latents that were coded: {encoded.bound_bits / encoded.dims:.3f}")


def decompress(args: argparse.Namespace) -> None:
    """Get the images of a compressed file back, with the checkpoint that compressed them. Experimental."""
    output = Path(args.output)
    if output.suffix.lower() == ".npy":
        check_new_file(output)
    else:
        check_new_folder(output)
    check_in_range("--micro_batch", args.micro_batch, 1)
    data = codec.read_file(args.file)
    codec.read_header(data)  # refuse a damaged file before the model is loaded
    pipe = load_pipeline(args.checkpoint).to(args.device)
    decoded = codec.decompress(pipe, data, micro_batch=args.micro_batch, progress=True)
    output.parent.mkdir(parents=True, exist_ok=True)
    if output.suffix.lower() == ".npy":
        np.save(output, decoded.levels.numpy(), allow_pickle=False)
    else:
        codec.write_images(output, decoded)
    print(f"{codec.counted(len(decoded.levels), 'image')} in {output}; every batch has its checksum")


def publish(args: argparse.Namespace) -> None:
    """Upload a training run, or any saved pipeline, to the Hub with a model card."""
    try:
        url = hub.publish(args.run, args.repo_id, private=args.private, revision=args.revision, license=args.license)
    except hub.PublishError as error:
        print(f"ddpm-hf: {error}", file=sys.stderr)
        sys.exit(4)
    print(url)


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


def add_work_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--work_dir",
        type=Path,
        help="for unfinished work and features; default: evaluation in $DDPM_HF_CACHE or ~/.cache/ddpm_hf",
    )
    command.add_argument("--cpu_threads", type=int, help="without a GPU; default: the cores, shared by processes")


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="ddpm-hf", description="The DDPM paper as Hugging Face classes.")
    parser.add_argument("--version", action="version", version=f"ddpm_hf {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)

    command = commands.add_parser("sample", help=sample.__doc__, description=sample.__doc__)
    command.set_defaults(function=sample)
    command.add_argument("checkpoint", help="a folder, or a repository on the Hub")
    command.add_argument(
        "--seeds", type=parse_seeds, default=[0], metavar="0-15,20", help="one sample each; default: 0"
    )
    command.add_argument("--steps", type=int, help="reverse steps; default: all the network was trained with")
    command.add_argument("--scheduler", choices=SCHEDULERS, default="ddpm", help="default: the checkpoint's own")
    command.add_argument(
        "--batch_size", type=int, default=64, help="samples at once; does not change them; default: 64"
    )
    command.add_argument("--dtype", choices=DTYPES, default="float32", help="precision of the network")
    command.add_argument("--device", type=parse_device, default=default_device())
    command.add_argument("--fast", action="store_true", help="the same samples, to rounding, sooner (images only)")
    command.add_argument(
        "-o",
        "--output",
        default="samples.png",
        help="grid.png, a folder for one picture per seed, or samples.npy; default: %(default)s",
    )

    command = commands.add_parser("convert", help=convert.__doc__, description=convert.__doc__)
    command.set_defaults(function=convert)
    command.add_argument(
        "source", help="a folder or Hub repository of ours or stock's, or a TensorFlow checkpoint (model.ckpt-790000)"
    )
    command.add_argument("output", help="a new folder")
    command.add_argument(
        "--to", choices=("paper", "stock"), default="paper", help="ours, or DDPMPipeline; default: ours"
    )
    tensorflow = command.add_argument_group("TensorFlow checkpoints only")
    tensorflow.add_argument("--raw", action="store_true", help="the raw weights, not their moving average")
    tensorflow.add_argument("--sample_size", type=int, help="side of the images; default: so that attention is at 16")
    tensorflow.add_argument(
        "--variance_type",
        choices=("fixed_small", "fixed_large", "learned"),
        help="default: the paper's, fixed_large up to 32x32 and fixed_small above; learned if channels are doubled",
    )

    draw.add_parser(commands)

    command = commands.add_parser(
        "evaluate",
        help=evaluate.__doc__,
        description=f"{evaluate.__doc__} On several processes: accelerate launch -m ddpm_hf.cli evaluate ... A run "
        "that was stopped goes on where it was. FID, IS, KID and FD-DINOv2 need the extra `eval`.",
    )
    command.set_defaults(function=evaluate)
    command.add_argument("checkpoint", help="a training run, a pipeline's folder, or a repository on the Hub")
    command.add_argument("--metrics", nargs="+", choices=METRICS, default=["bpd"], help="default: bpd")
    command.add_argument("--dataset", help="digits, swiss_roll, moons, a data set's name on the Hub, or a folder")
    command.add_argument("--split", help="default: test for bpd, and train for the others, as the paper's FID")
    command.add_argument("--num_samples", type=int, default=50_000, help="drawn for all metrics but bpd")
    command.add_argument("--num_images", type=int, help="for bpd, from the first; default: all of the split")
    command.add_argument(
        "--num_timesteps_subset", type=int, help="for bpd: terms per image, an unbiased estimate; default: all"
    )
    command.add_argument("--steps", dest="num_inference_steps", type=int, help="reverse steps; default: the model's")
    command.add_argument("--seed", type=int, default=0, help="of the bound's noise; samples have the seeds from here")
    command.add_argument("--batch_size", type=int, default=64, help="samples at once; part of the protocol")
    command.add_argument("--weights", choices=("ema", "raw"), help="of a training checkpoint; default: ema")
    command.add_argument(
        "--extractor", default="inception", help="of FID, IS and KID: inception, or a factory as module:function"
    )
    add_skip_bad_images(command)
    command.add_argument("-o", "--output", help=f"default: {RESULTS} in the checkpoint's folder, or here")
    add_work_arguments(command)

    command = commands.add_parser("shorten", help=shorten.__doc__, description=shorten.__doc__)
    command.set_defaults(function=shorten)
    command.add_argument("checkpoint", help="a training run, a pipeline's folder, or a repository on the Hub")
    command.add_argument("output", help="a new folder")
    command.add_argument("--steps", type=int, help="reverse steps; default: all, with fitted variances")
    command.add_argument("--dataset", required=True, help="what the network was trained on, as for evaluate")
    command.add_argument("--num_images", type=int, default=128, help="to measure the network's error on; default: 128")
    command.add_argument("--seed", type=int, default=0, help="of the noise")
    add_skip_bad_images(command)
    add_work_arguments(command)

    command = commands.add_parser("reproduce", help=reproduce.__doc__, description=reproduce.__doc__)
    command.set_defaults(function=reproduce)
    command.add_argument("table", choices=paper_results.TABLES)
    command.add_argument("--checkpoint", help=f"a folder in which `evaluate` left its {RESULTS}")

    command = commands.add_parser(
        "publish",
        help=publish.__doc__,
        description=f"{publish.__doc__} Log in first with `hf auth login`, or set HF_TOKEN. A README.md in RUN is "
        "uploaded in place of the generated card. Exit code 4: the Hub could not be reached or refused.",
    )
    command.set_defaults(function=publish)
    command.add_argument("run", help="a run's folder, finished or not, or a pipeline's")
    command.add_argument("repo_id", metavar="user/name", help="made where it does not exist")
    command.add_argument("--private", action="store_true", help="make it private")
    command.add_argument("--revision", help="a branch, made where it does not exist; default: main")
    command.add_argument("--license", help="an identifier such as apache-2.0, for the card; default: none is stated")

    command = commands.add_parser("compress", help=compress.__doc__, description=compress.__doc__)
    command.set_defaults(function=compress)
    command.add_argument("checkpoint", help="a folder, or a repository on the Hub")
    command.add_argument("images", help="a folder of images, an image, or a data set's name; of the model's size")
    command.add_argument("-o", "--output", help="the file, a new one; not needed with --dry_run")
    command.add_argument(
        "--steps", type=int, help="reverse steps, fitted to the images; default: a shortened checkpoint's own, else 25"
    )
    command.add_argument("--fit_images", type=int, default=64, help="to fit them to, at most; default: 64")
    command.add_argument("--split", default="test", help="of a data set; default: test")
    add_skip_bad_images(command)
    command.add_argument(
        "--max_batch", type=int, default=codec.MAX_BATCH, help="images coded together, at most; default: %(default)s"
    )
    command.add_argument("--dry_run", action="store_true", help="only print how many bits/dim to expect")
    command.add_argument("--device", type=parse_device, default=default_device())

    command = commands.add_parser("decompress", help=decompress.__doc__, description=decompress.__doc__)
    command.set_defaults(function=decompress)
    command.add_argument("checkpoint", help="the one that compressed")
    command.add_argument("file")
    command.add_argument("-o", "--output", required=True, help="a new folder, of a PNG per image, or a new levels.npy")
    command.add_argument(
        "--micro_batch", type=int, help="images that the network sees at once; default: all of a batch"
    )
    command.add_argument("--device", type=parse_device, default=default_device())

    demo.add_parser(commands)

    command = commands.add_parser("env", help=env.__doc__, description=env.__doc__)
    command.set_defaults(function=env)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run a subcommand; a mistake, or a missing package, ends with exit code 1 and one line on stderr."""
    args = build_parser().parse_args(argv)
    try:
        check_in_range("--batch_size", getattr(args, "batch_size", None), 1)
        args.function(args)
    except (ValueError, OSError) as error:
        sys.exit(f"ddpm-hf: {error}")
    except ModuleNotFoundError as error:  # of what plain `pip install ddpm_hf` leaves out; `train` has most of it
        sys.exit(f"ddpm-hf: {error.name} is not installed: pip install 'ddpm_hf[train]'")

