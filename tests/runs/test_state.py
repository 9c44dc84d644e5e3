"""The training state: what is saved and read back goes on as if nothing had happened, bit for bit."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from diffusers.training_utils import EMAModel
from torch import Tensor

from ddpm_hf import DDPMPaperPipeline
from ddpm_hf.objectives import LossHistory
from ddpm_hf.randomness import keyed_seed, normal
from ddpm_hf.runs import TrainingState, checkpoints

DECAY = 0.9
MANIFEST = {"world_size": 1, "options": {}, "dataset": {"fingerprint": ""}}


@pytest.fixture(params=["unet", "mlp"])
def build(request, tiny_unet, tiny_mlp) -> Callable[[], TrainingState]:
    """build(): a fresh state, as training/train.py makes it, of a network for images (with dropout) or for points."""

    def make() -> TrainingState:
        model = tiny_unet(in_channels=1, out_channels=1, dropout=0.3) if request.param == "unet" else tiny_mlp()
        model.train()
        ema = EMAModel(model.parameters(), decay=DECAY, min_decay=DECAY, foreach=True)
        return TrainingState(model, ema, torch.optim.Adam(model.parameters(), lr=1e-2, fused=True))

    return make


def update(state: TrainingState) -> None:
    """One optimizer step on noise; all randomness, dropout's too, is keyed by the step."""
    shape = (2,) if state.unet.config["in_channels"] == 2 else (1, 8, 8)
    x = normal(0, "x", state.step, range(4), shape)
    torch.manual_seed(keyed_seed(0, "dropout", state.step))
    state.unet(x, torch.arange(4)).sample.square().mean().backward()
    state.optimizer.step()
    state.optimizer.zero_grad()
    state.ema.step(state.unet.parameters())
    state.step += 1
    state.num_updates += 1


def tensors_of(state: TrainingState) -> list[Tensor]:
    """Copies of everything that training changes."""
    slots = state.optimizer.state_dict()["state"]
    optimizer = [value for index in sorted(slots) for _, value in sorted(slots[index].items())]
    return [x.detach().clone() for x in [*state.unet.parameters(), *state.ema.shadow_params, *optimizer]]


def assert_equal(some: list[Tensor], others: list[Tensor]) -> None:
    assert len(some) == len(others) > 0
    for one, other in zip(some, others, strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)


def counters_of(state: TrainingState) -> tuple[int, int, int, int]:
    return state.step, state.num_updates, state.overflows_in_a_row, state.ema.optimization_step


def trained(state: TrainingState, num_updates: int = 3) -> TrainingState:
    for _ in range(num_updates):
        update(state)
    return state


def test_save_and_restore_into_a_fresh_state_is_exact(build, tiny_scheduler, tmp_path):
    state = trained(build())
    state.step, state.overflows_in_a_row = 7, 2  # counters that differ from each other
    path = state.save(tmp_path, tiny_scheduler(), MANIFEST)
    assert path.name == "step-7"
    restored = build()
    restored.restore(path)
    assert_equal(tensors_of(restored), tensors_of(state))
    assert counters_of(restored) == counters_of(state) == (7, 3, 2, 3)


def test_a_restored_state_goes_on_bit_for_bit(build, tiny_scheduler, tmp_path):
    whole = trained(build())
    path = whole.save(tmp_path, tiny_scheduler(), MANIFEST)
    trained(whole, 4)
    restored = trained(build(), 1)  # that it was trained on before must not matter
    restored.restore(path)
    trained(restored, 4)
    assert_equal(tensors_of(restored), tensors_of(whole))


@pytest.mark.parametrize("build", ["mlp"], indirect=True)
def test_saving_changes_nothing_in_the_state(build, tiny_scheduler, tmp_path):
    state = trained(build())
    before = tensors_of(state)
    state.save(tmp_path, tiny_scheduler(), MANIFEST)
    assert_equal(tensors_of(state), before)
    assert state.unet.training


@pytest.mark.parametrize("build", ["mlp"], indirect=True)
def test_a_restored_state_is_independent_of_the_files(build, tiny_scheduler, tmp_path):
    state = trained(build())
    path = state.save(tmp_path, tiny_scheduler(), MANIFEST)
    restored = build()
    restored.restore(path)
    trained(restored, 2)
    checkpoints.verify(path)


