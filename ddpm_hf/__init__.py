"""ddpm_hf: the DDPM paper (Ho, Jain, Abbeel 2020) as Hugging Face classes, exact to the paper's own code."""

from .pipeline_ddpm_paper import DDPMPaperPipeline
from .scheduler.scheduling_ddpm_paper import DDPMPaperScheduler, GaussianDiffusion
from .unet.unet_ddpm_paper import DDPMPaperMLP, DDPMPaperUNet

__version__ = "0.1.0"
__all__ = ["DDPMPaperMLP", "DDPMPaperPipeline", "DDPMPaperScheduler", "DDPMPaperUNet", "GaussianDiffusion"]
