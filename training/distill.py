"""Distil a checkpoint into one that samples in a few steps: progressive distillation (Salimans & Ho 2022).

    accelerate launch training/distill.py
        the digits of model_cards/ddpm-digits, into 4 steps (training/configs/distill_digits.yaml)
    accelerate launch training/distill.py --teacher runs/mine --dataset_name none --train_data_dir my_photos \\
        --output_dir runs/mine-few
        a model of yours; give the data that it was trained on

`python training/distill.py` and `ddpm-hf distill` do the same in one process; `--help` lists the options. A stage
teaches a student to take in one DDIM step what its teacher takes in several (ddpm_hf/distillation.py), from its
teacher's weights on, and its averaged weights are the next teacher. The first stage takes as many steps as there are
timesteps, and makes a network that predicts v. The same command again goes on where the run stopped.

`output_dir` gets what training/train.py writes. Its model is the last student, with diffusers' DDIMScheduler and its
number of steps in model_index.json; `stages/8-steps` and the like have the student of each stage.
"""

# ruff: noqa: E402  (imports follow the parsing of options)
import contextlib
import importlib
import itertools
import logging
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ddpm_hf.machine import end_at_once_on_signals
from ddpm_hf.runs import DistillationOptions, parse_options, to_yaml

CONFIGS = Path(__file__).parent / "configs"


def parse(argv: list[str]) -> DistillationOptions:
    default = CONFIGS / "distill_digits.yaml"
    return parse_options(DistillationOptions, argv, default_config=default, description=__doc__)


if __name__ == "__main__":  # help, mistakes and Ctrl-C do not wait for the imports below, which take seconds
    end_at_once_on_signals()
    OPTIONS = parse(sys.argv[1:])

import torch
from accelerate import Accelerator
from diffusers import DDIMScheduler
from torch import Tensor

from ddpm_hf import DDPMPaperPipeline, GaussianDiffusion, runs
from ddpm_hf.data import Samples, to_model_range
from ddpm_hf.distillation import data_range, student_network, student_scheduler, teacher_x_start
from ddpm_hf.hub import BackgroundUploads, load_pipeline
from ddpm_hf.machine import StopSignals, agree_to_stop
from ddpm_hf.scheduler import distilled_steps, paper_scheduler

logger = logging.getLogger("distill")

# ---- one stage -----------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """What the loop works with."""

    options: DistillationOptions
    accelerator: Accelerator
    samples: Samples
    original: DDPMPaperPipeline  # the first teacher
    model: torch.nn.Module  # state.unet, wrapped for mixed precision and several processes
    state: runs.TrainingState
    scheduler: DDIMScheduler
    diffusion: GaussianDiffusion
    stages: list[runs.Stage]
    batches: list[runs.KeyedBatches]  # of each stage

    def teacher(self) -> tuple[DDPMPaperPipeline, dict[str, Any]]:
        """Of the stage in which the state is, and what `teacher_x_start` needs beside it."""
        if self.state.teacher is None:
            scale = self.options.guidance_scale  # guided, x̂_0 may leave the data on purpose
            how = {"guidance_scale": scale, "within": data_range(self.samples) if scale == 1 else None}
            return runs.frozen(self.original, self.accelerator), how
        network = student_network(self.original.unet, self.state.teacher)
        return runs.frozen(DDPMPaperPipeline(network, self.scheduler), self.accelerator), {"clip": False}


