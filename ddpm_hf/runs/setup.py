"""From options to what a run works with: data, network, process, optimizer, averaged weights."""

import logging
import os
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel

from ..data import Samples, load_samples
from ..machine import join_processes
from ..objectives import LossHistory
from ..pipeline_loading import DDPMPaperPipeline
from ..randomness import keyed_seed
from ..scheduler import DDPMPaperScheduler
from ..unet import DDPMPaperMLP, DDPMPaperUNet, use_native_kernels
from .distillation_options import DistillationOptions
from .networks import own_network
from .options import FREE_TO_CHANGE, DataOptions, TrainingOptions
from .records import environment, some_names
from .state import TrainingState

logger = logging.getLogger(__name__)
Options = TypeVar("Options", TrainingOptions, DistillationOptions)


def make_accelerator(options: TrainingOptions | DistillationOptions) -> Accelerator:
    """Accelerate's view of this process, and the settings of the machine that hold for all of it.

    Raises ValueError where the surroundings would change what the options say.
    """
    num_parts = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if num_parts != "1":
        raise ValueError(
            f"ACCELERATE_GRADIENT_ACCUMULATION_STEPS={num_parts} would divide gradients that are "
            f"means already; unset it and give --gradient_accumulation_steps {num_parts}, which cuts the same batch"
        )
    accelerator = join_processes(
        cpu_threads=options.cpu_threads,
        mixed_precision=options.mixed_precision,
        log_with=options.report_to,
        project_dir=options.output_dir,
    )
    torch.backends.cudnn.deterministic = True  # so that a resumed run repeats its sums; on an H100 it cost no time
    if options.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    return accelerator


def in_force(options: Options, accelerator: Accelerator) -> Options:
    """The options as a record of the run: with the precision that Accelerate chose where they leave it to it."""
    return replace(options, mixed_precision=accelerator.mixed_precision)


def load_data(options: DataOptions) -> Samples:
    """What the options say is trained on. Raises what `load_samples` raises, and ValueError for points to mirror."""
    samples = load_samples(
        options.dataset_name,
        train_data_dir=options.train_data_dir,
        split=options.dataset_split,
        dataset_config=options.dataset_config,
        image_column=options.image_column,
        label_column=options.label_column,
        resolution=options.resolution,
        background=options.background,
        channels=options.in_channels if options.convert_channels else None,
        max_value=options.max_value,
        skip_bad_images=options.skip_bad_images,
        num_workers=options.num_workers,
        output_dir=options.output_dir,
    )
    if options.random_flip and samples.is_points:
        raise ValueError("--random_flip mirrors images, and the data are points; leave it out")
    return samples


def embedding_rows(options: TrainingOptions, num_classes: int) -> dict[str, int | None]:
    """A network's rows for so many classes: the last is for "no label", where labels are dropped in training."""
    if not num_classes:
        return {"num_class_embeds": None, "null_class": None}
    dropped = options.label_dropout > 0
    return {"num_class_embeds": num_classes + dropped, "null_class": num_classes if dropped else None}


def build_network(options: TrainingOptions, sample_shape: tuple[int, ...], num_classes: int = 0) -> Any:
    """A network with freshly drawn weights for samples of this shape, (C, H, W) or (d,), and so many classes."""
    channels, rows = sample_shape[0], embedding_rows(options, num_classes)
    torch.manual_seed(keyed_seed(options.seed, "weights"))
    out_channels = 2 * channels if options.variance_type == "learned" else channels
    if options.network:
        shape: Any = {"sample_shape": sample_shape, "out_channels": out_channels, "rows": rows}
        return own_network(options.network, options.network_args or {}, **shape)
    if len(sample_shape) == 1:
        return DDPMPaperMLP(channels, out_channels, options.hidden_size, options.num_layers, **rows)
    height, width = sample_shape[1:]
    return DDPMPaperUNet(
        sample_size=height if height == width else (height, width),
        in_channels=channels,
        out_channels=out_channels,
        block_out_channels=tuple(options.block_out_channels),
        layers_per_block=options.layers_per_block,
        attention_resolutions=tuple(options.attention_resolutions),
        dropout=options.dropout,
        norm_num_groups=options.norm_num_groups,
        **rows,
    )


