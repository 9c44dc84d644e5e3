"""The state that training changes from step to step: how it is written to a checkpoint and read back."""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor

from ..objectives import LossHistory
from ..pipeline_loading import DDPMPaperPipeline
from . import checkpoints


@dataclass
class TrainingState:
    """The network, its averaged weights, the optimizer, and the counters.

    No random state belongs to it: every draw is keyed by `step` (see `randomness`).
    """

    unet: Any  # ours, or a `ModelMixin`
    ema: EMAModel
    optimizer: Any  # torch's, or Accelerate's wrapper of it
    grad_scaler: Any | None = None  # of float16
    loss_history: LossHistory | None = None  # of importance sampling
    id2label: dict[int, str] | None = None  # the classes' names, of a conditional network
    num_inference_steps: int | None = None  # of the pipeline, where it has a number of its own
    teacher: dict[str, Tensor] | None = None  # in distillation the weights that this network learns from
    step: int = 0  # steps tried: the position in the data
    num_updates: int = 0  # steps made: fewer where float16 overflowed; learning rate and EMA go by these
    overflows_in_a_row: int = 0

    def pipeline(self, scheduler: Any) -> DDPMPaperPipeline:
        """A pipeline of the network, with the weights that it has when it is used."""
        return DDPMPaperPipeline(self.unet, scheduler, self.id2label, self.num_inference_steps)

    def restart(self) -> None:
        """Go on from the averaged weights, which are kept as `teacher`: optimizer and averages begin anew."""
        with self.ema_weights():
            self.teacher = {name: tensor.detach().clone() for name, tensor in self.unet.state_dict().items()}
        self.unet.load_state_dict(self.teacher)
        self.ema.shadow_params = [weights.detach().clone() for weights in self.unet.parameters()]
        self.optimizer.load_state_dict({"state": {}, "param_groups": self.optimizer.state_dict()["param_groups"]})
        self.num_updates = self.ema.optimization_step = 0

    @contextlib.contextmanager
    def ema_weights(self) -> Iterator[None]:
        """Inside, the network has its averaged weights."""
        self.ema.store(self.unet.parameters())
        self.ema.copy_to(self.unet.parameters())
        try:
            yield
        finally:
            self.ema.restore(self.unet.parameters())

    def save(self, folder: Path, scheduler: Any, manifest: Mapping[str, Any]) -> Path:
        """Write `folder/step-N`: a pipeline with the averaged weights, and this state. For one process only."""
        names = [name for name, _ in self.unet.named_parameters()]
        slots = self.optimizer.state_dict()["state"]
        tensors = {
            "model": {name: tensor.detach().clone() for name, tensor in self._tensors().items()},
            "ema": dict(zip(names, self.ema.shadow_params, strict=True)),
            "optimizer": {f"{names[i]}/{slot}": value for i, own in slots.items() for slot, value in own.items()},
        }
        if self.loss_history is not None:
            tensors["loss_history"] = self.loss_history.state()
        if self.teacher is not None:
            tensors["teacher"] = self.teacher
        counters = {
            "step": self.step,
            "num_updates": self.num_updates,
            "overflows_in_a_row": self.overflows_in_a_row,
            "ema_steps": self.ema.optimization_step,
            "grad_scaler": None if self.grad_scaler is None else self.grad_scaler.state_dict(),
        }
        with self.ema_weights():
            return checkpoints.write(
                folder,
                self.step,
                save_pipeline=self.pipeline(scheduler).save_pretrained,
                tensors=tensors,
                state=counters,
                manifest=manifest,
            )

    def _tensors(self) -> dict[str, Tensor]:
        """The network's parameters by name, and the buffers that are saved with it: ours have none."""
        kept = self.unet.state_dict()
        return {**dict(self.unet.named_parameters()), **{n: b for n, b in self.unet.named_buffers() if n in kept}}

    def restore(self, checkpoint: Path) -> None:
        """Take over the state saved in a checkpoint. Raises ValueError for a network of another architecture."""
        names = [name for name, _ in self.unet.named_parameters()]
        model, ema = checkpoints.read(checkpoint, "model"), checkpoints.read(checkpoint, "ema")
        own, saved = self._tensors(), {name: value.shape for name, value in model.items()}
        if saved != {name: tensor.shape for name, tensor in own.items()}:
            raise ValueError(f"{checkpoint} holds another network than the options describe; it cannot be resumed")
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(model[name])
            for name, shadow in zip(names, self.ema.shadow_params, strict=True):
                shadow.copy_(ema[name])
        position = {name: i for i, name in enumerate(names)}
        slots: dict[int, dict[str, Tensor]] = {}
        for key, value in checkpoints.read(checkpoint, "optimizer").items():
            name, slot = key.rsplit("/", 1)
            slots.setdefault(position[name], {})[slot] = value.clone()
        self.optimizer.load_state_dict({"state": slots, "param_groups": self.optimizer.state_dict()["param_groups"]})
        counters = checkpoints.read_state(checkpoint)
        self.step, self.num_updates = counters["step"], counters["num_updates"]
        self.overflows_in_a_row, self.ema.optimization_step = counters["overflows_in_a_row"], counters["ema_steps"]
        if self.grad_scaler is not None and counters["grad_scaler"] is not None:
            self.grad_scaler.load_state_dict(counters["grad_scaler"])
        # absent where a run goes on with importance sampling that began without: it then starts with no history
        if self.loss_history is not None and checkpoints.has(checkpoint, "loss_history"):
            self.loss_history.restore(checkpoints.read(checkpoint, "loss_history"))
        if checkpoints.has(checkpoint, "teacher"):
            self.teacher = {name: tensor.clone() for name, tensor in checkpoints.read(checkpoint, "teacher").items()}
