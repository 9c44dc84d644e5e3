"""The gradient step of Algorithm 1, line 5: in parts, by all processes, in mixed precision, with averaged weights."""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from ..machine import Recorded
from ..randomness import keyed_seed
from .batches import Batch
from .state import TrainingState

MAX_OVERFLOWS_IN_A_ROW = 20  # float16's loss scale halves at each: 2^20 in all, more than it can need


def linear_warmup(learning_rate: float, warmup_steps: int) -> Callable[[int], float]:
    """Linear from 0, then constant, by the number of updates made so far, as in the paper's code."""
    return lambda num_updates: learning_rate * (min(1.0, num_updates / warmup_steps) if warmup_steps else 1.0)


class Updates:
    """Updates of a network's weights by Adam, one after the other.

        updates.begin()
        for batch in …:  # num_parts of them
            updates.add_gradient(batch)
        grad_norm = updates.finish()

    Args:
        accelerator: over all processes, each of which calls the same.
        model: the network as Accelerate wrapped it.
        state: the network, its averaged weights, the optimizer and the counters, which `finish` advances.
        losses: `losses(x_start, t, noise)` is each sample's loss, [B], with its gradient.
        learning_rate: by the number of updates made so far.
        num_parts: how many batches make one update; their gradients are averaged.
        max_grad_norm: gradients are clipped to this norm.
        dropout_seed: None where the network draws nothing.
        cuda_graphs: record the work of an update on one GPU and replay it: the same bits, sooner.

    `learning_rate` is that of the last update, and `loss` its mean over this process's samples, 0-d on the device.
    Raises ValueError where the Accelerator would divide the gradients once more.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: torch.nn.Module,
        state: TrainingState,
        losses: Callable[..., Tensor],
        *,
        learning_rate: Callable[[int], float],
        num_parts: int = 1,
        max_grad_norm: float = 1.0,
        dropout_seed: int | None = None,
        cuda_graphs: bool = False,
    ):
        if accelerator.gradient_accumulation_steps != 1:
            raise ValueError(
                f"this Accelerator divides gradients by {accelerator.gradient_accumulation_steps} "
                "(gradient_accumulation_steps, or ACCELERATE_GRADIENT_ACCUMULATION_STEPS), which are means already; "
                "leave it at 1 and give num_parts"
            )
        self.accelerator, self.model, self.state, self.losses = accelerator, model, state, losses
        self.learning_rate_of, self.num_parts, self.max_grad_norm = learning_rate, num_parts, max_grad_norm
        self.dropout_seed = dropout_seed
        # Not between processes, where a graph would hold their communication too, and not where the CPU decides within
        # an update whether float16 overflowed.
        alone_on_gpu = accelerator.device.type == "cuda" and accelerator.num_processes == 1
        replayed = cuda_graphs and alone_on_gpu and not state.grad_scaler
        self.recorded: dict[Callable[..., Tensor | None], Recorded] | None = {} if replayed else None
        self.weights = list(state.unet.parameters())  # once: walking over the modules takes milliseconds
        self.loss = torch.zeros((), device=accelerator.device)
        self.learning_rate = learning_rate(state.num_updates)
        self._parts: list[tuple[Batch, Tensor]] = []  # of this update, with their losses

    def begin(self) -> None:
        """Start an update: the optimizer gets its learning rate."""
        self.learning_rate = self.learning_rate_of(self.state.num_updates)
        for group in self.state.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(self.learning_rate)
            else:
                group["lr"] = self.learning_rate
        self.loss, self._parts = torch.zeros((), device=self.accelerator.device), []

    def add_gradient(self, batch: Batch) -> None:
        """Add the gradient of a part's mean loss. A loss history draws t and weights the losses."""
        state, accelerator, part = self.state, self.accelerator, len(self._parts)
        batch, weights = batch.to(accelerator.device), ()
        labels = () if batch.labels is None else (batch.labels,)
        if state.loss_history is not None:
            t, weight = (x.to(accelerator.device) for x in state.loss_history.draw(batch.quantiles))
            batch, weights = batch._replace(t=t), (weight,)
        if self.dropout_seed is not None:
            index = part * accelerator.num_processes + accelerator.process_index
            torch.manual_seed(keyed_seed(self.dropout_seed, "dropout", state.step, index))
        with contextlib.nullcontext() if part == self.num_parts - 1 else accelerator.no_sync(self.model):
            losses: Any = self._launch(self._add_gradient, batch.x_start, batch.t, batch.noise, *labels, *weights)
        self._parts.append((batch, losses))
        self.loss += (losses * weights[0] if weights else losses).mean() / self.num_parts

    def finish(self) -> Tensor:
        """Clip the gradient, and let Adam and the averaged weights take their step. Returns its norm before, 0-d.

        Raises FloatingPointError, before the weights are touched, when the loss or the gradient is not finite; in
        float16, whose loss scale must overflow now and then to be found, only when it did so 20 times in a row.
        """
        state, accelerator = self.state, self.accelerator
        grad_norm: Any = self._launch(self._clip_gradient)
        # the one place where an update waits for the device
        if state.grad_scaler is None and not torch.isfinite(self.loss + grad_norm):
            raise self._not_finite()
        state.step += 1
        self._launch(self._update_weights)
        if state.loss_history is not None:
            for batch, losses in self._parts:
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
        return grad_norm

    def _launch(self, work: Callable[..., Tensor | None], *tensors: Tensor) -> Tensor | None:
        """`work(*tensors)`; on one GPU replayed as a CUDA graph."""
        if self.recorded is None:
            return work(*tensors)
        if work not in self.recorded:
            self.recorded[work] = Recorded(work, self.accelerator.device)
        return self.recorded[work](*tensors)

    def _add_gradient(self, x_start: Tensor, t: Tensor, noise: Tensor, *others: Tensor) -> Tensor:
        """`others` are labels, where samples have some, and then weights, where a loss history draws t."""
        weights = others[-1] if self.state.loss_history is not None else 1.0
        labels = others[:-1] if self.state.loss_history is not None else others
        losses = self.losses(x_start, t, noise, *labels)
        self.accelerator.backward((losses * weights).mean() / self.num_parts)
        return losses.detach()

    def _clip_gradient(self) -> Tensor:
        norm: Any = self.accelerator.clip_grad_norm_(self.weights, self.max_grad_norm)
        return norm

    def _update_weights(self) -> None:
        state = self.state
        state.optimizer.step()
        # a CUDA graph needs the gradient in its place
        state.optimizer.zero_grad(set_to_none=self.accelerator.device.type != "cuda")
        if not self.accelerator.optimizer_step_was_skipped:
            state.ema.step(self.weights)

    def _not_finite(self) -> FloatingPointError:
        """What to raise where the loss, or only the gradient, is not finite, with the samples it may come from."""
        bad = [~torch.isfinite(losses) for _, losses in self._parts]
        what = "loss" if any(b.any() for b in bad) else "gradient"
        t, samples = [], []
        for (batch, _), b in zip(self._parts, bad, strict=True):
            chosen = b if what == "loss" else torch.ones_like(b)
            t += batch.t[chosen].tolist()
            samples += batch.indices[chosen.cpu().numpy()].tolist()
        return FloatingPointError(
            f"the {what} is not finite at step {self.state.step}, learning rate {self.learning_rate:g}, t={t}, "
            f"samples {samples}; the weights are as they were before this step. Lower the learning rate, or look at "
            "these samples"
        )
