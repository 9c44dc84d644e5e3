"""Train a DDPM: Algorithm 1 of Ho et al. 2020 (arXiv 2006.11239).

    accelerate launch training/train.py
        real 8×8 digits (training/configs/digits.yaml), about two minutes on two cores
    accelerate launch training/train.py --config training/configs/folder32.yaml --train_data_dir my_photos
        your photographs at 32×32, half an hour on two cores; folder64.yaml on a GPU
    accelerate launch training/train.py --config training/configs/cifar10.yaml --global_batch_size 64

`python training/train.py` does the same in one process. Every option of ddpm_hf/runs/options.py can stand in the YAML
file or on the command line, which wins; `--help` lists them, `--dry_run` prints what they come to. The same command
again goes on where the run stopped, from its newest checkpoint, and ends with the weights it would have had.

Several processes share `global_batch_size`, which stays what it is:

    one GPU            accelerate launch --mixed_precision bf16 training/train.py --compile --config ...
    eight GPUs         accelerate launch --multi_gpu --num_processes 8 --mixed_precision bf16 \\
                           training/train.py --config ...
                       torchrun --nproc_per_node 8 training/train.py --mixed_precision bf16 --config ...
    two machines       accelerate launch --multi_gpu --num_machines 2 --num_processes 16 --machine_rank 0|1 \\
                           --main_process_ip HOST --main_process_port 29500 training/train.py --config ...
                       torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500 \\
                           training/train.py --config ...      (the same line on both)
    SLURM              srun --nodes 2 --ntasks-per-node 1 torchrun --nnodes 2 --nproc_per_node 8 \\
                           --rdzv_backend c10d --rdzv_endpoint FIRST_NODE:29500 training/train.py --config ...
    two CPU processes  ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 training/train.py

Machines must see the same `output_dir` and data. What lands in `output_dir`:

    model_index.json, unet/, scheduler/     the finished model: DDPMPaperPipeline.from_pretrained(output_dir)
    checkpoints/step-N/                     a pipeline with the EMA weights, and the state to go on from
    metrics.jsonl, curves.png               loss, gradient norm and speed
    samples/, samples_over_time.png         grids of samples with the raw and with the EMA weights
    report.html                             all of this and the options on one page, to open by a double click
    options.yaml                            the resolved options; --config reads it back

With `--push_to_hub --hub_model_id user/name` the model, its numbers, options and grids are uploaded, with a model card
that says what the page says; if only that fails, the exit code is 4, and the last line the command that finishes it.
"""

# ruff: noqa: E402  (imports follow the parsing of options)
import contextlib
import copy
import importlib
import logging
import math
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

from ddpm_hf.machine import end_at_once_on_signals
from ddpm_hf.runs import FREE_TO_CHANGE, TrainingOptions, averaging_lags, parse_options, to_yaml

CONFIGS = Path(__file__).parent / "configs"


def parse(argv: list[str]) -> TrainingOptions:
    return parse_options(TrainingOptions, argv, default_config=CONFIGS / "digits.yaml", description=__doc__)


if __name__ == "__main__":  # help, mistakes and Ctrl-C do not wait for the imports below, which take seconds
    end_at_once_on_signals()
    OPTIONS = parse(sys.argv[1:])

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from diffusers.training_utils import EMAModel
from torch import Tensor

from ddpm_hf import DDPMPaperMLP, DDPMPaperPipeline, DDPMPaperScheduler, DDPMPaperUNet, GaussianDiffusion
from ddpm_hf.data import Samples, load_samples, to_model_range
from ddpm_hf.hub import BackgroundUploads
from ddpm_hf.machine import Recorded, Stopped, StopSignals, join_processes
from ddpm_hf.objectives import LossHistory, simple_loss, vlb_loss
from ddpm_hf.randomness import keyed_seed
from ddpm_hf.runs import (
    Batch,
    KeyedBatches,
    RunLog,
    TrainingState,
    checkpoints,
    environment,
    prefetched,
    public_options,
    share_of,
)
from ddpm_hf.runs.log import cut_metrics, start_trackers
from ddpm_hf.runs.report import Rows
from ddpm_hf.sampling import sample_together