def test_what_is_saved_is_a_pipeline_with_the_averaged_weights(build, tiny_scheduler, tmp_path):
    state = trained(build())
    path = state.save(tmp_path, tiny_scheduler(variance_type="fixed_large"), MANIFEST)
    pipe = DDPMPaperPipeline.from_pretrained(path)
    loaded = list(pipe.unet.parameters())
    assert_equal([x.detach() for x in loaded], list(state.ema.shadow_params))
    assert not all(torch.equal(raw, x) for raw, x in zip(state.unet.parameters(), loaded, strict=True))
    assert type(pipe.unet) is type(state.unet) and pipe.scheduler.config["variance_type"] == "fixed_large"
    assert pipe(seeds=[0, 1], output_type="pt").images.shape[0] == 2


@pytest.mark.parametrize("build", ["mlp"], indirect=True)
def test_ema_weights_are_lent_and_given_back_also_after_an_error(build):
    state = trained(build())
    raw = [x.detach().clone() for x in state.unet.parameters()]
    with pytest.raises(RuntimeError, match="sampling failed"), state.ema_weights():
        assert_equal([x.detach() for x in state.unet.parameters()], list(state.ema.shadow_params))
        raise RuntimeError("sampling failed")
    assert_equal([x.detach() for x in state.unet.parameters()], raw)


@pytest.mark.parametrize("build", ["mlp"], indirect=True)
def test_the_first_ema_update_copies_and_the_decay_is_constant(build, tiny_scheduler, tmp_path):
    """As in the paper's code, and after a resumption too: no ramp."""
    state = build()
    weights = []
    for _ in range(4):
        update(state)
        weights.append([x.detach().clone() for x in state.unet.parameters()])
        expected = [x.double() for x in weights[0]]
        for later in weights[1:]:
            expected = [DECAY * e + (1 - DECAY) * x.double() for e, x in zip(expected, later, strict=True)]
        for shadow, e in zip(state.ema.shadow_params, expected, strict=True):
            torch.testing.assert_close(shadow.double(), e, rtol=0, atol=1e-6)
        path = state.save(tmp_path, tiny_scheduler(), MANIFEST)
        state = build()
        state.restore(path)


class Scaler:
    """Stands in for the float16 loss scaler, which works on GPUs only."""

    def __init__(self, scale: float):
        self.scale = scale

    def state_dict(self) -> dict:
        return {"scale": self.scale}

    def load_state_dict(self, state: dict) -> None:
        self.scale = state["scale"]


@pytest.mark.parametrize("build", ["mlp"], indirect=True)
def test_the_loss_scale_of_float16_is_kept(build, tiny_scheduler, tmp_path):
    state = trained(build())
    state.grad_scaler = Scaler(1024.0)
    path = state.save(tmp_path, tiny_scheduler(), MANIFEST)
    restored = build()
    restored.grad_scaler = Scaler(65536.0)
    restored.restore(path)
    assert restored.grad_scaler.scale == 1024.0


def importance(num_losses: int) -> LossHistory:
    """A history of four timesteps after so many losses at each."""
    history = LossHistory(4)
    for i in range(num_losses):
        history.update(torch.arange(4).numpy(), (1.1**i * torch.arange(1.0, 5.0, dtype=torch.float64)).numpy())
    return history


@pytest.mark.parametrize("build", ["mlp"], indirect=True)
def test_the_loss_history_is_kept_and_goes_on(build, tiny_scheduler, tmp_path):
    """With its place in the row of the last ten, past which it has gone once; and it is a copy."""
    state = trained(build())
    state.loss_history = importance(13)
    path = state.save(tmp_path, tiny_scheduler(), MANIFEST)
    assert checkpoints.has(path, "loss_history") and checkpoints.verify(path)
    restored = build()
    restored.loss_history = LossHistory(4)
    restored.restore(path)
    for history in (state.loss_history, restored.loss_history):
        history.update(torch.tensor([2, 0]).numpy(), torch.tensor([7.5, 8.5]).numpy())
    assert np.array_equal(restored.loss_history.losses, state.loss_history.losses)
    assert restored.loss_history.counts.tolist() == state.loss_history.counts.tolist() == [14, 13, 14, 13]
    checkpoints.verify(path)  # what went on is not the file


@pytest.mark.parametrize("build", ["mlp"], indirect=True)
@pytest.mark.parametrize("saved_with", [True, False])
def test_a_history_that_only_one_of_two_runs_has_is_fine(build, tiny_scheduler, tmp_path, saved_with):
    state = trained(build())
    state.loss_history = importance(10) if saved_with else None
    path = state.save(tmp_path, tiny_scheduler(), MANIFEST)
    assert checkpoints.has(path, "loss_history") == saved_with and not checkpoints.has(path, "history")
    restored = build()
    restored.loss_history = None if saved_with else LossHistory(4)
    restored.restore(path)
    assert_equal(tensors_of(restored), tensors_of(state))
    if restored.loss_history is not None:
        assert restored.loss_history.counts.sum() == 0
