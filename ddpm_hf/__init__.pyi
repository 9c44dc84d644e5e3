from .pipeline_loading import DDPMPaperPipeline as DDPMPaperPipeline
from .scheduler import DDPMPaperScheduler as DDPMPaperScheduler, GaussianDiffusion as GaussianDiffusion
from .unet import DDPMPaperMLP as DDPMPaperMLP, DDPMPaperUNet as DDPMPaperUNet

__version__: str
