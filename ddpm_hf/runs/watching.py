"""What is seen of a run while it trains: grids of samples, the tables of its report, one-line descriptions."""

import contextlib
import copy
import logging
import os
import shlex
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from ..data import Samples
from ..machine import Stopped, StopSignals
from ..sampling import sample_together
from .distillation_options import DistillationOptions
from .folder import RunFolder
from .held_out import HeldOut, evaluate, numbers_of
from .log import RunLog
from .options import TrainingOptions, averaging_lags, option_defaults
from .records import public_options, read_json, relevant_options
from .report import Rows
from .state import TrainingState

logger = logging.getLogger(__name__)
AnyOptions = TrainingOptions | DistillationOptions


def write_grids(
    log: RunLog,
    state: TrainingState,
    scheduler: Any,
    *,
    num_samples: int = 64,
    num_inference_steps: int | None = None,
    batch_size: int = 64,
) -> None:
    """Grids of this step by the raw and the averaged weights: Algorithm 2, its seeds shared by all processes.

    With classes the seeds take them in turn.
    """
    pipe, num_classes = state.pipeline(copy.deepcopy(scheduler)), len(state.id2label or ())
    silent = None if log.accelerator.is_main_process else True  # none: in a terminal only
    pipe.set_progress_bar_config(desc="sampling", leave=False, disable=silent)
    options: Any = {"num_inference_steps": num_inference_steps, "batch_size": batch_size}
    options["class_labels"] = [seed % num_classes for seed in range(num_samples)] if num_classes else None

    def write(kind: str) -> None:
        samples = sample_together(log.accelerator, pipe, num_samples, **options)
        log.write_samples(state.step, kind, samples, columns=num_classes if 1 < num_classes <= 20 else None)

    write("raw")
    with state.ema_weights():
        write("ema")


@dataclass
class Watch:
    """What is shown of a run on the way: grids of samples, and a line about held-out samples, each where it is due."""

    options: TrainingOptions
    state: TrainingState
    scheduler: Any
    log: RunLog
    folder: RunFolder
    signals: StopSignals
    held_out: HeldOut | None = None

    def write_due(self, *, only_missing: bool = False) -> None:
        """Write what is due after this step; a signal cuts it off.

        With `only_missing`, after a resumption, only what is not there yet.
        """
        self._write_grids(only_missing)
        self._write_evaluation(only_missing)

    def _write_grids(self, only_missing: bool) -> None:
        options, state, log = self.options, self.state, self.log
        if not self._is_due(options.sample_every):
            return
        if only_missing and broadcast_object_list([log.has_samples(state.step)])[0]:
            return
        with self._cut_off_by_signals(is_saved=only_missing):
            write_grids(
                log,
                state,
                self.scheduler,
                num_samples=options.num_samples,
                num_inference_steps=options.sample_steps,
                batch_size=options.global_batch_size,  # what fits into memory in training fits here
            )

    def _write_evaluation(self, only_missing: bool) -> None:
        options, state, log, held_out = self.options, self.state, self.log, self.held_out
        if held_out is None or not held_out.parts or not self._is_due(options.eval_every):
            return
        if only_missing and broadcast_object_list([log.has_evaluation(state.step, held_out.identity)])[0]:
            return
        num_parts = log.accelerator.num_processes * options.gradient_accumulation_steps
        with self._cut_off_by_signals(is_saved=only_missing):
            batch_size = options.global_batch_size // num_parts  # what fits into memory in training fits here
            values = evaluate(log.accelerator, state, self.scheduler, held_out.parts, batch_size=batch_size)
        log.write_evaluation(state.step, numbers_of(values, held_out.identity))

    def _is_due(self, every: int) -> bool:
        step = self.state.step
        return bool(every) and (step == self.options.num_steps or step % every == 0)

    @contextlib.contextmanager
    def _cut_off_by_signals(self, *, is_saved: bool) -> Iterator[None]:
        """Inside, a signal stops the work at once: it may take longer than a machine waits.

        The main process then saves this step on its own, since the others may be anywhere in theirs. Where it
        `is_saved` already, writing it again would put its only copy at risk.
        """
        try:
            with self.signals.interruptible():
                yield
        except Stopped as stopped:
            if not is_saved:
                self.folder.save(self.state, self.scheduler)
            self.log.progress.close()  # what follows gets a line of its own
            stopped.add_note(f"after step {self.state.step}, which is saved")
            raise


