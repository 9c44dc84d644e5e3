from .cpu import FastUNet as FastUNet
from .gpu import GraphedUNet as GraphedUNet
from .pipelines import speed_up as speed_up