def updates_of(run: Run, stage: runs.Stage) -> runs.Updates:
    """The stage's updates: Adam's, with a learning rate that falls linearly to 0."""
    options, law, (teacher, how) = run.options, stage.law, run.teacher()
    timesteps = torch.from_numpy(law.timesteps).to(run.accelerator.device)

    def losses(x_start: Tensor, index: Tensor, noise: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """Algorithm 2 of Salimans & Ho, per sample: [B]; `index` counts the student's timesteps from the data."""
        t = timesteps[index]
        x_t = run.diffusion.q_sample(to_model_range(x_start, run.samples.num_levels), t, noise)
        with torch.no_grad():
            x_tilde = law.target(teacher_x_start(teacher, class_labels, **how), x_t, index)
        conditions = {} if class_labels is None else {"class_labels": class_labels}
        return law.losses(runs.output_of(run.model, x_t, t, conditions), x_tilde, x_t, index)

    return runs.Updates(
        run.accelerator,
        run.model,
        run.state,
        losses,
        learning_rate=lambda made: options.learning_rate * (1 - made / len(stage.steps)),
        num_parts=options.gradient_accumulation_steps,
        max_grad_norm=options.max_grad_norm,
    )


# ---- all stages ----------------------------------------------------------------------------------------------------


def distil(run: Run, folder: runs.RunFolder, signals: StopSignals, uploads: BackgroundUploads | None = None) -> None:
    """Every stage, from where the state stands, with metrics, checkpoints, and samples of each student.

    Signals, and the end of `max_minutes`, do what they do in train.py.
    """
    options, state, last = run.options, run.state, run.stages[-1].steps.stop
    deadline = time.monotonic() + 60 * (math.inf if options.max_minutes is None else options.max_minutes)
    log = runs.RunLog(
        run.accelerator,
        folder.path,
        first_step=state.step,
        num_steps=last,
        global_batch_size=options.global_batch_size,
        tables=runs.report_tables(options, run.samples, state.unet, run.accelerator, folder.manifest),
    )
    show: Any = {"signals": signals, "num_samples": options.num_samples}
    for stage, batches in zip(run.stages, run.batches, strict=True):
        if state.step == stage.steps.stop:  # a run that was stopped before this was done
            runs.keep_student(stage, state, folder, log, run.scheduler, **show)
        if state.step not in stage.steps:
            continue
        if state.step == stage.steps.start > 0:
            state.restart()
        state.num_inference_steps = stage.law.num_steps
        for step in steps_made(run, stage, batches, log):
            ending, stopping = step == stage.steps.stop, agree_to_stop(run.accelerator, signals, deadline)
            with log.paused():
                if stopping or ending or step % options.checkpoint_every == 0:
                    folder.save(state, run.scheduler)
                    log.write_overview()
                    if uploads and folder.checkpoint and options.hub_strategy == "every_save" and step < last:
                        uploads.submit(folder.checkpoint)
                    run.accelerator.wait_for_everyone()
                if stopping and step < last:
                    log.close()
                    runs.end_early(options, run.accelerator, step, signals)
                if ending:
                    runs.keep_student(stage, state, folder, log, run.scheduler, **show)
    log.write_overview()
    log.close()


def steps_made(run: Run, stage: runs.Stage, batches: runs.KeyedBatches, log: runs.RunLog) -> Iterator[int]:
    """The steps of a stage, made one after the other: each yields how many the run has made, and is in the log."""
    state, updates = run.state, updates_of(run, stage)
    steps = range(state.step, stage.steps.stop)
    stream = runs.batches_of(batches, run.accelerator, steps, num_parts=updates.num_parts)
    run.model.train()
    for _ in steps:
        updates.begin()
        for batch in itertools.islice(stream, updates.num_parts):
            updates.add_gradient(batch)
        grad_norm = updates.finish()
        log.update(updates.loss)
        if state.step == stage.steps.stop or state.step % run.options.log_every == 0:
            epoch, learning_rate = batches.epoch(state.step), updates.learning_rate
            log.write(state.step, epoch=epoch, grad_norm=grad_norm, learning_rate=learning_rate)
        yield state.step


# ---- wiring --------------------------------------------------------------------------------------------------------


def build_run(options: DistillationOptions, accelerator: Accelerator, samples: Samples) -> Run:
    """Raises ValueError where teacher, data and stages do not fit."""
    original = load_pipeline(str(options.teacher), torch.float32)
    scheduler = paper_scheduler(original.scheduler)
    runs.check_teacher(original, samples, options)
    stages = runs.stages_of(options, scheduler.diffusion, distilled_steps(original))
    names = samples.label_names if original.classes else ()
    unet = student_network(original.unet)
    model, state = runs.training_state(accelerator, unet, ema_decay=options.ema_decay, label_names=names)
    student, diffusion = student_scheduler(scheduler), scheduler.diffusion
    how: Any = {name: getattr(options, name) for name in ("seed", "global_batch_size", "random_flip")}
    how["label_dropout"] = options.label_dropout if original.null_class is not None else 0.0
    batches = [runs.KeyedBatches(samples, num_timesteps=stage.law.num_steps, **how) for stage in stages]
    return Run(options, accelerator, samples, original, model, state, student, diffusion, stages, batches)


def main(argv: list[str]) -> None:
    start(parse(argv))


def start(options: DistillationOptions) -> None:
    runs.launch(
        lambda held, signals: run_distillation(options, held, signals), logger, is_script=__name__ == "__main__"
    )


def run_distillation(options: DistillationOptions, held: contextlib.ExitStack, signals: StopSignals) -> None:
    """From options to a finished run."""
    try:
        importlib.import_module("matplotlib")  # of the curves: missing packages show now, not at the first checkpoint
        accelerator = runs.make_accelerator(options)
        if options.print_config:
            accelerator.print(to_yaml(options), end="")
            return
        runs.prepare(options, accelerator, make_folder=True)
        with signals.interruptible(), accelerator.main_process_first():  # the others read what the first cached
            samples = runs.load_data(options)
        run = build_run(options, accelerator, samples)
        logger.info(runs.described(samples, run.state.unet, accelerator))
        runs.warn_if_stages_are_short(run.stages, options.ema_decay)
        known = asdict(options) | runs.teacher_identity(run.original) | {"num_steps": options.steps_of_stages}
        manifest, allowed = runs.run_manifest(accelerator, samples, known), options.allowed_changes
        how: Any = {"resume": options.resume, "free": runs.FREE_IN_DISTILLATION, "allow_changes": allowed}
        how |= {"keep_checkpoints": options.keep_checkpoints, "samples": samples}
        folder = held.enter_context(runs.RunFolder(options.output_dir, accelerator, manifest, **how))
        folder.resume(run.state, options=to_yaml(runs.in_force(options, accelerator)))
    except ModuleNotFoundError as error:
        sys.exit(f"distill.py: {error}; training needs more packages: pip install 'ddpm_hf[train]'")
    except (ValueError, OSError) as error:
        sys.exit(f"distill.py: {error}")
    if options.report_to:
        runs.start_trackers(accelerator, asdict(runs.in_force(options, accelerator)))
    uploads = None
    if options.push_to_hub and accelerator.is_main_process:
        uploads = BackgroundUploads(folder.path, str(options.hub_model_id), private=options.hub_private_repo)
    try:
        distil(run, folder, signals, uploads)
        folder.export()
    except OSError as error:  # a full disk, most often
        sys.exit(f"distill.py: {error}")
    runs.finish(options, accelerator, signals, uploads, logger)


if __name__ == "__main__":
    start(OPTIONS)
