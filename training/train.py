"""Train a DDPM: Algorithm 1 of Ho et al. 2020 (arXiv 2006.11239).

    accelerate launch training/train.py
        real 8×8 digits (training/configs/digits.yaml), about five minutes on two cores
    accelerate launch training/train.py --config training/configs/folder32.yaml --train_data_dir my_photos
        your photographs at 32×32, half an hour on two cores; folder64.yaml on a GPU
    accelerate launch training/train.py --config training/configs/cifar10.yaml --global_batch_size 64

`python training/train.py` does the same in one process. Every option of ddpm_hf/runs/options.py can stand in the YAML
file or on the command line, which wins; `--help` lists them, `--dry_run` shows data, cost and what would happen. The
same command again goes on where the run stopped, from its newest checkpoint, with the weights it would have had.

Several processes share `global_batch_size`, which stays what it is (docs/training.md has SLURM and more machines):

    one GPU            accelerate launch --mixed_precision bf16 training/train.py --compile --config ...
    eight GPUs         accelerate launch --multi_gpu --num_processes 8 --mixed_precision bf16 \\
                           training/train.py --config ...
    two CPU processes  ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 training/train.py

What lands in `output_dir`:

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
import importlib
import logging
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ddpm_hf.machine import end_at_once_on_signals
from ddpm_hf.runs import TrainingOptions, parse_options, to_yaml

CONFIGS = Path(__file__).parent / "configs"


def parse(argv: list[str]) -> TrainingOptions:
    return parse_options(TrainingOptions, argv, default_config=CONFIGS / "digits.yaml", description=__doc__)


if __name__ == "__main__":  # help, mistakes and Ctrl-C do not wait for the imports below, which take seconds
    end_at_once_on_signals()
    OPTIONS = parse(sys.argv[1:])

import torch
from accelerate import Accelerator
from torch import Tensor

from ddpm_hf import DDPMPaperScheduler
from ddpm_hf.data import Samples, to_model_range
from ddpm_hf.hub import BackgroundUploads
from ddpm_hf.machine import StopSignals, agree_to_stop
from ddpm_hf.objectives import simple_loss, vlb_loss
from ddpm_hf.runs import (
    Batch,
    DryRun,
    HeldOut,
    KeyedBatches,
    RunFolder,
    RunLog,
    TrainingState,
    Updates,
    Watch,
    batches_of,
    described,
    end_early,
    finish,
    free_to_change,
    hold_out,
    in_force,
    initial_model,
    launch,
    linear_warmup,
    load_data,
    make_accelerator,
    output_of,
    prepare,
    report_tables,
    resolved,
    run_manifest,
    start_trackers,
    training_state,
    warn_if_averages_lag,
)

logger = logging.getLogger("train")


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
    held_out: HeldOut | None
    updates: Updates = field(init=False)

    def __post_init__(self) -> None:
        self.updates = Updates(
            self.accelerator,
            self.model,
            self.state,
            lambda *batch: losses_of(self, *batch),
            learning_rate=linear_warmup(self.options.learning_rate, self.options.warmup_steps),
            num_parts=self.options.gradient_accumulation_steps,
            max_grad_norm=self.options.max_grad_norm,
            dropout_seed=self.options.seed if self.options.dropout or self.options.network else None,
            cuda_graphs=self.options.cuda_graphs and not self.options.gradient_checkpointing,  # which draws again
        )


def training_step(run: Run, stream: Iterator[Batch]) -> tuple[Tensor, Tensor]:
    """One round of Algorithm 1's loop. Returns this process's loss and the gradient's norm before clipping, both 0-d.

    Raises FloatingPointError, before the weights are touched, when the loss or the gradient is not finite.
    """
    run.updates.begin()
    for _ in range(run.updates.num_parts):
        batch = next(stream)  # lines 2–4: x_0 ∼ q(x_0), t ∼ Uniform({0, …, T−1}), ε ∼ N(0, I), keyed by step and row
        run.updates.add_gradient(batch)  # line 5: the gradient of the mean of `losses_of`
    grad_norm = run.updates.finish()  # clip it; Adam's step, and the averaged weights after it
    return run.updates.loss, grad_norm


def losses_of(run: Run, x_start: Tensor, t: Tensor, noise: Tensor, class_labels: Tensor | None = None) -> Tensor:
    """Algorithm 1, line 5 without its gradient, per sample: [B]; L_simple, or the bound's term at t in bits/dim.

    `x_start` has the levels or points as they are stored; `class_labels` go to a conditional network. Noise is added
    in float32 whatever the precision of the network: in bfloat16 the first timesteps would get none.
    """
    diffusion, num_levels = run.scheduler.diffusion, run.batches.samples.num_levels
    x_start = to_model_range(x_start, num_levels)
    x_t = diffusion.q_sample(x_start, t, noise)
    conditions = {} if class_labels is None else {"class_labels": class_labels}
    model_output = output_of(run.model, x_t, t, conditions)
    if run.options.objective == "simple":
        return simple_loss(diffusion, model_output, x_start, x_t, t, noise)
    return vlb_loss(diffusion, model_output, x_start, x_t, t, num_levels=num_levels)


def train(run: Run, folder: RunFolder, signals: StopSignals, uploads: BackgroundUploads | None = None) -> None:
    """Algorithm 1, from where the state stands to the last step, with metrics, samples, evaluations and checkpoints.

    A signal leads to a checkpoint of the step that was just made, and `Stopped`; the end of `max_minutes` too, and
    exit code 0.
    """
    options, accelerator, state = run.options, run.accelerator, run.state
    deadline = time.monotonic() + 60 * (math.inf if options.max_minutes is None else options.max_minutes)
    steps = range(state.step, options.num_steps)
    stream = batches_of(run.batches, accelerator, steps, num_parts=run.updates.num_parts)
    log = RunLog(
        accelerator,
        folder.path,
        first_step=state.step,
        num_steps=options.num_steps,
        global_batch_size=options.global_batch_size,
        tables=report_tables(options, run.batches.samples, state.unet, accelerator, folder.manifest, run.held_out),
    )
    watch = Watch(options, state, run.scheduler, log, folder, signals, run.held_out)
    if state.step:  # a run that was stopped while it drew or evaluated them
        watch.write_due(only_missing=True)
    run.model.train()
    for _ in steps:
        loss, grad_norm = training_step(run, stream)

        # what is due after this step: a line of metrics, samples, a checkpoint, the end
        log.update(loss)
        step, ending = state.step, state.step == options.num_steps
        stopping = agree_to_stop(accelerator, signals, deadline)
        if ending or step % options.log_every == 0:
            epoch, rate = run.batches.epoch(step), run.updates.learning_rate
            log.write(step, epoch=epoch, grad_norm=grad_norm, learning_rate=rate)
        with log.paused():
            if not stopping:
                watch.write_due()
            if stopping or ending or step % options.checkpoint_every == 0:
                folder.save(state, run.scheduler)
                log.write_overview()
                if uploads and folder.checkpoint and options.hub_strategy == "every_save" and not (ending or stopping):
                    uploads.submit(folder.checkpoint)
                accelerator.wait_for_everyone()
        if stopping and not ending:
            log.close()
            end_early(options, accelerator, step, signals)
    if not steps:  # evaluated since, perhaps
        log.write_overview()
    log.close()


# ---- wiring --------------------------------------------------------------------------------------------------------


def build_run(
    options: TrainingOptions, accelerator: Accelerator, samples: Samples, held_out: HeldOut | None = None
) -> Run:
    unet, scheduler = initial_model(options, samples)
    batches = KeyedBatches(
        samples,
        seed=options.seed,
        global_batch_size=options.global_batch_size,
        num_timesteps=len(scheduler),
        random_flip=options.random_flip,
        allowed=held_out and held_out.rows,
        label_dropout=options.label_dropout,
    )
    history_of = len(scheduler) if options.timestep_sampling == "loss_history" else None
    model, state = training_state(accelerator, unet, ema_decay=options.ema_decay, history_of=history_of,
                                  compile=options.compile, label_names=samples.label_names)  # fmt: skip
    return Run(options, accelerator, batches, model, state, scheduler, held_out)


def main(argv: list[str]) -> None:
    start(parse(argv))


def start(options: TrainingOptions) -> None:
    launch(lambda held, signals: run_training(options, held, signals), logger, is_script=__name__ == "__main__")


def run_training(options: TrainingOptions, held: contextlib.ExitStack, signals: StopSignals) -> None:
    """From options to a finished run; `held` keeps its folder until the end."""
    try:
        importlib.import_module("matplotlib")  # of the curves: missing packages show now, not at the first checkpoint
        accelerator = make_accelerator(options)
        if options.print_config:
            accelerator.print(to_yaml(resolved(options)), end="")
            return
        prepare(options, accelerator, make_folder=not options.dry_run)
        with signals.interruptible():
            with accelerator.main_process_first():  # the others read what the first cached
                samples = load_data(options)
            held_out = hold_out(options, accelerator, samples)
        run = build_run(options, accelerator, samples, held_out)
        logger.info(described(samples, run.state.unet, accelerator))
        warn_if_averages_lag(options)
        manifest = run_manifest(accelerator, samples, options)
        folder = RunFolder(options.output_dir, accelerator, manifest, resume=options.resume,
                           free=free_to_change(run.state.unet), allow_changes=options.allowed_changes,
                           keep_checkpoints=options.keep_checkpoints, samples=samples)  # fmt: skip
        if options.dry_run:
            DryRun(options, accelerator, run.batches, run.updates, folder, held_out).show()
            return
        held.enter_context(folder).resume(run.state, options=to_yaml(in_force(options, accelerator)))
    except ModuleNotFoundError as error:
        sys.exit(f"train.py: {error}; training needs more packages: pip install 'ddpm_hf[train]'")
    except (ValueError, OSError) as error:
        sys.exit(f"train.py: {error}")
    if options.report_to:
        start_trackers(accelerator, asdict(in_force(options, accelerator)))
    if run.state.step >= options.num_steps:
        logger.info("already trained to step %d; more with --num_steps", run.state.step)
    uploads = None
    if options.push_to_hub and accelerator.is_main_process:
        uploads = BackgroundUploads(folder.path, str(options.hub_model_id), private=options.hub_private_repo)
    try:
        train(run, folder, signals, uploads)
        folder.export()
    except OSError as error:  # a full disk, most often
        sys.exit(f"train.py: {error}")
    finish(options, accelerator, signals, uploads, logger)


if __name__ == "__main__":
    start(OPTIONS)
