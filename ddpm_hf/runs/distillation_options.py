"""The options of training/distill.py, each with its default, its range and its help.

Nothing imported here is slow, so that help and mistakes do not wait for torch.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from .options import FREE_TO_CHANGE, DataOptions, TrainingOptions, changes_allowed, check_data_and_places
from .parsing import check_ranges, option


def _as_in_training(name: str, default: Any = None) -> Any:
    """The option of this name of training/train.py, with its default unless another is given."""
    of_training = TrainingOptions.__dataclass_fields__[name]
    value = of_training.default if default is None else default
    text = str(of_training.metadata["help"]).replace(f"(default: {of_training.default})", f"(default: {value})")
    return field(default=value, metadata={**of_training.metadata, "help": text})


@dataclass
class DistillationOptions(DataOptions):
    """Without --config, training/configs/distill_digits.yaml is read first."""

    ALSO_COMPARED: ClassVar = ("teacher_sha256", "teacher_process")  # with a checkpoint, beside options

    output_dir: str = _as_in_training("output_dir", "runs/distilled")

    # what is distilled, and into how many steps
    teacher: str | None = option(
        None, "the checkpoint to distil: a run, a pipeline's folder, or a repository on the Hub", is_path=True
    )
    guidance_scale: float = option(
        1.0, "with labels: the guidance that the student learns as its own; 1: none", at_least=0, below=math.inf
    )
    stages: list[int] = option(
        [1000, 200, 40, 8, 4, 2, 1],
        "reverse steps of one student after the other, each dividing the one before; the first is T, unless the "
        "teacher predicts v",
        at_least=1,
        at_most=1_000_000,
    )
    num_steps: list[int] = option([10_000], "optimizer steps of a stage: one number, or one for each", at_least=1)

    # optimization
    global_batch_size: int = _as_in_training("global_batch_size")
    gradient_accumulation_steps: int = _as_in_training("gradient_accumulation_steps")
    learning_rate: float = option(
        2e-4, "of Adam at the start of every stage, at whose end it is 0", above=0, below=math.inf
    )
    max_grad_norm: float = _as_in_training("max_grad_norm")
    ema_decay: float = option(
        0.99, "of the averaged weights, which are the student and the next teacher", at_least=0, below=1
    )

    # machine
    mixed_precision: Literal["no", "fp16", "bf16"] | None = _as_in_training("mixed_precision")
    allow_tf32: bool = _as_in_training("allow_tf32")
    cpu_threads: int | None = _as_in_training("cpu_threads")

    # watching and saving
    max_minutes: float | None = _as_in_training("max_minutes")
    log_every: int = _as_in_training("log_every")
    report_to: Literal["tensorboard", "trackio", "wandb"] | None = _as_in_training("report_to")
    num_samples: int = option(
        16,
        "samples in the grid at the end of a stage of at most 50 reverse steps, of seeds 0, 1, …; 0: no grids",
        at_least=0,
        at_most=10_000,
    )
    checkpoint_every: int = option(
        5000, "steps between checkpoints; one is always written at the end of a stage", at_least=1
    )
    keep_checkpoints: int = _as_in_training("keep_checkpoints")
    resume: str = _as_in_training("resume")
    allow_changes: str = _as_in_training("allow_changes")
    push_to_hub: bool = _as_in_training("push_to_hub")
    hub_model_id: str | None = _as_in_training("hub_model_id")
    hub_private_repo: bool = _as_in_training("hub_private_repo")
    hub_strategy: Literal["end", "every_save"] = _as_in_training("hub_strategy")
    print_config: bool = _as_in_training("print_config")

    def __post_init__(self) -> None:
        check_ranges(self)
        check_data_and_places(self)
        if not self.teacher:
            raise ValueError("--teacher is missing: the checkpoint to distil, such as model_cards/ddpm-digits")
        if Path(self.output_dir).resolve() == Path(self.teacher).resolve():
            raise ValueError(f"--output_dir={self.output_dir} is the teacher's folder, whose model would be lost")
        if not self.stages:
            raise ValueError("--stages=[] must hold the number of steps of at least one student")
        for before, after in itertools.pairwise(self.stages):
            if after >= before or before % after:
                raise ValueError(f"--stages={self.stages}: {after} must be less than {before} and divide it")
        if len(self.num_steps) not in (1, len(self.stages)):
            raise ValueError(
                f"--num_steps={self.num_steps} are {len(self.num_steps)} numbers for {len(self.stages)} --stages; "
                "give one for all, or one for each"
            )
        if self.guidance_scale != 1 and self.label_column is None:
            raise ValueError(
                f"--guidance_scale={self.guidance_scale:g} needs labels; --label_column says where they are"
            )
        _ = self.allowed_changes

    @property
    def steps_of_stages(self) -> list[int]:
        """The optimizer steps of each stage."""
        return steps_of_stages(self.stages, self.num_steps)

    @property
    def allowed_changes(self) -> bool | set[str]:
        """What may differ from the checkpoint that the run goes on from. Raises ValueError."""
        return changes_allowed(self)


def steps_of_stages(stages: Sequence[int], num_steps: Sequence[int]) -> list[int]:
    """The optimizer steps of each stage, of one number for all or one for each."""
    return [*num_steps] if len(num_steps) > 1 else [*num_steps] * len(stages)


# What may differ between a run and its resumption: where the teacher lies may, since its weights are compared.
FREE_IN_DISTILLATION = (FREE_TO_CHANGE - {"num_steps"}) | {"teacher", "gradient_accumulation_steps", "num_processes"}