def end_early(options: AnyOptions, accelerator: Accelerator, step: int, signals: StopSignals) -> NoReturn:
    """Leave after a step that is saved: by `Stopped` for a signal, else, after `max_minutes`, with exit code 0."""
    if signals.received is None:
        command = command_to_go_on(options, accelerator)
        logger.info(
            "stopped after %g minutes by --max_minutes at step %d, which is saved; to go on: %s",
            options.max_minutes,
            step,
            command,
        )
        sys.exit(0)
    stopped = Stopped(signals.received)
    stopped.add_note(f"after step {step}, which is saved")
    raise stopped


def described_network(unet: torch.nn.Module) -> str:
    return f"{type(unet).__name__} with {sum(p.numel() for p in unet.parameters()):,} parameters"


def differing_options(options: AnyOptions) -> list[tuple[str, Any, Any]]:
    """(name, value, default) of each option that differs from its default, the paper's for CIFAR-10."""
    defaults = option_defaults(options)
    given = relevant_options(public_options(asdict(options))).items()
    return [(name, value, defaults[name]) for name, value in given if value != defaults[name]]


def described(samples: Samples, unet: torch.nn.Module, accelerator: Accelerator) -> str:
    return (
        f"{described_network(unet)}; {len(samples):,} samples {samples.sample_shape} of {samples.name}; "
        f"{accelerator.num_processes} process(es) on {accelerator.device.type}, "
        f"precision {accelerator.mixed_precision}"
    )


def warn_if_averages_lag(options: TrainingOptions) -> None:
    """Log advice where the run is too short for its averaged weights to follow."""
    if advice := averaging_lags(options.num_steps, options.ema_decay):
        logger.warning(
            "%d steps are too short for ema_decay %g: the averaged weights, which are saved, will lag behind; %s",
            options.num_steps,
            options.ema_decay,
            advice,
        )


def how_to_load(options: AnyOptions) -> str:
    """The call that loads the finished model, whose network may be of a class that the folder carries, or not."""
    library, name = read_json(Path(options.output_dir) / "model_index.json").get("unet") or ("", "")
    more = ", trust_remote_code=True" if library.startswith("own_") else ""
    more = ", unet=….from_pretrained(…, subfolder='unet')" if name == "ModelMixin" else more
    return f"DDPMPaperPipeline.from_pretrained({options.output_dir!r}{more})"


def report_tables(
    options: AnyOptions,
    samples: Samples,
    unet: torch.nn.Module,
    accelerator: Accelerator,
    manifest: Mapping[str, Any],
    held_out: HeldOut | None = None,
) -> dict[str, Rows]:
    """What report.html tells of the run beside its numbers; paths on this machine only by their last part."""
    differing = differing_options(options)
    papers = ", the paper's for CIFAR-10" if isinstance(options, TrainingOptions) else ""
    network = f"{type(unet).__name__}, {sum(p.numel() for p in unet.parameters()):,} parameters"
    data = {**manifest["dataset"], "shape": samples.sample_shape, "network": network}
    if held_out is not None and held_out.rows is not None:
        data["held out, and not trained on"] = f"{len(samples) - len(held_out.rows):,} samples"
    environment = {"processes": accelerator.num_processes, "precision": accelerator.mixed_precision}
    return {
        f"Options that differ from the defaults{papers}": [("option", "here", "default"), *differing],
        "Data and network": [("", ""), *public_options(data).items()],
        "Environment": [("", ""), *{**manifest["environment"], **environment}.items()],
    }


def command_to_go_on(options: AnyOptions, accelerator: Accelerator) -> str:
    """The command line of this run, for a shell, with the precision that a launcher may have chosen."""
    num_processes, precision = accelerator.num_processes, accelerator.mixed_precision
    if os.environ.get("LOCAL_WORLD_SIZE", str(num_processes)) != str(num_processes):
        return "the same command, on every machine"
    launcher = ["python"] if num_processes == 1 else ["torchrun", "--nproc_per_node", str(num_processes)]
    is_implied = options.mixed_precision is not None or precision == "no"
    return shlex.join([*launcher, *sys.argv, *([] if is_implied else ["--mixed_precision", precision])])
