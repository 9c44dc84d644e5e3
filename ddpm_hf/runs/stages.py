"""The stages of a distillation: their teachers, and what is kept of their students."""

import json
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
from .options import DataOptions, averaging_lags
from .records import some_names, weights_sha256
from .setup import check_channels
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


def check_teacher(pipe: DDPMPaperPipeline, samples: Samples, options: DistillationOptions) -> None:
    """Raises ValueError where a teacher cannot be distilled with these samples, as the options say."""
    shape, data, first_stage = pipe.sample_shape, samples.sample_shape, options.stages[0]
    if shape != data:
        remedy = "--resolution resizes images"
        if len(shape) != len(data):
            remedy = "give the data that it was trained on"
        elif shape[0] != data[0]:
            remedy = f"--in_channels {shape[0]} --convert_channels converts images"
        raise ValueError(f"the teacher draws samples {shape}, the data are {data}; {remedy}")
    check_channels(options, samples)
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
    if pipe.null_class is None:
        lacking = "needs a teacher with a null_class; this one has none"
        if options.guidance_scale != 1:
            raise ValueError(f"--guidance_scale {options.guidance_scale:g} {lacking}")
        if options.label_dropout not in (0, DataOptions.label_dropout):  # its default is for those that have one
            raise ValueError(f"--label_dropout {options.label_dropout:g} {lacking}")


def teacher_identity(pipe: DDPMPaperPipeline) -> dict[str, Any]:
    """What of a teacher must be the same where a run goes on: its weights, and its process with how it clips."""
    config = paper_scheduler(pipe.scheduler).config
    process = {name: value for name, value in config.items() if not name.startswith("_")}
    as_kept = json.loads(json.dumps(process))  # a checkpoint's manifest has lists where a configuration has tuples
    return {"teacher_sha256": weights_sha256(pipe.unet.state_dict()), "teacher_process": as_kept}


def stages_of(
    options: DistillationOptions, diffusion: GaussianDiffusion, teacher_steps: int | None = None
) -> list[Stage]:
    """The stages of a run, one after the other. Raises ValueError.

    The first teacher takes `teacher_steps`, as one that was distilled for so many; None: all timesteps.
    """
    before, first, stages = teacher_steps or diffusion.num_timesteps, 0, []
    if before % options.stages[0]:
        kind = "timesteps" if teacher_steps is None else "steps, for which it was distilled"
        raise ValueError(f"--stages: {options.stages[0]} does not divide the teacher's {before} {kind}")
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
