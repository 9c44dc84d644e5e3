from .autograd import Convolve as Convolve, Normalize as Normalize
from .build import library as library
from .ops import (
    convolve as convolve,
    has_kernels as has_kernels,
    normalize as normalize,
    takes_channels as takes_channels,
    winograd_filters as winograd_filters,
)
