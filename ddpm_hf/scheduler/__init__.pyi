from .process import (
    alphas_cumprod_at as alphas_cumprod_at,
    paper_scheduler as paper_scheduler,
    timestep_at as timestep_at,
)
from .scheduling_ddpm_paper import (
    DDPMPaperScheduler as DDPMPaperScheduler,
    GaussianDiffusion as GaussianDiffusion,
    clipped as clipped,
)