logger = logging.getLogger("train")
MAX_OVERFLOWS_IN_A_ROW = 20  # float16's loss scale halves at each: 2^20 in all, more than it can need


# ---- Algorithm 1 ---------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """What the training loop works with."""

    options: TrainingOptions
    accelerator: Accelerator
    batches: KeyedBatches
    model: torch.nn.Module  # state.unet, wrapped for mixed precision and several processes
    state: TrainingState
    scheduler: DDPMPaperScheduler
    objective: Callable[..., Tensor] = simple_loss
    recorded: dict[Callable[..., Tensor | None], Recorded] = field(default_factory=dict)  # see `launch`


def losses_of(run: Run, x_start: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """Algorithm 1, line 5 without its gradient, per sample: [B]; L_simple, or the bound's term at t in bits/dim.

    Lines 2–4, the random draws, made the batch, of which `x_start` has the levels or points as they are stored.

    Noise is added in float32 whatever the precision of the network: in bfloat16 the first timesteps would get none.
    """
    diffusion: GaussianDiffusion = run.scheduler.diffusion
    x_start = to_model_range(x_start, run.batches.samples.num_levels)
    x_t = diffusion.q_sample(x_start, t, noise)
    model_output = run.model(x_t, t, return_dict=False)[0]
    noise_of_loss = (noise,) if run.options.objective == "simple" else ()
    return run.objective(diffusion, model_output.float(), x_start, x_t, t, *noise_of_loss)


def learning_rate_of(options: TrainingOptions, num_updates: int) -> float:
    """Linear warm-up from 0, then constant, by the number of updates made so far, as in the paper's code."""
    warmed_up = min(1.0, num_updates / options.warmup_steps) if options.warmup_steps else 1.0
    return options.learning_rate * warmed_up


def training_step(run: Run, stream: Iterator[Batch]) -> tuple[Tensor, Tensor]:
    """One round of Algorithm 1's loop. Returns this process's loss and the gradient's norm before clipping, both 0-d.

    Raises FloatingPointError, before the weights are touched, when the loss or the gradient is not finite; in float16,
    whose loss scale must overflow now and then to be found, only when it did so 20 times in a row.
    """
    options, accelerator, state = run.options, run.accelerator, run.state
    learning_rate = learning_rate_of(options, state.num_updates)
    for group in state.optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(learning_rate)
        else:
            group["lr"] = learning_rate
    loss = torch.zeros((), device=accelerator.device)
    num_parts = options.gradient_accumulation_steps
    parts: list[tuple[Batch, Tensor]] = []  # with their losses
    for part in range(num_parts):
        batch, weights = next(stream).to(accelerator.device), ()
        if state.loss_history is not None:  # line 3, with importance sampling
            t, weight = (x.to(accelerator.device) for x in state.loss_history.draw(batch.quantiles))
            batch, weights = batch._replace(t=t), (weight,)
        if options.dropout:
            index = part * accelerator.num_processes + accelerator.process_index
            torch.manual_seed(keyed_seed(options.seed, "dropout", state.step, index))
        with contextlib.nullcontext() if part == num_parts - 1 else accelerator.no_sync(run.model):
            losses: Any = launch(run, add_gradient, batch.x_start, batch.t, batch.noise, *weights)
        parts.append((batch, losses))
        loss += (losses * weights[0] if weights else losses).mean() / num_parts
    grad_norm: Any = launch(run, clip_gradient)
    # the one place where a step waits for the device
    if state.grad_scaler is None and not torch.isfinite(loss + grad_norm):
        raise not_finite(parts, state.step, learning_rate)
    state.step += 1
    launch(run, update_weights)
    if state.loss_history is not None:
        for batch, losses in parts:
            t, losses = accelerator.gather((batch.t, losses))  # of all processes, by row of the global batch
            state.loss_history.update(t.cpu().numpy(), losses.cpu().numpy())
    if accelerator.optimizer_step_was_skipped:  # then learning rate and averaged weights wait as well
        state.overflows_in_a_row += 1
        if state.overflows_in_a_row >= MAX_OVERFLOWS_IN_A_ROW:
            raise FloatingPointError(f"float16 overflowed {MAX_OVERFLOWS_IN_A_ROW} times in a row; train in bf16")
    else:
        state.overflows_in_a_row = 0
        state.num_updates += 1
        state.ema.optimization_step = state.num_updates  # which a replay does not count
    return loss, grad_norm


def launch(run: Run, work: Callable[..., Tensor | None], *tensors: Tensor) -> Tensor | None:
    """`work(run, *tensors)`; on one GPU replayed as a CUDA graph.

    Not between processes, where a graph would hold their communication too, and not where the CPU decides within a
    step: whether float16 overflowed, or what gradient checkpointing draws again.
    """
    options, accelerator = run.options, run.accelerator
    alone_on_gpu = accelerator.device.type == "cuda" and accelerator.num_processes == 1
    if not (options.cuda_graphs and alone_on_gpu) or run.state.grad_scaler or options.gradient_checkpointing:
        return work(run, *tensors)
    if work not in run.recorded:
        run.recorded[work] = Recorded(partial(work, run), accelerator.device)
    return run.recorded[work](*tensors)


def add_gradient(run: Run, x_start: Tensor, t: Tensor, noise: Tensor, weights: Tensor | float = 1.0) -> Tensor:
    """The losses [B] of a part of the batch; the gradient of their weighted mean joins that of the parts before."""
    losses = losses_of(run, x_start, t, noise)
    run.accelerator.backward((losses * weights).mean() / run.options.gradient_accumulation_steps)
    return losses.detach()


def clip_gradient(run: Run) -> Tensor:
    """The gradient's norm before it is clipped, 0-d."""
    norm: Any = run.accelerator.clip_grad_norm_(run.state.unet.parameters(), run.options.max_grad_norm)
    return norm


def update_weights(run: Run) -> None:
    """Adam's step, and the averaged weights after it."""
    state = run.state
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=run.accelerator.device.type != "cuda")  # a CUDA graph needs it in its place
    if not run.accelerator.optimizer_step_was_skipped:
        state.ema.step(state.unet.parameters())


