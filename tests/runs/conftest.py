"""What tests of several files of a run use."""

import pytest
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from ddpm_hf.runs import RunLog


@pytest.fixture
def log(tmp_path):
    """A log of ten steps of four images in tmp_path."""
    log = RunLog(Accelerator(cpu=True), tmp_path, first_step=0, num_steps=10, global_batch_size=4)
    yield log
    log.close()
    AcceleratorState._reset_state(True)
