"""What the subcommands of `ddpm-hf` do: one function each, in the order of `arguments`, whose names they have."""

import argparse
import dataclasses
import importlib.metadata
import platform
import sys
from pathlib import Path

import numpy as np
import torch
from diffusers import UNet2DModel

from .. import codec, hub
from ..convert import (
    export_onnx,
    pipeline_from_pytorch_port,
    pipeline_from_stock,
    pipeline_from_tf_checkpoint,
    pipeline_to_stock,
    state_size,
    tf_checkpoint_prefix,
    unknown_keys,
)
from ..evaluation import Evaluator, Protocol, paper_tables
from ..hub import load_pipeline
from ..inference import can_speed_up, speed_up
from ..machine import join_processes, leave_processes
from ..pictures import image_grid, point_density
from ..runs import RESULTS, read_results, shown_value, write_results
from ..scheduler import paper_scheduler
from ..short_chains import shortened
from .arguments import SCHEDULERS
from .checks import check_in_range, check_new_file, check_new_folder, check_output
from .classes import chosen_classes, require_unlabelled
from .devices import default_device
from .networks import draw_by_onnx, resize
from .shared_options import weights_options


def sample(args: argparse.Namespace) -> None:
    """Samples, `batch_size` seeds at a time, into a grid, a folder of pictures, a density of points, or an array."""
    output = Path(args.output)
    suffix = output.suffix.lower()
    if not args.output:
        raise ValueError(f"--output {args.output!r}: give a .png, a .npy, or for images a folder")
    check_output(output, is_file=bool(suffix))
    dtype = "auto" if args.dtype == "auto" else getattr(torch, args.dtype)
    loaded_in = torch.float32 if dtype == "auto" else dtype
    pipe = load_pipeline(args.checkpoint, loaded_in, **weights_options(args))
    sampler = SCHEDULERS[args.scheduler]
    if sampler.scheduler is not None:
        import diffusers

        pipe.scheduler = getattr(diffusers, sampler.scheduler).from_config(pipe.scheduler.config)
    pipe.to(args.device)
    is_points = len(pipe.sample_shape) == 1
    if suffix not in ("", ".png", ".npy") or (is_points and suffix == ""):
        raise ValueError(f"--output {output}: give a .png, a .npy, or for images a folder")
    if args.onnx is not None:
        draw_by_onnx(pipe, args)
    if args.size is not None:
        resize(pipe, args.size)
    if args.fast or (args.fast is None and can_speed_up(pipe, dtype)):
        pipe = speed_up(pipe, dtype, release=True)
    labels, count, parts = None, len(args.seeds), []
    if args.classes is None:
        require_unlabelled(pipe, "--classes is missing", "--classes all takes them in turn")
    else:
        classes = chosen_classes(pipe, args.classes)
        labels = [classes[i % len(classes)] for i in range(count)]
    for i in range(0, count, args.batch_size):
        part = slice(i, i + args.batch_size)
        parts += pipe(
            seeds=args.seeds[part],
            class_labels=labels and labels[part],
            guidance_scale=args.guidance_scale,
            num_inference_steps=args.steps,
            output_type="np",
            return_dict=False,
            **sampler.options,
        )
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
    print(f"{len(samples)} sample{'s' if len(samples) != 1 else ''} in {output}")


def convert(args: argparse.Namespace) -> None:
    """What `source` is, made a pipeline of ours, or stock's, in a new folder; keys that are left out are named."""
    output = Path(args.output)
    check_new_folder(output)
    left_out: list[str] = []
    is_tensorflow = tf_checkpoint_prefix(args.source) is not None
    if is_tensorflow or Path(args.source).is_file():
        if any(weights_options(args).values()):
            raise ValueError(f"{args.source}: --variant, --allow_pickle and --trust_remote_code are for folders")
        read = pipeline_from_tf_checkpoint if is_tensorflow else pipeline_from_pytorch_port
        pipe = read(args.source, ema=not args.raw, sample_size=args.sample_size, variance_type=args.variance_type)
    elif args.raw or args.variance_type:
        raise ValueError(
            "--raw, --sample_size and --variance_type are for TensorFlow checkpoints and files of PyTorch ports; "
            f"there is no {args.source}.index, no {Path(args.source) / 'checkpoint'} and no file {args.source}"
        )
    else:
        pipe = load_pipeline(args.source, **weights_options(args))
        left_out = unknown_keys(pipe)
        if args.sample_size is not None:
            state_size(pipe, args.sample_size)
        is_ours = not isinstance(pipe.unet, UNet2DModel)
        if args.to == "paper" and not (is_ours and (args.variant or args.allow_pickle)):  # then it is written anew
            pipe = pipeline_from_stock(pipe)
    if args.to == "stock":
        require_unlabelled(
            pipe, "--to stock", "in Python, convert.pipeline_to_stock(pipe, NAME) makes one of one class"
        )
        if pipe.null_class is not None:
            print("stock's DDPMPipeline takes no labels: this one draws as without; in Python,")
            print("convert.pipeline_to_stock(pipe, NAME) makes one of a class")
        pipe = pipeline_to_stock(pipe)
    pipe.save_pretrained(output)
    config, process = pipe.unet.config, pipe.scheduler.config
    parameters = sum(parameter.numel() for parameter in pipe.unet.parameters())
    # a student's scheduler has no variance
    kind = f"variance_type={process['variance_type']}" if "variance_type" in process else type(pipe.scheduler).__name__
    print(
        f"{output}: {type(pipe).__name__}, {parameters:,} parameters, sample_size={config['sample_size']}, {kind}"
        + (f"; of its configurations, unknown here and without effect: {', '.join(left_out)}" if left_out else "")
    )


