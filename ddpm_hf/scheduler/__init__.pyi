from .process import (
    alphas_cumprod_at as alphas_cumprod_at,
    distilled_steps as distilled_steps,
    paper_scheduler as paper_scheduler,
    timestep_at as timestep_at,
    whole_process as whole_process,
)
from .scheduling_ddpm_paper import (
    DDPMPaperScheduler as DDPMPaperScheduler,
    GaussianDiffusion as GaussianDiffusion,
    clipped as clipped,
)
