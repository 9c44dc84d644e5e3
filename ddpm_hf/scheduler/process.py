"""Any scheduler of a DDPM → a scheduler of ours."""

from __future__ import annotations

from typing import Any

from .scheduling_ddpm_paper import DDPMPaperScheduler


def paper_scheduler(scheduler: Any) -> Any:
    """The scheduler itself where it has the paper's process; else (stock's) ours, built from its configuration.

    Raises ValueError for one that is not a DDPM's, and for stock's `learned` variance, which has another meaning here.
    """
    if hasattr(scheduler, "diffusion"):
        return scheduler
    name = type(scheduler).__name__
    if name not in DDPMPaperScheduler._compatibles:
        raise ValueError(f"{name} is not a scheduler of a DDPM: it must be one of {DDPMPaperScheduler._compatibles}")
    if scheduler.config.get("variance_type") == "learned":
        raise ValueError(f"variance_type='learned' of {name} is not a log-variance; it has no equivalent here")
    return DDPMPaperScheduler.from_config(scheduler.config)