def build_scheduler(options: TrainingOptions, *, clip_sample: bool) -> DDPMPaperScheduler:
    return DDPMPaperScheduler(**options.process, clip_sample=clip_sample)


def adopt(options: TrainingOptions, pipe: DDPMPaperPipeline) -> None:
    """Give the options that describe network and process the pipeline's values: what is saved is what runs."""
    if not isinstance(pipe.unet, DDPMPaperUNet | DDPMPaperMLP) or not isinstance(pipe.scheduler, DDPMPaperScheduler):
        raise ValueError(
            f"--init_from {options.init_from} holds {type(pipe.unet).__name__} and {type(pipe.scheduler).__name__}; "
            "fine-tuning starts from a DDPMPaperUNet or DDPMPaperMLP with a DDPMPaperScheduler; of stock's "
            "`ddpm-hf convert` makes them"
        )
    if pipe.scheduler.config["variance_type"] == "fitted":
        raise ValueError(
            f"--init_from {options.init_from} has variances fitted to its weights; start from the checkpoint it was "
            "made from"
        )
    config = {**pipe.unet.config, **pipe.scheduler.config}
    for name in ({f.name for f in fields(options)} & config.keys()) - {"dropout"}:
        setattr(options, name, list(config[name]) if isinstance(config[name], tuple) else config[name])
    options.__post_init__()


def initial_pipeline(options: TrainingOptions) -> DDPMPaperPipeline | None:
    """What `init_from` names, whose network and process the options then describe; None where it is not given."""
    if not options.init_from:
        return None
    pipe = DDPMPaperPipeline.from_pretrained(options.init_from)
    adopt(options, pipe)
    return pipe


def resolved(options: TrainingOptions) -> TrainingOptions:
    """The options, with the network and the process of `init_from` where it is given."""
    initial_pipeline(options)
    return options


def initial_model(options: TrainingOptions, samples: Samples) -> tuple[Any, DDPMPaperScheduler]:
    """The network and the process to train: fresh, or those of `init_from`, which the options then describe."""
    pipe = initial_pipeline(options)
    check_channels(options, samples)
    if pipe is not None:
        _fit_size(pipe, options, samples)
    unet = build_network(options, samples.sample_shape, len(samples.label_names))
    if pipe is not None:
        _take_weights(unet, pipe, options, samples)
    if options.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    return unet, pipe.scheduler if pipe else build_scheduler(options, clip_sample=not samples.is_points)


def _fit_size(pipe: DDPMPaperPipeline, options: TrainingOptions, samples: Samples) -> None:
    """Give the network of `init_from` the size of the data, where that is another; attention stays at its levels."""
    shape, theirs = samples.sample_shape, pipe.sample_shape
    if len(shape) != len(theirs):
        raise ValueError(f"--init_from {options.init_from} is for samples {theirs}, the data are {shape}")
    if shape == theirs:
        return
    height, width = shape[1:]
    pipe.unet.register_to_config(sample_size=height if height == width else (height, width))
    options.attention_resolutions = list(pipe.unet.config["attention_resolutions"])
    at = " ".join(map(str, options.attention_resolutions)) or "no resolution"
    sizes = ["×".join(map(str, each[1:])) for each in (theirs, shape)]
    logger.info("--init_from: from %s to %s; attention stays at its levels, now at %s", *sizes, at)


def _take_weights(unet: Any, pipe: DDPMPaperPipeline, options: TrainingOptions, samples: Samples) -> None:
    """Give `unet` the weights of `init_from`. Raises ValueError where that has classes, and the data other ones.

    A network without classes gets them: with vectors of 0 it begins as the function that it was.
    """
    weights, config = pipe.unet.state_dict(), pipe.unet.config
    theirs, ours = pipe.id2label, dict(enumerate(samples.label_names))
    if config["num_class_embeds"] is None:
        if ours:
            weights = {**weights, "class_embedding.weight": torch.zeros_like(unet.class_embedding.weight)}
    elif theirs != ours or any(config[name] != unet.config[name] for name in ("num_class_embeds", "null_class")):
        raise ValueError(
            f"--init_from {options.init_from} has {config['num_class_embeds']} rows for the classes "
            f"{some_names(theirs.values()) or 'without names'}; the data have {some_names(ours.values()) or 'none'}, "
            f"--label_dropout {options.label_dropout:g}. Both must agree; --label_column says where labels are"
        )
    unet.load_state_dict(weights)


