"""The paper's values, by the names of our options and configurations, and how a configuration differs from them.

They are those of its Appendix B, or of its code where the paper says nothing. tests/test_paper.py checks that the
training script's defaults and training/configs agree with them.
"""

from collections.abc import Mapping
from typing import Any

PAPER_PROCESS = {
    "num_train_timesteps": 1000,
    "beta_schedule": "linear",
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "trained_betas": None,
    "prediction_type": "epsilon",
    "objective": "simple",
    "warmup_steps": 5000,
    "max_grad_norm": 1.0,
    "ema_decay": 0.9999,
}
PAPER_IMAGES = {
    **PAPER_PROCESS,
    "clip_sample": True,
    "layers_per_block": 2,
    "attention_resolutions": [16],
    "norm_num_groups": 32,
}
PAPER_CIFAR10 = {
    **PAPER_IMAGES,
    "variance_type": "fixed_large",
    "block_out_channels": [128, 256, 256, 256],
    "dropout": 0.1,
    "random_flip": True,
    "learning_rate": 2e-4,
    "global_batch_size": 128,
    "num_steps": 800_000,
}
PAPER_256 = {  # the number of steps and the flips depend on the data set
    **PAPER_IMAGES,
    "variance_type": "fixed_small",
    "block_out_channels": [128, 128, 256, 256, 512, 512],
    "dropout": 0.0,
    "learning_rate": 2e-5,
    "global_batch_size": 64,
}


def compare_with_paper(
    config: Mapping[str, Any], *, is_points: bool = False
) -> tuple[str, list[tuple[str, Any, Any]]]:
    """Which of the paper's configurations this one is compared with, and (name, paper's value, value) that differ.

    Names that `config` (options and configurations together) lacks are not compared.
    """
    size = config.get("sample_size") or 0
    side = max(size) if isinstance(size, list | tuple) else size
    if is_points:
        paper, values = "the paper's diffusion process and optimization (it has no points)", PAPER_PROCESS
    elif side < 128:
        paper, values = "the paper's CIFAR-10 configuration", PAPER_CIFAR10
    else:
        paper, values = "the paper's configuration for 256×256 images", PAPER_256
    pairs = [(name, theirs, config[name]) for name, theirs in values.items() if name in config]
    return paper, [(name, theirs, ours) for name, theirs, ours in pairs if ours != theirs]