def not_finite(parts: list[tuple[Batch, Tensor]], step: int, learning_rate: float) -> FloatingPointError:
    """What to raise where the loss, or else only the gradient, is not finite, with the samples it may come from."""
    bad = [~torch.isfinite(losses) for _, losses in parts]
    what = "loss" if any(b.any() for b in bad) else "gradient"
    t, samples = [], []
    for (batch, _), b in zip(parts, bad, strict=True):
        chosen = b if what == "loss" else torch.ones_like(b)
        t += batch.t[chosen].tolist()
        samples += batch.indices[chosen.cpu().numpy()].tolist()
    return FloatingPointError(
        f"the {what} is not finite at step {step}, learning rate {learning_rate:g}, t={t}, samples {samples}; the "
        "weights are as they were before this step. Lower the learning rate, or look at these samples"
    )


def all_agree_to_stop(run: Run, signals: StopSignals, deadline: float) -> bool:
    """Whether any process was asked to stop or is past its deadline, which all of them then know, after the same step.

    A signal is then in `signals.received` of all; None there says that it was the deadline.
    """
    signaled, late = signals.received is not None, time.monotonic() >= deadline
    if run.accelerator.num_processes > 1:
        asked = torch.tensor([float(signaled), float(late)], device=run.accelerator.device)
        # by this sum alone: a signal that comes meanwhile is for the next step, or this process would leave by itself
        num_asked: Any = run.accelerator.reduce(asked, reduction="sum")
        signaled, late = (num_asked > 0).tolist()
        if signaled and signals.received is None:
            signals.received = signal.SIGTERM
    return signaled or late


