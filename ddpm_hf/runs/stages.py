"""The stages of a distillation: their teachers, and what is kept of their students."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from ..data import Samples
from ..distillation import DistillationStage
from ..machine import Stopped, StopSignals
from ..pipeline_loading import DDPMPaperPipeline
from ..scheduler import GaussianDiffusion, paper_scheduler
from ..unet import use_native_kernels
from .distillation_options import DistillationOptions
from .folder import RunFolder
from .log import RunLog
from .options import averaging_lags
from .records import some_names
from .state import TrainingState
from .watching import write_grids

logger = logging.getLogger(__name__)
MOST_DRAWN = 50  # reverse steps of a student whose samples are drawn; with more they are much like its teacher's


@dataclass
class Stage:
    """The optimizer steps `steps` of a run, in which a student of `law.num_steps` reverse steps learns."""

    law: DistillationStage
    steps: range

    @property
    def name(self) -> str:
        """Where its student is kept in the run's folder."""
        return f"stages/{self.law.num_steps}-steps"


def check_teacher(pipe: DDPMPaperPipeline, samples: Samples, first_stage: int, guidance_scale: float = 1.0) -> None:
    """Raises ValueError where a teacher cannot be distilled with these samples, from `first_stage` steps on."""
    shape, data = pipe.sample_shape, samples.sample_shape
    if shape != data:
        raise ValueError(f"the teacher draws samples {shape}, the data are {data}; --resolution resizes images")
    total, kind = len(paper_scheduler(pipe.scheduler)), pipe.scheduler.config["prediction_type"]
    if kind != "v_prediction" and first_stage != total:
        raise ValueError(
            f"the teacher predicts {kind}, and a student v: --stages must begin with {total}, all its timesteps, in "
            f"which one becomes the other; it begins with {first_stage}"
        )
    theirs, ours = pipe.classes, dict(enumerate(samples.label_names))
    if theirs and list(theirs.values()) != list(ours.values()):
        raise ValueError(
            f"the teacher has {len(theirs)} classes, {some_names(theirs.values())}; the data have "
            f"{some_names(ours.values()) or 'none'}. Both must agree; --label_column says where labels are"
        )
    if ours and not theirs:
        raise ValueError("the teacher has no classes; leave out --label_column")
    if guidance_scale != 1 and pipe.null_class is None:
        raise ValueError(f"--guidance_scale {guidance_scale:g} needs a teacher with a null_class; this one has none")


def stages_of(options: DistillationOptions, diffusion: GaussianDiffusion) -> list[Stage]:
    """The stages of a run, one after the other; the first teacher takes all timesteps. Raises ValueError."""
    before, first, stages = diffusion.num_timesteps, 0, []
    if before % options.stages[0]:
        raise ValueError(f"--stages: {options.stages[0]} does not divide the teacher's {before} timesteps")
    for num_steps, count in zip(options.stages, options.steps_of_stages, strict=True):
        law = DistillationStage(diffusion, num_steps, before // num_steps)
        stages.append(Stage(law, range(first, first + count)))
        before, first = num_steps, first + count
    return stages


def warn_if_stages_are_short(stages: Sequence[Stage], ema_decay: float) -> None:
    """Log advice where a stage is too short for its averaged weights to follow."""
    steps = min(len(stage.steps) for stage in stages)
    if advice := averaging_lags(steps, ema_decay):
        logger.warning("a stage of %d steps is too short for ema_decay %g: its student will lag behind; %s",
                       steps, ema_decay, advice)  # fmt: skip


def frozen(pipe: DDPMPaperPipeline, accelerator: Accelerator) -> DDPMPaperPipeline:
    """The pipeline as a teacher: on the device, in eval mode, and without gradients."""
    pipe.to(accelerator.device)
    if accelerator.device.type == "cpu":
        use_native_kernels(pipe.unet)
    pipe.unet.requires_grad_(False).eval()
    return pipe


def keep_student(
    stage: Stage,
    state: TrainingState,
    folder: RunFolder,
    log: RunLog,
    scheduler: Any,
    *,
    signals: StopSignals,
    num_samples: int,
) -> None:
    """Keep the student of a stage whose last step is saved, and draw samples unless they are there already.

    A signal cuts the drawing off.
    """
    state.num_inference_steps = stage.law.num_steps
    folder.export(stage.name)
    many = not num_samples or stage.law.num_steps > MOST_DRAWN
    if many or broadcast_object_list([log.has_samples(state.step)])[0]:
        return
    try:
        with signals.interruptible():
            write_grids(log, state, scheduler, num_samples=num_samples)
    except Stopped as stopped:
        log.progress.close()  # what follows gets a line of its own
        stopped.add_note(f"after step {state.step}, which is saved")
        raise