def export(args: argparse.Namespace) -> None:
    """The checkpoint's network as an ONNX file, and by how much onnxruntime differs from PyTorch."""
    output = Path(args.output)
    if output.suffix.lower() != ".onnx":
        raise ValueError(f"{output}: give the name of a .onnx file")
    check_new_file(output)
    for size in args.batches:
        check_in_range("--batches", size, 1)
    pipe = load_pipeline(args.checkpoint, torch.float32, **weights_options(args))
    output.parent.mkdir(parents=True, exist_ok=True)
    difference = export_onnx(pipe.unet, output, batches=args.batches)
    sizes = ", ".join(map(str, args.batches))
    print(f"{output}: {output.stat().st_size:,} bytes, for any batch and t of [1] or [B]")
    print(
        f"in onnxruntime at most {difference.largest:.2g} from PyTorch's outputs, which reach {difference.output:.2g} "
        f"(batches of {sizes})"
    )


def evaluate(args: argparse.Namespace) -> None:
    """The results of `Evaluator`, each printed and kept in evaluation.json as soon as it is there."""
    protocol = Protocol(**{f.name: getattr(args, f.name) for f in dataclasses.fields(Protocol)})
    accelerator = join_processes(cpu_threads=args.cpu_threads, mixed_precision="no")
    is_folder = Path(args.checkpoint).is_dir()
    output = Path(args.output) if args.output else Path(args.checkpoint if is_folder else ".") / RESULTS
    read_results(output)  # refuse another file there now, not after hours
    output.parent.mkdir(parents=True, exist_ok=True)
    evaluator = Evaluator(accelerator, args.checkpoint, protocol, work_dir=args.work_dir, **weights_options(args))
    if args.label_column is None:
        require_unlabelled(evaluator.pipe, "--label_column is missing", "it says where the data's labels are")
    for result in evaluator.run():
        write_results(output, [result])
        print(f"{result['name']} {shown_value(result)}")
        for name, value in result.get("parts", {}).items():
            print(f"    {name} {value:.6f}")
    if accelerator.is_main_process:
        print(f"with the whole protocol in {output}")
    leave_processes(accelerator)


def shorten(args: argparse.Namespace) -> None:
    """The checkpoint with the process of `short_chains.shortened`, by the network's error on training data."""
    check_new_folder(Path(args.output))
    accelerator = join_processes(cpu_threads=args.cpu_threads, mixed_precision="no")
    protocol = Protocol(
        dataset=args.dataset,
        split="train",
        num_images=args.num_images,
        seed=args.seed,
        skip_bad_images=args.skip_bad_images,
        label_column=args.label_column,
    )
    evaluator = Evaluator(accelerator, args.checkpoint, protocol, work_dir=args.work_dir, **weights_options(args))
    if args.label_column is None:
        require_unlabelled(evaluator.pipe, "--label_column is missing", "it says where the data's labels are")
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
    """The text of `paper_tables.report`."""
    results = read_results(Path(args.checkpoint) / RESULTS) if args.checkpoint else None
    print(paper_tables.report(args.table, checkpoint=args.checkpoint, results=results))


def publish(args: argparse.Namespace) -> None:
    """The address of what `hub.publish` uploaded; exit code 4 where the Hub could not be reached or refused."""
    try:
        url = hub.publish(args.run, args.repo_id, private=args.private, revision=args.revision, license=args.license)
    except hub.PublishError as error:
        print(f"ddpm-hf: {error}", file=sys.stderr)
        sys.exit(4)
    print(url)


def compress(args: argparse.Namespace) -> None:
    """The file of `codec.compress` and what its bits are made of; with `dry_run` the bound alone."""
    if not args.dry_run:
        if args.output is None:
            raise ValueError("--output is missing: name the file to write, or add --dry_run, which writes none")
        check_new_file(Path(args.output))
    check_in_range("--fit_images", args.fit_images, 1)
    check_in_range("--max_batch", args.max_batch, 1, codec.LARGEST_BATCH)
    check_in_range("--skip_bad_images", args.skip_bad_images, 0)
    pipe = load_pipeline(args.checkpoint, **weights_options(args)).to(args.device)
    require_unlabelled(pipe, f"compress with {args.checkpoint}")
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
    """The images of `codec.decompress`, in a new folder or array."""
    output = Path(args.output)
    if output.suffix.lower() == ".npy":
        check_new_file(output)
    else:
        check_new_folder(output)
    check_in_range("--micro_batch", args.micro_batch, 1)
    data = codec.read_file(args.file)
    codec.read_header(data)  # refuse a damaged file before the model is loaded
    pipe = load_pipeline(args.checkpoint, **weights_options(args)).to(args.device)
    decoded = codec.decompress(pipe, data, micro_batch=args.micro_batch, progress=True)
    output.parent.mkdir(parents=True, exist_ok=True)
    if output.suffix.lower() == ".npy":
        np.save(output, decoded.levels.numpy(), allow_pickle=False)
    else:
        codec.write_images(output, decoded)
    print(f"{codec.counted(len(decoded.levels), 'image')} in {output}; every batch has its checksum")


def env(args: argparse.Namespace) -> None:
    """Versions of the packages and of Python, and the device that is used by default."""
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