def train(
    run: Run, manifest: dict[str, Any], signals: StopSignals, uploads: BackgroundUploads | None = None
) -> Path | None:
    """Algorithm 1, from where the state stands to the last step, with metrics, samples and checkpoints on the way.

    Returns the last checkpoint on the main process; None where there was nothing left to train. A signal leads to a
    checkpoint of the step that was just made, and `Stopped`; the end of `max_minutes` too, and exit code 0.
    """
    options, accelerator, state = run.options, run.accelerator, run.state
    deadline = time.monotonic() + 60 * (math.inf if options.max_minutes is None else options.max_minutes)
    folder, num_parts = Path(options.output_dir), options.gradient_accumulation_steps
    rank, world_size = accelerator.process_index, accelerator.num_processes
    shares = [share_of(options.global_batch_size, num_parts, part, rank, world_size) for part in range(num_parts)]
    wanted = ((step, share) for step in range(state.step, options.num_steps) for share in shares)
    stream = prefetched(run.batches, wanted, pin_memory=accelerator.device.type == "cuda")
    log = RunLog(
        accelerator,
        folder,
        first_step=state.step,
        num_steps=options.num_steps,
        global_batch_size=options.global_batch_size,
        tables=report_tables(run, manifest),
    )
    written = None
    if state.step:  # a run that was stopped while it drew them
        write_samples(run, log, signals, manifest, only_missing=True)
    run.model.train()
    while state.step < options.num_steps:
        loss, grad_norm = training_step(run, stream)
        log.update(loss)
        ending, step = state.step == options.num_steps, state.step
        stopping = all_agree_to_stop(run, signals, deadline)
        if ending or step % options.log_every == 0:
            num_before = state.num_updates - (not accelerator.optimizer_step_was_skipped)  # which this step went by
            learning_rate = learning_rate_of(options, num_before)
            log.write(step, epoch=run.batches.epoch(step), grad_norm=grad_norm, learning_rate=learning_rate)
        with log.paused():
            if not stopping:
                write_samples(run, log, signals, manifest)
            if stopping or ending or step % options.checkpoint_every == 0:
                if accelerator.is_main_process:
                    written = state.save(folder / "checkpoints", run.scheduler, manifest)
                    checkpoints.prune(folder / "checkpoints", options.keep_checkpoints)
                log.write_overview()
                if written and uploads and options.hub_strategy == "every_save" and not (ending or stopping):
                    uploads.submit(written)
                accelerator.wait_for_everyone()
        if stopping and not ending:
            log.close()
            if signals.received is None:
                logger.info(
                    "stopped after %g minutes by --max_minutes at step %d, which is saved; to go on: %s",
                    options.max_minutes, step, command_to_go_on(run),
                )  # fmt: skip
                sys.exit(0)
            stopped = Stopped(signals.received)
            stopped.add_note(f"after step {step}, which is saved")
            raise stopped
    if written is None:  # evaluated since, perhaps
        log.write_overview()
    log.close()
    return written


def write_samples(
    run: Run, log: RunLog, signals: StopSignals, manifest: dict[str, Any], *, only_missing: bool = False
) -> None:
    """Grids with the raw and the averaged weights, where they are due after this step.

    A signal stops it at once: drawing may take longer than a machine waits. The main process then saves this step on
    its own, since the others may be anywhere in theirs. With `only_missing`, after a resumption, the step is saved
    already: writing it again would put its only copy at risk.
    """
    options, accelerator, state = run.options, run.accelerator, run.state
    step = state.step
    due = options.sample_every and (step == options.num_steps or step % options.sample_every == 0)
    if not due or (only_missing and broadcast_object_list([log.has_samples(step)])[0]):
        return
    try:
        with signals.interruptible():
            log.write_samples(step, "raw", draw_samples(run))
            with state.ema_weights():
                log.write_samples(step, "ema", draw_samples(run))
    except Stopped as stopped:
        if accelerator.is_main_process and not only_missing:
            state.save(Path(options.output_dir) / "checkpoints", run.scheduler, manifest)
        log.progress.close()  # what follows gets a line of its own
        stopped.add_note(f"after step {step}, which is saved")
        raise


