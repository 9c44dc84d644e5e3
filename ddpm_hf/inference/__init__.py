"""Faster sampling: a pipeline's network, rewritten for inference on a CPU, or recorded for a GPU.

    pipe = speed_up(DDPMPaperPipeline.from_pretrained(...))         # or speed_up(pipe, torch.bfloat16)

On a GPU the network is a CUDA graph, which Python launches by one call. On a CPU the same weights give the same sums
in another order, so images agree with the plain pipeline's to rounding. There

- 3×3 convolutions take a quarter of the multiplications, and GroupNorm with SiLU one pass, by kernels of our own
  (`machine/native`) where there is a compiler and the number of channels is a multiple of 32;
- elsewhere oneDNN computes them, of wide feature maps with Winograd's F(4, 3) along each row, and a nearest-neighbour
  upsampling with its convolution as one 2×2 convolution of the small image;
- other convolutions and linear layers run in oneDNN, with weights that are laid out for it once;
- what depends on t alone, the time embedding and its projections, comes from a table, as part of a bias;
- queries, keys and values are one product, the kernels add residuals, SiLU works in place, memory is channels last;
- a batch is computed in parts that fit into the cache.

Which kernel computes a layer is decided by the layer's shape, never by a measurement, so results repeat. Where PyTorch
has no oneDNN, its plain kernels do the same. `benchmarks/run.py` compares all of this with stock diffusers.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
