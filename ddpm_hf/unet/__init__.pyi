from .unet_ddpm_paper import DDPMPaperMLP as DDPMPaperMLP, DDPMPaperUNet as DDPMPaperUNet