def report_tables(run: Run, manifest: dict[str, Any]) -> dict[str, Rows]:
    """What report.html tells of the run beside its numbers; paths on this machine only by their last part."""
    defaults = {**asdict(TrainingOptions(dataset_name="digits")), "dataset_name": None}
    options = public_options(asdict(run.options)).items()
    differing = [(name, value, defaults[name]) for name, value in options if value != defaults[name]]
    samples, unet, accelerator = run.batches.samples, run.state.unet, run.accelerator
    network = f"{type(unet).__name__}, {sum(p.numel() for p in unet.parameters()):,} parameters"
    data = {**manifest["dataset"], "shape": samples.sample_shape, "network": network}
    environment = {"processes": accelerator.num_processes, "precision": accelerator.mixed_precision}
    return {
        "Options that differ from the defaults, the paper's for CIFAR-10": [("option", "here", "default"), *differing],
        "Data and network": [("", ""), *public_options(data).items()],
        "Environment": [("", ""), *{**manifest["environment"], **environment}.items()],
    }


def command_to_go_on(run: Run) -> str:
    """The command line of this run, for a shell, with the precision that a launcher may have chosen."""
    num_processes, precision = run.accelerator.num_processes, run.accelerator.mixed_precision
    if os.environ.get("LOCAL_WORLD_SIZE", str(num_processes)) != str(num_processes):
        return "the same command, on every machine"
    launcher = ["python"] if num_processes == 1 else ["torchrun", "--nproc_per_node", str(num_processes)]
    is_implied = run.options.mixed_precision is not None or precision == "no"
    return shlex.join([*launcher, *sys.argv, *([] if is_implied else ["--mixed_precision", precision])])


def publish(options: TrainingOptions, uploads: BackgroundUploads) -> bool:
    """Upload the finished run, and say in one line what became of it. For one process."""
    private = " --private" if options.hub_private_repo else ""
    command = f"ddpm-hf publish {shlex.quote(options.output_dir)} {options.hub_model_id}{private}"
    try:
        url = uploads.finish()
    except (ValueError, OSError) as error:
        logger.error("%s; to upload it later: %s", error, command)
        return False
    logger.info("uploaded to %s", url)
    return True


def draw_samples(run: Run) -> Tensor:
    """Algorithm 2 with the network's present weights, the seeds shared out to all processes."""
    pipe = DDPMPaperPipeline(run.state.unet, copy.deepcopy(run.scheduler))
    silent = None if run.accelerator.is_main_process else True  # none: in a terminal only
    pipe.set_progress_bar_config(desc="sampling", leave=False, disable=silent)
    return sample_together(
        run.accelerator,
        pipe,
        run.options.num_samples,
        num_inference_steps=run.options.sample_steps,
        batch_size=run.options.global_batch_size,  # what fits into memory in training fits here
    )


# ---- wiring --------------------------------------------------------------------------------------------------------


def make_accelerator(options: TrainingOptions) -> Accelerator:
    """Accelerate's view of this process, and the settings of the machine that hold for all of it."""
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


def load_data(options: TrainingOptions) -> Samples:
    return load_samples(
        options.dataset_name,
        train_data_dir=options.train_data_dir,
        split=options.dataset_split,
        dataset_config=options.dataset_config,
        image_column=options.image_column,
        resolution=options.resolution,
        background=options.background,
        skip_bad_images=options.skip_bad_images,
        num_workers=options.num_workers,
    )


def build_network(options: TrainingOptions, sample_shape: tuple[int, ...]) -> DDPMPaperUNet | DDPMPaperMLP:
    """A network with freshly drawn weights for samples of this shape, (C, H, W) or (d,)."""
    channels = sample_shape[0]
    if options.in_channels not in (None, channels):
        raise ValueError(f"the model expects {options.in_channels} channels (--in_channels), the data has {channels}")
    if options.random_flip and len(sample_shape) == 1:
        raise ValueError("--random_flip mirrors images, and the data are points; leave it out")
    torch.manual_seed(keyed_seed(options.seed, "weights"))
    out_channels = 2 * channels if options.variance_type == "learned" else channels
    if len(sample_shape) == 1:
        return DDPMPaperMLP(channels, out_channels, hidden_size=options.hidden_size, num_layers=options.num_layers)
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
    )


