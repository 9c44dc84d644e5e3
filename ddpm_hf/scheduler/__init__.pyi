from .process import paper_scheduler as paper_scheduler
from .scheduling_ddpm_paper import (
    DDPMPaperScheduler as DDPMPaperScheduler,
    GaussianDiffusion as GaussianDiffusion,
    clipped as clipped,
)
