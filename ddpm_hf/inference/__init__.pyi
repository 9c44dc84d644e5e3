from .cpu import FastUNet as FastUNet
from .gpu import GraphedUNet as GraphedUNet
from .pipelines import can_speed_up as can_speed_up, fastest_dtype as fastest_dtype, speed_up as speed_up