def build_scheduler(options: TrainingOptions, *, clip_sample: bool) -> DDPMPaperScheduler:
    return DDPMPaperScheduler(**options.process, clip_sample=clip_sample)


def adopt(options: TrainingOptions, pipe: DDPMPaperPipeline) -> None:
    """Give the options that describe network and process the pipeline's values: what is saved is what runs."""
    if not isinstance(pipe.unet, DDPMPaperUNet | DDPMPaperMLP) or not isinstance(pipe.scheduler, DDPMPaperScheduler):
        raise ValueError(
            f"--init_from {options.init_from} holds {type(pipe.unet).__name__} and {type(pipe.scheduler).__name__}; "
            "fine-tuning starts from a DDPMPaperUNet or DDPMPaperMLP with a DDPMPaperScheduler"
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


def build_run(options: TrainingOptions, accelerator: Accelerator, samples: Samples) -> Run:
    pipe = DDPMPaperPipeline.from_pretrained(options.init_from) if options.init_from else None
    if pipe is not None:
        adopt(options, pipe)
    unet = build_network(options, samples.sample_shape)
    if pipe is not None:
        unet.load_state_dict(pipe.unet.state_dict())
    scheduler = pipe.scheduler if pipe else build_scheduler(options, clip_sample=not samples.is_points)
    batches = KeyedBatches(
        samples,
        seed=options.seed,
        global_batch_size=options.global_batch_size,
        num_timesteps=len(scheduler),
        random_flip=options.random_flip,
    )
    if options.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    unet.to(accelerator.device)
    # decay = min_decay: the first update copies and then the decay is constant, as in the paper's code
    ema = EMAModel(unet.parameters(), decay=options.ema_decay, min_decay=options.ema_decay, foreach=True)
    on_gpu = accelerator.device.type == "cuda"
    # there as a tensor, so that a step which is replayed sees it change
    learning_rate: Any = torch.zeros((), device=accelerator.device) if on_gpu else 0.0
    fused = accelerator.device.type in ("cpu", "cuda")
    optimizer = torch.optim.Adam(unet.parameters(), lr=learning_rate, fused=fused, capturable=on_gpu)
    if options.compile:
        unet.compile()
    model, optimizer = accelerator.prepare(unet, optimizer)
    history = LossHistory(len(scheduler)) if options.timestep_sampling == "loss_history" else None
    state = TrainingState(unet, ema, optimizer, accelerator.scaler, history)
    objective = simple_loss if options.objective == "simple" else partial(vlb_loss, num_levels=samples.num_levels)
    return Run(options, accelerator, batches, model, state, scheduler, objective)


def enter_folder(run: Run, manifest: dict[str, Any], held: contextlib.ExitStack) -> Path | None:
    """Bring the state to where the newest checkpoint in `output_dir` left it, and return that checkpoint.

    The folder is this run's alone until `held` is closed.
    """
    options, accelerator = run.options, run.accelerator
    folder = Path(options.output_dir)
    decision: list[Any] = [None, None]  # checkpoint, error: made once, so that all processes do the same
    if accelerator.is_main_process:
        try:
            held.enter_context(checkpoints.exclusive(folder))
            decision[0] = checkpoints.to_resume(
                folder / "checkpoints",
                options.resume,
                manifest,
                free=FREE_TO_CHANGE,
                allow_changes=options.allow_changes,
            )
            (folder / "options.yaml").write_text(to_yaml(options), encoding="utf-8")
        except (ValueError, OSError) as error:
            decision[1] = str(error)
    broadcast_object_list(decision)
    checkpoint, error = decision
    if error is not None:
        raise ValueError(error)
    if checkpoint is not None:
        run.state.restore(checkpoint)
        logger.info("resuming at step %d, from %s", run.state.step, checkpoint)
    if accelerator.is_main_process:
        checkpoints.move_aside(folder / "checkpoints", run.state.step if checkpoint else -1)
        cut_metrics(folder / "metrics.jsonl", run.state.step)
    return checkpoint


def describe(run: Run) -> str:
    samples, accelerator, unet = run.batches.samples, run.accelerator, run.state.unet
    return (
        f"{type(unet).__name__} with {sum(p.numel() for p in unet.parameters()):,} parameters; "
        f"{len(samples):,} samples {samples.sample_shape} of {samples.name}; {accelerator.num_processes} process(es) "
        f"on {accelerator.device.type}, precision {accelerator.mixed_precision}"
    )


def main(argv: list[str]) -> None:
    start(parse(argv))


def start(options: TrainingOptions) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for client in ("httpx", "httpx2"):  # a line for every request to the Hub
        logging.getLogger(client).setLevel(logging.WARNING)
    with contextlib.ExitStack() as held, StopSignals() as signals:
        try:
            run_training(options, held, signals)
        except Stopped as stopped:
            state_of_run = getattr(stopped, "__notes__", [])
            logger.info("%s; the same command goes on", " ".join(["stopped by", stopped.name, *state_of_run]))
            if __name__ == "__main__":  # torch's loader, cut off while it was made, would complain when it is deleted
                sys.unraisablehook = lambda unraisable: None
            raise


def run_training(options: TrainingOptions, held: contextlib.ExitStack, signals: StopSignals) -> None:
    """From options to a finished run; `held` keeps its folder until the end."""
    try:
        importlib.import_module("matplotlib")  # of the curves: missing packages show now, not at the first checkpoint
        accelerator = make_accelerator(options)
        if not options.dry_run:  # before hours of decoding
            Path(options.output_dir).mkdir(parents=True, exist_ok=True)
        if not accelerator.is_main_process:
            logging.disable(logging.WARNING)
        share_of(options.global_batch_size, options.gradient_accumulation_steps, 0, 0, accelerator.num_processes)
        with signals.interruptible(), accelerator.main_process_first():  # the others read what the first cached
            samples = load_data(options)
        run = build_run(options, accelerator, samples)
        logger.info(describe(run))
        if advice := averaging_lags(options.num_steps, options.ema_decay):
            logger.warning("%d steps are too short for ema_decay %g: the averaged weights, which are saved, will lag "
                           "behind; %s", options.num_steps, options.ema_decay, advice)  # fmt: skip
        if options.dry_run:
            accelerator.print(to_yaml(options), end="")
            return
        manifest = {
            "world_size": accelerator.num_processes,
            "options": {**asdict(options), "mixed_precision": accelerator.mixed_precision},  # also where it chose
            "environment": environment(accelerator.device),
            "dataset": {"name": samples.name, "num_samples": len(samples), "fingerprint": samples.fingerprint},
        }
        resumed = enter_folder(run, manifest, held)
    except ModuleNotFoundError as error:
        sys.exit(f"train.py: {error}; training needs more packages: pip install 'ddpm_hf[train]'")
    except (ValueError, OSError) as error:
        sys.exit(f"train.py: {error}")
    if options.report_to:
        start_trackers(accelerator, asdict(options))
    if run.state.step >= options.num_steps:
        logger.info("already trained to step %d; more with --num_steps", run.state.step)
    uploads = None
    if options.push_to_hub and accelerator.is_main_process:
        folder, repo_id = Path(options.output_dir), str(options.hub_model_id)
        uploads = BackgroundUploads(folder, repo_id, private=options.hub_private_repo)
    try:
        finished = train(run, manifest, signals, uploads) or resumed
        if accelerator.is_main_process and finished is not None:
            checkpoints.export_pipeline(finished, Path(options.output_dir))
    except OSError as error:  # a full disk, most often
        sys.exit(f"train.py: {error}")
    if accelerator.is_main_process and finished is not None:
        logger.info("done: DDPMPaperPipeline.from_pretrained(%r)", options.output_dir)
        with signals.interruptible():
            published = uploads is None or publish(options, uploads)
        if not published:
            sys.exit(4)


if __name__ == "__main__":
    start(OPTIONS)
