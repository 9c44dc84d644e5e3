from .native import use_native_kernels as use_native_kernels
from .unet_ddpm_paper import (
    DDPMPaperMLP as DDPMPaperMLP,
    DDPMPaperUNet as DDPMPaperUNet,
    evaluation_mode as evaluation_mode,
)