def check_channels(options: Any, samples: Samples) -> None:
    """Raises ValueError where the network is for another number of channels than the data has."""
    wanted, channels = options.in_channels, samples.sample_shape[0]
    if wanted in (None, channels):
        return
    found = f"the model expects {wanted} channels (--in_channels), the data has {channels}"
    if getattr(options, "init_from", None):
        plural = "s" if wanted != 1 else ""
        found = f"--init_from {options.init_from} is for {wanted} channel{plural}, the data has {channels}"
    reason = f" ({samples.first_in_colour})" if samples.first_in_colour else ""
    remedy = "" if samples.is_points else f"; --in_channels {wanted} --convert_channels converts the images"
    raise ValueError(f"{found}{reason}{remedy}")


def training_state(
    accelerator: Accelerator,
    unet: Any,
    *,
    ema_decay: float,
    history_of: int | None = None,
    compile: bool = False,
    label_names: Sequence[str] = (),
) -> tuple[torch.nn.Module, TrainingState]:
    """`unet` wrapped by Accelerate, and it with averaged weights and Adam, on the device, before the first step.

    Adam's learning rate is 0 until `Updates` sets it. `history_of` is the number of timesteps of which a loss history
    is kept, None for uniform t. `label_names` are those of a conditional network's classes.
    """
    unet.to(accelerator.device)
    if accelerator.device.type == "cpu" and accelerator.mixed_precision == "no" and not compile:
        use_native_kernels(unet)
    # decay = min_decay: the first update copies and then the decay is constant, as in the paper's code
    ema = EMAModel(unet.parameters(), decay=ema_decay, min_decay=ema_decay, foreach=True)
    on_gpu = accelerator.device.type == "cuda"
    # there as a tensor, so that a step which is replayed sees it change
    learning_rate: Any = torch.zeros((), device=accelerator.device) if on_gpu else 0.0
    fused = accelerator.device.type in ("cpu", "cuda")
    optimizer = torch.optim.Adam(unet.parameters(), lr=learning_rate, fused=fused, capturable=on_gpu)
    if compile:
        unet.compile()
    model, optimizer = accelerator.prepare(unet, optimizer)
    history = None if history_of is None else LossHistory(history_of)
    id2label = dict(enumerate(label_names)) or None
    return model, TrainingState(unet, ema, optimizer, accelerator.scaler, history, id2label)


def free_to_change(unet: Any) -> set[str]:
    """What may differ between a run with this network and its resumption, without a word.

    How a batch is cut only rounds its sums otherwise, but the masks of dropout are drawn by process and part, and what
    a network of another class draws is not known.
    """
    draws = not isinstance(unet, DDPMPaperUNet | DDPMPaperMLP) or unet.config.get("dropout")
    return FREE_TO_CHANGE | (set() if draws else {"gradient_accumulation_steps", "num_processes"})


def run_manifest(accelerator: Accelerator, samples: Samples, options: Any) -> dict[str, Any]:
    """What a checkpoint says of its run, and must agree with for it to go on: options, data, processes, machine.

    `options` is a dataclass or a dict of what JSON can hold.
    """
    classes = {} if samples.labels is None else {"classes": samples.class_counts(), "labels": samples.labels_sha256()}
    named = dict(options) if isinstance(options, dict) else asdict(options)
    return {
        "world_size": accelerator.num_processes,
        "options": {**named, "mixed_precision": accelerator.mixed_precision},  # also where it chose
        "environment": environment(accelerator.device),
        "dataset": {"name": samples.name, "num_samples": len(samples), "fingerprint": samples.fingerprint, **classes},
    }
